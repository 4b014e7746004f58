"""The FFCV loader: FFCV's own decoder and resize (libffcv), called by the threads of the threads loader.

FFCV's Loader compiles its pipeline in 2 to 16 s, keeps room for the largest image in every slot of its ring, ends
silently when a worker fails and draws its own crops. Its speed comes from the two functions that this file calls, which
release the interpreter. So plan, order and errors are those of the threads loader, and the pixels are FFCV's:
libjpeg-turbo's fast transform and OpenCV's INTER_AREA.
"""

import ctypes
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from fastil.data.loaders.frames import Box
from fastil.data.loaders.threads import Threads, new
from fastil.errors import UserError
from fastil.kernels.crop_resize import cut


@cache
def library() -> ctypes.CDLL:
    """Return libffcv without FFCV's Python part, which would import numba and OpenCV. Raises UserError without it."""
    spec = find_spec("ffcv")  # imports nothing
    folders = spec.submodule_search_locations if spec is not None else None
    files = sorted(Path(next(iter(folders))).parent.glob("ffcv/_libffcv*.so")) if folders else []
    if not files:
        raise UserError("loader=ffcv: FFCV is not installed; `fastil doctor` says how, or use loader=threads")
    found = ctypes.CDLL(str(files[0]))
    found.imdecode.argtypes = [
        ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_void_p, *[ctypes.c_uint32] * 6,
        ctypes.c_bool, ctypes.c_bool,
    ]  # fmt: skip
    found.resize.argtypes = [ctypes.c_int64] * 11
    return found


class Ffcv(Threads):
    """See `Streaming`."""

    name = "ffcv"

    def decode(self, i: int, content: memoryview) -> NDArray[np.uint8]:
        """Return the pixels of a JPEG by FFCV's decoder, or by Pillow if that one refuses it: uint8 [h, w, 3]."""
        try:
            height, width = simplejpeg.decode_jpeg_header(content)[:2]
        except ValueError:
            return np.asarray(self.by_pillow(i, content))
        self.check_size(i, height, width)  # libjpeg-turbo would scale it to the size it is given
        encoded, pixels = np.frombuffer(content, np.uint8), self.scratch("image", (height, width))
        whole = (height, width, 0, 0, 1, 1, False, False)  # no crop, no scale, no mirror
        failed = library().imdecode(encoded.ctypes.data, len(encoded), height, width, pixels.ctypes.data, *whole)
        if failed:
            return np.asarray(self.by_pillow(i, content))
        return pixels

    def resize(self, image: NDArray[np.uint8], box: Box, size: tuple[int, int]) -> NDArray[np.uint8]:
        """Return `box`, cropped and resized by FFCV's resizer: uint8 [*size, 3]."""
        top, left, height, width = box
        if (height, width) == size:
            return cut(image, box, new)
        if top < 0 or left < 0 or top + height > image.shape[0] or left + width > image.shape[1]:
            image, top, left = self.part(image, box), 0, 0
        image = np.ascontiguousarray(image)
        resized = self.scratch("resized", size)
        library().resize(
            0, image.ctypes.data, *image.shape[:2], top, top + height, left, left + width, resized.ctypes.data, *size
        )
        return resized
