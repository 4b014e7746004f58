"""Images of a split held decoded on the device: exemplars (memory=resident) and an overlay's (Mnemonics)."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastil import machine
from fastil.protocol import Ids

TOGETHER = 256  # images decoded before the first of them is copied


class Held:
    """Images of any size in one buffer, one after the other, so that one launch makes a batch of frames from them.

    pixels: uint8 [bytes]. starts: int64 [images of the split], where each begins, -1 if it is not held.
    """

    def __init__(self, count: int, device: torch.device) -> None:
        self.pixels = torch.empty(0, dtype=torch.uint8, device=device)
        self.starts = np.full(count, -1, dtype=np.int64)

    @property
    def ids(self) -> Ids:
        """The samples that are held, ascending."""
        return np.flatnonzero(self.starts >= 0)

    def image(self, i: int, size: NDArray[np.int32]) -> Tensor:
        """Return a view of a held image's pixels, uint8 [h, w, 3]."""
        height, width = size.tolist()
        start = int(self.starts[i])
        return self.pixels[start : start + height * width * 3].view(height, width, 3)

    def hold(self, ids: Ids, sizes: NDArray[np.int32], pixels_of: Callable[[int], NDArray[np.uint8]]) -> None:
        """Hold these images and no others. ids: int64 [n], ascending, each once. sizes: int32 [images of the split, 2].

        pixels_of: reads an image that is not held yet; it is called in several threads. If one cannot be read, the old
        images stay. On a GPU without room for both, nothing is held then.
        """
        if np.array_equal(ids, self.ids):
            return
        device, lengths = self.pixels.device, sizes.prod(axis=1, dtype=np.int64) * 3
        before, were = self.pixels, self.starts
        if not _fits(int(lengths[ids].sum()), device):  # no room next to the old ones: go by way of the host
            before = before.cpu()
            self.pixels, self.starts = torch.empty(0, dtype=torch.uint8, device=device), np.full_like(were, -1)
        pixels = torch.empty(int(lengths[ids].sum()), dtype=torch.uint8, device=device)
        starts = np.full_like(were, -1)
        starts[ids] = np.cumsum(lengths[ids]) - lengths[ids]

        def flat(i: int) -> Tensor:
            return before[were[i] : were[i] + lengths[i]] if were[i] >= 0 else torch.from_numpy(pixels_of(i)).flatten()

        with ThreadPoolExecutor(machine.cores(), thread_name_prefix="fastil-keep") as pool:
            for at in range(0, len(ids), TOGETHER):
                some = ids[at : at + TOGETHER].tolist()
                # Copied here, not in the pool, because this thread's stream will read them.
                for i, part in zip(some, pool.map(flat, some), strict=True):
                    pixels[starts[i] : starts[i] + lengths[i]] = part
        self.pixels, self.starts = pixels, starts  # only now, when nothing can fail

    def forget(self, ids: Ids) -> None:
        """Stop holding these images. Their room stays taken until the next `hold`."""
        self.starts[ids] = -1


def _fits(count: int, device: torch.device) -> bool:
    """Return whether so many bytes can be allocated: on a GPU what is free, and what torch kept of freed memory."""
    if device.type != "cuda":
        return True
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return count < int(torch.cuda.mem_get_info(device)[0]) + kept
