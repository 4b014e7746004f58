"""Gather, crop, flip, normalise, cast and lay out channels-last, in one launch, from uint8 NHWC."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastil.kernels.jit.launching import launch

BLOCK = 1_024  # values per program; with 4 warps 8 per thread, a 16-byte store of bfloat16


@triton.jit(do_not_specialize=["count"])
def augment_pixels(
    IMAGES,  # [N, h, w, C] uint8
    IDS,  # [B] int
    BOXES,  # [B, 4] int: top, left, height, width
    FLIPS,  # [B] bool
    MEAN, STD,  # [C] float
    OUT,  # [B, H, W, C] float, the memory of a channels-last [B, C, H, W]
    count,  # N
    SOURCE_H: tl.constexpr, SOURCE_W: tl.constexpr, C: tl.constexpr,
    H: tl.constexpr, W: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One part of one image per program; neighbouring threads write neighbouring values."""
    VALUES: tl.constexpr = H * W * C
    image = (tl.program_id(0) // PARTS).to(tl.int64)
    value = (tl.program_id(0) % PARTS) * BLOCK + tl.arange(0, BLOCK)
    channel, pixel = value % C, value // C
    sample = tl.load(IDS + image).to(tl.int64)
    end = tl.where((sample >= 0) & (sample < count), VALUES, 0)  # read nothing for an id that the data set lacks
    column = pixel % W
    column = tl.where(tl.load(FLIPS + image) != 0, W - 1 - column, column)
    # 64 bits, because a box may lie anywhere.
    y = tl.load(BOXES + image * 4).to(tl.int64) + pixel // W
    x = tl.load(BOXES + image * 4 + 1).to(tl.int64) + column
    inside = (value < end) & (y >= 0) & (y < SOURCE_H) & (x >= 0) & (x < SOURCE_W)
    at = ((sample * SOURCE_H + y) * SOURCE_W + x) * C + channel
    byte = tl.load(IMAGES + at, mask=inside, other=0).to(tl.float32)
    mean, std = tl.zeros([BLOCK], tl.float32), tl.full([BLOCK], 1.0, tl.float32)
    for k in tl.static_range(C):
        mean = tl.where(channel == k, tl.load(MEAN + k).to(tl.float32), mean)
        std = tl.where(channel == k, tl.load(STD + k).to(tl.float32), std)
    # Divisions are rounded as IEEE demands, so that the float32 result is the CPU's, bit for bit.
    normal = tl.div_rn(tl.div_rn(byte, tl.full([BLOCK], 255.0, tl.float32)) - mean, std)
    normal = tl.where(value < end, normal, float("nan"))  # so that its image does not pass for a black one
    tl.store(OUT + image * VALUES + value, normal.to(OUT.dtype.element_ty), mask=value < VALUES)


def augment(
    images: Tensor,
    ids: Tensor,
    boxes: Tensor,
    flips: Tensor,
    mean: Tensor,
    std: Tensor,
    dtype: torch.dtype,
    height: int,
    width: int,
) -> Tensor:
    """Launch the kernel. Arguments and result as those of `fastil.kernels.augment.plain`."""
    count, source_height, source_width, channels = images.shape
    out = torch.empty(len(ids), height, width, channels, dtype=dtype, device=images.device)
    parts = triton.cdiv(height * width * channels, BLOCK)
    launch(
        augment_pixels,
        (len(ids) * parts,),
        images.contiguous(),
        ids.contiguous(),
        boxes.contiguous(),
        flips.contiguous(),
        mean.contiguous(),
        std.contiguous(),
        out,
        count,
        num_warps=4,
        SOURCE_H=source_height,
        SOURCE_W=source_width,
        C=channels,
        H=height,
        W=width,
        PARTS=parts,
        BLOCK=BLOCK,
    )
    return out.permute(0, 3, 1, 2)
