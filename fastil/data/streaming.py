"""What the loaders share that read images anew for every epoch: threads, reference, DALI and FFCV.

A backend turns a plan into uint8 frames of the output's size, batch by batch and in its order. What every image gets
that does not depend on where it came from (mirror, normalisation, the cast) is done on the device.
"""

import io
import os
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fastil import kernels
from fastil.data.batch import Batch
from fastil.data.beton import RAW, Beton
from fastil.data.sources import Split
from fastil.errors import UserError
from fastil.plan import EpochPlan, Transform, sequential_plan

Images = Beton | Split
Box = tuple[int, int, int, int]  # top, left, height, width


class Streaming(ABC):
    """Batches of one split, for as many plans as the run has. `close` frees all that is held.

    sizes: int32 [n, 2], height and width of every image, which plans need.
    """

    name: str

    def __init__(self, images: Images, transform: Transform, device: torch.device) -> None:
        self.images, self.transform, self.device = images, transform, device
        self.unresized = replace(transform, resize=None)
        self.where = str(images.path) if isinstance(images, Beton) else "the data set"
        self.dtype = torch.float32  # autocast casts inside the network, where it knows which layers want it
        self.sizes: NDArray[np.int32] = images.sizes.copy()
        self.labels = torch.as_tensor(images.labels, device=device)
        self.mean = torch.tensor(transform.mean, device=device)
        self.std = torch.tensor(transform.std, device=device)
        self.replaced: dict[int, NDArray[np.uint8]] = {}
        self.copies = None
        if device.type == "cuda":
            self.copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.closed = False

    @abstractmethod
    def frames(self, plan: EpochPlan, first: int) -> Generator[Tensor, None, None]:
        """uint8 [B, H, W, 3] of each batch from number `first` on, boxes cut out and resized, not mirrored. A frame
        may be overwritten when the next is asked for. Raises UserError that names an image that does not decode."""

    def batches(self, plan: EpochPlan, first: int = 0) -> Iterator[Batch]:
        """The batches of the plan in its order, from number `first` on."""
        if self.closed:
            raise ValueError("this loader was closed")
        ids = torch.as_tensor(plan.ids, device=self.device)
        flips = torch.as_tensor(plan.flips, device=self.device)
        size = (self.transform.height, self.transform.width)
        longest = min(len(plan.ids), plan.batch_size + 1)
        rows = torch.arange(longest, device=self.device)
        whole = torch.tensor([0, 0, *size], dtype=torch.int32, device=self.device).repeat(longest, 1)
        parts = list(plan.batches())[first:]
        with closing(self.frames(plan, first)) as frames:
            for part, pixels in zip(parts, self._sent(frames), strict=True):
                count = part.stop - part.start
                images = kernels.augment(
                    pixels, rows[:count], whole[:count], flips[part], self.mean, self.std, self.dtype, size
                )
                yield Batch(images, self.labels[ids[part]], ids[part])

    def _sent(self, frames: Iterator[Tensor]) -> Iterator[Tensor]:
        """The frames on the device: to a GPU one batch ahead, by a stream of its own, while the batch before is worked
        on."""
        stream = self.copies
        if stream is None:
            yield from frames
            return
        working = torch.cuda.current_stream(self.device)
        ahead: tuple[Tensor, torch.cuda.Event] | None = None
        for pixels in frames:
            with torch.cuda.stream(stream):
                sent = pixels.to(self.device, non_blocking=True, copy=True)
                arrived = stream.record_event()
            if ahead is not None:
                yield _received(*ahead, working)
            ahead = sent, arrived
            arrived.synchronize()  # `pixels` may be overwritten now; the copy has had a batch's time
        if ahead is not None:
            yield _received(*ahead, working)

    def whole(self, ids: NDArray[np.int64]) -> Tensor:
        """The images by the test-time transform, normalised, [n, 3, H, W]."""
        plan = sequential_plan(ids, self.transform, max(2, len(ids)), sizes=self.sizes)
        return next(iter(self.batches(plan))).images

    def overlay(self, ids: Tensor, images: Tensor) -> None:
        """Replace some images. ids: int64 [n]; images: uint8 [n, h, w, 3]. Their `sizes` are then those of these."""
        if images.dtype != torch.uint8 or images.ndim != 4 or len(images) != len(ids) or images.shape[3] != 3:
            raise ValueError(f"images must be uint8 [{len(ids)}, h, w, 3], not {images.dtype} {[*images.shape]}")
        for i, pixels in zip(ids.tolist(), images.cpu().numpy().copy(), strict=True):
            self.sizes[i] = pixels.shape[:2]
            self.replaced[i] = pixels

    def transform_of(self, i: int, box: Sequence[int]) -> Transform:
        """Of an image: an overlay that is a frame already is shown as it is."""
        whole = (0, 0, self.transform.height, self.transform.width)
        return self.unresized if i in self.replaced and tuple(box) == whole else self.transform

    def check_size(self, i: int, height: int, width: int) -> None:
        """Raise UserError for an image that is not as high and wide as its row says: the boxes would mean nothing."""
        expected = self.images.sizes[i].tolist()
        if [height, width] != expected:
            raise UserError(
                f"{self.where}: sample {i} has {height}x{width} pixels, its row says {expected[0]}x{expected[1]}; see "
                "fastil verify, and convert it again"
            )

    def content(self, i: int) -> NDArray[np.uint8] | memoryview:
        """What is shown for an image: pixels [h, w, 3], or the bytes of a JPEG, not copied."""
        return self.replaced[i] if i in self.replaced else self.stored(i)

    def stored(self, i: int) -> NDArray[np.uint8] | memoryview:
        if isinstance(self.images, Split):
            pixels: NDArray[np.uint8] = self.images.images[i]
            return pixels
        view = self.images.view(i)
        if self.images.modes[i] == RAW:
            return np.frombuffer(view, np.uint8).reshape(*self.images.sizes[i], 3)
        return view

    def by_pillow(self, i: int, content: memoryview) -> Image.Image:
        """A JPEG as Pillow decodes it; a UserError that names it if it does not."""
        try:
            image = Image.open(io.BytesIO(content), formats=("JPEG",)).convert("RGB")
        except Exception as error:  # Pillow raises many kinds on damaged files
            raise UserError(
                f"{self.where}: sample {i} does not decode ({error}); see fastil verify, and convert it again"
            ) from None
        self.check_size(i, image.height, image.width)
        return image

    def close(self) -> None:
        self.closed = True
        self.replaced.clear()


def _received(sent: Tensor, arrived: torch.cuda.Event, working: torch.cuda.Stream) -> Tensor:
    """For use on the stream that the network works on."""
    working.wait_event(arrived)
    sent.record_stream(working)
    return sent


def default_workers() -> int:
    """As many as there are cores for this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def central(size: tuple[int, int], transform: Transform) -> tuple[tuple[int, int], Box]:
    """For an image of this height and width and a transform with `resize`: what it is resized to, and the central box
    of the output's size in that; the rounding is torchvision's."""
    assert transform.resize is not None
    short, long = min(size), max(size)
    longer = int(transform.resize * long / short)
    new = (transform.resize, longer) if size[0] <= size[1] else (longer, transform.resize)
    height, width = transform.height, transform.width
    return new, (round((new[0] - height) / 2), round((new[1] - width) / 2), height, width)
