"""Gather, crop, flip, normalise and lay out channels-last, straight from a resident uint8 data set.

On CUDA it is one launch, which reads each needed byte once and writes the batch in the precision of training. On a CPU
it works on a few images at a time, so that their bytes and floats stay in the caches.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastil.kernels.registration import jitted, register
from fastil.losses import check_integer, check_scalar, differentiable_in

CACHED = 200_000  # values; 0.8 MB as float32
SMALL = 256  # pixels of a frame; for fewer, a loop over images costs more than the formula


@differentiable_in()
def augment(
    images: Tensor,
    ids: Tensor,
    boxes: Tensor,
    flips: Tensor,
    mean: Sequence[float] | Tensor,
    std: Sequence[float] | Tensor,
    dtype: torch.dtype = torch.float32,
    size: tuple[int, int] | None = None,
) -> Tensor:
    """Return a batch of normalised crops, [B, 3, H, W] in channels-last layout.

    images: uint8 [N, h, w, 3]. ids: int64 [B]. boxes: int [B, 4] (top, left, height, width) in source pixels; height
    and width equal `size` (default: that of the images), because nothing is resized here. flips: bool [B], mirror left
    to right after the crop. mean, std: per channel, in units of the full range (tensors on the device save a copy per
    call). Outside the image is black *before* normalisation, (0 - mean) / std, as PIL pads.

    In float32 the result is (pixel / 255 - mean) / std, bit for bit. An id that the data
    set lacks raises IndexError on the CPU and gives NaN on CUDA, where raising would mean waiting for the device.
    Shapes and types that do not fit, a size below 1 and a std that is not above 0 raise ValueError; a mean or std that
    requires a gradient raises RuntimeError.
    """
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise ValueError(f"images must be uint8 [N, h, w, channels], not {images.dtype} {[*images.shape]}")
    batch_size = ids.shape[0]
    fit = ids.ndim == 1 and boxes.shape == (batch_size, 4) and flips.shape == (batch_size,)
    if not fit or ids.is_floating_point() or boxes.is_floating_point() or flips.dtype != torch.bool:
        given = " and ".join(f"{t.dtype} {[*t.shape]}" for t in (ids, boxes, flips))
        raise ValueError(f"ids, boxes and flips must be integers [B], integers [B, 4] and bool [B], not {given}")
    height, width = size or (images.shape[1], images.shape[2])
    for side in (height, width):
        check_integer("size", side, least=1)
    if not dtype.is_floating_point:
        raise ValueError(f"dtype={dtype}: must be a floating-point type")
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != images.shape[3]:
            raise ValueError(f"{name} must have {images.shape[3]} values, one per channel, not {len(values)}")
        for value in () if isinstance(values, Tensor) else values:
            check_scalar(name, value, positive=name == "std")
    mean, std = (torch.as_tensor(v, dtype=torch.float32, device=images.device) for v in (mean, std))
    batch: Tensor = torch.ops.fastil.augment(images, ids, boxes, flips, mean, std, dtype, height, width)
    return batch


def plain(
    images: Tensor,
    ids: Tensor,
    boxes: Tensor,
    flips: Tensor,
    mean: Tensor,
    std: Tensor,
    dtype: torch.dtype,
    out_height: int,
    out_width: int,
) -> Tensor:
    """Return the batch by one gather of whole pixels, as `augment` describes it."""
    count, height, width, channels = images.shape
    device = images.device
    rows = boxes[:, 0, None].long() + torch.arange(out_height, device=device)  # [B, H]
    across = torch.arange(out_width, device=device)
    columns = boxes[:, 1, None].long() + torch.where(flips[:, None], out_width - 1 - across, across)  # [B, W]
    row_inside = (rows >= 0) & (rows < height)
    column_inside = (columns >= 0) & (columns < width)
    # One flat gather of whole pixels. A pixel outside the image reads a valid address and is blackened afterwards.
    line = ids[:, None] * height + rows.clamp(0, height - 1)
    flat = line[:, :, None] * width + columns.clamp(0, width - 1)[:, None, :]
    pixels = images.view(count * height * width, channels)[flat.reshape(-1)].view(-1, out_height, out_width, channels)
    pixels *= (row_inside[:, :, None] & column_inside[:, None, :])[..., None]
    full = torch.full((), 255.0, device=device)  # CUDA turns division by a number into a multiplication
    normal = pixels.to(torch.float32).div_(full).sub_(mean).div_(std)
    return normal.to(dtype).permute(0, 3, 1, 2)


def by_slices(
    images: Tensor,
    ids: Tensor,
    boxes: Tensor,
    flips: Tensor,
    mean: Tensor,
    std: Tensor,
    dtype: torch.dtype,
    out_height: int,
    out_width: int,
) -> Tensor:
    """Return what `plain` does on a CPU, 2 to 6 times as fast from 32x32 on (python -m bench.cpu), because it has no
    index per pixel and no pass over the batch in main memory. It uses numpy, because torch would split each row over
    threads, and the loader's threads need the cores.
    """
    if ids.numel() and not 0 <= ids.min() <= ids.max() < len(images):
        raise IndexError(f"ids must lie in [0, {len(images)})")
    if out_height * out_width < SMALL:
        return plain(images, ids, boxes, flips, mean, std, dtype, out_height, out_width)
    channels = images.shape[3]
    row = out_width * channels  # long enough for wide instructions; three channels are not
    means, deviations = mean.repeat(out_width).numpy(), std.repeat(out_width).numpy()
    group = max(1, CACHED // max(1, out_height * row))
    crops = torch.empty(min(group, len(ids)), out_height, out_width, channels, dtype=torch.uint8)
    source, crop_arrays = images.numpy(), crops.numpy()
    out = torch.empty(len(ids), out_height, row, dtype=dtype)
    floats = np.empty((len(crops), out_height, row), np.float32)
    for start in range(0, len(ids), group):
        part = slice(start, start + group)
        for crop, i, (top, left) in zip(crop_arrays, ids[part].tolist(), boxes[part, :2].tolist(), strict=False):
            inside = source[i, max(0, top) : max(0, top + out_height), max(0, left) : max(0, left + out_width)]
            if inside.shape[:2] != (out_height, out_width):
                crop[...] = 0
            crop[max(0, -top) :, max(0, -left) :][: inside.shape[0], : inside.shape[1]] = inside
        for at in flips[part].nonzero()[:, 0].tolist():
            crops[at] = crops[at].flip(1)
        target = out[part]
        normal = target.numpy() if dtype == torch.float32 else floats[: len(target)]
        normal[...] = crop_arrays[: len(target)].reshape(normal.shape)
        normal /= np.float32(255)
        normal -= means
        normal /= deviations
        if dtype != torch.float32:
            target.copy_(torch.from_numpy(normal))
    return out.view(len(ids), out_height, out_width, channels).permute(0, 3, 1, 2)


def _fake(images: Tensor, ids: Tensor, boxes: Tensor, flips: Tensor, mean: Tensor, std: Tensor, *shape: Any) -> Tensor:
    dtype, height, width = shape
    return images.new_empty(ids.shape[0], height, width, images.shape[3], dtype=dtype).permute(0, 3, 1, 2)


register(
    "augment(Tensor images, Tensor ids, Tensor boxes, Tensor flips, Tensor mean, Tensor std, ScalarType dtype,"
    " int height, int width) -> Tensor",
    plain=by_slices,
    cuda=jitted("augment", "augment"),
    fake=_fake,
)
