"""The resident loader: the whole set is on the device as uint8, and one `augment` cuts every batch from it.

CIFAR-100 takes 184 MB this way. A step, a replay memory or a test pass is a list of ids in the plan; nothing is copied,
decoded or sent again.
"""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastil import kernels
from fastil.data.loaders.batch import Batch, Inputs
from fastil.data.sources import Split
from fastil.plan import EpochPlan, Transform, sequential_plan


class Resident:
    """Batches of one split, for as many plans as the run has. `close` frees the images.

    The boxes of its plans have the height and width of the transform: it crops and pads, but does not resize.
    """

    name = "resident"
    sizes = None  # all images have the transform's
    worked: float | None = None

    def __init__(self, split: Split, transform: Transform, device: torch.device) -> None:
        if split.images.dtype != np.uint8 or split.images.ndim != 4:
            raise ValueError(f"images must be uint8 [N, h, w, 3], not {split.images.dtype} {split.images.shape}")
        self.transform = transform
        self.device = device
        self.images: Tensor | None = torch.tensor(split.images, device=device)  # a copy: `overlay` writes into it
        self.labels = torch.as_tensor(split.labels, device=device)
        self.mean = torch.tensor(transform.mean, device=device)
        self.std = torch.tensor(transform.std, device=device)

    def batches(self, plan: EpochPlan, first: int = 0, dtype: torch.dtype = torch.float32) -> Iterator[Batch]:
        """Yield the batches of the plan in its order, from number `first` on, with images in `dtype`."""
        for inputs in self.inputs(plan, first):
            yield self.batch(inputs, dtype)

    def inputs(self, plan: EpochPlan, first: int = 0) -> Iterator[Inputs]:
        """Yield what the batches of the plan are made from, from number `first` on."""
        if self.images is None:
            raise ValueError("this loader was closed")
        # One transfer per epoch; every batch is then a view of it.
        ids = torch.as_tensor(plan.ids, device=self.device)
        boxes = torch.as_tensor(plan.boxes, device=self.device)
        flips = torch.as_tensor(plan.flips, device=self.device)
        for number, part in enumerate(plan.batches()):
            if number >= first:
                yield Inputs(ids[part], flips[part], boxes=boxes[part])

    def batch(self, inputs: Inputs, dtype: torch.dtype = torch.float32) -> Batch:
        """Cut the images out and normalise them, by work of the device alone."""
        assert self.images is not None
        assert inputs.boxes is not None
        size = (self.transform.height, self.transform.width)
        images = kernels.augment(self.images, inputs.ids, inputs.boxes, inputs.flips, self.mean, self.std, dtype, size)
        return Batch(images, self.labels[inputs.ids], inputs.ids)

    def whole(self, ids: NDArray[np.int64]) -> Tensor:
        """Return the images under the test-time transform, normalised, [n, 3, H, W]."""
        plan = sequential_plan(ids, self.transform, max(2, len(ids)))
        return next(self.batches(plan)).images

    def keep(self, ids: NDArray[np.int64]) -> None:
        """Do nothing: all images are on the device."""

    def overlay(self, ids: Tensor, images: Tensor) -> None:
        """Replace the pixels of some samples. ids: int64 [n]; images: uint8 [n, h, w, 3]."""
        if self.images is None:
            raise ValueError("this loader was closed")
        if images.dtype != torch.uint8 or images.shape != (len(ids), *self.images.shape[1:]):
            shape = [len(ids), *self.images.shape[1:]]
            raise ValueError(f"images must be uint8 {shape}, not {images.dtype} {[*images.shape]}")
        self.images[ids] = images

    def close(self) -> None:
        self.images = None
