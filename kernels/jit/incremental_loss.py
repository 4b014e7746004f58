"""Balanced Softmax cross-entropy, distillation, margin ranking and their gradient, one row of logits per pass.

One launch, no atomics, and for rows of up to 8,192 columns no second read. With z the logits (scale * x where the
input x holds cosines), d the teacher's logits and lambda the class weights of eq. 5:

    cross-entropy   L_c = logsumexp(z + log lambda) - (z + log lambda)_y             dL_c/dz = q - onehot(y)
    distillation    L_d = T^2 (logsumexp(z / T) - <p_teacher, z / T>), old columns   dL_d/dz = T (p - p_teacher)
    gradient        dz = (ce_weight * sample_weight * dL_c/dz + kd_weight * dL_d/dz) / B

What keeps it accurate in float32; each costs nothing beside the memory traffic:
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

from fastil.kernels.jit.launching import (
    LN2,
    LOG2E,
    contiguous,
    join4,
    launch,
    power_of_two,
    scalar,
    split4,
    value_of,
)

IN_REGISTERS = 8_192  # columns; at 16,384 the 128 registers of a thread do not hold three exponentials, and spill
STREAM_BLOCK = 2_048
NONE = tl.constexpr(float("-inf"))
NO_KEY = tl.constexpr(-(2**63))


@triton.jit
def log2_of_one_plus(x):
    """Accurate for small x (Kahan)."""
    plus = 1.0 + x
    small = plus == 1.0
    return tl.where(small, x * LOG2E, tl.log2(plus) * (x / tl.where(small, 1.0, plus - 1.0)))


@triton.jit
def load_row_scalars(LOGITS, TARGET, LOG_PRIOR, row, live, num_old, num_seen, scale, W: tl.constexpr):
    """Of the rows: target, whether it counts, its x, z and log lambda, whether its class is old. [R]"""
    y = tl.load(TARGET + row, mask=live, other=-1).to(tl.int32)
    valid = (y >= 0) & live
    inside = valid & (y < W)  # a label beyond the logits gives an infinite loss and never a read out of bounds
    x_y = tl.load(LOGITS + row * W + y, mask=inside, other=0.0).to(tl.float32)
    z_y = x_y
    if scale is not None:
        z_y = x_y * scale
    prior_y = tl.load(LOG_PRIOR + y, mask=inside & (y < num_seen), other=NONE).to(tl.float32)
    return y, valid, x_y, z_y, prior_y, y < num_old


@triton.jit
def load_columns(
    LOGITS, TEACHER, LOG_PRIOR, row, live, col, y, x_y, y_is_old, num_old, num_seen, scale,
    W: tl.constexpr, SEPARATED: tl.constexpr,
):  # fmt: skip
    """A tile [R, C]: offsets and mask, x, z, teacher, log lambda [1, C], masks of old and competing columns, and 1
    where a column beats the target (argmax takes the lowest of equals)."""
    offset = row[:, None] * W + col[None, :]
    inside = live[:, None] & (col < W)[None, :]
    x = tl.load(LOGITS + offset, mask=inside, other=0.0).to(tl.float32)
    z = x
    if scale is not None:
        z = x * scale
    d = x
    if TEACHER is not None:
        # Whole vectors of 8 columns that hold an old class: the loads stay wide, and no other byte is read.
        d = tl.load(
            TEACHER + offset, mask=inside & ((col // 8) < ((num_old + 7) // 8))[None, :], other=0.0
        ).to(tl.float32)  # fmt: skip
    prior = tl.load(LOG_PRIOR + col, mask=col < W, other=NONE).to(tl.float32)[None, :]
    old = (col < num_old)[None, :]
    seen = (col < num_seen)[None, :]
    competes = seen & (prior > NONE) & live[:, None]
    if SEPARATED:
        competes = competes & (old == y_is_old[:, None])
    beats = seen & ((x > x_y[:, None]) | ((x == x_y[:, None]) & (col[None, :] < y[:, None])))
    return offset, inside, x, z, d, prior, old, competes, tl.where(beats, 1.0, 0.0)


@triton.jit
def row_values(valid, ay, rest, smooth, su, sv, dot, temperature, label_smoothing, SMOOTHED: tl.constexpr):
    """Cross-entropy and distillation of the rows from their sums, and the two normalisers. [R]

    ay: (z + log lambda)_y below the maximum; rest: sum over the other columns; smooth: mean of z + log lambda over the
    competing columns, below the same maximum."""
    e_y = tl.exp2(ay * LOG2E)
    s = rest + e_y
    near = ay > -1.0
    small = log2_of_one_plus(tl.where(near, rest / tl.where(near, e_y, 1.0), 0.0)) * LN2
    ce = tl.where(near, small, tl.log2(s) * LN2 - ay)
    if SMOOTHED:
        ce += label_smoothing * (ay - smooth)
    has = su > 0
    su = tl.where(has, su, 1.0)
    sv = tl.where(has, sv, 1.0)
    kd = temperature * (temperature * LN2 * tl.log2(su) - dot / sv)
    return tl.where(valid, ce, 0.0), kd, 1.0 / tl.where(s == 0.0, 1.0, s)


@triton.jit
def soft_difference(eu, ev, su, sv):
    """softmax of the student minus softmax of the teacher. [R, C]

    fma(.., 0) is a product that no compiler may fuse into the difference: a student equal to its teacher gets exactly
    0."""
    inv_su = (1.0 / tl.where(su > 0, su, 1.0))[:, None]
    inv_sv = (1.0 / tl.where(sv > 0, sv, 1.0))[:, None]
    zero = tl.zeros_like(eu)
    p = tl.fma(eu, tl.broadcast_to(inv_su, eu.shape), zero)
    return p - tl.fma(ev, tl.broadcast_to(inv_sv, ev.shape), zero)


@triton.jit
def classification_gradient(e, hit, competes, rest, inv_s, weight, uniform, label_smoothing, SMOOTHED: tl.constexpr):
    """weight times the derivative of the cross-entropy in z. [R, C]"""
    g = tl.where(hit, -(rest * inv_s)[:, None], e * inv_s[:, None])
    if SMOOTHED:
        g += tl.where(hit, label_smoothing, 0.0) - tl.where(competes, uniform[:, None], 0.0)
    return g * weight[:, None]


@triton.jit
def margin_gradient(x, x_y, y, valid, col, y_is_old, num_old, num_seen, margin, weight, HARDEST: tl.constexpr):
    """LUCIR's margin ranking: for targets that are old, the mean over the HARDEST highest new cosines of
    max(0, margin - x_y + x_k). Returns the value [R] and weight times its derivative in x [R, C]."""
    value = tl.zeros_like(x_y)
    gradient = tl.zeros_like(x)
    column = col[None, :]
    # Value and column in one integer, so that one round finds both: floats ordered as integers above, columns below.
    bits = x.to(tl.int32, bitcast=True)
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)
    key = tl.where((column >= num_old) & (column < num_seen), (ordered << 32) | (0x7FFFFFFF - column), NO_KEY)
    for _ in tl.static_range(HARDEST):
        highest = tl.max(key, 1)
        found = highest > NO_KEY
        k = 0x7FFFFFFF - (highest & 0x7FFFFFFF).to(tl.int32)
        bits = (highest >> 32).to(tl.int32)
        excess = margin - x_y + (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
        counts = valid & y_is_old & found & (excess > 0)
        value += tl.where(counts, excess, 0.0) / HARDEST
        step = tl.where(counts, weight / HARDEST, 0.0)[:, None]
        gradient += tl.where(column == k[:, None], step, 0.0) - tl.where(column == y[:, None], step, 0.0)
        key = tl.where(column == k[:, None], NO_KEY, key)
    return value, gradient


@triton.jit
def store_row_values(ROW_LOSS, METER, row, live, ce, kd, hit, margin, ce_weight, kd_weight, margin_weight):
    """The weighted loss of each row, or its terms added to the running sums METER [R, 4]: read once per epoch."""
    if ROW_LOSS is not None:
        total = ce_weight * ce + kd_weight * kd
        if margin_weight is not None:
            total += margin_weight * margin
        tl.store(ROW_LOSS + row, total, mask=live)
    if METER is not None:
        slot = tl.arange(0, 4)[None, :]
        at = METER + row[:, None] * 4 + slot
        new = tl.where(
            slot == 0, ce[:, None], tl.where(slot == 1, kd[:, None], tl.where(slot == 2, hit[:, None], margin[:, None]))
        )
        tl.store(at, tl.load(at, mask=live[:, None], other=0.0) + new, mask=live[:, None])


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
    """One row per program, held in registers."""
    num_old, num_seen = value_of(NUM_OLD, tl.int32), value_of(NUM_SEEN, tl.int32)
    ce_weight, kd_weight = value_of(CE_WEIGHT, tl.float32), value_of(KD_WEIGHT, tl.float32)
    temperature = value_of(TEMPERATURE, tl.float32)
    scale = None if SCALE is None else tl.load(SCALE).to(tl.float32)
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    live = row < batch
    col = tl.arange(0, BLOCK)
    y, valid, x_y, z_y, prior_y, y_is_old = load_row_scalars(
        LOGITS, TARGET, LOG_PRIOR, row, live, num_old, num_seen, scale, W
    )
    offset, inside, x, z, d, prior, old, competes, beats = load_columns(
        LOGITS, TEACHER, LOG_PRIOR, row, live, col, y, x_y, y_is_old, num_old, num_seen, scale, W, SEPARATED
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
    ce, kd, inv_s = row_values(valid, ay, rest, smooth, su, sv, dot, temperature, label_smoothing, SMOOTHED)
    weight = tl.where(valid, ce_weight / batch, 0.0)
    if SAMPLE_WEIGHT is not None:
        given = tl.load(SAMPLE_WEIGHT + row, mask=live, other=0.0).to(tl.float32)
        weight *= given
        ce *= given
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
        tl.store(DSCALE + row, tl.sum(tl.where(g != 0.0, g * x, 0.0), 1), mask=live)
        g *= scale
    if MARGIN_WEIGHT is not None:
        g += extra
    tl.store(DX + offset, g.to(DX.dtype.element_ty), mask=inside)
    correct = tl.where(valid & (beaten == 0.0), 1.0, 0.0)
    store_row_values(
        ROW_LOSS, METER, row, live, ce, kd, correct, ranking, ce_weight / batch, kd_weight / batch,
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
    """One row per program, read twice in blocks (the second time from the caches). Arguments as above; cosines and
    margin ranking are not for rows this wide."""
    num_old, num_seen = value_of(NUM_OLD, tl.int32), value_of(NUM_SEEN, tl.int32)
    ce_weight, kd_weight = value_of(CE_WEIGHT, tl.float32), value_of(KD_WEIGHT, tl.float32)
    temperature = value_of(TEMPERATURE, tl.float32)
    inv_t = LOG2E / temperature
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    live = row < batch
    y, valid, x_y, z_y, prior_y, y_is_old = load_row_scalars(
        LOGITS, TARGET, LOG_PRIOR, row, live, num_old, num_seen, None, W
    )
    top = tl.full([1], NONE, tl.float32)
    top_u, top_v, beaten = top, top, tl.zeros_like(top)
    # Sums by lane, reduced once at the end; a new maximum rescales them.
    rest = tl.zeros([1, BLOCK], tl.float32)
    su, sv, dot, number, total = rest, rest, rest, rest, rest
    for start in range(0, W, BLOCK):
        col = start + tl.arange(0, BLOCK)
        _, _, _, z, d, prior, old, competes, beats = load_columns(
            LOGITS, TEACHER, LOG_PRIOR, row, live, col, y, x_y, y_is_old, num_old, num_seen, None, W, SEPARATED
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
    ce, kd, inv_s = row_values(valid, ay, rest, smooth, su, sv, dot, temperature, label_smoothing, SMOOTHED)
    weight = tl.where(valid, ce_weight / batch, 0.0)
    if SAMPLE_WEIGHT is not None:
        given = tl.load(SAMPLE_WEIGHT + row, mask=live, other=0.0).to(tl.float32)
        weight *= given
        ce *= given
    for start in range(0, W, BLOCK):
        col = start + tl.arange(0, BLOCK)
        offset, inside, _, z, d, prior, old, competes, _ = load_columns(
            LOGITS, TEACHER, LOG_PRIOR, row, live, col, y, x_y, y_is_old, num_old, num_seen, None, W, SEPARATED
        )
        hit = col[None, :] == y[:, None]
        e = tl.where(competes, tl.exp2(((z - top[:, None]) + prior) * LOG2E), 0.0)
        g = classification_gradient(e, hit, competes, rest, inv_s, weight, uniform, label_smoothing, SMOOTHED)
        if TEACHER is not None:
            eu = tl.where(old, tl.exp2((z - top_u[:, None]) * inv_t), 0.0)
            ev = tl.where(old, tl.exp2((d - top_v[:, None]) * inv_t), 0.0)
            g += soft_difference(eu, ev, su, sv) * (kd_weight * temperature / batch)
        tl.store(DX + offset, g.to(DX.dtype.element_ty), mask=inside)
    correct = tl.where(valid & (beaten == 0.0), 1.0, 0.0)
    store_row_values(
        ROW_LOSS, METER, row, live, ce, kd, correct, tl.zeros_like(ce), ce_weight / batch, kd_weight / batch, None
    )


@triton.jit
def rescale(old_top, new_top, factor):
    """What turns sums measured against old_top into sums measured against new_top; 0 before there was one. [R, 1]"""
    return tl.where(old_top > NONE, tl.exp2((old_top - new_top) * factor), 0.0)[:, None]


def launch_table(width: int) -> tuple[int, int]:
    """(block, warps): eight columns per thread, so that a load is 16 bytes also in bfloat16, and up to 256 columns one
    warp, which needs no barrier. (Several narrow rows per program were no better: more registers or barriers.)"""
    block = power_of_two(max(width, 32))
    return (block, max(1, min(16, block // 256))) if block <= IN_REGISTERS else (STREAM_BLOCK, 8)


def incremental_loss(
    logits: Tensor,
    target: Tensor,
    log_prior: Tensor,
    teacher: Tensor | None,
    num_old: float | Tensor,
    num_seen: float | Tensor,
    ce_weight: float | Tensor,
    kd_weight: float | Tensor,
    temperature: float | Tensor,
    sample_weight: Tensor | None,
    logit_scale: Tensor | None,
    margin_weight: float | Tensor | None,
    separated: bool,
    label_smoothing: float,
    margin: float,
    hardest: int,
    meter: Tensor | None,
    value: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch. Arguments and results as those of `fastil.kernels.incremental_loss.plain`."""
    logits = logits.contiguous()
    batch, width = logits.shape
    block, warps = launch_table(width)
    per_row: dict[str, Any] = {"dtype": torch.float32, "device": logits.device}
    gradient = torch.empty_like(logits)
    scale_gradient = torch.empty(batch if logit_scale is not None else 0, **per_row)
    row_loss = torch.empty(batch if value else 0, **per_row)
    launch(
        incremental_loss_rows if width <= IN_REGISTERS else incremental_loss_stream,
        (batch,),
        logits,
        contiguous(teacher),
        target.contiguous(),
        log_prior.contiguous(),
        contiguous(sample_weight),
        logit_scale,
        *(scalar(value, logits) for value in (num_old, num_seen, ce_weight, kd_weight, temperature)),
        None if margin_weight is None else scalar(margin_weight, logits),
        gradient,
        scale_gradient if logit_scale is not None else None,
        row_loss if value else None,
        meter,
        batch,
        label_smoothing,
        margin,
        num_warps=warps,
        W=width,
        BLOCK=block,
        SEPARATED=separated,
        SMOOTHED=label_smoothing > 0,
        HARDEST=hardest if margin_weight is not None else 0,
    )
    return gradient, scale_gradient, row_loss
