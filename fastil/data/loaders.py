"""Which loader reads a split: all the same plan, all the same batches within what their decoders differ by."""

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastil.data.batch import Batch
from fastil.data.beton import Beton
from fastil.data.reference import Reference
from fastil.data.resident import Resident
from fastil.data.sources import Split
from fastil.data.streaming import Images
from fastil.data.threads import Threads
from fastil.errors import UserError
from fastil.plan import EpochPlan, Transform

BACKENDS = ("auto", "resident", "threads", "reference", "ffcv", "dali")


class Loader(Protocol):
    """Batches of one split, for as many plans as the run has; the next plan may name any other ids.

    sizes: int32 [n, 2], height and width of every image, for plans; None where all have the transform's.
    """

    name: str
    transform: Transform
    device: torch.device
    mean: Tensor
    std: Tensor

    @property
    def sizes(self) -> NDArray[np.int32] | None: ...

    def batches(self, plan: EpochPlan, first: int = 0) -> Iterator[Batch]:
        """The batches of the plan in its order, from number `first` on."""
        ...

    def whole(self, ids: NDArray[np.int64]) -> Tensor:
        """The images by the test-time transform, normalised, [n, 3, H, W]."""
        ...

    def overlay(self, ids: Tensor, images: Tensor) -> None:
        """Replace the pixels of some samples. ids: int64 [n]; images: uint8 [n, h, w, 3]."""
        ...

    def close(self) -> None:
        """Free everything it holds."""
        ...


def make_loader(dataset: Images, backend: str, transform: Transform, device: str | torch.device) -> Loader:
    """A loader over one split, which lies in memory or in a .beton.

    backend: "resident" (all pixels on the device; only for a split in memory), "threads", "ffcv", "dali", "reference",
    or "auto", which `choose` decides. Raises UserError for another, or one that cannot be had.
    """
    device = torch.device(device)
    if backend == "auto":
        backend = choose(dataset)[0]
    if backend == "resident":
        if isinstance(dataset, Beton):
            raise UserError("loader=resident: a .beton is streamed; use loader=threads")
        return Resident(dataset, transform, device)
    if backend == "threads":
        return Threads(dataset, transform, device)
    if backend == "reference":
        return Reference(dataset, transform, device)
    if backend == "ffcv":
        from fastil.data.ffcv import Ffcv, library

        library()  # before anything is started
        return Ffcv(dataset, transform, device)
    if backend == "dali":
        if not installed("nvidia.dali"):
            raise UserError("loader=dali: DALI is not installed; pip install nvidia-dali-cuda130, or use threads")
        from fastil.data.dali import Dali

        return Dali(dataset, transform, device)
    raise UserError(f"loader={backend}: unknown; use one of {', '.join(BACKENDS)}")


def installed(module: str) -> bool:
    """Whether it could be imported; it is not."""
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # the package that it would lie in
        return False


def choose(dataset: Images) -> tuple[str, str]:
    """The backend for a split, and why."""
    if isinstance(dataset, Split):
        return "resident", "its pixels are in memory already"
    return "threads", "it is streamed"
