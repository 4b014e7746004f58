"""The parts that both forms of the incremental loss share: loading a row, its losses, its gradient.

Shapes: R rows, of which a program has one (kept as an axis, so that tiles stay two-dimensional); C columns of a tile.
"""

import triton
import triton.language as tl

from fastil.kernels.jit.launching import LN2, LOG2E

NONE = tl.constexpr(float("-inf"))
NO_KEY = tl.constexpr(-(2**63))


@triton.jit
def label_of(TARGET, row, num_seen, W: tl.constexpr):
    """Return the columns of the rows' classes; -1 for the labels -1 and -100, and -2 for others that are no class."""
    label = tl.load(TARGET + row).to(tl.int64)  # 32 bits would make class 1 of 2^40 + 1
    none = tl.where((label == -1) | (label == -100), -1, -2)
    return tl.where((label >= 0) & (label < tl.minimum(num_seen, W)), label, none).to(tl.int32)


@triton.jit
def if_class(y, value):
    """Return the value if there is a class, 0 if there is none, and NaN if the label is a mistake. It is computed from
    y at each use, because keeping it would take registers.
    """
    return tl.where(y >= 0, value, tl.where(y == -1, 0.0, float("nan")))


@triton.jit
def log2_of_one_plus(x):
    """Return log2(1 + x), accurate for small x (Kahan)."""
    plus = 1.0 + x
    small = plus == 1.0
    return tl.where(small, x * LOG2E, tl.log2(plus) * (x / tl.where(small, 1.0, plus - 1.0)))


@triton.jit
def load_row_scalars(LOGITS, TARGET, LOG_PRIOR, row, num_old, num_seen, scale, W: tl.constexpr):
    """Load for each row [R]: target, whether it is a class, its x, z and log lambda, whether its class is old."""
    y = label_of(TARGET, row, num_seen, W)
    valid = y >= 0
    x_y = tl.load(LOGITS + row * W + y, mask=valid, other=0.0).to(tl.float32)
    z_y = x_y
    if scale is not None:
        z_y = x_y * scale
    prior_y = tl.load(LOG_PRIOR + y, mask=valid, other=NONE).to(tl.float32)
    return y, valid, x_y, z_y, prior_y, y < num_old


@triton.jit
def load_columns(
    LOGITS, TEACHER, LOG_PRIOR, row, col, y, x_y, y_is_old, num_old, num_seen, scale,
    W: tl.constexpr, SEPARATED: tl.constexpr,
):  # fmt: skip
    """Load a tile [R, C]: offsets and mask, x, z, teacher, log lambda [1, C], masks of old and competing columns, and 1
    where a column beats the target (argmax takes the lowest of equals).
    """
    offset = row[:, None] * W + col[None, :]
    inside = (col < W)[None, :]
    x = tl.load(LOGITS + offset, mask=inside, other=0.0).to(tl.float32)
    z = x
    if scale is not None:
        z = x * scale
    d = x
    if TEACHER is not None:
        # Whole vectors of 8 columns that contain an old class, so that loads stay wide and no other byte is read.
        d = tl.load(
            TEACHER + offset, mask=inside & ((col // 8) < ((num_old + 7) // 8))[None, :], other=0.0
        ).to(tl.float32)  # fmt: skip
    prior = tl.load(LOG_PRIOR + col, mask=col < W, other=NONE).to(tl.float32)[None, :]
    old = (col < num_old)[None, :]
    seen = (col < num_seen)[None, :]
    competes = seen & (prior != NONE)  # a NaN prior competes, so that it shows in the loss
    if SEPARATED:
        competes = competes & (old == y_is_old[:, None])
    beats = seen & ((x > x_y[:, None]) | ((x == x_y[:, None]) & (col[None, :] < y[:, None])))
    return offset, inside, x, z, d, prior, old, competes, tl.where(beats, 1.0, 0.0)


@triton.jit
def row_values(y, ay, rest, smooth, su, sv, dot, temperature, label_smoothing, SMOOTHED: tl.constexpr):
    """Return cross-entropy and distillation of the rows from their sums, and 1 / sum of the former's exponentials. [R]

    ay: (z + log lambda)_y below the maximum; rest: sum over the other columns; smooth: mean of z + log lambda over the
    competing columns, below the same maximum.
    """
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
    return if_class(y, ce), kd, 1.0 / tl.where(s == 0.0, 1.0, s)


@triton.jit
def soft_difference(eu, ev, su, sv):
    """Return the student's softmax minus the teacher's. [R, C]

    fma(.., 0) is a product that no compiler may fuse into the difference, so a student equal to its teacher gets
    exactly 0.
    """
    inv_su = (1.0 / tl.where(su > 0, su, 1.0))[:, None]
    inv_sv = (1.0 / tl.where(sv > 0, sv, 1.0))[:, None]
    zero = tl.zeros_like(eu)
    p = tl.fma(eu, tl.broadcast_to(inv_su, eu.shape), zero)
    return p - tl.fma(ev, tl.broadcast_to(inv_sv, ev.shape), zero)


@triton.jit
def classification_gradient(e, hit, competes, rest, inv_s, weight, uniform, label_smoothing, SMOOTHED: tl.constexpr):
    """Return weight times the derivative of the cross-entropy in z. [R, C]"""
    g = tl.where(hit, -(rest * inv_s)[:, None], e * inv_s[:, None])
    if SMOOTHED:
        g += tl.where(hit, label_smoothing, 0.0) - tl.where(competes, uniform[:, None], 0.0)
    return g * weight[:, None]


@triton.jit
def margin_gradient(x, x_y, y, valid, col, y_is_old, num_old, num_seen, margin, weight, HARDEST: tl.constexpr):
    """Return LUCIR's margin ranking [R], and weight times its derivative in x [R, C]: for old targets the mean over the
    HARDEST highest new cosines of max(0, margin - x_y + x_k).
    """
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
def store_row_values(ROW_LOSS, METER, row, ce, kd, hit, margin, ce_weight, kd_weight, margin_weight):
    """Store the weighted loss of each row in ROW_LOSS, and add its terms to the running sums METER [R, 4], which are
    read once per epoch; either may be None.
    """
    if ROW_LOSS is not None:
        total = ce_weight * ce + kd_weight * kd
        if margin_weight is not None:
            total += margin_weight * margin
        tl.store(ROW_LOSS + row, total)
    if METER is not None:
        slot = tl.arange(0, 4)[None, :]
        at = METER + row[:, None] * 4 + slot
        new = tl.where(
            slot == 0, ce[:, None], tl.where(slot == 1, kd[:, None], tl.where(slot == 2, hit[:, None], margin[:, None]))
        )
        tl.store(at, tl.load(at) + new)


@triton.jit
def rescale(old_top, new_top, factor):
    """Return the factor from sums measured against old_top to new_top, [R, 1]; 0 if there was no old one."""
    return tl.where(old_top > NONE, tl.exp2((old_top - new_top) * factor), 0.0)[:, None]
