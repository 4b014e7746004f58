"""The DALI loader: a pipeline that lives for the whole run, fed by the plan over the mapped file. Only the box of an
image is decoded.

It runs on the CPU without a driver (`device_id=None`), or on a GPU by nvJPEG, which upsamples colour differently.
Images are upright already, so EXIF is ignored.
"""

from collections import deque
from collections.abc import Generator, Iterator
from typing import Any

import numpy as np
import simplejpeg
import torch
from nvidia.dali import Pipeline, fn, types
from torch import Tensor

from fastil import machine
from fastil.data.formats.beton import Beton
from fastil.data.loaders.frames import resizes
from fastil.data.loaders.streaming import AnySplit, Streaming
from fastil.errors import UserError
from fastil.plan import EpochPlan, Transform

HELD = 8  # batches; more than a pipeline works on
KEPT = 2  # idle pipelines: for training, and for what is read in turns with it
LONGEST_KEPT = 1024  # images of a batch


class Dali(Streaming):
    """See `Streaming`. workers: threads of a pipeline. Plans that are read in turns have a pipeline each."""

    name = "dali"

    def __init__(
        self, images: AnySplit, transform: Transform, device: torch.device, workers: int | None = None
    ) -> None:
        super().__init__(images, transform, device)
        if isinstance(images, Beton) and images.mode == "mixed":
            raise UserError(f"{images.path}: holds JPEGs and pixels, which DALI cannot mix; use loader=threads")
        self.encoded = isinstance(images, Beton) and images.mode == "jpeg"
        self.reads_held = False
        self.workers = workers or machine.cores()
        self.idle: list[_Fed] = []

    def frames(self, plan: EpochPlan, parts: list[slice]) -> Generator[Tensor, None, None]:
        if not parts:
            return
        longest = min(len(plan.ids), plan.batch_size + 1)
        found = min((fed for fed in self.idle if fed.longest >= longest), key=lambda fed: fed.longest, default=None)
        if found is not None:
            self.idle.remove(found)
        fed = found or _Fed(longest, self.workers, self.transform, self.device, encoded=self.encoded)
        fed.feed = (self._inputs(plan, part) for part in parts)
        whole = valid = True
        try:
            for part in parts:
                whole = False
                try:
                    output = fed.run()
                except StopIteration:  # the inputs of this batch are not available
                    assert fed.failed is not None
                    raise fed.failed from None
                except RuntimeError as error:  # the pipeline is then "no longer valid"
                    valid = False
                    self._blame(plan, part, error)
                yield torch.utils.dlpack.from_dlpack(output.as_tensor())
            whole = True
        finally:
            if valid and not self.closed and fed.longest <= LONGEST_KEPT and fed.drain(whole):
                self.idle.append(fed)
                self.idle.sort(key=lambda fed: fed.longest)
                while len(self.idle) > KEPT:
                    self.idle.pop(0).close()
            else:
                fed.close()

    def _inputs(self, plan: EpochPlan, part: slice) -> list[Any]:
        """Return what the pipeline needs for a batch: encoded images or pixels, corner and size of the box, the size to
        resize it to, and with `resize` the frame's corner and size in that.
        """
        ids = plan.ids[part]
        boxes, sizes, frames = resizes(plan.boxes[part], self.transform)
        contents = [self.stored(i) for i in ids.tolist()]
        if self.encoded:
            self._check_sizes(ids.tolist(), contents)
            contents = [np.frombuffer(content, np.uint8) for content in contents]
        inputs = [contents, np.ascontiguousarray(boxes[:, :2]), np.ascontiguousarray(boxes[:, 2:]), sizes]
        if self.transform.resize is None:
            return inputs
        frame = np.array([self.transform.height, self.transform.width], np.int32)
        return [*inputs, frames, np.tile(frame, (len(ids), 1))]

    def _check_sizes(self, ids: list[int], contents: list[Any]) -> None:
        for i, content in zip(ids, contents, strict=True):
            try:
                height, width = simplejpeg.decode_jpeg_header(content)[:2]
            except ValueError:
                self.by_pillow(i, content)
            else:
                self.check_size(i, height, width)

    def _blame(self, plan: EpochPlan, part: slice, error: RuntimeError) -> None:
        """Raise a UserError that names the image which does not decode."""
        for i in plan.ids[part].tolist():
            content = self.stored(i)
            if isinstance(content, memoryview):
                self.by_pillow(i, content)
        raise UserError(f"loader=dali failed: {' '.join(str(error).split())[:300]}; use loader=threads") from None

    def close(self) -> None:
        super().close()
        for fed in self.idle:
            fed.close()
        self.idle.clear()


class _Fed:
    """A pipeline for batches up to a length, and the inputs of the plan that feeds it."""

    def __init__(
        self, longest: int, workers: int, transform: Transform, device: torch.device, *, encoded: bool
    ) -> None:
        self.longest = longest
        self.feed: Iterator[list[Any]] = iter(())
        self.held: deque[list[Any]] = deque(maxlen=HELD)
        self.failed: UserError | None = None
        gpu = device.type == "cuda"
        inside: dict[str, Any] = {"axis_names": "HW", "normalized_anchor": False, "normalized_shape": False}
        outside = inside | {"out_of_bounds_policy": "pad", "fill_values": 0}
        decoder: dict[str, Any] = {"device": "mixed" if gpu else "cpu", "output_type": types.RGB}
        decoder["adjust_orientation"] = False
        count = 4 if transform.resize is None else 6
        self.pipeline: Any = Pipeline(longest, workers, (device.index or 0) if gpu else None)
        with self.pipeline:
            image, anchor, shape, size, *of_resized = fn.external_source(
                source=self._next, num_outputs=count, batch=True, no_copy=not gpu,
                dtype=[types.UINT8] + [types.INT32] * (count - 1),
            )  # fmt: skip
            if not encoded:
                image = fn.slice(image.gpu() if gpu else image, anchor, shape, **outside)
            elif transform.pad:
                image = fn.slice(fn.decoders.image(image, **decoder), anchor, shape, **outside)
            else:
                image = fn.decoders.image_slice(image, anchor, shape, **inside, **decoder)
            size = fn.cast(size, dtype=types.FLOAT)
            image = fn.resize(image, size=size, interp_type=types.INTERP_LINEAR, antialias=True)
            self.pipeline.set_outputs(fn.slice(image, *of_resized, **outside) if of_resized else image)
        self.pipeline.build()

    def _next(self) -> list[Any]:
        """Return inputs. They are not copied, so those of the last batches are held until DALI is through with them.
        DALI asks ahead, so an error is raised when its batch is asked for.
        """
        try:
            self.held.append(next(self.feed))
        except UserError as error:
            self.failed = error
            raise StopIteration from None
        return self.held[-1]

    def run(self) -> Any:
        """Return the next batch of frames."""
        (output,) = self.pipeline.run()
        return output

    def drain(self, whole: bool) -> bool:
        """Make ready for another plan, and return whether that went well. whole: the last one was read to its end."""
        if not whole:
            self.feed = iter(())
        try:
            while True:
                self.pipeline.run()
        except StopIteration:
            self.pipeline.reset()
            return True
        except RuntimeError:  # about an image that was fetched ahead and that nobody will ask for
            return False

    def close(self) -> None:
        """Free the pipeline, which holds this object through its source."""
        self.pipeline = None
        self.feed = iter(())
        self.held.clear()
