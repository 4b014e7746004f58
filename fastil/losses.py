"""Every loss as a plain formula in float32 (float64 stays): what the kernels compute, and what runs on the CPU.

Shapes: B images, W columns. W is the padded width of the whole run; columns of classes not seen yet are masked with
`where`, so their values (NaN included) never reach a result or a gradient. Every mean divides by B, the number of rows.
A row labelled -1 or -100 has no class: it adds 0 and still counts in B (nn.CrossEntropyLoss leaves it out of both). Any
other label that is not a class makes the loss NaN on every device, because raising would mean waiting for a GPU.
Impossible numbers, such as a temperature of 0, raise ValueError.

Equations are those of "Balanced Softmax Cross-Entropy for Incremental Learning" (arXiv 2103.12532). Where to find them:

    eq. 1, the weighted sum         fastil/methods/il_baseline.py; fused: fastil/kernels/incremental_loss.py
    rho of eq. 1                    fastil/methods/context.py, StepContext.rho
    eq. 2, distillation             `distillation`
    eq. 3, Balanced Softmax         `balanced_cross_entropy` with `log_prior`
    eq. 4, its cross-entropy        `balanced_cross_entropy`
    eq. 5, alpha on old classes     `log_prior`
    Algorithm 1                     fastil/methods/meta.py
    section 4.1.2, NME              fastil/nearest_mean.py
    section 4.1.3, milestones       fastil/optimiser.py, TrainConfig
    section 4.1.3, held-out B_t     fastil/memory.py, hold_out; which images: fastil/training/training_set.py
    section 4.3.1, memory size      fastil/memory.py, MemoryConfig
    section 4.3.2, alpha            fastil/methods/classification_loss.py, LossConfig
    section 4.3.3, Table 4          fastil/methods/classification_loss.py (rescaling, Separated Softmax), fastil/plan.py
                                    (oversampling), fastil/methods/corrections.py (balanced finetuning)
    herding                         fastil/memory.py, herd; its loop: fastil/kernels/herd.py
    imprinting (LUCIR, PODNet)      open_classes in their files; fastil/models/heads.py, CosineHead.imprint
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

# A finite stand-in for -inf: exp(MASKED - max) is exactly 0 if the row has any real logit, and a row in which every
# column is masked (no old class yet) still has a finite logarithm, so that 0 * log p is 0 and not NaN.
MASKED = -1e30

SHORTEST = 1e-12  # length below which a vector is not normalised: the eps of F.normalize


def wide(x: Tensor) -> Tensor:
    """Return x in float32; float64 stays float64."""
    return x if x.dtype == torch.float64 else x.float()


# Checks of arguments, for formulas and kernels. Only what the host knows is checked: reading a tensor would mean
# waiting for its device.

FLOAT32 = torch.finfo(torch.float32)
P = ParamSpec("P")
R = TypeVar("R")


def differentiable_in(*names: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Return a decorator for a function whose result has a derivative in the arguments `names` only.

    It raises RuntimeError if another argument requires a gradient, as torch's own functions do, because that one would
    silently get none. Under torch.no_grad() no argument gets one, and nothing is raised.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        code = function.__code__
        order = code.co_varnames[: code.co_argcount]
        title = function.__qualname__.removesuffix(".__init__")

        @functools.wraps(function)
        def checked(*args: P.args, **keys: P.kwargs) -> R:
            if torch.is_grad_enabled():
                for name, value in (*zip(order, args, strict=False), *keys.items()):
                    if _requires_gradient(value) and name not in names:
                        raise RuntimeError(
                            f"{title} has no derivative in {name}, which requires a gradient: detach it or compute it "
                            "under torch.no_grad()"
                        )
            return function(*args, **keys)

        return checked

    return decorate


def _requires_gradient(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.requires_grad
    return isinstance(value, (list, tuple)) and any(map(_requires_gradient, value))


def check_scalar(name: str, value: float | Tensor, *, positive: bool = False) -> None:
    """Raise ValueError unless the value is a 0-d tensor or a number that is finite in float32, the type of all losses,
    and above 0 if it must be positive.
    """
    if isinstance(value, Tensor):
        if value.ndim:
            raise ValueError(f"{name} must be a number or a 0-d tensor, not {[*value.shape]}")
    elif not (FLOAT32.tiny if positive else FLOAT32.min) <= value <= FLOAT32.max:
        raise ValueError(f"{name}={value}: must be finite{' and above 0' if positive else ''} in float32")


def check_integer(name: str, value: int, least: int = 0) -> None:
    """Raise ValueError unless the value is an integer of at least `least`."""
    if value % 1 or value < least:
        raise ValueError(f"{name}={value}: must be an integer of at least {least}")


def check_classes(num_old: int | Tensor, num_seen: int | Tensor, width: int) -> None:
    """Raise ValueError unless 0 <= num_old <= num_seen <= width, all integers. The values of tensors are not read."""
    for name, value in (("num_old", num_old), ("num_seen", num_seen)):
        check_scalar(name, value)
    old = 0 if isinstance(num_old, Tensor) else num_old
    seen = width if isinstance(num_seen, Tensor) else num_seen
    if old % 1 or seen % 1 or not 0 <= old <= seen <= width:
        raise ValueError(f"{num_old=}, {num_seen=}: must be numbers of classes, 0 <= num_old <= num_seen <= {width}")


def check_counts(counts: Tensor) -> None:
    """Raise ValueError unless the counts are [W], the images of each class: none negative, infinite or NaN, and not all
    0. The values are not read if the tensor is on a device or a stand-in while code is traced.
    """
    if counts.ndim != 1 or counts.dtype == torch.bool or counts.is_complex():
        raise ValueError(f"counts must be [W], numbers of images of each class, not {counts.dtype} {[*counts.shape]}")
    real = type(counts) in (Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling()
    if counts.device.type != "cpu" or not real:
        return
    values = counts.tolist()
    for position, value in enumerate(values):
        if not 0 <= value < math.inf:
            raise ValueError(f"counts[{position}]={value}: a number of images is finite and not below 0")
    if not any(values):
        raise ValueError(f"counts={values}: at least one class must have images")


def check_integers(target: Tensor) -> None:
    """Raise ValueError unless the target has an integer dtype."""
    if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        raise ValueError(f"target must hold integers, not {target.dtype}")


def labels(target: Tensor, num_classes: int | Tensor) -> tuple[Tensor, Tensor]:
    """Return the column of each row's class, int64 [B], and a factor for the row's term, float32 [B].

    target: int [B]. num_classes: how many of the first columns are classes. The factor is 1 for a class, 0 for the
    labels -1 and -100 (torch's own: the row has no class), and NaN for any other label, which is a mistake. The column
    is 0 where there is no class. Nothing waits for the device.
    """
    check_integers(target)
    y = target.long()  # smaller types cannot hold -100, or wrap around to it
    inside = (y >= 0) & (y < num_classes)
    factor = inside.float().masked_fill_(~(inside | (y == -1) | (y == -100)), torch.nan)
    return y * inside, factor


# The formulas.


def log_prior(counts: Tensor, num_old: int | Tensor = 0, alpha: float | Tensor = 1.0) -> Tensor:
    """Return the logarithm of the class weights lambda of eq. 5, up to a constant, which no softmax notices: float32
    [W].

    counts: [W], training images per class of this step, 0 for a class not seen. num_old: classes of earlier steps.
    alpha: scalar or [W], the weight of the old classes; 1 gives eq. 3. The result is log(n / max n), plus log alpha on
    old columns, -inf where n = 0. Equal counts and alpha = 1 give exactly 0, which is the plain softmax.

    Counts that are negative, infinite, NaN or all 0 raise ValueError on the CPU. On a GPU, where reading them would
    mean waiting, they give NaN, and so does the loss. An alpha that is a number must be above 0.
    """
    check_counts(counts)
    check_classes(num_old, len(counts), len(counts))
    if not isinstance(alpha, Tensor):
        check_scalar("alpha", alpha, positive=True)
    counts = counts.to(torch.float32)
    prior = torch.log(counts / counts.max())
    is_old = torch.arange(counts.numel(), device=counts.device) < num_old
    log_alpha = torch.log(torch.as_tensor(alpha, dtype=torch.float32, device=counts.device))
    return torch.where(is_old & (counts > 0), prior + log_alpha, prior)


def balanced_cross_entropy(logits: Tensor, target: Tensor, log_prior: Tensor) -> Tensor:
    """Return the Balanced Softmax cross-entropy, 0-d: the mean over the batch of -log q_y (eq. 4), where q =
    softmax(z + log lambda) is eq. 3, or eq. 5 with alpha in the prior.

    logits [B, W], target int64 [B] (-1 or -100: the row adds nothing; a class without images is an infinite loss),
    log_prior [W] as `log_prior` makes it.
    """
    seen = log_prior != -math.inf
    return _cross_entropy(torch.where(seen, wide(logits) + log_prior, -math.inf), target, logits.shape[1])


def _cross_entropy(logits: Tensor, target: Tensor, num_classes: int | Tensor) -> Tensor:
    """Return the mean over the batch, 0-d."""
    y, factor = labels(target, num_classes)
    total = F.cross_entropy(logits, y.masked_fill(factor != 1, -1), ignore_index=-1, reduction="sum")
    return total / max(1, logits.shape[0]) * _nan_if_any(factor)


def _nan_if_any(factor: Tensor) -> Tensor:
    """Return NaN if a row's factor is NaN, else 1, which changes no bit of what it multiplies."""
    return 1 + (0 * factor).sum()


@differentiable_in("logits", "temperature")
def distillation(logits: Tensor, teacher_logits: Tensor, num_old: int | Tensor, temperature: float | Tensor) -> Tensor:
    """Return the distillation loss over the old classes, 0-d: eq. 2 with the mean over the batch,
    -T^2 sum_k p_teacher log p_student.

    logits, teacher_logits [B, W]; only the first num_old columns are read. num_old = 0 gives 0. A teacher that requires
    a gradient raises RuntimeError.
    """
    check_scalar("temperature", temperature, positive=True)
    check_classes(num_old, logits.shape[1], logits.shape[1])
    old = torch.arange(logits.shape[1], device=logits.device) < num_old
    student = torch.log_softmax(torch.where(old, wide(logits) / temperature, MASKED), dim=1)
    teacher = torch.softmax(torch.where(old, wide(teacher_logits) / temperature, MASKED), dim=1)
    terms = torch.where(old, teacher * student, 0.0)
    return -(temperature**2) * terms.sum() / max(1, logits.shape[0])


def separated_cross_entropy(logits: Tensor, target: Tensor, num_old: int | Tensor, num_seen: int | Tensor) -> Tensor:
    """Return the cross-entropy of the Separated Softmax (SS-IL, arXiv 2003.13947; section 4.3.3), 0-d: the mean over
    the batch. There is one softmax over the old classes and one over the new; a row is in that of its target.

    logits [B, W], target int64 [B] (-1 or -100: the row adds nothing).
    """
    check_classes(num_old, num_seen, logits.shape[1])
    column = torch.arange(logits.shape[1], device=logits.device)
    own_block = (column < num_old) == (target < num_old)[:, None]
    separated = torch.where(own_block & (column < num_seen), wide(logits), MASKED)
    return _cross_entropy(separated, target, num_seen)


def hardest_new(
    cosines: Tensor, target: Tensor, num_old: int | Tensor, num_seen: int | Tensor, k: int, margin: float
) -> tuple[Tensor, Tensor]:
    """Return two [B, k] tensors: how far each of the k new classes with the highest cosine comes within the margin of
    the target's (at least 0), and its column. The first is 0 if the target is not old or there is no such class.
    """
    column = torch.arange(cosines.shape[1], device=cosines.device)
    new = (column >= num_old) & (column < num_seen)
    highest, rival = torch.where(new, wide(cosines), -torch.inf).topk(min(k, cosines.shape[1]), dim=1)
    y, factor = labels(target, num_seen)
    own = wide(cosines).gather(1, y[:, None])
    old = ((factor == 1) & (y < num_old))[:, None] & (highest > -torch.inf)
    return torch.where(old, margin - own + highest, 0.0).clamp(min=0), rival


def margin_ranking(
    cosines: Tensor,
    target: Tensor,
    num_old: int | Tensor,
    num_seen: int | Tensor,
    k: int = 2,
    margin: float = 0.5,
) -> Tensor:
    """Return LUCIR's margin ranking loss (its eq. 8), 0-d. In rows of old classes it keeps the target's cosine a margin
    above the k highest of the new classes. It is the mean over k and over the batch (the released code divides by the
    rows of old classes instead).

    cosines [B, W], not scaled; target int64 [B] (-1 or -100: the row adds nothing).
    """
    check_classes(num_old, num_seen, cosines.shape[1])
    check_integer("k", k, least=1)
    check_scalar("margin", margin)
    excess = hardest_new(cosines, target, num_old, num_seen, k, margin)[0]
    return excess.sum() / (k * max(1, cosines.shape[0])) * _nan_if_any(labels(target, num_seen)[1])


@differentiable_in("features")
def less_forget(features: Tensor, teacher_features: Tensor) -> Tensor:
    """Return LUCIR's less-forget constraint (Hou et al., CVPR 2019), 0-d: the mean over the batch of 1 - cos(features,
    teacher's).

    features, teacher_features: [B, d], not normalised. A teacher that requires a gradient raises RuntimeError. A vector
    shorter than 1e-12 has no direction, so its row counts 1 and has no gradient.
    """
    student, teacher = _unit(wide(features)), _unit(wide(teacher_features))
    # 1 - cos of unit vectors is half their squared distance, which does not cancel where they are nearly equal.
    half_squared = (student - teacher).square().sum(1) / 2
    return torch.where(student.any(1) & teacher.any(1), half_squared, 1.0).sum() / max(1, len(student))


def _unit(x: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return x / norm.masked_fill(norm < SHORTEST, math.inf)


def pod_flat(features: Tensor, teacher_features: Tensor) -> Tensor:
    """Return PODNet's flat distillation (arXiv 2004.13513) as the released code computes it, 0-d: `less_forget`."""
    return less_forget(features, teacher_features)


@differentiable_in("maps")
def pod_spatial(maps: Sequence[Tensor], teacher_maps: Sequence[Tensor]) -> Tensor:
    """Return PODNet's spatial distillation (arXiv 2004.13513) as the released code computes it, 0-d. The squares of a
    map are summed over its width and over its height, concatenated and L2-normalised. The loss is the Euclidean
    distance to the teacher's vector, not squared, averaged over the batch and the layers.

    maps, teacher_maps: for each layer [B, C, H, W]. A teacher that requires a gradient raises RuntimeError.
    """

    def pooled(x: Tensor) -> Tensor:
        energy = wide(x).square()
        return F.normalize(torch.cat((energy.sum(3), energy.sum(2)), 2).flatten(1), eps=SHORTEST)

    distances = [
        torch.linalg.vector_norm(pooled(student) - pooled(teacher), dim=1).sum() / max(1, len(student))
        for student, teacher in zip(maps, teacher_maps, strict=True)
    ]
    return torch.stack(distances).mean()


def nca(
    similarities: Tensor,
    target: Tensor,
    num_seen: int | Tensor,
    scale: float | Tensor,
    margin: float = 0.6,
    variant: Literal["released", "paper"] = "released",
) -> Tensor:
    """Return PODNet's classification loss (arXiv 2004.13513, its eq. 8) over similarities y, 0-d, the mean over the
    batch.

    paper: max(0, -log(exp(scale (y_t - margin)) / sum_{j != t} exp(scale y_j))). released: what the released code
    computes. It subtracts the margin from every class and then the largest similarity m from all, so the margin
    cancels; it sets the target's term in the sum to exp(0) instead of leaving it out; and its hinge is off. With s =
    scale y this gives (m - s_t) + log(1 + sum_{j != t} exp(s_j - m)): the softmax cross-entropy where the target is the
    largest, and slightly more elsewhere. PODNet's published numbers come from it.

    similarities [B, W], target int64 [B] (-1 or -100: the row adds nothing).
    """
    check_classes(0, num_seen, similarities.shape[1])
    check_scalar("scale", scale)
    check_scalar("margin", margin)
    column = torch.arange(similarities.shape[1], device=similarities.device)
    y, factor = labels(target, num_seen)
    own = y[:, None]
    s = torch.where(column < num_seen, scale * wide(similarities), MASKED)
    s_own = s.gather(1, own)[:, 0]
    others = s.scatter(1, own, MASKED)
    if variant == "paper":
        losses = (others.logsumexp(1) - (s_own - scale * margin)).clamp(min=0)
    else:
        largest = s.amax(1)
        # The released code differentiates through the maximum as well.
        losses = largest - s_own + torch.log1p((others - largest[:, None]).exp().sum(1))
    return torch.where(factor == 0, 0.0, factor * losses).sum() / max(1, len(losses))


@differentiable_in("logits")
def icarl_cross_entropy(
    logits: Tensor,
    target: Tensor,
    teacher_logits: Tensor | None,
    num_old: int | Tensor,
    num_seen: int | Tensor,
    num_outputs: int,
) -> Tensor:
    """Return iCaRL's loss as published in 2017 (its Algorithm 3), 0-d: binary cross-entropy of each class's sigmoid.
    The target is the label on new classes and the teacher's sigmoid on old ones, for exemplars too.

    It is the mean over the batch and over num_outputs, because the released code divides by all classes of the run.
    (That code also trains the outputs of classes not seen yet towards 0; here they do not exist yet.) logits,
    teacher_logits [B, W], target int64 [B] (-1 or -100: the row has only the teacher's targets). A teacher that
    requires a gradient raises RuntimeError.
    """
    check_classes(num_old, num_seen, logits.shape[1])
    check_integer("num_outputs", num_outputs, least=1)
    column = torch.arange(logits.shape[1], device=logits.device)
    old, seen = column < num_old, column < num_seen
    y, factor = labels(target, num_seen)
    aims, factor = (column == y[:, None]).to(wide(logits).dtype), factor[:, None]
    if teacher_logits is not None:
        aims = torch.where(old, torch.sigmoid(wide(teacher_logits)), aims)
        factor = torch.where(old, 1.0, factor)
    z = torch.where(seen, wide(logits), 0.0)
    terms = F.binary_cross_entropy_with_logits(z, torch.where(seen, aims, 0.0), reduction="none")
    return torch.where(seen & (factor != 0), factor * terms, 0.0).sum() / (max(1, logits.shape[0]) * num_outputs)


@differentiable_in("similarities")
def topology(
    similarities: Tensor, teacher_similarities: Tensor, edges: Tensor, total: Callable[[Tensor], Tensor] = torch.sum
) -> Tensor:
    """Return the topology-preserving loss of TPCIL (Tao et al., ECCV 2020), as far as it is known, 0-d: 1 minus
    Pearson's correlation, over the edges of a graph, of the student's edge weights with the teacher's.

    similarities, teacher_similarities: float [B, V], of images and vertices; edges: bool [B, V], which of them count.
    total: sums a tensor, over all processes if several share a batch. A teacher that requires a gradient raises
    RuntimeError. The loss is 0 without two edges that differ.
    """
    student, teacher = wide(similarities), wide(teacher_similarities)
    weight = edges.to(student.dtype)
    count = total(weight).clamp(min=1)

    def centred(values: Tensor) -> Tensor:
        values = torch.where(edges, values, 0.0)
        return weight * (values - total(values) / count)

    x, y = centred(student), centred(teacher)
    both = total(x.square()) * total(y.square())
    some = both > SHORTEST
    correlation = total(x * y) / torch.where(some, both, 1.0).sqrt()
    return torch.where(some, 1 - correlation, 0.0)
