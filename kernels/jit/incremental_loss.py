"""Balanced Softmax cross-entropy, distillation, margin ranking and their gradient, one row of logits per pass.

It takes one launch, no atomics, and for rows of up to 8,192 columns no second read. With z the logits (scale * x where
the input x holds cosines), d the teacher's logits and lambda the class weights of eq. 5:

    cross-entropy   L_c = logsumexp(z + log lambda) - (z + log lambda)_y             dL_c/dz = q - onehot(y)
    distillation    L_d = T^2 (logsumexp(z / T) - <p_teacher, z / T>), old columns   dL_d/dz = T (p - p_teacher)
    gradient        dz = (ce_weight * sample_weight * dL_c/dz + kd_weight * dL_d/dz) / B

What keeps it accurate in float32; none of it costs time next to the memory traffic:
- maxima are subtracted from raw logits, where the difference of near numbers is exact, and the prior or 1 / T comes
  afterwards. Logits near 1,000 lose no digit that way.
- three separate maxima: were the old logits measured against the new ones, their sum could underflow.
- the target's gradient -(1 - q_y) is the sum over the other columns, not 1 minus a number close to 1.

Rounds over the lanes, not arithmetic, bound small rows: there are two, one for four maxima and one for four sums.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastil.kernels.incremental_loss import Operands
from fastil.kernels.jit.launching import (
    LOG2E,
    contiguous,
    join4,
    launch,
    power_of_two,
    rows_like,
    scalar,
    split4,
    value_of,
)
from fastil.kernels.jit.loss_parts import (
    NONE,
    classification_gradient,
    if_class,
    load_columns,
    load_row_scalars,
    margin_gradient,
    rescale,
    row_values,
    soft_difference,
    store_row_values,
)

# Columns of a row that is held in registers; wider rows stream. At 16,384 columns three exponentials do not fit a
# thread's 128 registers and spill; with label smoothing that happens at 8,192.
IN_REGISTERS = 8_192
IN_REGISTERS_SMOOTHED = 4_096
STREAM_BLOCK = 2_048


SCALARS = ["NUM_OLD", "NUM_SEEN", "CE_WEIGHT", "KD_WEIGHT", "TEMPERATURE", "MARGIN_WEIGHT", "batch"]


@triton.jit(do_not_specialize=[*SCALARS, "label_smoothing", "margin"])
def incremental_loss_rows(
    LOGITS,  # [B, W] float
    TEACHER,  # [B, W] float or None: no distillation
    TARGET,  # [B] int
    LOG_PRIOR,  # [W] float
    SAMPLE_WEIGHT,  # [B] float or None: 1
    SCALE,  # [] float or None: the input holds logits, not cosines
    NUM_OLD, NUM_SEEN, CE_WEIGHT, KD_WEIGHT, TEMPERATURE,  # numbers, or pointers to [] of any dtype
    MARGIN_WEIGHT,  # the same, or None: no margin ranking
    DX,  # [B, W] as LOGITS: the gradient
    DSCALE,  # [B] float32, written if SCALE is given: each row's part of the derivative in the scale
    ROW_LOSS,  # [B] float32 or None
    METER,  # [B, 4] float32 or None: sums of cross-entropy, distillation, hits, margin ranking
    batch, label_smoothing, margin,
    W: tl.constexpr, BLOCK: tl.constexpr,
    SEPARATED: tl.constexpr, SMOOTHED: tl.constexpr, HARDEST: tl.constexpr,
):  # fmt: skip
    """Compute one row per program, held in registers."""
    num_old, num_seen = value_of(NUM_OLD, tl.int32), value_of(NUM_SEEN, tl.int32)
    ce_weight, kd_weight = value_of(CE_WEIGHT, tl.float32), value_of(KD_WEIGHT, tl.float32)
    temperature = value_of(TEMPERATURE, tl.float32)
    scale = None if SCALE is None else tl.load(SCALE).to(tl.float32)
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    col = tl.arange(0, BLOCK)
    y, valid, x_y, z_y, prior_y, y_is_old = load_row_scalars(
        LOGITS, TARGET, LOG_PRIOR, row, num_old, num_seen, scale, W
    )
    offset, inside, x, z, d, prior, old, competes, beats = load_columns(
        LOGITS, TEACHER, LOG_PRIOR, row, col, y, x_y, y_is_old, num_old, num_seen, scale, W, SEPARATED
    )
    # First round: the maxima of what is exponentiated.
    top, top_u, top_v, beaten = split4(
        tl.max(join4(tl.where(competes, z + prior, NONE), tl.where(old, z, NONE), tl.where(old, d, NONE), beats), 1)
    )
    # Second round: the sums.
    inv_t = LOG2E / temperature
    hit = col[None, :] == y[:, None]
    a = (z - top[:, None]) + prior
    ay = tl.where(valid, (z_y - top) + prior_y, NONE)
    e = tl.where(competes, tl.exp2(a * LOG2E), 0.0)
    if TEACHER is not None:
        zu = z - top_u[:, None]
        eu = tl.where(old, tl.exp2(zu * inv_t), 0.0)
        ev = tl.where(old, tl.exp2((d - top_v[:, None]) * inv_t), 0.0)
        rest, su, sv, dot = split4(tl.sum(join4(tl.where(hit, 0.0, e), eu, ev, tl.where(old, ev * zu, 0.0)), 1))
    else:
        rest = tl.sum(tl.where(hit, 0.0, e), 1)
        su, sv, dot = tl.zeros_like(rest), tl.zeros_like(rest), tl.zeros_like(rest)
    smooth, uniform = tl.zeros_like(rest), tl.zeros_like(rest)
    if SMOOTHED:
        number, total = tl.split(tl.sum(tl.join(tl.where(competes, 1.0, 0.0), tl.where(competes, a, 0.0)), 1))
        uniform = label_smoothing / tl.maximum(number, 1.0)
        smooth = total / tl.maximum(number, 1.0)
    ce, kd, inv_s = row_values(y, ay, rest, smooth, su, sv, dot, temperature, label_smoothing, SMOOTHED)
    weight = if_class(y, ce_weight / batch)
    if SAMPLE_WEIGHT is not None:
        given = tl.load(SAMPLE_WEIGHT + row).to(tl.float32)
        weight, ce = weight * given, ce * given
    g = classification_gradient(e, hit, competes, rest, inv_s, weight, uniform, label_smoothing, SMOOTHED)
    if TEACHER is not None:
        g += soft_difference(eu, ev, su, sv) * (kd_weight * temperature / batch)
    ranking, margin_weight = tl.zeros_like(ce), None
    if MARGIN_WEIGHT is not None:
        margin_weight = value_of(MARGIN_WEIGHT, tl.float32)
        ranking, extra = margin_gradient(
            x, x_y, y, valid, col, y_is_old, num_old, num_seen, margin, margin_weight / batch, HARDEST
        )
    if SCALE is not None:
        tl.store(DSCALE + row, tl.sum(tl.where(g != 0.0, g * x, 0.0), 1))
        g *= scale
    if MARGIN_WEIGHT is not None:
        g += extra
    tl.store(DX + offset, g.to(DX.dtype.element_ty), mask=inside)
    correct = tl.where(valid & (x_y == x_y) & (beaten == 0.0), 1.0, 0.0)  # x == x: not NaN
    store_row_values(
        ROW_LOSS, METER, row, ce, kd, correct, ranking, ce_weight / batch, kd_weight / batch,
        None if MARGIN_WEIGHT is None else margin_weight / batch,
    )  # fmt: skip


@triton.jit(do_not_specialize=[*SCALARS, "label_smoothing", "margin"])
def incremental_loss_stream(
    LOGITS, TEACHER, TARGET, LOG_PRIOR, SAMPLE_WEIGHT, SCALE,
    NUM_OLD, NUM_SEEN, CE_WEIGHT, KD_WEIGHT, TEMPERATURE, MARGIN_WEIGHT,
    DX, DSCALE, ROW_LOSS, METER,
    batch, label_smoothing, margin,
    W: tl.constexpr, BLOCK: tl.constexpr,
    SEPARATED: tl.constexpr, SMOOTHED: tl.constexpr, HARDEST: tl.constexpr,
):  # fmt: skip
    """Compute one row per program, read twice in blocks, the second time from the caches. Arguments as above, but
    without cosines and margin ranking.
    """
    num_old, num_seen = value_of(NUM_OLD, tl.int32), value_of(NUM_SEEN, tl.int32)
    ce_weight, kd_weight = value_of(CE_WEIGHT, tl.float32), value_of(KD_WEIGHT, tl.float32)
    temperature = value_of(TEMPERATURE, tl.float32)
    inv_t = LOG2E / temperature
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    y, valid, x_y, z_y, prior_y, y_is_old = load_row_scalars(LOGITS, TARGET, LOG_PRIOR, row, num_old, num_seen, None, W)
    top = tl.full([1], NONE, tl.float32)
    top_u, top_v, beaten = top, top, tl.zeros_like(top)
    # Sums by lane, reduced once at the end; a new maximum rescales them.
    rest = tl.zeros([1, BLOCK], tl.float32)
    su, sv, dot, number, total = rest, rest, rest, rest, rest
    for start in range(0, W, BLOCK):
        col = start + tl.arange(0, BLOCK)
        _, _, _, z, d, prior, old, competes, beats = load_columns(
            LOGITS, TEACHER, LOG_PRIOR, row, col, y, x_y, y_is_old, num_old, num_seen, None, W, SEPARATED
        )
        new, new_u, new_v, new_beaten = split4(
            tl.max(join4(tl.where(competes, z + prior, NONE), tl.where(old, z, NONE), tl.where(old, d, NONE), beats), 1)
        )
        beaten = tl.maximum(beaten, new_beaten)
        new, new_u, new_v = tl.maximum(top, new), tl.maximum(top_u, new_u), tl.maximum(top_v, new_v)
        a = (z - new[:, None]) + prior
        e = tl.where(competes & (col[None, :] != y[:, None]), tl.exp2(a * LOG2E), 0.0)
        rest = rest * rescale(top, new, LOG2E) + e
        if SMOOTHED:
            moved = tl.where(top > NONE, top - new, 0.0)[:, None]
            total += tl.where(competes, a, 0.0) + number * moved
            number += tl.where(competes, 1.0, 0.0)
        top = new
        if TEACHER is not None:  # noqa: SIM102 (known when compiling, unlike the next condition)
            if start < num_old:
                zu = z - new_u[:, None]
                eu = tl.where(old, tl.exp2(zu * inv_t), 0.0)
                ev = tl.where(old, tl.exp2((d - new_v[:, None]) * inv_t), 0.0)
                moved = tl.where(top_u > NONE, top_u - new_u, 0.0)[:, None]
                shrink = rescale(top_v, new_v, inv_t)
                dot = (dot + sv * moved) * shrink + tl.where(old, ev * zu, 0.0)
                su = su * rescale(top_u, new_u, inv_t) + eu
                sv = sv * shrink + ev
                top_u, top_v = new_u, new_v
    rest, su, sv, dot = split4(tl.sum(join4(rest, su, sv, dot), 1))
    ay = tl.where(valid, (z_y - top) + prior_y, NONE)
    smooth, uniform = tl.zeros_like(rest), tl.zeros_like(rest)
    if SMOOTHED:
        count, sum_a = tl.split(tl.sum(tl.join(number, total), 1))
        uniform = label_smoothing / tl.maximum(count, 1.0)
        smooth = sum_a / tl.maximum(count, 1.0)
    ce, kd, inv_s = row_values(y, ay, rest, smooth, su, sv, dot, temperature, label_smoothing, SMOOTHED)
    weight = if_class(y, ce_weight / batch)
    if SAMPLE_WEIGHT is not None:
        given = tl.load(SAMPLE_WEIGHT + row).to(tl.float32)
        weight, ce = weight * given, ce * given
    for start in range(0, W, BLOCK):
        col = start + tl.arange(0, BLOCK)
        offset, inside, _, z, d, prior, old, competes, _ = load_columns(
            LOGITS, TEACHER, LOG_PRIOR, row, col, y, x_y, y_is_old, num_old, num_seen, None, W, SEPARATED
        )
        hit = col[None, :] == y[:, None]
        e = tl.where(competes, tl.exp2(((z - top[:, None]) + prior) * LOG2E), 0.0)
        g = classification_gradient(e, hit, competes, rest, inv_s, weight, uniform, label_smoothing, SMOOTHED)
        if TEACHER is not None:
            eu = tl.where(old, tl.exp2((z - top_u[:, None]) * inv_t), 0.0)
            ev = tl.where(old, tl.exp2((d - top_v[:, None]) * inv_t), 0.0)
            g += soft_difference(eu, ev, su, sv) * (kd_weight * temperature / batch)
        tl.store(DX + offset, g.to(DX.dtype.element_ty), mask=inside)
    correct = tl.where(valid & (x_y == x_y) & (beaten == 0.0), 1.0, 0.0)  # x == x: not NaN
    store_row_values(
        ROW_LOSS, METER, row, ce, kd, correct, tl.zeros_like(ce), ce_weight / batch, kd_weight / batch, None
    )


def launch_table(width: int, smoothed: bool) -> tuple[Any, int, int]:
    """Return (kernel, block, warps): eight columns per thread, so that a load is 16 bytes in bfloat16 too, and one warp
    up to 256 columns, which needs no barrier. (Several narrow rows per program were no better: they take more registers
    or barriers.)
    """
    block = power_of_two(max(width, 32))
    if width % 8 and block > IN_REGISTERS_SMOOTHED:  # unaligned rows need one more address per column
        return incremental_loss_stream, STREAM_BLOCK, 8
    if block <= (IN_REGISTERS_SMOOTHED if smoothed else IN_REGISTERS):
        return incremental_loss_rows, block, max(1, min(16, block // 256))
    return incremental_loss_stream, STREAM_BLOCK, 8


def incremental_loss(*operands: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the kernel. Operands and results as those of `fastil.kernels.incremental_loss.plain`."""
    o = Operands(*operands)
    logits = o.logits.contiguous()
    batch, width = logits.shape
    kernel, block, warps = launch_table(width, o.label_smoothing > 0)
    gradient = torch.empty_like(logits, dtype=o.gradient_dtype)
    scale_gradient = rows_like(logits, batch if o.logit_scale is not None else 0)
    row_loss = rows_like(logits, batch if o.value else 0)
    launch(
        kernel,
        (batch,),
        logits,
        contiguous(o.teacher),
        o.target.contiguous(),
        o.log_prior.contiguous(),
        contiguous(o.sample_weight),
        o.logit_scale,
        *(scalar(number, logits) for number in (o.num_old, o.num_seen, o.ce_weight, o.kd_weight, o.temperature)),
        None if o.margin_weight is None else scalar(o.margin_weight, logits),
        gradient,
        scale_gradient if o.logit_scale is not None else None,
        row_loss if o.value else None,
        o.meter,
        batch,
        o.label_smoothing,
        o.margin,
        num_warps=warps,
        # Narrow rows hide each other's waits, and 96 registers leave room for 21 of them. Wide rows may have all that
        # a program can: otherwise the assembler stops at 64 or 128 to make room for a second one, and spills.
        maxnreg=96 if block <= 128 else min(255, 2048 // warps),
        W=width,
        BLOCK=block,
        SEPARATED=o.separated,
        SMOOTHED=o.label_smoothing > 0,
        HARDEST=o.hardest if o.margin_weight is not None else 0,
    )
    return gradient, scale_gradient, row_loss
