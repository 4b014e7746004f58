"""The batches that loaders yield."""

from typing import NamedTuple

from torch import Tensor


class Batch(NamedTuple):
    """Images [B, 3, H, W] channels-last, normalised; labels int64 [B], data set labels; ids int64 [B].

    share: the weight of these images in the update, if several processes share one.
    """

    images: Tensor
    labels: Tensor
    ids: Tensor
    share: float = 1.0


class Inputs(NamedTuple):
    """What a loader makes a batch from, on the device. The next one may overwrite it.

    ids int64 [B]; flips bool [B]. boxes int32 [B, 4], if the images are on the device and cut there; frames uint8 [B,
    H, W, 3], if they arrive already cut.
    """

    ids: Tensor
    flips: Tensor
    boxes: Tensor | None = None
    frames: Tensor | None = None
