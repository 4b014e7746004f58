"""What loaders yield."""

from typing import NamedTuple

from torch import Tensor


class Batch(NamedTuple):
    """images [B, 3, H, W] channels-last, normalised; labels int64 [B], data set labels; ids int64 [B]."""

    images: Tensor
    labels: Tensor
    ids: Tensor
