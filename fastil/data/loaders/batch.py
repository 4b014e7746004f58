"""What loaders yield."""

from typing import NamedTuple

from torch import Tensor


class Batch(NamedTuple):
    """images [B, 3, H, W] channels-last, normalised; labels int64 [B], data set labels; ids int64 [B].

    share: the weight of these images in the update, where several processes share one.
    """

    images: Tensor
    labels: Tensor
    ids: Tensor
    share: float = 1.0


class Inputs(NamedTuple):
    """What a loader makes a batch of, on the device. It may be overwritten when the next is asked for.

    ids int64 [B]; flips bool [B]. boxes int32 [B, 4], where the images lie on the device and are cut there; frames
    uint8 [B, H, W, 3], where they come already cut.
    """

    ids: Tensor
    flips: Tensor
    boxes: Tensor | None = None
    frames: Tensor | None = None
