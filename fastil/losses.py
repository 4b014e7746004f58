"""Every loss as a plain formula in float32 (float64 stays): the meaning of the kernels, and the path taken on the CPU.

Shapes: B images, W columns. W is the padded width of the whole run; columns of classes not seen yet are masked with
`where`, so whatever they hold (NaN included) never reaches a result or a gradient. Every mean divides by B, the number
of rows. A row labelled -1 or -100 has no class: it adds 0 and still counts in B (nn.CrossEntropyLoss leaves it out of
both). Any other label outside of the classes makes the loss NaN, on a CPU as on a GPU, where raising would mean waiting
for the device. Impossible numbers, such as a temperature of 0, raise ValueError.

Equations are those of "Balanced Softmax Cross-Entropy for Incremental Learning" (arXiv 2103.12532). Where they stand:

    eq. 1, the weighted sum; rho    fastil/methods/il_baseline.py; fused: fastil/kernels/incremental_loss.py
    eq. 2, distillation             `distillation`
    eq. 3, Balanced Softmax         `balanced_cross_entropy` with `log_prior`
    eq. 4, its cross-entropy        `balanced_cross_entropy`
    eq. 5, alpha on old classes     `log_prior`
    Algorithm 1                     fastil/methods/meta.py
    section 4.3.1, memory size      fastil/memory.py, MemoryConfig
    section 4.3.2, alpha            fastil/methods/classification_loss.py, LossConfig
    section 4.3.3, Table 4          fastil/methods/classification_loss.py (rescaling, Separated Softmax), fastil/plan.py
                                    (oversampling), fastil/methods/corrections.py (balanced finetuning)
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

# A finite stand-in for -inf: exp(MASKED - max) is exactly 0 beside any real logit, and a row in which every column is
# masked (no old class yet) still has a finite logarithm, so that 0 * log p is 0 and not NaN.
MASKED = -1e30

SHORTEST = 1e-12  # length below which a vector is not normalised: what F.normalize takes


def _wide(x: Tensor) -> Tensor:
    """In float32, or float64 if that is what it is in."""
    return x if x.dtype == torch.float64 else x.float()


# What formulas and kernels ask of their arguments. Only what the host knows is checked: reading a tensor would mean
# waiting for its device.

FLOAT32 = torch.finfo(torch.float32)
P = ParamSpec("P")
R = TypeVar("R")


def differentiable_in(*names: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorator of a function whose result has a derivative in the arguments `names` only. It raises RuntimeError if
    another argument requires a gradient, as torch's own functions do, instead of leaving that one without. Under
    torch.no_grad() nobody gets one, and nothing is raised."""

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
    """Raise ValueError unless it is a 0-d tensor or a number that float32, in which all losses are computed, keeps
    finite, and above 0 if it must be positive."""
    if isinstance(value, Tensor):
        if value.ndim:
            raise ValueError(f"{name} must be a number or a 0-d tensor, not {[*value.shape]}")
    elif not (FLOAT32.tiny if positive else FLOAT32.min) <= value <= FLOAT32.max:
        raise ValueError(f"{name}={value}: must be finite{' and above 0' if positive else ''} in float32")


def check_integer(name: str, value: int, least: int = 0) -> None:
    """Raise ValueError unless it is an integer of at least `least`."""
    if value % 1 or value < least:
        raise ValueError(f"{name}={value}: must be an integer of at least {least}")


def check_classes(num_old: int | Tensor, num_seen: int | Tensor, width: int) -> None:
    """Raise ValueError unless they are numbers of classes, 0 <= num_old <= num_seen <= width, as far as they are
    numbers and no tensors."""
    for name, value in (("num_old", num_old), ("num_seen", num_seen)):
        check_scalar(name, value)
    old = 0 if isinstance(num_old, Tensor) else num_old
    seen = width if isinstance(num_seen, Tensor) else num_seen
    if old % 1 or seen % 1 or not 0 <= old <= seen <= width:
        raise ValueError(f"{num_old=}, {num_seen=}: must be numbers of classes, 0 <= num_old <= num_seen <= {width}")


def check_counts(counts: Tensor) -> None:
    """Raise ValueError unless they are the images of each class, [W]: none negative, infinite or NaN, not all 0. The
    values of a tensor that is on a device, or that only stands for one while code is traced, are not read."""
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
    if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        raise ValueError(f"target must hold integers, not {target.dtype}")


def labels(target: Tensor, num_classes: int | Tensor) -> tuple[Tensor, Tensor]:
    """The column of each row's class, and a factor of the row's term; nothing waits for the device.

    target: int [B]; num_classes: columns in which a class may lie. Returns int64 [B], 0 where there is none, and
    float32 [B]: 1; 0 for the labels -1 and -100 (torch's own), which say that the row has no class; NaN for any other
    label, which is a mistake.
    """
    check_integers(target)
    y = target.long()  # the smaller types have no -100, or wrap around to it
    inside = (y >= 0) & (y < num_classes)
    factor = inside.float().masked_fill_(~(inside | (y == -1) | (y == -100)), torch.nan)
    return y * inside, factor


# The formulas.


def log_prior(counts: Tensor, num_old: int | Tensor = 0, alpha: float | Tensor = 1.0) -> Tensor:
    """Logarithm of the class weights lambda of eq. 5, up to a constant that no softmax sees.

    counts: [W], training images per class of this step, 0 for a class not seen. num_old: classes of earlier steps.
    alpha: scalar or [W], the weight of the old classes; 1 gives eq. 3. Returns float32 [W]: log(n / max n), plus log
    alpha on old columns, -inf where n = 0. Equal counts and alpha = 1 give exactly 0, which is the plain softmax.

    Counts that are negative, infinite, NaN or all 0 raise ValueError on the CPU. On a GPU, where that would mean
    waiting, they give NaN, and so does the loss. An alpha that is a number must be above 0.
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
    """Balanced Softmax cross-entropy: the mean over the batch of -log q_y (eq. 4), where q = softmax(z + log lambda) is
    eq. 3, or eq. 5 with alpha in the prior.

    logits [B, W], target int64 [B] (-1 or -100: the row adds nothing; a class without images is an infinite loss),
    log_prior [W] as `log_prior` makes it. Returns a scalar.
    """
    seen = log_prior != -math.inf
    return _cross_entropy(torch.where(seen, _wide(logits) + log_prior, -math.inf), target, logits.shape[1])


def _cross_entropy(logits: Tensor, target: Tensor, num_classes: int | Tensor) -> Tensor:
    """The mean over the batch."""
    y, factor = labels(target, num_classes)
    total = F.cross_entropy(logits, y.masked_fill(factor != 1, -1), ignore_index=-1, reduction="sum")
    return total / logits.shape[0] * _nan_if_any(factor)


def _nan_if_any(factor: Tensor) -> Tensor:
    """NaN if a row's factor is NaN, else 1, which changes no bit."""
    return 1 + (0 * factor).sum()


@differentiable_in("logits", "temperature")
def distillation(logits: Tensor, teacher_logits: Tensor, num_old: int | Tensor, temperature: float | Tensor) -> Tensor:
    """Distillation over the old classes, eq. 2 with the mean over the batch: -T^2 sum_k p_teacher log p_student.

    logits, teacher_logits [B, W]; only the first num_old columns are read. num_old = 0 gives 0. A teacher that requires
    a gradient raises RuntimeError. Returns a scalar.
    """
    check_scalar("temperature", temperature, positive=True)
    check_classes(num_old, logits.shape[1], logits.shape[1])
    old = torch.arange(logits.shape[1], device=logits.device) < num_old
    student = torch.log_softmax(torch.where(old, _wide(logits) / temperature, MASKED), dim=1)
    teacher = torch.softmax(torch.where(old, _wide(teacher_logits) / temperature, MASKED), dim=1)
    terms = torch.where(old, teacher * student, 0.0)
    return -(temperature**2) * terms.sum() / logits.shape[0]


def separated_cross_entropy(logits: Tensor, target: Tensor, num_old: int | Tensor, num_seen: int | Tensor) -> Tensor:
    """Cross-entropy with one softmax over the old and one over the new classes (SS-IL, arXiv 2003.13947): a row
    competes with the classes of its target's block only. The mean over the batch.

    logits [B, W], target int64 [B] (-1 or -100: the row adds nothing). Returns a scalar.
    """
    check_classes(num_old, num_seen, logits.shape[1])
    column = torch.arange(logits.shape[1], device=logits.device)
    own_block = (column < num_old) == (target < num_old)[:, None]
    separated = torch.where(own_block & (column < num_seen), _wide(logits), MASKED)
    return _cross_entropy(separated, target, num_seen)


def hardest_new(
    cosines: Tensor, target: Tensor, num_old: int | Tensor, num_seen: int | Tensor, k: int, margin: float
) -> tuple[Tensor, Tensor]:
    """Of the k new classes with the highest cosine: how far each comes within the margin of the target's, at least 0,
    and 0 where the target is not old or there is no such class; and its column. Both [B, k]."""
    column = torch.arange(cosines.shape[1], device=cosines.device)
    new = (column >= num_old) & (column < num_seen)
    highest, rival = torch.where(new, _wide(cosines), -torch.inf).topk(min(k, cosines.shape[1]), dim=1)
    y, factor = labels(target, num_seen)
    own = _wide(cosines).gather(1, y[:, None])
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
    """LUCIR's margin ranking (eq. 8): rows of old classes keep their target's cosine a margin above the k highest of
    the new classes; the mean over k and over the batch (the released code divides by the rows of old classes instead).

    cosines [B, W], not scaled; target int64 [B] (-1 or -100: the row adds nothing). Returns a scalar.
    """
    check_classes(num_old, num_seen, cosines.shape[1])
    check_integer("k", k, least=1)
    check_scalar("margin", margin)
    excess = hardest_new(cosines, target, num_old, num_seen, k, margin)[0]
    return excess.sum() / (k * cosines.shape[0]) * _nan_if_any(labels(target, num_seen)[1])


@differentiable_in("features")
def less_forget(features: Tensor, teacher_features: Tensor) -> Tensor:
    """LUCIR's less-forget constraint (Hou et al., CVPR 2019): the mean over the batch of 1 - cos(features, teacher's).

    features, teacher_features: [B, d], not normalised. A teacher that requires a gradient raises RuntimeError. A vector
    shorter than 1e-12 has no direction: its row counts 1 and has no gradient. Returns a scalar.
    """
    student, teacher = _unit(_wide(features)), _unit(_wide(teacher_features))
    # 1 - cos of unit vectors is half their squared distance, which does not cancel where they are nearly equal.
    half_squared = (student - teacher).square().sum(1) / 2
    return torch.where(student.any(1) & teacher.any(1), half_squared, 1.0).mean()


def _unit(x: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return x / norm.masked_fill(norm < SHORTEST, math.inf)


def pod_flat(features: Tensor, teacher_features: Tensor) -> Tensor:
    """PODNet's flat distillation (arXiv 2004.13513) as the released code computes it: 1 - cos, as `less_forget`."""
    return less_forget(features, teacher_features)


@differentiable_in("maps")
def pod_spatial(maps: Sequence[Tensor], teacher_maps: Sequence[Tensor]) -> Tensor:
    """PODNet's spatial distillation (arXiv 2004.13513) as the released code computes it: the squares of a map, summed
    over its width and over its height, are concatenated and L2-normalised; the Euclidean distance to the teacher's, not
    squared, the mean over the batch and over the layers.

    maps, teacher_maps: for each layer [B, C, H, W]. A teacher that requires a gradient raises RuntimeError. Returns a
    scalar.
    """

    def pooled(x: Tensor) -> Tensor:
        energy = _wide(x).square()
        return F.normalize(torch.cat((energy.sum(3), energy.sum(2)), 2).flatten(1), eps=SHORTEST)

    distances = [
        torch.linalg.vector_norm(pooled(student) - pooled(teacher), dim=1).mean()
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
    """PODNet's classification loss (arXiv 2004.13513, eq. 8) over similarities y; the mean over the batch.

    paper: max(0, -log(exp(scale (y_t - margin)) / sum_{j != t} exp(scale y_j))). released: what the released code comes
    to, which takes the margin from every class and then the largest similarity m from all, so that the margin cancels,
    sets the target's term in the sum to exp(0) instead of leaving it out, and has the hinge off: (m - s_t) +
    log(1 + sum_{j != t} exp(s_j - m)) with s = scale y. That is the softmax cross-entropy where the target is the
    largest, and slightly more elsewhere; published numbers of PODNet are made with it.

    similarities [B, W], target int64 [B] (-1 or -100: the row adds nothing). Returns a scalar.
    """
    check_classes(0, num_seen, similarities.shape[1])
    check_scalar("scale", scale)
    check_scalar("margin", margin)
    column = torch.arange(similarities.shape[1], device=similarities.device)
    y, factor = labels(target, num_seen)
    own = y[:, None]
    s = torch.where(column < num_seen, scale * _wide(similarities), MASKED)
    s_own = s.gather(1, own)[:, 0]
    others = s.scatter(1, own, MASKED)
    if variant == "paper":
        losses = (others.logsumexp(1) - (s_own - scale * margin)).clamp(min=0)
    else:
        largest = s.amax(1)
        # The released code differentiates through the maximum as well.
        losses = largest - s_own + torch.log1p((others - largest[:, None]).exp().sum(1))
    return torch.where(factor == 0, 0.0, factor * losses).mean()


@differentiable_in("logits")
def icarl_cross_entropy(
    logits: Tensor,
    target: Tensor,
    teacher_logits: Tensor | None,
    num_old: int | Tensor,
    num_seen: int | Tensor,
    num_outputs: int,
) -> Tensor:
    """iCaRL's loss as published in 2017 (Algorithm 3): binary cross-entropy of each class's sigmoid, whose aim is the
    label on new classes and the teacher's sigmoid on old ones, for exemplars as well.

    The mean over the batch and over num_outputs: the released code divides by all classes of the run. (It also trains
    the outputs of classes not seen yet towards 0; here they do not exist yet.) logits, teacher_logits [B, W], target
    int64 [B] (-1 or -100: the row has the teacher's aims only). A teacher that requires a gradient raises RuntimeError.
    Returns a scalar.
    """
    check_classes(num_old, num_seen, logits.shape[1])
    check_integer("num_outputs", num_outputs, least=1)
    column = torch.arange(logits.shape[1], device=logits.device)
    old, seen = column < num_old, column < num_seen
    y, factor = labels(target, num_seen)
    aim, factor = (column == y[:, None]).to(_wide(logits).dtype), factor[:, None]
    if teacher_logits is not None:
        aim = torch.where(old, torch.sigmoid(_wide(teacher_logits)), aim)
        factor = torch.where(old, 1.0, factor)
    z = torch.where(seen, _wide(logits), 0.0)
    terms = F.binary_cross_entropy_with_logits(z, torch.where(seen, aim, 0.0), reduction="none")
    return torch.where(seen & (factor != 0), factor * terms, 0.0).sum() / (logits.shape[0] * num_outputs)


@differentiable_in("similarities")
def topology(similarities: Tensor, teacher_similarities: Tensor, edges: Tensor) -> Tensor:
    """1 minus Pearson's correlation, over the edges of a graph, of their weights with those that the teacher has: the
    topology-preserving loss of TPCIL (Tao et al., ECCV 2020), as far as it is known.

    similarities, teacher_similarities: float [B, V], of images and vertices; edges: bool [B, V], which of them count.
    A teacher that requires a gradient raises RuntimeError. Without at least two edges that differ, 0. Returns a scalar.
    """
    student, teacher = _wide(similarities), _wide(teacher_similarities)
    weight = edges.to(student.dtype)
    count = weight.sum().clamp(min=1)

    def centred(values: Tensor) -> Tensor:
        values = torch.where(edges, values, 0.0)
        return weight * (values - values.sum() / count)

    x, y = centred(student), centred(teacher)
    both = x.square().sum() * y.square().sum()
    some = both > SHORTEST
    correlation = (x * y).sum() / torch.where(some, both, 1.0).sqrt()
    return torch.where(some, 1 - correlation, 0.0)
