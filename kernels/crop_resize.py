"""Cut boxes out of images of any sizes and resize them, straight from one buffer into the frames of a batch.

On CUDA it is one launch for all images of a batch, however they differ. On a CPU it takes one image after the other.
"""

from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from fastil.kernels.registration import jitted, register
from fastil.losses import differentiable_in

COLUMNS = 12  # of a table
SIDE_LIMIT = 2**24  # sides are shorter, in pixels: float32 counts the positions below this exactly
MOST_SHRUNK = 4096  # a box may be at most that many times as long as its output, which bounds the sum of a pixel
Array = TypeVar("Array", NDArray[np.uint8], Tensor)  # uint8 [h, w, 3]


@differentiable_in()
def crop_resize(store: Tensor, table: Tensor, frames: Tensor) -> None:
    """Write a frame for each row of the table, bilinear and antialiased like torch's interpolate in float32, and
    rounded.

    store: uint8 [bytes], images [height, width, 3] one after the other. frames: uint8 [N, H, W, 3], contiguous. table:
    int64 [B, 12], a row for each frame: where its image begins in the store, and that one's height and width; the box
    (top, left, height, width) in pixels of the image, outside which it is black; height and width that the box is
    resized to; top and left of the frame in that, outside which it is black, too; the number of the frame.

    An image outside the store or of 2**31 bytes or more, a side not from 1 to 2**24 - 1, a box more than 4096 times as
    long as its output, and a frame that does not exist raise IndexError on the CPU. On CUDA, where raising would mean
    waiting for the device, the frame is black or not written. Shapes and types that do not fit raise ValueError.
    """
    if store.dtype != torch.uint8 or store.ndim != 1:
        raise ValueError(f"store must be uint8 [bytes], not {store.dtype} {[*store.shape]}")
    if table.dtype != torch.int64 or table.ndim != 2 or table.shape[1] != COLUMNS:
        raise ValueError(f"table must be int64 [B, {COLUMNS}], not {table.dtype} {[*table.shape]}")
    if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or not frames.is_contiguous():
        raise ValueError(f"frames must be uint8 [N, H, W, 3], contiguous, not {frames.dtype} {[*frames.shape]}")
    torch.ops.fastil.crop_resize(store, table, frames)


def plain(store: Tensor, table: Tensor, frames: Tensor) -> None:
    """Write the frames with torch, one after the other."""

    def room(height: int, width: int) -> Tensor:
        return store.new_empty(height, width, 3)

    for start, height, width, top, left, box_height, box_width, *size, y, x, number in table.tolist():
        end, sides = start + height * width * 3, (height, width, box_height, box_width, *size)
        there = min(sides) > 0 and max(sides) < SIDE_LIMIT and start >= 0 and end <= len(store) and end - start < 2**31
        there = there and box_height // MOST_SHRUNK <= size[0] and box_width // MOST_SHRUNK <= size[1]
        if not (there and 0 <= number < len(frames)):
            raise IndexError(
                f"image at {start} of {height}x{width}, box of {box_height}x{box_width} to {size[0]}x{size[1]}, frame "
                f"{number}: the store has {len(store)} bytes and there are {len(frames)} frames"
            )
        part = cut(store[start:end].view(height, width, 3), (top, left, box_height, box_width), room)
        if size != [box_height, box_width]:
            floats = part.permute(2, 0, 1)[None].float()
            floats = F.interpolate(floats, size=size, mode="bilinear", antialias=True, align_corners=False)
            part = floats.round_().byte()[0].permute(1, 2, 0)
        frames[number] = cut(part, (y, x, frames.shape[1], frames.shape[2]), room)


def cut(image: Array, box: tuple[int, int, int, int], room: Callable[[int, int], Array]) -> Array:
    """Return a box of an image, black outside the image: a view if it lies inside, else in room(height, width)."""
    top, left, height, width = box
    inside = image[max(0, top) : max(0, top + height), max(0, left) : max(0, left + width)]
    if inside.shape[:2] == (height, width):
        return inside
    whole = room(height, width)
    whole[...] = 0
    at = whole[max(0, -top) :, max(0, -left) :]
    at[: inside.shape[0], : inside.shape[1]] = inside
    return whole


register(
    "crop_resize(Tensor store, Tensor table, Tensor(a!) frames) -> ()",
    plain=plain,
    cuda=jitted("crop_resize", "crop_resize"),
    fake=lambda store, table, frames: None,
)
