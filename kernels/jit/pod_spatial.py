"""PODNet's spatial distillation of one layer and its gradient, one image per program, in one launch.

With x and y the student's and the teacher's map, a and b their squares summed over the width and over the height (H + W
vectors of C), and d = a / |a| - b / |b|:

    value     |d| / (B layers)
    gradient  2 x (g over the width + g over the height),   g = (d - a <a, d> / |a|^2) / (|a| |d|) / (B layers)

The rows of the maps are read once for a, b and a - b, and the student's again for the gradient. Meanwhile the pooled
values wait in memory, or rather in the caches, so that registers hold only one tile of a map and the sums over the
height, for maps of any size. a - b is pooled from (x - y) (x + y), and d is formed from it, so that both keep their
relative accuracy when student and teacher are nearly equal; the difference of a and b would not.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastil.kernels.jit.launching import join4, launch, power_of_two, rows_like, split4
from fastil.kernels.jit.less_forget import length, unit_difference

TILE = 2_048  # numbers of a map at once
BLOCK = 2_048  # pooled numbers at once


@triton.jit
def tile_of(h, w, c, H: tl.constexpr, W: tl.constexpr, C: tl.constexpr):
    """Return offsets of the tile [R, W, C] of a channels-last image, and which of them lie inside."""
    h, w, c = h[:, None, None], w[None, :, None], c[None, None, :]
    return (h * W + w) * C + c, (h < H) & (w < W) & (c < C)


@triton.jit
def store_pooled(A, B, DELTA, k, c, K: tl.constexpr, C: tl.constexpr, a, b, delta):
    """Store the pooled values of K rows or columns, those numbered k, as [k, c]."""
    at, inside = k[:, None] * C + c[None, :], (k[:, None] < K) & (c[None, :] < C)
    tl.store(A + at, a, mask=inside)
    tl.store(B + at, b, mask=inside)
    tl.store(DELTA + at, delta, mask=inside)


@triton.jit
def pooled_gradient(A, B, DELTA, k, c, K: tl.constexpr, C: tl.constexpr, p, q, r):
    """Return p (a - b) + q a + r b for them, [k, c]."""
    at, inside = k[:, None] * C + c[None, :], (k[:, None] < K) & (c[None, :] < C)
    a = tl.load(A + at, mask=inside, other=0.0)
    b = tl.load(B + at, mask=inside, other=0.0)
    return p * tl.load(DELTA + at, mask=inside, other=0.0) + (q * a + r * b)


@triton.jit(do_not_specialize=["weight"])
def pod_spatial_images(
    MAPS,  # [B, H, W, C] float
    TEACHER,  # [B, H, W, C] float
    POOLED,  # [B, 3, H + W, C] float32: room for a, b and a - b
    ROW_VALUE,  # [B] float32
    DX,  # [B, H, W, C] as MAPS: the gradient
    weight,
    H: tl.constexpr, W: tl.constexpr, C: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute one image per program."""
    image = tl.program_id(0).to(tl.int64)
    N: tl.constexpr = (H + W) * C
    MAPS += image * (H * W * C)
    TEACHER += image * (H * W * C)
    DX += image * (H * W * C)
    A = POOLED + image * (3 * N)
    B = A + N
    DELTA = B + N
    w = tl.arange(0, BLOCK_W)

    for first in range(0, C, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        # One sum per lane of the tile, reduced once at the end.
        column_a = tl.zeros([ROWS, BLOCK_W, BLOCK_C], tl.float32)
        column_b, column_delta = column_a, column_a
        for top in range(0, H, ROWS):
            h = top + tl.arange(0, ROWS)
            offset, inside = tile_of(h, w, c, H, W, C)
            x = tl.load(MAPS + offset, mask=inside, other=0.0).to(tl.float32)
            y = tl.load(TEACHER + offset, mask=inside, other=0.0).to(tl.float32)
            a, b, delta = x * x, y * y, (x - y) * (x + y)
            column_a += a
            column_b += b
            column_delta += delta
            store_pooled(A, B, DELTA, h, c, H, C, tl.sum(a, 1), tl.sum(b, 1), tl.sum(delta, 1))
        column_a, column_b, column_delta = tl.sum(column_a, 0), tl.sum(column_b, 0), tl.sum(column_delta, 0)
        store_pooled(A + H * C, B + H * C, DELTA + H * C, w, c, W, C, column_a, column_b, column_delta)
    tl.debug_barrier()  # other threads read what these wrote

    aa = tl.zeros([BLOCK], tl.float32)
    bb, inner = aa, aa
    for start in range(0, N, BLOCK):
        i = start + tl.arange(0, BLOCK)
        a = tl.load(A + i, mask=i < N, other=0.0)
        b = tl.load(B + i, mask=i < N, other=0.0)
        delta = tl.load(DELTA + i, mask=i < N, other=0.0)
        aa += a * a
        bb += b * b
        inner += delta * (a + b)
    aa, bb, inner, _ = split4(tl.sum(join4(aa, bb, inner, tl.zeros_like(aa)), 0))
    a_length, a_short = length(aa)
    b_length, b_short = length(bb)
    p, q, r = unit_difference(a_length, a_short, b_length, b_short, inner)

    dd = tl.zeros([BLOCK], tl.float32)
    ad = dd
    for start in range(0, N, BLOCK):
        i = start + tl.arange(0, BLOCK)
        a = tl.load(A + i, mask=i < N, other=0.0)
        b = tl.load(B + i, mask=i < N, other=0.0)
        d = p * tl.load(DELTA + i, mask=i < N, other=0.0) + (q * a + r * b)
        dd += d * d
        ad += a * d
    dd, ad = tl.split(tl.sum(tl.join(dd, ad), 0))
    distance = tl.sqrt(dd)
    tl.store(ROW_VALUE + image, distance * weight)

    # g and the 2 of the squares as factors of a - b, a and b. A vector that is too short is divided by a constant, and
    # has no part along it to take away.
    scale = tl.where(distance == 0.0, 0.0, 2.0 * weight / a_length / distance)
    q -= tl.where(a_short, 0.0, ad / a_length / a_length)
    p, q, r = p * scale, q * scale, r * scale
    for first in range(0, C, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        column = pooled_gradient(A + H * C, B + H * C, DELTA + H * C, w, c, W, C, p, q, r)
        for top in range(0, H, ROWS):
            h = top + tl.arange(0, ROWS)
            offset, inside = tile_of(h, w, c, H, W, C)
            x = tl.load(MAPS + offset, mask=inside, other=0.0).to(tl.float32)
            row = pooled_gradient(A, B, DELTA, h, c, H, C, p, q, r)
            gradient = x * (row[:, None, :] + column[None, :, :])
            tl.store(DX + offset, gradient.to(DX.dtype.element_ty), mask=inside)


def launch_table(height: int, width: int, channels: int) -> tuple[int, int, int, int]:
    """Return (rows, columns, channels, warps) of a tile: whole rows of all channels if they fit, else the channels in
    parts. It has eight numbers per thread, so that a load is 16 bytes in bfloat16 too. Twice the tile and the warps,
    with half the registers for each, spills.
    """
    columns = power_of_two(width)
    part = min(power_of_two(channels), max(8, TILE // columns))
    rows = min(power_of_two(height), max(1, TILE // (columns * part)))
    return rows, columns, part, max(1, min(8, rows * columns * part // 256))


def pod_spatial(maps: Tensor, teacher: Tensor, layers: int) -> tuple[Tensor, Tensor]:
    """Launch the kernel. Arguments and results as those of `fastil.kernels.pod_spatial.plain`."""
    maps = maps.contiguous(memory_format=torch.channels_last)
    batch, channels, height, width = maps.shape
    gradient, row_value = torch.empty_like(maps, memory_format=torch.channels_last), rows_like(maps, batch)
    rows, columns, part, warps = launch_table(height, width, channels)
    launch(
        pod_spatial_images,
        (batch,),
        maps,
        teacher.contiguous(memory_format=torch.channels_last),
        rows_like(maps, batch, 3, height + width, channels),
        row_value,
        gradient,
        1 / (layers * max(1, batch)),
        num_warps=warps,
        # Without this the assembler stops at 64 registers for some maps, to make room for more programs than there
        # are images, and spills.
        maxnreg=255,
        H=height,
        W=width,
        C=channels,
        ROWS=rows,
        BLOCK_W=columns,
        BLOCK_C=part,
        BLOCK=min(BLOCK, power_of_two((height + width) * channels)),
    )
    return row_value, gradient
