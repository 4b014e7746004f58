"""Cross-entropy, distillation and margin ranking of an incremental step as one weighted sum (eq. 1), with its gradient.

`incremental_loss_grad` is the training form: on CUDA one launch gives the final gradient, to seed the backward pass
with, and adds the terms of the loss to a meter. `incremental_loss` is the autograd form: a scalar, at the price of one
reduction in the forward and one product in the backward pass.
"""

from typing import Any

import torch
from torch import Tensor

from fastil.kernels.registration import jitted, refuse_second_order, register, scalar_tensor
from fastil.losses import MASKED, hardest_new

WIDEST_COSINES = 2_048  # columns up to which the Triton form does logit_scale and margin ranking; above, the plain one


def incremental_loss(
    logits: Tensor,
    target: Tensor,
    log_prior: Tensor,
    teacher_logits: Tensor | None = None,
    *,
    num_old: int | Tensor,
    num_seen: int | Tensor,
    ce_weight: float | Tensor,
    kd_weight: float | Tensor,
    temperature: float | Tensor,
    sample_weight: Tensor | None = None,
    separated: bool = False,
    label_smoothing: float = 0.0,
    logit_scale: Tensor | None = None,
    margin_weight: float | Tensor | None = None,
    margin: float = 0.5,
    hardest: int = 2,
    meter: Tensor | None = None,
) -> Tensor:
    """ce_weight * cross-entropy + kd_weight * distillation (T^2 inside) + margin_weight * margin ranking, each the mean
    over the batch. Returns a float32 scalar.

    logits, teacher_logits: [B, W] in float32, bfloat16 or float16, computed in float32. target: int [B], incremental
    positions; -1 contributes no cross-entropy. log_prior: [W], -inf on classes without images; columns from num_seen on
    are ignored whatever it or they hold; a target among the columns that do not count is an infinite loss. Counts,
    weights and temperature are numbers or 0-d tensors on the device: a step then changes values, and neither shapes nor
    code.

    sample_weight: [B], factor of each row's cross-entropy. separated: a row competes with the classes of its own block
    only, old or new (SS-IL). label_smoothing: in [0, 1), spread over the classes a row competes with.
    logit_scale: 0-d; the input then holds cosines, of which cross-entropy and distillation see the scaled ones and
    margin ranking (`fastil.losses.margin_ranking`, over the `hardest` new classes) the plain ones, as in LUCIR. Both
    are one launch up to 2,048 columns and the plain formula beyond.
    meter: see `incremental_loss_grad`.

    Differentiable once, in logits and logit_scale: a second derivative or a forward-mode one raises RuntimeError.
    """
    arguments = checked(logits, target, log_prior, teacher_logits, sample_weight, label_smoothing)
    scalars = [scalar_tensor(v) for v in (num_old, num_seen, ce_weight, kd_weight, temperature)]
    weight = None if margin_weight is None else scalar_tensor(margin_weight)
    if logit_scale is not None and logit_scale.ndim:
        raise ValueError(f"logit_scale must be a 0-d tensor, not {[*logit_scale.shape]}")
    rows = None if meter is None else _rows(meter, logits.shape[0])
    loss: Tensor = _Value.apply(  # type: ignore[no-untyped-call]
        *arguments, *scalars, sample_weight, logit_scale, weight, separated, label_smoothing, margin, hardest, rows
    )
    _finish(meter, rows)
    return loss


def incremental_loss_grad(
    logits: Tensor,
    target: Tensor,
    log_prior: Tensor,
    teacher_logits: Tensor | None = None,
    *,
    num_old: int | Tensor,
    num_seen: int | Tensor,
    ce_weight: float | Tensor,
    kd_weight: float | Tensor,
    temperature: float | Tensor,
    meter: Tensor,
    sample_weight: Tensor | None = None,
    separated: bool = False,
    label_smoothing: float = 0.0,
) -> Tensor:
    """The gradient of `incremental_loss` in logits: `logits.backward(gradient)` is then the whole backward pass.

    meter: float32 [R, 4] with R >= B, or [4]. Row b gains the cross-entropy, the distillation, 1 for a hit (the target
    is the argmax of the raw logits over the num_seen columns) and the margin ranking of image b: sums to be read once
    per epoch. [R, 4] costs nothing, [4] three small launches. Nothing here waits for the device.

    Returns [B, W] in the dtype of logits. Differentiating it again raises RuntimeError; in compiled code it is a
    constant. float16 has no room for a gradient divided by B: multiply the weights by the loss scale, or use the
    autograd form, which keeps its gradient in float32 until it is scaled.
    """
    arguments = checked(logits, target, log_prior, teacher_logits, sample_weight, label_smoothing)
    scalars = [scalar_tensor(v) for v in (num_old, num_seen, ce_weight, kd_weight, temperature)]
    rows = _rows(meter, logits.shape[0])
    # Tracing a backward pass that raises would fail: in compiled code the gradient is a constant.
    run = _gradient if torch.compiler.is_compiling() else _Gradient.apply
    gradient: Tensor = run(*arguments, *scalars, sample_weight, None, None, separated, label_smoothing, 0.0, 0, rows)
    _finish(meter, rows)
    return gradient


def checked(
    logits: Tensor,
    target: Tensor,
    log_prior: Tensor,
    teacher: Tensor | None,
    weight: Tensor | None = None,
    smoothing: float = 0.0,
    second: str = "teacher_logits",
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The arguments, if they fit each other: a kernel would read beyond the end of one that does not."""
    if logits.ndim != 2 or not logits.is_floating_point():
        raise ValueError(f"logits must be floating-point [B, W], not {logits.dtype} {[*logits.shape]}")
    batch, width = logits.shape
    for name, tensor, shape in (
        ("target", target, (batch,)),
        ("log_prior", log_prior, (width,)),
        (second, teacher, (batch, width)),
        ("sample_weight", weight, (batch,)),
    ):
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} must be {[*shape]} beside logits {[batch, width]}, not {[*tensor.shape]}")
    if target.is_floating_point():
        raise ValueError(f"target must hold integers, not {target.dtype}")
    if not 0 <= smoothing < 1:
        raise ValueError(f"label_smoothing={smoothing}: must be in [0, 1)")
    return logits, target, log_prior, teacher


def _rows(meter: Tensor, batch: int) -> Tensor:
    """The meter itself, or rows to be summed into it."""
    fits = meter.shape == (4,) or (meter.ndim == 2 and meter.shape[1] == 4 and meter.shape[0] >= batch)
    if meter.dtype != torch.float32 or not fits or not meter.is_contiguous():
        raise ValueError(
            f"meter must be contiguous float32 [4] or [R, 4] with R >= {batch}, not {meter.dtype} {[*meter.shape]}"
        )
    return meter if meter.ndim == 2 else meter.new_zeros(batch, 4)


def _finish(meter: Tensor | None, rows: Tensor | None) -> None:
    if meter is not None and rows is not None and meter.ndim == 1:
        meter += rows.sum(0)


class _Value(torch.autograd.Function):
    """Arguments as those of the operator; differentiable in logits (0) and logit_scale (10)."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        gradient, scale_gradient, row_loss = torch.ops.fastil.incremental_loss(*arguments, True)
        ctx.save_for_backward(gradient, scale_gradient)
        ctx.arguments, ctx.has_scale, ctx.dtype = len(arguments), arguments[10] is not None, arguments[0].dtype
        loss: Tensor = row_loss.sum()
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        refuse_second_order("incremental_loss")
        gradient, scale_gradient = ctx.saved_tensors
        grads: list[Tensor | None] = [None] * ctx.arguments
        grads[0] = (gradient * grad).to(ctx.dtype)
        if ctx.has_scale:
            grads[10] = scale_gradient.sum() * grad
        return tuple(grads)


def _gradient(logits: Tensor, *arguments: Any) -> Tensor:
    gradient: Tensor = torch.ops.fastil.incremental_loss(logits.detach(), *arguments, False)[0]
    return gradient


class _Gradient(torch.autograd.Function):
    """An operator call that refuses to be differentiated, where plain detaching would be wrong in silence."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        return _gradient(*arguments)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        raise RuntimeError("incremental_loss_grad returns a gradient, which cannot be differentiated again")


def plain(
    logits: Tensor,
    target: Tensor,
    log_prior: Tensor,
    teacher: Tensor | None,
    num_old: Tensor,
    num_seen: Tensor,
    ce_weight: Tensor,
    kd_weight: Tensor,
    temperature: Tensor,
    sample_weight: Tensor | None,
    logit_scale: Tensor | None,
    margin_weight: Tensor | None,
    separated: bool,
    label_smoothing: float,
    margin: float,
    hardest: int,
    meter: Tensor | None,
    value: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator in plain torch, row by row what the formulas of fastil.losses average. Returns the gradient [B, W],
    each row's part of the derivative in logit_scale [B or 0] and of the loss [B or 0]."""
    batch, width = logits.shape
    x = logits.float()
    z = x if logit_scale is None else x * logit_scale
    column = torch.arange(width, device=logits.device)
    old, seen = column < num_old, column < num_seen
    valid, y = target >= 0, target.clamp(min=0).long()[:, None]
    competes = (seen & (log_prior > -torch.inf)).expand(batch, width)
    if separated:
        competes = competes & (old == (target < num_old)[:, None])
    log_q = torch.log_softmax(torch.where(competes, z + log_prior, MASKED), 1)
    aim = torch.zeros_like(x).scatter_(1, y, 1 - label_smoothing)
    # A target that does not compete, not seen or without images, has an infinite loss, as in the Triton form.
    ce = torch.where(competes.gather(1, y), -log_q.gather(1, y), torch.inf)[:, 0]
    if label_smoothing:
        share = label_smoothing / competes.sum(1, keepdim=True).clamp(min=1)
        aim += torch.where(competes, share, 0)
        ce = (1 - label_smoothing) * ce - (torch.where(competes, log_q, 0) * share).sum(1)
    weight = valid if sample_weight is None else valid * sample_weight
    ce = torch.where(valid, ce, 0) if sample_weight is None else torch.where(valid, ce, 0) * sample_weight
    gradient = torch.where(competes | (aim > 0), log_q.exp() - aim, 0) * (weight * (ce_weight / batch))[:, None]
    kd = torch.zeros_like(ce)
    if teacher is not None:
        log_p = torch.log_softmax(torch.where(old, z / temperature, MASKED), 1)
        # By the same functions as the student's, so that equal logits give a difference of exactly 0.
        p_teacher = torch.log_softmax(torch.where(old, teacher.float() / temperature, MASKED), 1).exp()
        kd = -(temperature**2) * torch.where(old, p_teacher * log_p, 0).sum(1)
        gradient += torch.where(old, log_p.exp() - p_teacher, 0) * (kd_weight * temperature / batch)
    scale_gradient = x.new_empty(0)
    if logit_scale is not None:
        scale_gradient = torch.where(seen, gradient * x, 0).sum(1)
        gradient = gradient * logit_scale
    ranking = torch.zeros_like(ce)
    if margin_weight is not None:
        excess, rival = hardest_new(x, target, num_old, num_seen, hardest, margin)
        ranking = excess.sum(1) / hardest
        step = (excess > 0) * (margin_weight / (hardest * batch))
        gradient.scatter_add_(1, rival, step).scatter_add_(1, y.expand_as(rival), -step)
    if meter is not None:
        best = torch.where(seen, x, -torch.inf).argmax(1)
        hit = (best == target) & x.gather(1, y)[:, 0].isfinite()
        meter[:batch] += torch.stack((ce, kd, hit.float(), ranking), 1)
    row_loss = x.new_empty(0)
    if value:
        row_loss = (ce_weight * ce + kd_weight * kd) / batch
        if margin_weight is not None:
            row_loss = row_loss + margin_weight * ranking / batch
    return gradient.to(gradient_dtype(logits, value)).contiguous(), scale_gradient, row_loss


def gradient_dtype(logits: Tensor, value: bool) -> torch.dtype:
    """Of the operator's gradient: that of logits, but where the autograd form has yet to scale it not float16, whose
    smallest numbers a gradient divided by B would fall below."""
    return torch.float32 if value and logits.dtype == torch.float16 else logits.dtype


def _fake(logits: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    batch, has_scale, value = logits.shape[0], arguments[9] is not None, arguments[-1]
    per_row = [logits.new_empty(batch if wanted else 0, dtype=torch.float32) for wanted in (has_scale, value)]
    return logits.new_empty(logits.shape, dtype=gradient_dtype(logits, value)), per_row[0], per_row[1]


def _cuda(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    cosines = arguments[10] is not None or arguments[11] is not None
    narrow = arguments[0].shape[1] <= WIDEST_COSINES
    run = jitted("incremental_loss", "incremental_loss") if narrow or not cosines else plain
    result: tuple[Tensor, Tensor, Tensor] = run(*arguments)
    return result


register(
    "incremental_loss(Tensor logits, Tensor target, Tensor log_prior, Tensor? teacher, Tensor num_old, Tensor num_seen,"
    " Tensor ce_weight, Tensor kd_weight, Tensor temperature, Tensor? sample_weight, Tensor? logit_scale,"
    " Tensor? margin_weight, bool separated, float label_smoothing, float margin, int hardest, Tensor(a!)? meter,"
    " bool value) -> (Tensor, Tensor, Tensor)",
    plain=plain,
    cuda=_cuda,
    fake=_fake,
)
