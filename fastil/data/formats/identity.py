"""The content of a split in any container: two splits with the same identity have the same images in the same classes.

The ordered sha256 of a split also depends on the order of the images, and decides whether a run may continue. Names of
classes differ between containers and are compared separately.
"""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastil import machine
from fastil.protocol import Ids

BYTES = 16  # of an image's or a class's digest
TOGETHER = 256  # images that a thread hashes at a time


@dataclass(frozen=True)
class Identity:
    """Digests of a split by class.

    kind: "pixels" for decoded images, "stored" for the source's own image files, "changed" for images that were
    resized, re-encoded or left out on request. shape: height, width and channels of images in memory, empty for
    streamed ones. counts: images of each label. classes: hexadecimal digest of each label's images.
    """

    kind: str
    shape: tuple[int, ...]
    counts: tuple[int, ...]
    classes: tuple[str, ...]

    @cached_property
    def text(self) -> str:
        """Kind and sha256, as in protocol.json: equal if and only if the splits are."""
        return f"{self.kind}:{hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()}"


def of_pixels(images: NDArray[np.uint8], labels: Ids) -> Identity:
    """Return the identity of images in memory. images: uint8 [n, h, w, 3]; labels: int64 [n], from 0."""
    hashes = np.empty((len(images), BYTES // 8), ">u8")
    starts = range(0, len(images), TOGETHER)
    with ThreadPoolExecutor(machine.cores()) as pool:  # hashing releases the interpreter
        list(pool.map(partial(_hash_some, images, hashes), starts))
    shape = images.shape[1:]
    return of_hashes("pixels", shape, hashes, labels, repr(shape))


def _hash_some(images: NDArray[np.uint8], hashes: NDArray[Any], start: int) -> None:
    for row in range(start, min(start + TOGETHER, len(images))):
        digest = hashlib.blake2b(np.ascontiguousarray(images[row]).data, digest_size=BYTES).digest()
        hashes[row] = np.frombuffer(digest, hashes.dtype)


def of_hashes(kind: str, shape: tuple[int, ...], hashes: NDArray[Any], labels: Ids, head: str) -> Identity:
    """Return the identity of images with hashes >u8 [n, 2] and labels int64 [n]. head: goes into every digest."""
    counts = np.bincount(labels).tolist()
    hashes = hashes[np.lexsort((hashes[:, 1], hashes[:, 0], labels))]
    parts = np.split(hashes, np.cumsum(counts)[:-1])
    digests = (hashlib.blake2b(head.encode() + part.tobytes(), digest_size=BYTES).hexdigest() for part in parts)
    return Identity(kind, shape, tuple(counts), tuple(digests))
