"""The DALI loader: one pipeline for the whole run, fed by the plan over the mapped file (boxes are decoded alone).

On the CPU without a driver (`device_id=None`), or on a GPU by nvJPEG, which upsamples colour differently. Images are
upright already, so EXIF is ignored.
"""

import contextlib
from collections.abc import Generator, Iterator
from typing import Any

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, types
from PIL import Image
from torch import Tensor

from fastil.data.beton import Beton
from fastil.data.reference import render
from fastil.data.streaming import Images, Streaming, central, default_workers
from fastil.errors import UserError
from fastil.plan import EpochPlan, Transform


class Dali(Streaming):
    """See `Streaming`. workers: threads of the pipeline."""

    name = "dali"

    def __init__(self, images: Images, transform: Transform, device: torch.device, workers: int | None = None) -> None:
        super().__init__(images, transform, device)
        if isinstance(images, Beton) and images.mode == "mixed":
            raise UserError(f"{images.path}: holds JPEGs and pixels, which DALI cannot mix; use loader=threads")
        self.encoded = isinstance(images, Beton) and images.mode == "jpeg"
        self.workers = workers or default_workers()
        self.pipeline: Any = None
        self.longest = 0  # batch that the pipeline has room for
        self.feed: Iterator[list[Any]] = iter(())

    def frames(self, plan: EpochPlan, first: int) -> Generator[Tensor, None, None]:
        longest = min(len(plan.ids), plan.batch_size + 1)
        if self.pipeline is None or longest > self.longest:
            self._build(longest)
        parts = list(plan.batches())[first:]
        self.feed = (self._inputs(plan, part) for part in parts)
        try:
            for part in parts:
                try:
                    (output,) = self.pipeline.run()
                except RuntimeError as error:
                    self.pipeline = None  # DALI's words: no longer valid
                    self._blame(plan, part, error)
                yield self._frames(output, plan, part)
        finally:
            self._drain()

    def _build(self, longest: int) -> None:
        self.longest = longest
        gpu = self.device.type == "cuda"
        inside: dict[str, Any] = {"axis_names": "HW", "normalized_anchor": False, "normalized_shape": False}
        outside = inside | {"out_of_bounds_policy": "pad", "fill_values": 0}
        decoder: dict[str, Any] = {"device": "mixed" if gpu else "cpu", "output_type": types.RGB}
        decoder["adjust_orientation"] = False
        count = 4 if self.transform.resize is None else 6
        self.pipeline = Pipeline(longest, self.workers, (self.device.index or 0) if gpu else None)
        with self.pipeline:
            image, anchor, shape, size, *of_resized = fn.external_source(
                source=lambda: next(self.feed)[:count], num_outputs=count, batch=True,
                dtype=[types.UINT8] + [types.INT32] * (count - 1),
            )  # fmt: skip
            if not self.encoded:
                image = fn.slice(image.gpu() if gpu else image, anchor, shape, **outside)
            elif self.transform.pad:
                image = fn.slice(fn.decoders.image(image, **decoder), anchor, shape, **outside)
            else:
                image = fn.decoders.image_slice(image, anchor, shape, **inside, **decoder)
            size = fn.cast(size, dtype=types.FLOAT)
            image = fn.resize(image, size=size, interp_type=types.INTERP_LINEAR, antialias=True)
            self.pipeline.set_outputs(fn.slice(image, *of_resized, **outside) if of_resized else image)
        self.pipeline.build()

    def _inputs(self, plan: EpochPlan, part: slice) -> list[Any]:
        """What the pipeline needs of a batch: encoded images or pixels, corner and size of the box, what it is resized
        to, corner and size of the frame in that."""
        contents, geometry = [], np.zeros((5, part.stop - part.start, 2), np.int32)
        for at, (i, box) in enumerate(zip(plan.ids[part].tolist(), plan.boxes[part].tolist(), strict=True)):
            if i in self.replaced:  # `_frames` puts it in place
                box = (0, 0, *self.images.sizes[i].tolist())
            content = self.stored(i)
            contents.append(np.frombuffer(content, np.uint8) if isinstance(content, memoryview) else content)
            size, frame = (self.transform.height, self.transform.width), (0, 0, 0, 0)
            if self.transform.resize is not None:
                size, frame = central((box[2], box[3]), self.transform)
            geometry[:, at] = box[:2], box[2:], size, frame[:2], frame[2:]
        return [contents, *geometry]

    def _frames(self, output: Any, plan: EpochPlan, part: slice) -> Tensor:
        frames = torch.utils.dlpack.from_dlpack(output.as_tensor())
        replaced = [at for at, i in enumerate(plan.ids[part].tolist()) if i in self.replaced]
        if replaced:
            frames = frames.clone()
        for at in replaced:
            image = Image.fromarray(self.replaced[int(plan.ids[part][at])])
            frame = np.array(render(image, plan.boxes[part][at].tolist(), self.transform))
            frames[at] = torch.from_numpy(frame).to(frames.device)
        return frames

    def _blame(self, plan: EpochPlan, part: slice, error: RuntimeError) -> None:
        """Raise a UserError that names the image which does not decode."""
        for i in plan.ids[part].tolist():
            content = self.content(i)
            if isinstance(content, memoryview):
                self.by_pillow(i, content)
        raise UserError(f"loader=dali failed: {' '.join(str(error).split())[:300]}; use loader=threads") from None

    def _drain(self) -> None:
        """Drop what the pipeline has fetched ahead of a plan that was left early."""
        self.feed = iter(())
        if self.pipeline is None:
            return
        with contextlib.suppress(StopIteration):
            while True:
                self.pipeline.run()
        self.pipeline.reset()

    def close(self) -> None:
        super().close()
        self.pipeline = None
        self.feed = iter(())
