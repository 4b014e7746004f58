"""From an image to a frame: a box of it at the size of the output, following a transform."""

from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from fastil.data.formats.pixels import middle
from fastil.kernels.crop_resize import cut
from fastil.plan import Transform

Box = tuple[int, int, int, int]  # top, left, height, width
Boxes = NDArray[np.int32]
Image = TypeVar("Image")


def frame_of(
    image: Image, box: Box, transform: Transform, resize: Callable[[Image, Box, tuple[int, int]], Image]
) -> Image:
    """Return a box of an image at the size of the output; outside the image is black.

    resize(image, box, size): returns that box at this height and width, unchanged if it has them.
    """
    if transform.resize is not None:
        box = unthinned(box)
        size, inner = central((box[2], box[3]), transform)
        image, box = resize(image, box, size), inner
    return resize(image, box, (transform.height, transform.width))


def unthinned(box: Box) -> Box:
    """Return the middle of a box that is very long or very wide; resized as a whole it would fill the memory."""
    top, left, height, width = box
    x0, y0, x1, y1 = middle((width, height))
    return top + y0, left + x0, y1 - y0, x1 - x0


def central(size: tuple[int, int], transform: Transform) -> tuple[tuple[int, int], Box]:
    """Return, for an image of this height and width and a transform with `resize`, the size it is resized to, and the
    central box of the output's size in that. It rounds like torchvision.
    """
    assert transform.resize is not None
    short, long = min(size), max(size)
    longer = int(transform.resize * long / short)
    new = (transform.resize, longer) if size[0] <= size[1] else (longer, transform.resize)
    height, width = transform.height, transform.width
    return new, (round((new[0] - height) / 2), round((new[1] - width) / 2), height, width)


def resizes(boxes: Boxes, transform: Transform) -> tuple[Boxes, Boxes, Boxes]:
    """Return, for boxes int32 [n, 4]: what is cut out, [n, 4], the size it is resized to, [n, 2], and the top left
    corner of the frame in that, [n, 2].
    """
    if transform.resize is None:
        frame = np.array([transform.height, transform.width], np.int32)
        return boxes, np.tile(frame, (len(boxes), 1)), np.zeros((len(boxes), 2), np.int32)
    boxes = np.array([unthinned(box) for box in boxes.tolist()], np.int32).reshape(-1, 4)
    placed = [central((height, width), transform) for height, width in boxes[:, 2:].tolist()]
    sizes = np.array([size for size, _ in placed], np.int32).reshape(-1, 2)
    return boxes, sizes, np.array([frame[:2] for _, frame in placed], np.int32).reshape(-1, 2)


def scaled(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Return uint8 [h, w, 3], contiguous, on a CPU, at this height and width: bilinear, antialiased."""
    new = F.interpolate(channels_last(image), size=size, mode="bilinear", antialias=True, align_corners=False)
    return new[0].permute(1, 2, 0)


def channels_last(image: Tensor) -> Tensor:
    """Return the image as [1, 3, h, w], channels-last by all its strides. Otherwise the result of a resize is not, and
    would have to be turned.
    """
    height, width = image.shape[:2]
    return image.as_strided((1, 3, height, width), (height * width * 3, 1, width * 3, 3))


def resized(image: Tensor, box: Box, size: tuple[int, int]) -> Tensor:
    """The resize of `frame_of` by torch, on a CPU: uint8 [h, w, 3]."""
    part = cut(image, box, lambda height, width: image.new_empty(height, width, 3))
    return part if part.shape[:2] == size else scaled(part.contiguous(), size)
