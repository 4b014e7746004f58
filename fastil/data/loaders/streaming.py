"""What the loaders share that read images again in every epoch: threads, reference, DALI and FFCV.

A backend turns a plan into uint8 frames of the output's size, batch by batch and in its order. What every image gets
that does not depend on where it came from (mirror, normalisation, the cast) is done on the device. Some images may be
held there as pixels: exemplars (memory=resident), and those that an overlay replaces (Mnemonics).
"""

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fastil import kernels, machine
from fastil.data.formats.beton import RAW, Beton
from fastil.data.formats.pixels import open_stored
from fastil.data.loaders.batch import Batch, Inputs
from fastil.data.loaders.frames import Box, frame_of, resized
from fastil.data.sources import Split
from fastil.errors import UserError
from fastil.plan import EpochPlan, Transform, sequential_plan

AnySplit = Beton | Split
TOGETHER = 256  # images that are decoded to be held


class Streaming(ABC):
    """Batches of one split, for as many plans as the run has. `close` frees all that is held.

    sizes: int32 [n, 2], height and width of every image, which plans need.
    """

    name: str

    def __init__(self, images: AnySplit, transform: Transform, device: torch.device) -> None:
        self.images, self.transform, self.device = images, transform, device
        self.unresized = replace(transform, resize=None)
        self.where = str(images.path) if isinstance(images, Beton) else "the data set"
        self.sizes: NDArray[np.int32] = images.sizes.copy()
        self.labels = torch.as_tensor(images.labels, device=device)
        self.mean = torch.tensor(transform.mean, device=device)
        self.std = torch.tensor(transform.std, device=device)
        self.held: dict[int, Tensor] = {}  # pixels on the device, [h, w, 3], by sample
        self.replaced: set[int] = set()  # those of them that are not what is stored
        self.reads_held = device.type == "cpu"  # whether `frames` shows them; else `pixels` makes their frames
        self.whole_frames: dict[int, tuple[Tensor, Tensor]] = {}  # rows and boxes of a batch, by its size
        self.copies = None
        if device.type == "cuda":
            self.copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.closed = False

    @abstractmethod
    def frames(self, plan: EpochPlan, parts: list[slice]) -> Generator[Tensor, None, None]:
        """uint8 [B, H, W, 3] of these batches of the plan, boxes cut out and resized, not mirrored. A frame may be
        overwritten when the next is asked for. Raises UserError that names an image that does not decode."""

    def batches(self, plan: EpochPlan, first: int = 0, dtype: torch.dtype = torch.float32) -> Iterator[Batch]:
        """The batches of the plan in its order, from number `first` on, their images in `dtype`."""
        with closing(self.inputs(plan, first)) as made_of:
            for inputs in made_of:
                yield self.batch(inputs, dtype)

    def inputs(self, plan: EpochPlan, first: int = 0) -> Generator[Inputs, None, None]:
        """What the batches of the plan are made of, from number `first` on."""
        ids = torch.as_tensor(plan.ids, device=self.device)
        flips = torch.as_tensor(plan.flips, device=self.device)
        parts = list(plan.batches())[first:]
        with closing(self.pixels(plan, first)) as frames:
            for part, pixels in zip(parts, frames, strict=True):
                yield Inputs(ids[part], flips[part], frames=pixels)

    def batch(self, inputs: Inputs, dtype: torch.dtype = torch.float32) -> Batch:
        """Mirror the frames and normalise them. Work of the device alone."""
        assert inputs.frames is not None
        count, size = len(inputs.ids), (self.transform.height, self.transform.width)
        if count not in self.whole_frames:
            whole = torch.tensor([0, 0, *size], dtype=torch.int32, device=self.device)
            self.whole_frames[count] = torch.arange(count, device=self.device), whole.repeat(count, 1)
        images = kernels.augment(
            inputs.frames, *self.whole_frames[count], inputs.flips, self.mean, self.std, dtype, size
        )
        return Batch(images, self.labels[inputs.ids], inputs.ids)

    def pixels(self, plan: EpochPlan, first: int = 0) -> Generator[Tensor, None, None]:
        """The frames of the batches from number `first` on, on the device, those of held images among them. They may
        be overwritten when the next are asked for."""
        if self.closed:
            raise ValueError("this loader was closed")
        apart = np.zeros(len(plan.ids), dtype=np.bool_)
        if self.held and not self.reads_held:
            apart = np.fromiter((i in self.held for i in plan.ids.tolist()), np.bool_, len(plan.ids))
        streamed = plan.only(~apart)
        parts, streamed_parts = list(plan.batches())[first:], list(streamed.batches())[first:]
        starts = np.array([part.start for part in plan.batches()], dtype=np.int64)
        lengths = np.array([part.stop - part.start for part in plan.batches()], dtype=np.int64)
        row = np.arange(len(plan.ids)) - np.repeat(starts, lengths)
        places = torch.as_tensor(row[~apart], device=self.device)  # of what is streamed, in its batch
        size = (self.transform.height, self.transform.width, 3)
        with closing(self.frames(streamed, [part for part in streamed_parts if part.stop > part.start])) as frames:
            arriving = self._sent(frames)
            for part, streamed_part in zip(parts, streamed_parts, strict=True):
                count, some = part.stop - part.start, streamed_part.stop > streamed_part.start
                if some and streamed_part.stop - streamed_part.start == count:
                    yield next(arriving)
                    continue
                batch = torch.empty(count, *size, dtype=torch.uint8, device=self.device)
                if some:
                    batch[places[streamed_part]] = next(arriving)
                for at in np.flatnonzero(apart[part]).tolist():
                    i, box = int(plan.ids[part][at]), plan.boxes[part][at].tolist()
                    batch[at] = frame_of(self.held[i], box, self.transform_of(i, box), resized)
                yield batch
            for _ in arriving:  # there is none; it learns that it was read to the end
                raise AssertionError

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

    def keep(self, ids: NDArray[np.int64]) -> None:
        """Hold these images as pixels on the device, so that they are not read again, and let go of all others but
        those of an overlay, whose pixels are nowhere else. ids: int64 [n]."""
        wanted = set(ids.tolist()) | self.replaced
        self.held = {i: pixels for i, pixels in self.held.items() if i in wanted}
        missing = sorted(wanted - self.held.keys())
        with ThreadPoolExecutor(machine.cores(), thread_name_prefix="fastil-keep") as pool:
            for start in range(0, len(missing), TOGETHER):  # not all of them at once on their way to a GPU
                some = missing[start : start + TOGETHER]
                for i, pixels in zip(some, pool.map(self.decoded, some), strict=True):
                    self.held[i] = torch.from_numpy(pixels).to(self.device)

    def overlay(self, ids: Tensor, images: Tensor) -> None:
        """Replace some images. ids: int64 [n]; images: uint8 [n, h, w, 3]. Their `sizes` are then those of these."""
        if images.dtype != torch.uint8 or images.ndim != 4 or len(images) != len(ids) or images.shape[3] != 3:
            raise ValueError(f"images must be uint8 [{len(ids)}, h, w, 3], not {images.dtype} {[*images.shape]}")
        for i, pixels in zip(ids.tolist(), images.to(self.device), strict=True):
            self.sizes[i] = pixels.shape[:2]
            self.held[i] = pixels.clone()  # a view would keep all of them
            self.replaced.add(i)

    def transform_of(self, i: int, box: Box) -> Transform:
        """The transform of an image: an overlay that is a frame already is shown as it is."""
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
        """What is shown for an image on the CPU: pixels [h, w, 3], or the bytes of a JPEG, not copied."""
        return self.held[i].numpy() if i in self.held and self.reads_held else self.stored(i)

    def decoded(self, i: int) -> NDArray[np.uint8]:
        """The pixels of an image as it is stored, [h, w, 3], in memory of their own."""
        content = self.stored(i)
        return np.array(self.by_pillow(i, content) if isinstance(content, memoryview) else content)

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
            image = open_stored(content, int(self.images.sizes[i].prod(dtype=np.int64)))
            self.check_size(i, image.height, image.width)
            return image.convert("RGB")
        except UserError:
            raise
        except Exception as error:  # Pillow raises many kinds on damaged files
            raise UserError(
                f"{self.where}: sample {i} does not decode ({error}); see fastil verify, and convert it again"
            ) from None

    def close(self) -> None:
        self.closed = True
        self.held.clear()
        self.replaced.clear()


def _received(sent: Tensor, arrived: torch.cuda.Event, working: torch.cuda.Stream) -> Tensor:
    """For use on the stream that the network works on."""
    working.wait_event(arrived)
    sent.record_stream(working)
    return sent
