"""The choice of a loader. All follow the same plan and yield the same batches, up to differences of their decoders."""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from typing import Protocol

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastil import machine
from fastil.data.formats.beton import Beton
from fastil.data.loaders.batch import Batch, Inputs
from fastil.data.loaders.frames import scaled
from fastil.data.loaders.reference import Reference
from fastil.data.loaders.resident import Resident
from fastil.data.loaders.streaming import AnySplit
from fastil.data.loaders.threads import Threads
from fastil.data.sources import BACKENDS, Split
from fastil.errors import UserError
from fastil.plan import EpochPlan, Transform

SAMPLED, TURNS = 32, 3  # images of a split to read when timing it, and how often


class Loader(Protocol):
    """Batches of one split, for as many plans as the run has; the next plan may name any other ids.

    sizes: int32 [n, 2], height and width of every image, for plans; None if all have the transform's. worked: seconds
    that its threads have worked since it was made, their mean; None if it does not know.
    """

    name: str
    transform: Transform
    device: torch.device
    mean: Tensor
    std: Tensor

    @property
    def worked(self) -> float | None: ...

    @property
    def sizes(self) -> NDArray[np.int32] | None: ...

    def batches(self, plan: EpochPlan, first: int = 0, dtype: torch.dtype = torch.float32) -> Iterator[Batch]:
        """Yield the batches of the plan in its order, from number `first` on, with images in `dtype`."""
        ...

    def inputs(self, plan: EpochPlan, first: int = 0) -> Iterator[Inputs]:
        """Yield what `batch` makes these batches from."""
        ...

    def batch(self, inputs: Inputs, dtype: torch.dtype = torch.float32) -> Batch:
        """Return a batch made from its inputs, by work of the device alone, so that a CUDA graph can capture it."""
        ...

    def whole(self, ids: NDArray[np.int64]) -> Tensor:
        """Return the images under the test-time transform, normalised, [n, 3, H, W]."""
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
    """Return a loader over one split, in memory or in a .beton.

    backend: "resident" (all pixels on the device; only for a split in memory), "threads", "ffcv", "dali", "reference",
    or "auto": resident if possible, else threads. (A run knows what it trains, and uses `choose`.) Raises UserError for
    an unknown backend, or one that is not available.
    """
    device = torch.device(device)
    if backend == "auto":
        backend = "resident" if isinstance(dataset, Split) else "threads"
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

        library()  # raises before anything is started
        return Ffcv(dataset, transform, device)
    if backend == "dali":
        if not installed("nvidia.dali"):
            raise UserError("loader=dali: DALI is not installed; pip install nvidia-dali-cuda130, or use threads")
        from fastil.data.loaders.dali import Dali

        return Dali(dataset, transform, device)
    raise UserError(f"loader={backend}: unknown; use one of {', '.join(BACKENDS)}")


def installed(module: str) -> bool:
    """Return whether a module could be imported; it is not imported."""
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # its package is missing
        return False


def choose(
    train: AnySplit,
    val: AnySplit,
    device: torch.device,
    size: tuple[int, int],
    trained: Callable[[], float],
    held: bool = False,
) -> tuple[str, str]:
    """Return the backend of a run on these splits and this device, and why.

    size: height and width of a frame. trained: measures how many images per second the device trains on; it is called
    only if that decides. held: whether exemplars stay decoded (memory=resident).
    """
    if isinstance(train, Split):
        return "resident", "its pixels are in memory already"
    if device.type == "cpu":
        return "threads", "on a CPU the fastest"
    if any(isinstance(split, Split) or split.mode != "jpeg" for split in (train, val)):
        return "threads", "pixels are stored, not JPEGs only"
    if held:  # they must be decoded like the new images
        return "threads", "exemplars are held decoded"
    return by_rates(read_rate(sample(train), size), trained())


def by_rates(read: float, trained: float) -> tuple[str, str]:
    """Return the backend for a GPU, and why, from the JPEGs per second that the cores read and that training takes."""
    rates = f"{machine.cores()} cores read about {read:,.0f} images/s, and the GPU trains on about {trained:,.0f}"
    if read >= trained:
        return "threads", rates
    if installed("nvidia.dali"):
        return "dali", f"{rates}: it decodes, too"
    return "threads", f"{rates}: it would decode, too, with DALI: pip install nvidia-dali-cuda130"


def sample(beton: Beton) -> list[memoryview]:
    """Return JPEGs from all over a file."""
    return [beton.view(i) for i in np.unique(np.linspace(0, len(beton) - 1, SAMPLED).astype(np.int64)).tolist()]


def read_rate(jpegs: Sequence[bytes | memoryview], size: tuple[int, int]) -> float:
    """Return how many such images loader=threads decodes and resizes per second on all cores, to two digits.

    One core is timed by its own work, so that other programs do not count; the others are assumed to do as much.
    """

    def seconds() -> float:
        began = time.thread_time()
        for jpeg in jpegs:
            try:
                scaled(torch.from_numpy(simplejpeg.decode_jpeg(jpeg)), size)
            except ValueError:  # damaged; the loader will say so
                continue
        return time.thread_time() - began

    torch.get_num_threads()  # see `Threads`: from here on the main thread has a count of its own
    with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as one:
        took = float(np.median([one.submit(seconds).result() for _ in range(TURNS)]))
    return float(f"{machine.cores() * len(jpegs) / took:.2g}")


def resident_bytes(dataset: AnySplit, exemplars: int) -> int:
    """Return the bytes that this many exemplars of average size take on the device."""
    return round(exemplars * 3 * mean_pixels(dataset))


def mean_pixels(dataset: AnySplit) -> float:
    """Return the mean number of pixels of an image."""
    return float(dataset.sizes.prod(axis=1, dtype=np.int64).mean())


def check_resident(dataset: AnySplit, exemplars: int, backend: str, device: torch.device) -> None:
    """Raise UserError if memory=resident is useless or impossible. backend: not "auto"."""
    if isinstance(dataset, Split):
        raise UserError("memory=resident: all images are in memory already; leave it out")
    if device.type == "cuda" and backend in ("ffcv", "dali"):
        raise UserError(
            f"memory=resident: exemplars would be decoded and resized otherwise than loader={backend} does with new "
            "images; use loader=threads, or leave it out"
        )
    needed, there = resident_bytes(dataset, exemplars), memory_of(device)
    # The rest is for the network and other programs; a CPU also holds the old images while new ones are read.
    part, name = (2, "half") if device.type == "cuda" else (3, "a third")
    if needed > there / part:
        raise UserError(
            f"memory=resident: {exemplars:,} exemplars take about {needed / 2**30:.1f} GiB, more than {name} of the "
            f"{there / 2**30:.1f} that {device} has; keep fewer, or leave it out"
        )


def memory_of(device: torch.device) -> int:
    """Return the bytes of a GPU, or those that this process may use of the machine's memory."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return machine.memory()
