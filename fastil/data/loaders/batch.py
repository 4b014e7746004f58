"""What loaders yield."""

from typing import NamedTuple

from torch import Tensor


class Batch(NamedTuple):
    """images [B, 3, H, W] channels-last, normalised; labels int64 [B], data set labels; ids int64 [B].

    whole: how many images the update has, where some of them are on other processes.
    """

    images: Tensor
    labels: Tensor
    ids: Tensor
    whole: int | None = None

    @property
    def total(self) -> int:
        """The number of images of the update, over all processes."""
        return len(self.ids) if self.whole is None else self.whole

    @property
    def share(self) -> float:
        """The part of the update's images that is here."""
        return 1.0 if self.whole is None else len(self.ids) / self.whole


class Inputs(NamedTuple):
    """What a loader makes a batch of, on the device. It may be overwritten when the next is asked for.

    ids int64 [B]; flips bool [B]. boxes int32 [B, 4], where the images lie on the device and are cut there; frames
    uint8 [B, H, W, 3], where they come already cut.
    """

    ids: Tensor
    flips: Tensor
    boxes: Tensor | None = None
    frames: Tensor | None = None
