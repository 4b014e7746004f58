"""Gather, crop, flip, normalise and lay out channels-last, straight from a resident uint8 data set.

On CUDA one launch, which reads each wanted byte once and writes the batch in the precision it is trained in.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastil.kernels.registration import jitted, register


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
    """Batch of normalised crops.

    images: uint8 [N, h, w, 3]. ids: int64 [B]. boxes: int [B, 4] (top, left, height, width) in source pixels; height
    and width equal `size` (default: that of the images), for nothing is resized here. flips: bool [B], mirror left to
    right after the crop. mean, std: per channel, in units of the full range (tensors on the device save a copy per
    call). Outside the image is black *before* normalisation, (0 - mean) / std, as PIL pads.

    Returns [B, 3, H, W] in channels-last layout; in float32 bit for bit (pixel / 255 - mean) / std. An id that the data
    set lacks raises IndexError on the CPU and gives NaN on CUDA, where raising would mean waiting for the device.
    """
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise ValueError(f"images must be uint8 [N, h, w, channels], not {images.dtype} {[*images.shape]}")
    batch_size = ids.shape[0]
    if ids.ndim != 1 or boxes.shape != (batch_size, 4) or flips.shape != (batch_size,) or boxes.is_floating_point():
        shapes = f"{[*ids.shape]}, {boxes.dtype} {[*boxes.shape]} and {[*flips.shape]}"
        raise ValueError(f"ids, boxes and flips must be [B], integers [B, 4] and [B], not {shapes}")
    height, width = size or (images.shape[1], images.shape[2])
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
    count, height, width, channels = images.shape
    device = images.device
    if device.type == "cpu" and ids.numel() and not 0 <= ids.min() <= ids.max() < count:
        raise IndexError(f"ids must lie in [0, {count})")
    rows = boxes[:, 0, None].long() + torch.arange(out_height, device=device)  # [B, H]
    across = torch.arange(out_width, device=device)
    columns = boxes[:, 1, None].long() + torch.where(flips[:, None], out_width - 1 - across, across)  # [B, W]
    row_inside = (rows >= 0) & (rows < height)
    column_inside = (columns >= 0) & (columns < width)
    # One flat gather of whole pixels; a pixel outside reads a valid address and is blackened afterwards.
    line = ids[:, None] * height + rows.clamp(0, height - 1)
    flat = line[:, :, None] * width + columns.clamp(0, width - 1)[:, None, :]
    pixels = images.view(count * height * width, channels)[flat.reshape(-1)].view(-1, out_height, out_width, channels)
    pixels *= (row_inside[:, :, None] & column_inside[:, None, :])[..., None]
    full = torch.full((), 255.0, device=device)  # by a tensor: CUDA turns division by a number into a multiplication
    normal = pixels.to(torch.float32).div_(full).sub_(mean).div_(std)
    return normal.to(dtype).permute(0, 3, 1, 2)


def _fake(images: Tensor, ids: Tensor, boxes: Tensor, flips: Tensor, mean: Tensor, std: Tensor, *shape: Any) -> Tensor:
    dtype, height, width = shape
    return images.new_empty(ids.shape[0], height, width, images.shape[3], dtype=dtype).permute(0, 3, 1, 2)


register(
    "augment(Tensor images, Tensor ids, Tensor boxes, Tensor flips, Tensor mean, Tensor std, ScalarType dtype,"
    " int height, int width) -> Tensor",
    plain=plain,
    cuda=jitted("augment", "augment"),
    fake=_fake,
)
