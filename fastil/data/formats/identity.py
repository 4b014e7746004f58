"""What a split holds, whatever it lies in: two splits of one identity have the same images in the same classes.

It stands next to the ordered sha256 of a split, which also depends on the order of the images and decides whether a run
may go on. Names of classes differ between containers and are compared apart.
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

BYTES = 16  # of the digest of an image or of a class
TOGETHER = 256  # images that a thread hashes in one go


@dataclass(frozen=True)
class Identity:
    """Digests of a split by class.

    kind: "pixels", of decoded images; "stored", of the bytes of image files that are the source's own; "changed", of
    those that were resized, re-encoded or left out on request. shape: height, width and channels of images in memory,
    empty for streamed ones. counts: images of each label. classes: hexadecimal digest of each label's images.
    """

    kind: str
    shape: tuple[int, ...]
    counts: tuple[int, ...]
    classes: tuple[str, ...]

    @cached_property
    def text(self) -> str:
        """Kind and sha256, as protocol.json has it: equal if and only if the splits are."""
        return f"{self.kind}:{hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()}"


def of_pixels(images: NDArray[np.uint8], labels: Ids) -> Identity:
    """The identity of images in memory. images: uint8 [n, h, w, 3]; labels: int64 [n], from 0."""
    hashes = np.empty((len(images), BYTES // 8), ">u8")
    starts = range(0, len(images), TOGETHER)
    with ThreadPoolExecutor(machine.cores()) as pool:  # hashing lets go of the interpreter
        list(pool.map(partial(_hash_some, images, hashes), starts))
    shape = images.shape[1:]
    return of_hashes("pixels", shape, hashes, labels, repr(shape))


def _hash_some(images: NDArray[np.uint8], hashes: NDArray[Any], start: int) -> None:
    for row in range(start, min(start + TOGETHER, len(images))):
        digest = hashlib.blake2b(np.ascontiguousarray(images[row]).data, digest_size=BYTES).digest()
        hashes[row] = np.frombuffer(digest, hashes.dtype)


def of_hashes(kind: str, shape: tuple[int, ...], hashes: NDArray[Any], labels: Ids, head: str) -> Identity:
    """The identity of images with these hashes, >u8 [n, 2], and labels, int64 [n]. head: goes into every digest."""
    counts = np.bincount(labels).tolist()
    hashes = hashes[np.lexsort((hashes[:, 1], hashes[:, 0], labels))]
    parts = np.split(hashes, np.cumsum(counts)[:-1])
    digests = (hashlib.blake2b(head.encode() + part.tobytes(), digest_size=BYTES).hexdigest() for part in parts)
    return Identity(kind, shape, tuple(counts), tuple(digests))
