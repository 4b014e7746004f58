"""From an image to a frame: a box of it at the size of the output, by a transform's rules."""

from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from fastil.data.formats.pixels import middle
from fastil.plan import Transform

Box = tuple[int, int, int, int]  # top, left, height, width
Image = TypeVar("Image")
Array = TypeVar("Array", NDArray[np.uint8], Tensor)  # uint8 [h, w, 3]


def frame_of(
    image: Image, box: Box, transform: Transform, resize: Callable[[Image, Box, tuple[int, int]], Image]
) -> Image:
    """A box of an image at the size of the output; outside the image is black.

    resize(image, box, size): that box at this height and width, untouched where it has them.
    """
    if transform.resize is not None:
        box = unthinned(box)
        size, inner = central((box[2], box[3]), transform)
        image, box = resize(image, box, size), inner
    return resize(image, box, (transform.height, transform.width))


def unthinned(box: Box) -> Box:
    """The middle of a box that is very long or very wide; resized as a whole it would fill the memory."""
    top, left, height, width = box
    x0, y0, x1, y1 = middle((width, height))
    return top + y0, left + x0, y1 - y0, x1 - x0


def central(size: tuple[int, int], transform: Transform) -> tuple[tuple[int, int], Box]:
    """For an image of this height and width and a transform with `resize`: what it is resized to, and the central box
    of the output's size in that; the rounding is torchvision's."""
    assert transform.resize is not None
    short, long = min(size), max(size)
    longer = int(transform.resize * long / short)
    new = (transform.resize, longer) if size[0] <= size[1] else (longer, transform.resize)
    height, width = transform.height, transform.width
    return new, (round((new[0] - height) / 2), round((new[1] - width) / 2), height, width)


def cut(image: Array, box: Box, room: Callable[[int, int], Array]) -> Array:
    """A box of an image; outside the image is black. A view where it lies inside, else in room(height, width)."""
    top, left, height, width = box
    inside = image[max(0, top) : max(0, top + height), max(0, left) : max(0, left + width)]
    if inside.shape[:2] == (height, width):
        return inside
    whole = room(height, width)
    whole[...] = 0
    at = whole[max(0, -top) :, max(0, -left) :]
    at[: inside.shape[0], : inside.shape[1]] = inside
    return whole


def scaled(image: Tensor, size: tuple[int, int]) -> Tensor:
    """uint8 [h, w, 3], contiguous, at this height and width: bilinear, antialiased, on the device it lies on."""
    if image.device.type != "cpu":
        return in_floats(image, size)
    new = F.interpolate(channels_last(image), size=size, mode="bilinear", antialias=True, align_corners=False)
    return new[0].permute(1, 2, 0)


def in_floats(image: Tensor, size: tuple[int, int]) -> Tensor:
    """`scaled` where torch resizes no bytes, on a GPU; within one of 255."""
    new = F.interpolate(channels_last(image).float(), size=size, mode="bilinear", antialias=True, align_corners=False)
    return new.round_().clamp_(0, 255).byte()[0].permute(1, 2, 0)


def channels_last(image: Tensor) -> Tensor:
    """[1, 3, h, w] by all its strides, or what comes out of a resize is not, and would have to be turned."""
    height, width = image.shape[:2]
    return image.as_strided((1, 3, height, width), (height * width * 3, 1, width * 3, 3))


def resized(image: Tensor, box: Box, size: tuple[int, int]) -> Tensor:
    """For `frame_of`: uint8 [h, w, 3] by torch, where the pixels lie."""
    part = cut(image, box, lambda height, width: image.new_empty(height, width, 3))
    return part if part.shape[:2] == size else scaled(part.contiguous(), size)
