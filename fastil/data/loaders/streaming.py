"""The common part of the loaders that read images again in every epoch: threads, reference, DALI and FFCV.

A backend turns a plan into uint8 frames of the output's size, batch by batch and in its order. What does not depend on
where an image came from (mirror, normalisation, cast) is done on the device. Some images may be held there as pixels:
exemplars (memory=resident), and those that an overlay replaces (Mnemonics).
"""

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fastil import kernels
from fastil.data.formats.beton import RAW, Beton
from fastil.data.formats.pixels import open_stored
from fastil.data.loaders.batch import Batch, Inputs
from fastil.data.loaders.frames import Box, resizes
from fastil.data.loaders.held import Held
from fastil.data.sources import Split
from fastil.errors import UserError
from fastil.plan import EpochPlan, Transform, sequential_plan

AnySplit = Beton | Split


class Streaming(ABC):
    """Batches of one split, for as many plans as the run has. `close` frees all that is held.

    sizes: int32 [n, 2], height and width of every image, which plans need.
    """

    name: str
    worked: float | None = None

    def __init__(self, images: AnySplit, transform: Transform, device: torch.device) -> None:
        self.images, self.transform, self.device = images, transform, device
        self.unresized = replace(transform, resize=None)
        self.where = str(images.path) if isinstance(images, Beton) else "the data set"
        self.sizes: NDArray[np.int32] = images.sizes.copy()
        self.labels = torch.as_tensor(images.labels, device=device)
        self.mean = torch.tensor(transform.mean, device=device)
        self.std = torch.tensor(transform.std, device=device)
        self.held = Held(len(self.sizes), device)
        self.replaced = np.zeros(len(self.sizes), dtype=np.bool_)  # held images that differ from the stored ones
        self.reads_held = device.type == "cpu"  # whether `frames` reads held images; else `pixels` makes their frames
        self.whole_frames: dict[int, tuple[Tensor, Tensor]] = {}  # rows and boxes of a batch, by its size
        self.copies = None
        if device.type == "cuda":
            self.copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.closed = False

    @abstractmethod
    def frames(self, plan: EpochPlan, parts: list[slice]) -> Generator[Tensor, None, None]:
        """Yield uint8 [B, H, W, 3] for these batches of the plan, boxes cut out and resized, not mirrored. The next
        frame may overwrite a frame. Raises UserError naming an image that does not decode.
        """

    def batches(self, plan: EpochPlan, first: int = 0, dtype: torch.dtype = torch.float32) -> Iterator[Batch]:
        """Yield the batches of the plan in its order, from number `first` on, with images in `dtype`."""
        with closing(self.inputs(plan, first)) as made_of:
            for inputs in made_of:
                yield self.batch(inputs, dtype)

    def inputs(self, plan: EpochPlan, first: int = 0) -> Generator[Inputs, None, None]:
        """Yield what the batches of the plan are made from, from number `first` on."""
        ids = torch.as_tensor(plan.ids, device=self.device)
        flips = torch.as_tensor(plan.flips, device=self.device)
        parts = list(plan.batches())[first:]
        with closing(self.pixels(plan, first)) as frames:
            for part, pixels in zip(parts, frames, strict=True):
                yield Inputs(ids[part], flips[part], frames=pixels)

    def batch(self, inputs: Inputs, dtype: torch.dtype = torch.float32) -> Batch:
        """Mirror the frames and normalise them, by work of the device alone."""
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
        """Yield the frames of the batches from number `first` on, on the device, with those of held images among them.
        The next ones may overwrite them.
        """
        if self.closed:
            raise ValueError("this loader was closed")
        apart = np.zeros(len(plan.ids), dtype=np.bool_)
        if not self.reads_held:
            apart = self.held.starts[plan.ids] >= 0
        streamed, held = plan.only(~apart), plan.only(apart)
        parts, streamed_parts, held_parts = (list(one.batches())[first:] for one in (plan, streamed, held))
        starts = np.array([part.start for part in plan.batches()], dtype=np.int64)
        lengths = np.array([part.stop - part.start for part in plan.batches()], dtype=np.int64)
        row = np.arange(len(plan.ids)) - np.repeat(starts, lengths)
        places = torch.as_tensor(row[~apart], device=self.device)  # rows of the streamed frames in their batch
        table, store = torch.as_tensor(self._table(held, row[apart]), device=self.device), self.held.pixels
        size = (self.transform.height, self.transform.width, 3)
        with closing(self.frames(streamed, [part for part in streamed_parts if part.stop > part.start])) as frames:
            arriving = self._sent(frames)
            for part, streamed_part, held_part in zip(parts, streamed_parts, held_parts, strict=True):
                count, some = part.stop - part.start, streamed_part.stop > streamed_part.start
                if some and held_part.stop == held_part.start:
                    yield next(arriving)
                    continue
                batch = torch.empty(count, *size, dtype=torch.uint8, device=self.device)
                if some:
                    batch[places[streamed_part]] = next(arriving)
                kernels.crop_resize(store, table[held_part], batch)
                yield batch
            for _ in arriving:  # there is none left; this tells it that it was read to the end
                raise AssertionError

    def _table(self, held: EpochPlan, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the table from which `kernels.crop_resize` makes the frames of held images, [n, 12]. rows: each one's
        row in its batch.
        """
        boxes, sizes, corners = resizes(held.boxes, self.transform)
        shown = self.is_frame(held.ids, held.boxes)  # shown as they are: see `transform_of`
        boxes[shown], sizes[shown], corners[shown] = resizes(held.boxes[shown], self.unresized)
        images = self.held.starts[held.ids, None], self.sizes[held.ids]
        return np.concatenate([*images, boxes, sizes, corners, rows[:, None]], axis=1, dtype=np.int64)

    def _sent(self, frames: Iterator[Tensor]) -> Iterator[Tensor]:
        """Yield the frames on the device; to a GPU one batch ahead, on a stream of its own."""
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
            arrived.synchronize()  # `pixels` may be overwritten from now on; the copy had a batch's time
        if ahead is not None:
            yield _received(*ahead, working)

    def whole(self, ids: NDArray[np.int64]) -> Tensor:
        """Return the images under the test-time transform, normalised, [n, 3, H, W]."""
        plan = sequential_plan(ids, self.transform, max(2, len(ids)), sizes=self.sizes)
        return next(iter(self.batches(plan))).images

    def keep(self, ids: NDArray[np.int64]) -> None:
        """Hold these images as pixels on the device, so that they are not read again. ids: int64 [n]. All others are
        let go, except an overlay's, whose pixels are nowhere else.
        """
        self.held.hold(np.union1d(ids, np.flatnonzero(self.replaced)), self.sizes, self.decoded)

    def overlay(self, ids: Tensor, images: Tensor) -> None:
        """Replace some images, also their `sizes`. ids: int64 [n]; images: uint8 [n, h, w, 3]."""
        if images.dtype != torch.uint8 or images.ndim != 4 or len(images) != len(ids) or images.shape[3] != 3:
            raise ValueError(f"images must be uint8 [{len(ids)}, h, w, 3], not {images.dtype} {[*images.shape]}")
        samples = ids.cpu().numpy()
        new = dict(zip(samples.tolist(), images.cpu().numpy(), strict=True))
        all_held = np.union1d(self.held.ids, samples)
        self.held.forget(samples)
        self.sizes[samples], self.replaced[samples] = images.shape[1:3], True
        self.held.hold(all_held, self.sizes, new.__getitem__)

    def transform_of(self, i: int, box: Box) -> Transform:
        """Return the transform of an image. An overlay that is a frame already is shown as it is."""
        resized = self.transform.resize is not None
        return self.unresized if resized and self.is_frame(i, np.array(box)) else self.transform

    def is_frame(self, ids: int | NDArray[np.int64], boxes: NDArray[np.int32]) -> NDArray[np.bool_]:
        """Return which visits are of an overlay that is a frame already. ids: [n] or one; boxes: [n, 4] or one."""
        whole = (0, 0, self.transform.height, self.transform.width)
        shown: NDArray[np.bool_] = self.replaced[ids] & (boxes == whole).all(axis=-1)
        return shown

    def check_size(self, i: int, height: int, width: int) -> None:
        """Raise UserError if an image is not as high and wide as its row says: the boxes would be meaningless."""
        expected = self.images.sizes[i].tolist()
        if [height, width] != expected:
            raise UserError(
                f"{self.where}: sample {i} has {height}x{width} pixels, its row says {expected[0]}x{expected[1]}; see "
                "fastil verify, and convert it again"
            )

    def content(self, i: int) -> NDArray[np.uint8] | memoryview:
        """Return what the CPU shows for an image: pixels [h, w, 3], or the bytes of a JPEG, not copied."""
        if self.reads_held and self.held.starts[i] >= 0:
            pixels: NDArray[np.uint8] = self.held.image(i, self.sizes[i]).numpy()
            return pixels
        return self.stored(i)

    def decoded(self, i: int) -> NDArray[np.uint8]:
        """Return the pixels of a stored image, [h, w, 3], in memory of their own."""
        content = self.stored(i)
        return np.array(self.by_pillow(i, content) if isinstance(content, memoryview) else content)

    def stored(self, i: int) -> NDArray[np.uint8] | memoryview:
        """Return image i as it is in memory or in the file: pixels, uint8 [h, w, 3], or a JPEG."""
        if isinstance(self.images, Split):
            pixels: NDArray[np.uint8] = self.images.images[i]
            return pixels
        view = self.images.view(i)
        if self.images.modes[i] == RAW:
            return np.frombuffer(view, np.uint8).reshape(*self.images.sizes[i], 3)
        return view

    def by_pillow(self, i: int, content: memoryview) -> Image.Image:
        """Return a JPEG as Pillow decodes it. Raises UserError naming it if it does not decode."""
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
        """Let go of held images. The loader cannot be used afterwards."""
        self.closed = True
        self.held = Held(len(self.sizes), self.device)


def _received(sent: Tensor, arrived: torch.cuda.Event, working: torch.cuda.Stream) -> Tensor:
    """Make the frames ready for the stream that the network works on."""
    working.wait_event(arrived)
    sent.record_stream(working)
    return sent
