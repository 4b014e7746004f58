"""The threads loader: libjpeg-turbo and torch's antialiased resize of bytes in a pool of threads, no processes.

simplejpeg decodes as Pillow does, to the last bit; torch's resize of uint8 differs from Pillow's by 2 of 255 at most and
takes a third of the time. Both leave the interpreter to the other threads.
"""

import os
from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from fastil.data.streaming import Box, Images, Streaming, central
from fastil.plan import EpochPlan, Transform

AHEAD = 2  # batches that are in work beside the one that is asked for
TOGETHER = 4  # images of a task


class Threads(Streaming):
    """See `Streaming`. workers: threads; default: as many as there are cores for this process."""

    name = "threads"

    def __init__(self, images: Images, transform: Transform, device: torch.device, workers: int | None = None) -> None:
        super().__init__(images, transform, device)
        count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.pool = ThreadPoolExecutor(workers or count, thread_name_prefix="fastil-threads")
        self.free: list[Tensor] = []  # buffers of frames

    def frames(self, plan: EpochPlan, first: int) -> Generator[Tensor, None, None]:
        parts = deque(list(plan.batches())[first:])
        waiting: deque[tuple[Tensor, list[Future[None]]]] = deque()
        try:
            while parts or waiting:
                while parts and len(waiting) <= AHEAD:
                    waiting.append(self._begin(plan, parts.popleft()))
                frames, tasks = waiting.popleft()
                for task in tasks:
                    task.result()
                yield frames
                self.free.append(frames)
        finally:
            for _, tasks in waiting:
                for task in tasks:
                    task.cancel()

    def _begin(self, plan: EpochPlan, part: slice) -> tuple[Tensor, list[Future[None]]]:
        """Hand a batch to the pool."""
        ids, boxes = plan.ids[part].tolist(), plan.boxes[part].tolist()
        frames = self._room(len(ids))
        array = frames.numpy()
        tasks = [
            self.pool.submit(self._fill, array[at:], ids[at : at + TOGETHER], boxes[at : at + TOGETHER])
            for at in range(0, len(ids), TOGETHER)
        ]
        return frames, tasks

    def _room(self, count: int) -> Tensor:
        """For a batch; memory that has been used before where there is some."""
        fitting = next((i for i, frames in enumerate(self.free) if len(frames) == count), None)
        if fitting is not None:
            return self.free.pop(fitting)
        shape = (count, self.transform.height, self.transform.width, 3)
        return torch.empty(shape, dtype=torch.uint8, pin_memory=self.device.type == "cuda")

    def _fill(self, frames: NDArray[np.uint8], ids: list[int], boxes: list[Box]) -> None:
        """In a thread of the pool."""
        for frame, i, box in zip(frames, ids, boxes, strict=False):
            render(self._decode(i), box, self.transform, frame)

    def _decode(self, i: int) -> NDArray[np.uint8]:
        content = self.content(i)
        if isinstance(content, np.ndarray):
            return content
        try:
            pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(content)
        except ValueError:  # a warning, which Pillow can live with, or an error, which it words better
            pixels = np.asarray(self.by_pillow(i, content))
        return pixels

    def close(self) -> None:
        super().close()
        self.pool.shutdown(cancel_futures=True)
        self.free.clear()


def render(image: NDArray[np.uint8], box: Box, transform: Transform, frame: NDArray[np.uint8]) -> None:
    """Put a box of an image [h, w, 3] into a frame [H, W, 3]; outside the image is black."""
    part = cut(image, box)
    if transform.resize is not None:
        size, box = central((box[2], box[3]), transform)
        part = cut(resized(part, size), box)
    elif part.shape != frame.shape:
        part = resized(part, frame.shape[:2])
    frame[...] = part


def cut(image: NDArray[np.uint8], box: Box) -> NDArray[np.uint8]:
    """A box of an image, a view where it lies inside."""
    top, left, height, width = box
    if top >= 0 and left >= 0 and top + height <= image.shape[0] and left + width <= image.shape[1]:
        return image[top : top + height, left : left + width]
    part = np.zeros((height, width, 3), np.uint8)
    rows, columns = slice(max(0, top), max(0, top + height)), slice(max(0, left), max(0, left + width))
    inside = image[rows, columns]
    at = part[max(0, -top) :, max(0, -left) :]
    at[: inside.shape[0], : inside.shape[1]] = inside
    return part


def resized(image: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Bilinear, antialiased."""
    tensor = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None]  # channels-last as it is
    new = F.interpolate(tensor, size=size, mode="bilinear", antialias=True, align_corners=False)
    array: NDArray[np.uint8] = new[0].permute(1, 2, 0).numpy()
    return array
