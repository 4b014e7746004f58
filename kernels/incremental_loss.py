"""Cross-entropy, distillation and margin ranking of an incremental step as one weighted sum (eq. 1), with its gradient.

`incremental_loss_grad` is the training form: on CUDA one launch gives the final gradient, which seeds the backward
pass, and adds the terms of the loss to a meter. `incremental_loss` is the autograd form: it returns a scalar, at the
price of one reduction in the forward pass and one product in the backward pass.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastil.kernels.registration import jitted, refuse_second_order, register, scalar_tensor
from fastil.losses import (
    MASKED,
    check_classes,
    check_integer,
    check_integers,
    check_scalar,
    differentiable_in,
    hardest_new,
    labels,
    wide,
)

WIDEST_COSINES = 2_048  # columns up to which the Triton form does logit_scale and margin ranking; else plain


class Operands(NamedTuple):
    """The arguments of the operator, in the order of its schema; `incremental_loss` explains them. A launch takes
    numbers or tensors; the operator takes 0-d tensors only.
    """

    logits: Tensor
    target: Tensor
    log_prior: Tensor
    teacher: Tensor | None
    num_old: int | Tensor
    num_seen: int | Tensor
    ce_weight: float | Tensor
    kd_weight: float | Tensor
    temperature: float | Tensor
    sample_weight: Tensor | None = None
    logit_scale: Tensor | None = None
    margin_weight: float | Tensor | None = None
    separated: bool = False
    label_smoothing: float = 0.0
    margin: float = 0.5
    hardest: int = 2
    meter: Tensor | None = None  # [R, 4] in the operator
    value: bool = False  # whether the loss is wanted too

    @property
    def gradient_dtype(self) -> torch.dtype:
        """The dtype of logits. It is float32 instead of float16 if the autograd form has yet to scale the gradient,
        which is divided by B and would be too small for float16.
        """
        return torch.float32 if self.value and self.logits.dtype == torch.float16 else self.logits.dtype


@differentiable_in("logits", "logit_scale")
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
    """Return ce_weight * cross-entropy (eq. 4) + kd_weight * distillation (eq. 2, with T^2) + margin_weight * margin
    ranking, a float32 scalar; each is the sum over the batch divided by B, rows without a class included.

    logits, teacher_logits: [B, W] in float32, bfloat16 or float16, computed in float32. target: int [B], incremental
    positions. A row labelled -1 or -100 adds no cross-entropy; any other label that is not one of the num_seen classes
    makes the loss and its row of the gradient NaN; a class without images is an infinite loss. log_prior: [W], -inf on
    classes without images; columns from num_seen on are ignored, whatever they hold. Counts, weights and temperature
    are numbers or 0-d tensors on the device, so that a step changes values, but no shapes or code.

    sample_weight: [B], factor of each row's cross-entropy. separated: a row competes only with the classes of its own
    block, old or new (SS-IL). label_smoothing: in [0, 1), spread over the classes a row competes with. logit_scale:
    0-d; `logits` are then cosines. Cross-entropy and distillation see them scaled, margin ranking
    (`fastil.losses.margin_ranking`, over the `hardest` new classes) as they are, as in LUCIR. Both are one launch up to
    2,048 columns, and the plain formula beyond. meter: see `incremental_loss_grad`.

    Differentiable once, in logits and logit_scale. Another argument that requires a gradient, a second derivative and a
    forward-mode one raise RuntimeError; the formulas of fastil.losses have them. Shapes that do not fit and impossible
    numbers (kd_weight without a teacher, num_old > num_seen, a temperature of 0) raise ValueError. The values of
    tensors are not read.
    """
    operands = Operands(
        logits, target, log_prior, teacher_logits, num_old, num_seen, ce_weight, kd_weight, temperature,
        sample_weight=sample_weight, logit_scale=logit_scale, margin_weight=margin_weight, separated=separated,
        label_smoothing=label_smoothing, margin=margin, hardest=hardest, meter=meter, value=True,
    )  # fmt: skip
    return _run(_Value.apply, operands)


@differentiable_in("logits")  # through `logits.backward(gradient)`
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
    """Return the gradient of `incremental_loss` in logits, [B, W] in their dtype: `logits.backward(gradient)` is then
    the whole backward pass.

    meter: float32 [R, 4] with R >= B, or [4]. Added to row b are image b's cross-entropy, its distillation, 1 for a hit
    (the target is the argmax of the raw logits over the num_seen columns) and its margin ranking: sums to be read once
    per epoch. [R, 4] costs nothing, [4] three small launches. Nothing here waits for the device.

    Differentiating it again raises RuntimeError; in compiled code it is a constant. float16 has no room for a gradient
    divided by B: multiply the weights by the loss scale, or use the autograd form, which keeps its gradient in float32
    until it is scaled.
    """
    operands = Operands(
        logits, target, log_prior, teacher_logits, num_old, num_seen, ce_weight, kd_weight, temperature,
        sample_weight=sample_weight, separated=separated, label_smoothing=label_smoothing, meter=meter,
    )  # fmt: skip
    # Tracing a backward pass that raises would fail: in compiled code the gradient is a constant.
    return _run(_gradient if torch.compiler.is_compiling() else _Gradient.apply, operands)


def check_loss_arguments(
    logits: Tensor,
    target: Tensor,
    log_prior: Tensor,
    teacher: Tensor | None,
    num_old: int | Tensor,
    num_seen: int | Tensor,
    weight: Tensor | None = None,
    smoothing: float = 0.0,
    second: str = "teacher_logits",
) -> None:
    """Raise ValueError unless the arguments fit each other; a kernel would read beyond the end of a short one."""
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
            raise ValueError(f"{name} must be {[*shape]} with logits {[batch, width]}, not {[*tensor.shape]}")
    check_integers(target)
    check_classes(num_old, num_seen, width)
    if not 0 <= smoothing < 1:
        raise ValueError(f"label_smoothing={smoothing}: must be in [0, 1)")


def _run(function: Callable[..., Any], o: Operands) -> Tensor:
    """Call `function` with the operands, checked and with tensors for numbers. A meter of [4] gets sums over rows."""
    check_loss_arguments(
        o.logits, o.target, o.log_prior, o.teacher, o.num_old, o.num_seen, o.sample_weight, o.label_smoothing
    )
    if o.logit_scale is not None and o.logit_scale.ndim:
        raise ValueError(f"logit_scale must be a 0-d tensor, not {[*o.logit_scale.shape]}")
    check_scalar("temperature", o.temperature, positive=True)
    for name in ("ce_weight", "kd_weight", "margin_weight"):
        if (value := getattr(o, name)) is not None:
            check_scalar(name, value)
    if o.teacher is None and not isinstance(o.kd_weight, Tensor) and o.kd_weight:
        raise ValueError(f"kd_weight={o.kd_weight}: there is no teacher to distil; give teacher_logits or kd_weight=0")
    if o.margin_weight is not None:
        check_scalar("margin", o.margin)
        check_integer("hardest", o.hardest, least=1)
    rows = None if o.meter is None else _rows(o.meter, o.logits.shape[0])
    tensors = o._replace(
        num_old=scalar_tensor(o.num_old),
        num_seen=scalar_tensor(o.num_seen),
        ce_weight=scalar_tensor(o.ce_weight),
        kd_weight=scalar_tensor(o.kd_weight),
        temperature=scalar_tensor(o.temperature),
        margin_weight=None if o.margin_weight is None else scalar_tensor(o.margin_weight),
        meter=rows,
    )
    result: Tensor = function(*tensors)
    if o.meter is not None and rows is not None and o.meter.ndim == 1:
        o.meter.add_(rows.sum(0))
    return result


def _rows(meter: Tensor, batch: int) -> Tensor:
    """Return the meter itself, or rows to be summed into it. Raises ValueError for a meter of another shape."""
    fits = meter.shape == (4,) or (meter.ndim == 2 and meter.shape[1] == 4 and meter.shape[0] >= batch)
    if meter.dtype != torch.float32 or not fits or not meter.is_contiguous():
        raise ValueError(
            f"meter must be contiguous float32 [4] or [R, 4] with R >= {batch}, not {meter.dtype} {[*meter.shape]}"
        )
    return meter if meter.ndim == 2 else meter.new_zeros(batch, 4)


class _Value(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *operands: Any) -> Tensor:
        o = Operands(*operands)
        gradient, scale_gradient, row_loss = torch.ops.fastil.incremental_loss(*o)
        ctx.save_for_backward(gradient, scale_gradient)
        ctx.dtype, ctx.has_scale = o.logits.dtype, o.logit_scale is not None
        loss: Tensor = row_loss.sum()
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        refuse_second_order("incremental_loss")
        gradient, scale_gradient = ctx.saved_tensors
        grads = {"logits": (gradient * grad).to(ctx.dtype)}
        if ctx.has_scale:
            grads["logit_scale"] = scale_gradient.sum() * grad
        return tuple(grads.get(name) for name in Operands._fields)


def _gradient(logits: Tensor, *rest: Any) -> Tensor:
    gradient: Tensor = torch.ops.fastil.incremental_loss(logits.detach(), *rest)[0]
    return gradient


class _Gradient(torch.autograd.Function):
    """The operator as a function that refuses to be differentiated: detaching the result would be silently wrong."""

    @staticmethod
    def forward(ctx: Any, *operands: Any) -> Tensor:
        return _gradient(*operands)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        raise RuntimeError("incremental_loss_grad returns a gradient, which cannot be differentiated again")


def plain(*operands: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return the operator in plain torch, row by row what the formulas of fastil.losses average: the gradient [B, W],
    each row's part of the derivative in logit_scale [B or 0], and each row's part of the loss [B or 0]."""
    o = Operands(*operands)
    batch, width = o.logits.shape
    x = wide(o.logits)
    z = x if o.logit_scale is None else x * o.logit_scale
    column = torch.arange(width, device=o.logits.device)
    old, seen = column < o.num_old, column < o.num_seen
    y, factor = labels(o.target, o.num_seen)
    y = y[:, None]
    # With !=, a NaN prior competes, and so shows in the loss.
    competes = (seen & (o.log_prior != -torch.inf)).expand(batch, width)
    if o.separated:
        competes = competes & (old == (y < o.num_old))
    log_q = torch.log_softmax(torch.where(competes, z + o.log_prior, -torch.inf), 1)
    aims = torch.zeros_like(x).scatter_(1, y, 1 - o.label_smoothing)
    ce = -log_q.gather(1, y)[:, 0]
    if o.label_smoothing:
        share = o.label_smoothing / competes.sum(1, keepdim=True).clamp(min=1)
        aims += torch.where(competes, share, 0)
        ce = (1 - o.label_smoothing) * ce - (torch.where(competes, log_q, 0) * share).sum(1)
    ce, weight = (ce * factor).masked_fill_(factor == 0, 0), factor.to(x.dtype)
    if o.sample_weight is not None:
        ce, weight = ce * o.sample_weight, factor * o.sample_weight
    gradient = (log_q.exp() - aims) * (weight * (o.ce_weight / batch))[:, None]
    kd = torch.zeros_like(ce)
    if o.teacher is not None:
        log_p = torch.log_softmax(torch.where(old, z / o.temperature, MASKED), 1)
        # The same functions as for the student, so the difference is exactly 0 at equal logits, and on new columns.
        p_teacher = torch.log_softmax(torch.where(old, wide(o.teacher) / o.temperature, MASKED), 1).exp()
        kd = -(o.temperature**2) * torch.where(old, p_teacher * log_p, 0).sum(1)
        gradient += (log_p.exp() - p_teacher) * (o.kd_weight * o.temperature / batch)
    scale_gradient = x.new_empty(0)
    if o.logit_scale is not None:
        scale_gradient = torch.where(seen, gradient * x, 0).sum(1)
        gradient = gradient * o.logit_scale
    ranking = torch.zeros_like(ce)
    if o.margin_weight is not None:
        excess, rival = hardest_new(x, o.target, o.num_old, o.num_seen, o.hardest, o.margin)
        ranking = excess.sum(1) / o.hardest
        step = (excess > 0).to(gradient.dtype) * (o.margin_weight / (o.hardest * batch))
        gradient.scatter_add_(1, rival, step).scatter_add_(1, y.expand_as(rival), -step)
    if o.meter is not None:
        best = torch.where(seen, x, -torch.inf).argmax(1)
        own = x.gather(1, y)[:, 0]
        hit = (best == o.target) & (own == own)  # not NaN
        o.meter[:batch] += torch.stack((ce, kd, hit.to(ce.dtype), ranking), 1)
    row_loss = x.new_empty(0)
    if o.value:
        row_loss = (o.ce_weight * ce + o.kd_weight * kd) / batch
        if o.margin_weight is not None:
            row_loss = row_loss + o.margin_weight * ranking / batch
    return gradient.to(o.gradient_dtype).contiguous(), scale_gradient, row_loss


def _fake(*operands: Any) -> tuple[Tensor, ...]:
    o = Operands(*operands)
    batch, has_scale = o.logits.shape[0], o.logit_scale is not None
    per_row = (o.logits.new_empty(batch if wanted else 0, dtype=torch.float32) for wanted in (has_scale, o.value))
    return o.logits.new_empty(o.logits.shape, dtype=o.gradient_dtype), *per_row


def _cuda(*operands: Any) -> tuple[Tensor, Tensor, Tensor]:
    o = Operands(*operands)
    cosines = o.logit_scale is not None or o.margin_weight is not None
    narrow = o.logits.shape[1] <= WIDEST_COSINES
    run = jitted("incremental_loss", "incremental_loss") if narrow or not cosines else plain
    result: tuple[Tensor, Tensor, Tensor] = run(*o)
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
