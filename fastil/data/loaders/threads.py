"""The threads loader: libjpeg-turbo and torch's antialiased uint8 resize in a pool of threads, without processes.

simplejpeg decodes as Pillow does, to the last bit. torch's uint8 resize is within 2 of 255 of Pillow's and takes a
third of its time. Both release the interpreter for the other threads.
"""

import threading
import time
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastil import machine
from fastil.data.loaders.frames import Box, frame_of, scaled
from fastil.data.loaders.streaming import AnySplit, Streaming
from fastil.kernels.crop_resize import cut
from fastil.plan import EpochPlan, Transform

AHEAD = 2  # batches in work besides the one that is asked for
TOGETHER = 4  # images per task


class Threads(Streaming):
    """See `Streaming`. workers: number of threads; default: as many as this process has cores."""

    name = "threads"
    worked: float = 0.0

    def __init__(
        self, images: AnySplit, transform: Transform, device: torch.device, workers: int | None = None
    ) -> None:
        super().__init__(images, transform, device)
        # torch must not split a resize over threads again, on top of the pool's and the network's: with two of each an
        # epoch took a quarter longer. torch counts by thread; one that never asked takes the last count set by any.
        torch.get_num_threads()
        self.workers = workers or machine.cores()
        self.pool = ThreadPoolExecutor(self.workers, "fastil-threads", initializer=torch.set_num_threads, initargs=(1,))
        self.free: list[Tensor] = []  # buffers for frames
        self.local = threading.local()

    def frames(self, plan: EpochPlan, parts: list[slice]) -> Generator[Tensor, None, None]:
        left = deque(parts)
        waiting: deque[tuple[Tensor, Tensor, list[Future[float]]]] = deque()
        longest = max((part.stop - part.start for part in parts), default=0)
        try:
            while left or waiting:
                while left and len(waiting) <= AHEAD:
                    if self.closed:
                        raise ValueError("this loader was closed")
                    waiting.append(self._begin(plan, left.popleft(), longest))
                memory, frames, tasks = waiting.popleft()
                self.worked += sum(task.result() for task in tasks) / self.workers
                yield frames
                if len(self.free) <= AHEAD + 1:
                    self.free.append(memory)
        finally:
            for _, _, tasks in waiting:
                for task in tasks:
                    task.cancel()

    def _begin(self, plan: EpochPlan, part: slice, longest: int) -> tuple[Tensor, Tensor, list[Future[float]]]:
        """Hand a batch to the pool."""
        ids, boxes = plan.ids[part].tolist(), plan.boxes[part].tolist()
        memory = self._room(longest)
        frames = memory[: len(ids)]
        array = frames.numpy()
        tasks = [
            self.pool.submit(self._fill, array[at:], ids[at : at + TOGETHER], boxes[at : at + TOGETHER])
            for at in range(0, len(ids), TOGETHER)
        ]
        return memory, frames, tasks

    def _room(self, count: int) -> Tensor:
        """Return room for this many frames or more, used memory if there is some."""
        while self.free:
            memory = self.free.pop()
            if count <= len(memory) <= 2 * count:
                return memory
        shape = (count, self.transform.height, self.transform.width, 3)
        return torch.empty(shape, dtype=torch.uint8, pin_memory=self.device.type == "cuda")

    def _fill(self, frames: NDArray[np.uint8], ids: list[int], boxes: list[Box]) -> float:
        """Fill frames, in a thread of the pool. Returns the seconds that it took."""
        began = time.perf_counter()
        for frame, i, box in zip(frames, ids, boxes, strict=False):
            content = self.content(i)
            image = content if isinstance(content, np.ndarray) else self.decode(i, content)
            frame[...] = frame_of(image, box, self.transform_of(i, box), self.resize)
        return time.perf_counter() - began

    def decoded(self, i: int) -> NDArray[np.uint8]:
        content = self.stored(i)
        return np.array(content if isinstance(content, np.ndarray) else self.decode(i, content))

    def decode(self, i: int, content: memoryview) -> NDArray[np.uint8]:
        """Return a JPEG's pixels [h, w, 3], in memory that the thread uses again. Raises UserError if it is damaged."""
        try:
            room = self.scratch("image", self.images.sizes[i])
            pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(content, buffer=room)
        except ValueError:  # a warning, which Pillow tolerates, or an error, which it words better
            return np.asarray(self.by_pillow(i, content))
        self.check_size(i, *pixels.shape[:2])
        return pixels

    def scratch(self, use: str, size: Sequence[int]) -> NDArray[np.uint8]:
        """Return [height, width, 3], the thread's own room for one use: new memory costs more than the copy into it."""
        memory: NDArray[np.uint8] | None = getattr(self.local, use, None)
        height, width = int(size[0]), int(size[1])
        if memory is None or len(memory) < height * width * 3:
            memory = np.empty(height * width * 3, np.uint8)
            setattr(self.local, use, memory)
        return memory[: height * width * 3].reshape(height, width, 3)

    def part(self, image: NDArray[np.uint8], box: Box) -> NDArray[np.uint8]:
        """Return a box of an image in memory that the thread uses again."""
        part = self.scratch("part", box[2:])
        part[...] = cut(image, box, new)
        return part

    def resize(self, image: NDArray[np.uint8], box: Box, size: tuple[int, int]) -> NDArray[np.uint8]:
        """Return a box of an image at this height and width, bilinear and antialiased."""
        if (box[2], box[3]) == size:
            return cut(image, box, new)
        array: NDArray[np.uint8] = scaled(torch.from_numpy(self.part(image, box)), size).numpy()
        return array

    def close(self) -> None:
        super().close()
        self.pool.shutdown(cancel_futures=True)
        self.free.clear()


def new(height: int, width: int) -> NDArray[np.uint8]:
    """Return uninitialised pixels, uint8 [height, width, 3]."""
    return np.empty((height, width, 3), np.uint8)
