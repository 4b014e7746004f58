"""Cut boxes out of images of any sizes and resize them into uint8 frames, in one launch."""

import triton
import triton.language as tl
from torch import Tensor

from fastil.kernels.crop_resize import MOST_SHRUNK, SIDE_LIMIT
from fastil.kernels.jit.launching import launch

BLOCK = 256  # pixels per program; with 4 warps two per thread, so that six loads are on their way at once
SIDES, SHRUNK = tl.constexpr(SIDE_LIMIT), tl.constexpr(MOST_SHRUNK)
NEAREST = tl.constexpr(12582912.0)  # 1.5 * 2**23: a float this large has no fraction, and adding rounds to even


@triton.jit
def filter_of(at, length, size):
    """Return, for a pixel of the output: its centre in the input and its first pixel there that counts, by how much a
    neighbour's weight falls, and how many pixels count at most. length, size: of input and output.
    """
    scale = tl.div_rn(length.to(tl.float32), size.to(tl.float32))
    support = tl.maximum(scale, 1.0)
    center = scale * (at.to(tl.float32) + 0.5)
    first = tl.maximum((center - support + 0.5).to(tl.int32), 0)
    taps = tl.where(scale == 1.0, 1, tl.ceil(2 * support).to(tl.int32))
    return center, first, tl.div_rn(tl.full([], 1.0, tl.float32), support), taps


@triton.jit
def side_of(place, sized):
    """Return a side in pixels as int32, and whether it and those before it are valid."""
    side = tl.load(place)
    return side.to(tl.int32), sized & (side > 0) & (side < SIDES)


@triton.jit(do_not_specialize=["size", "count"])
def crop_and_resize(
    STORE,  # [size] uint8
    TABLE,  # [B, 12] int64
    FRAMES,  # [count, H, W, 3] uint8
    size,
    count,
    H: tl.constexpr, W: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Make a part of a frame per program. Each pixel sums over its window in the image. A two-step filter would read
    half as much, from the caches, but need room for its first step.
    """
    table = TABLE + (tl.program_id(0) // PARTS).to(tl.int64) * 12
    start, frame = tl.load(table), tl.load(table + 11)
    sized = True
    height, sized = side_of(table + 1, sized)
    width, sized = side_of(table + 2, sized)
    top, left = tl.load(table + 3).to(tl.int32), tl.load(table + 4).to(tl.int32)
    box_height, sized = side_of(table + 5, sized)
    box_width, sized = side_of(table + 6, sized)
    new_height, sized = side_of(table + 7, sized)
    new_width, sized = side_of(table + 8, sized)
    sized = sized & (box_height // SHRUNK <= new_height) & (box_width // SHRUNK <= new_width)
    pixel = (tl.program_id(0) % PARTS) * BLOCK + tl.arange(0, BLOCK)
    y = tl.load(table + 9).to(tl.int32) + pixel // W
    x = tl.load(table + 10).to(tl.int32) + pixel % W
    end = tl.where((frame >= 0) & (frame < count), H * W, 0)  # write nothing of a frame that does not exist
    length = height.to(tl.int64) * width * 3
    there = (start >= 0) & (length < 2**31) & (start <= size - length)
    read = tl.where(there & sized, end, 0)
    shown = (pixel < read) & (y >= 0) & (y < new_height) & (x >= 0) & (x < new_width)
    center_y, first_y, fall_y, taps_y = filter_of(y, box_height, new_height)
    center_x, first_x, fall_x, taps_x = filter_of(x, box_width, new_width)
    taps_y = tl.where(read > 0, taps_y, 0)  # an invalid size may ask for any number of them
    red, green = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    blue, total = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for i in range(taps_y):
        row = first_y + i
        weight_y = tl.maximum(1.0 - tl.abs(row.to(tl.float32) + 0.5 - center_y) * fall_y, 0.0)
        weight_y = tl.where(row < box_height, weight_y, 0.0)
        line = shown & (row < box_height) & (top + row >= 0) & (top + row < height)
        for j in range(taps_x):
            column = first_x + j
            weight = tl.maximum(1.0 - tl.abs(column.to(tl.float32) + 0.5 - center_x) * fall_x, 0.0) * weight_y
            weight = tl.where(column < box_width, weight, 0.0)
            inside = line & (column < box_width) & (left + column >= 0) & (left + column < width)
            at = STORE + start + ((top + row) * width + left + column) * 3
            red += weight * tl.load(at, mask=inside, other=0).to(tl.float32)
            green += weight * tl.load(at + 1, mask=inside, other=0).to(tl.float32)
            blue += weight * tl.load(at + 2, mask=inside, other=0).to(tl.float32)
            total += weight
    total = tl.where(shown, total, 1.0)
    out = FRAMES + (frame * (H * W) + pixel) * 3
    tl.store(out, (tl.div_rn(red, total) + NEAREST - NEAREST).to(tl.uint8), mask=pixel < end)
    tl.store(out + 1, (tl.div_rn(green, total) + NEAREST - NEAREST).to(tl.uint8), mask=pixel < end)
    tl.store(out + 2, (tl.div_rn(blue, total) + NEAREST - NEAREST).to(tl.uint8), mask=pixel < end)


def crop_resize(store: Tensor, table: Tensor, frames: Tensor) -> None:
    """Launch the kernel. Arguments as those of `fastil.kernels.crop_resize.plain`."""
    count, height, width, _ = frames.shape
    parts = triton.cdiv(height * width, BLOCK)
    launch(
        crop_and_resize,
        (len(table) * parts,),
        store,
        table.contiguous(),
        frames,
        len(store),
        count,
        num_warps=4,
        H=height,
        W=width,
        PARTS=parts,
        BLOCK=BLOCK,
    )
