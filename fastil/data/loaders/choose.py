"""Which loader reads a split: all the same plan, all the same batches within what their decoders differ by."""

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastil import machine
from fastil.data.formats.beton import Beton
from fastil.data.loaders.batch import Batch, Inputs
from fastil.data.loaders.reference import Reference
from fastil.data.loaders.resident import Resident
from fastil.data.loaders.streaming import AnySplit
from fastil.data.loaders.threads import Threads
from fastil.data.sources import BACKENDS, Split
from fastil.errors import UserError
from fastil.plan import EpochPlan, Transform

# Seconds of a core for a JPEG by loader=threads, whatever its size and for each of its pixels, and images per second
# that a data centre's GPU trains a ResNet-18 on at 224x224, all rough: to say which of the two would wait.
PER_IMAGE, PER_PIXEL, GPU_RATE = 0.3e-3, 7e-9, 7_000


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

    def batches(self, plan: EpochPlan, first: int = 0, dtype: torch.dtype = torch.float32) -> Iterator[Batch]:
        """The batches of the plan in its order, from number `first` on, their images in `dtype`."""
        ...

    def inputs(self, plan: EpochPlan, first: int = 0) -> Iterator[Inputs]:
        """What these batches are made of, for `batch`."""
        ...

    def batch(self, inputs: Inputs, dtype: torch.dtype = torch.float32) -> Batch:
        """A batch from its inputs, by work of the device alone, which a CUDA graph can capture."""
        ...

    def whole(self, ids: NDArray[np.int64]) -> Tensor:
        """The images by the test-time transform, normalised, [n, 3, H, W]."""
        ...

    def keep(self, ids: NDArray[np.int64]) -> None:
        """Hold these images, and no others, decoded on the device (memory=resident)."""
        ...

    def overlay(self, ids: Tensor, images: Tensor) -> None:
        """Replace the pixels of some samples. ids: int64 [n]; images: uint8 [n, h, w, 3]."""
        ...

    def close(self) -> None:
        """Free everything it holds."""
        ...


def make_loader(dataset: AnySplit, backend: str, transform: Transform, device: str | torch.device) -> Loader:
    """A loader over one split, which lies in memory or in a .beton.

    backend: "resident" (all pixels on the device; only for a split in memory), "threads", "ffcv", "dali", "reference",
    or "auto", which `choose` decides. Raises UserError for another, or one that cannot be had.
    """
    device = torch.device(device)
    if backend == "auto":
        backend = choose(dataset, device)[0]
    if backend == "resident":
        if isinstance(dataset, Beton):
            raise UserError("loader=resident: a .beton is streamed; use loader=threads")
        return Resident(dataset, transform, device)
    if backend == "threads":
        return Threads(dataset, transform, device)
    if backend == "reference":
        return Reference(dataset, transform, device)
    if backend == "ffcv":
        from fastil.data.loaders.ffcv import Ffcv, library

        library()  # before anything is started
        return Ffcv(dataset, transform, device)
    if backend == "dali":
        if not installed("nvidia.dali"):
            raise UserError("loader=dali: DALI is not installed; pip install nvidia-dali-cuda130, or use threads")
        from fastil.data.loaders.dali import Dali

        return Dali(dataset, transform, device)
    raise UserError(f"loader={backend}: unknown; use one of {', '.join(BACKENDS)}")


def installed(module: str) -> bool:
    """Whether it could be imported; it is not."""
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # the package that it would lie in
        return False


def choose(dataset: AnySplit, device: torch.device) -> tuple[str, str]:
    """The backend for a split whose batches are for this device, and why."""
    if isinstance(dataset, Split):
        return "resident", "its pixels are in memory already"
    if device.type != "cpu" and dataset.mode != "jpeg":
        return "threads", "pixels are stored, not JPEGs only"
    return choose_for_jpegs(mean_pixels(dataset), device)


def choose_for_jpegs(pixels: float, device: torch.device) -> tuple[str, str]:
    """The backend for a .beton of JPEGs of so many pixels each, and why."""
    if device.type == "cpu":
        return "threads", "on a CPU the fastest"
    cores, rate = machine.cores(), cpu_rate(pixels)
    cores_read = f"{cores} cores read about {rate:,.0f} images/s of this size"
    if rate >= GPU_RATE:
        return "threads", f"{cores_read}, as many as a GPU trains on"
    if installed("nvidia.dali"):
        return "dali", f"{cores_read}; the GPU decodes"
    return "threads", f"{cores_read}; the GPU would decode with DALI: pip install nvidia-dali-cuda130"


def cpu_rate(pixels: float) -> float:
    """JPEGs of so many pixels that loader=threads reads per second on all cores, about."""
    return float(f"{machine.cores() / (PER_IMAGE + PER_PIXEL * pixels):.2g}")


def resident_bytes(dataset: AnySplit, exemplars: int) -> int:
    """Bytes that so many exemplars of average size take on the device."""
    return round(exemplars * 3 * mean_pixels(dataset))


def mean_pixels(dataset: AnySplit) -> float:
    """The mean number of pixels of an image."""
    return float(dataset.sizes.prod(axis=1, dtype=np.int64).mean())


def check_resident(dataset: AnySplit, exemplars: int, backend: str, device: torch.device) -> None:
    """Raise UserError where memory=resident is no use or cannot be. backend: not "auto"."""
    if isinstance(dataset, Split):
        raise UserError("memory=resident: all images are in memory already; leave it out")
    if device.type == "cuda" and backend in ("ffcv", "dali"):
        raise UserError(
            f"memory=resident: exemplars would be decoded and resized otherwise than loader={backend} does with new "
            "images; use loader=threads, or leave it out"
        )
    needed, there = resident_bytes(dataset, exemplars), memory_of(device)
    # The rest for the network, and for what else runs; a CPU's memory has the old ones, too, while new ones are read.
    part, name = (2, "half") if device.type == "cuda" else (3, "a third")
    if needed > there / part:
        raise UserError(
            f"memory=resident: {exemplars:,} exemplars take about {needed / 2**30:.1f} GiB, more than {name} of the "
            f"{there / 2**30:.1f} that {device} has; keep fewer, or leave it out"
        )


def memory_of(device: torch.device) -> int:
    """Bytes of a GPU, or that this process may use of the machine's."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return machine.memory()
