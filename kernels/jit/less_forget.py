"""1 - cos of two feature vectors and its gradient, one row per program, held in registers.

With f and t the features and the teacher's, both of length 1 after division by |f| and |t|, and d = f - t:

    value     1 - cos = |d|^2 / 2        gradient    (d - f |d|^2 / 2) / |f|        both divided by B

d is formed so that it keeps its relative accuracy where f and t are nearly equal (`unit_difference`).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastil.kernels.jit.launching import join4, launch, power_of_two, rows_like, split4
from fastil.losses import SHORTEST as SHORTEST_LENGTH

SHORTEST = tl.constexpr(SHORTEST_LENGTH)


@triton.jit
def length(squares):
    """Return the length of a vector from its sum of squares, what it is divided by to normalise it, and whether it is
    shorter than the shortest divisor. (It uses comparisons, because tl.maximum would drop a NaN.)
    """
    norm = tl.sqrt(squares)
    short = norm < SHORTEST
    return tl.where(short, SHORTEST, norm), short


@triton.jit
def unit_difference(x_length, x_short, y_length, y_short, inner):
    """Return factors p, q, r with x / |x| - y / |y| = p (x - y) + q x + r y, given inner = <x - y, x + y>.

    The difference of the quotients would keep only the digits in which they differ. Instead, with k = |x| - |y| = inner
    / (|x| + |y|), it is (x - y - k y / |y|) / |x|, or the same from x's side if x is shorter.
    """
    k = tl.where(x_short | y_short, x_length - y_length, inner / (x_length + y_length))
    share = -k / x_length / y_length
    x_shorter = x_length < y_length
    p = 1.0 / tl.where(x_shorter, y_length, x_length)
    return p, tl.where(x_shorter, share, 0.0), tl.where(x_shorter, 0.0, share)


@triton.jit(do_not_specialize=["batch"])
def less_forget_rows(
    FEATURES,  # [B, W] float
    TEACHER,  # [B, W] float
    ROW_VALUE,  # [B] float32
    DX,  # [B, W] as FEATURES: the gradient
    batch,
    W: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute one row per program, held in registers."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    inside = col < W
    x = tl.load(FEATURES + row * W + col, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(TEACHER + row * W + col, mask=inside, other=0.0).to(tl.float32)
    delta = x - y
    xx, yy, inner, _ = split4(tl.sum(join4(x * x, y * y, delta * (x + y), tl.zeros_like(x)), 0))
    x_length, x_short = length(xx)
    y_length, y_short = length(yy)
    p, q, r = unit_difference(x_length, x_short, y_length, y_short, inner)
    d = p * delta + (q * x + r * y)
    one_minus_cos = tl.sum(d * d, 0) / 2
    blank = x_short | y_short
    gradient = (d - x * (one_minus_cos / x_length)) * tl.where(blank, 0.0, 1.0 / x_length / batch)
    tl.store(DX + row * W + col, gradient.to(DX.dtype.element_ty), mask=inside)
    tl.store(ROW_VALUE + row, tl.where(blank, 1.0, one_minus_cos) / batch)


def less_forget(features: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Launch the kernel. Arguments and results as those of `fastil.kernels.less_forget.plain`."""
    features = features.contiguous()
    batch, width = features.shape
    gradient, row_value = torch.empty_like(features), rows_like(features, batch)
    block = power_of_two(max(width, 32))
    launch(
        less_forget_rows,
        (batch,),
        features,
        teacher.contiguous(),
        row_value,
        gradient,
        batch,
        # Eight columns per thread, so that a load is 16 bytes in bfloat16 too; up to 256 columns there is no barrier.
        num_warps=max(1, min(16, block // 256)),
        W=width,
        BLOCK=block,
    )
    return row_value, gradient
