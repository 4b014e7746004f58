"""The idx files of MNIST and its relatives: four files of unsigned bytes, gzipped or not."""

import gzip
import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from fastil import machine
from fastil.data.formats.records import whole_file
from fastil.errors import UserError

Arrays = tuple[NDArray[np.uint8], NDArray[np.int64]]
TRAIN_IMAGES = "train-images-idx3-ubyte"
PIXEL_BYTES, LABEL_BYTES = 4, 9  # memory for one in a file: itself, and three channels or an int64


def read(path: Path) -> tuple[list[str], tuple[Arrays, Arrays]]:
    """Return class names (numbers) and (train, test), each uint8 [N, h, w, 3] and int64 [N], from a folder."""
    splits = []
    for prefix in ("train", "t10k"):
        images_path, labels_path = (
            _idx_file(path, f"{prefix}-{part}-ubyte") for part in ("images-idx3", "labels-idx1")
        )
        count, labelled = _count(images_path, 3), _count(labels_path, 1)  # before either is unpacked
        if count != labelled:
            raise UserError(f"{images_path}: {count} images but {labelled} labels; fetch both files again")
        images, labels = read_idx(images_path, 3), read_idx(labels_path, 1).astype(np.int64)
        splits.append((np.repeat(images[..., None], 3, axis=3), labels))
    train, test = splits
    return [str(label) for label in range(int(train[1].max(initial=-1)) + 1)], (train, test)


def _idx_file(path: Path, name: str) -> Path:
    for candidate in (path / name, path / f"{name}.gz"):
        if candidate.exists():
            return candidate
    raise UserError(f"{path}: no {name} (or .gz) there; --data must name the folder with the four idx files")


def read_idx(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """Return the content of an idx file of unsigned bytes, gzipped or not: 0 0 8 ndim, big-endian sizes, then the
    bytes.

    It is read only as far as its sizes promise, whatever it would unpack to. Raises UserError if it holds anything
    else.
    """
    with _opened(path) as file:
        shape = _sizes(path, file, dimensions)
        expected, memory = math.prod(shape), machine.memory()
        needed = expected * (LABEL_BYTES if dimensions == 1 else PIXEL_BYTES)
        if needed > memory // 2:
            raise UserError(
                f"{path}: promises what takes {needed / 2**30:,.0f} GiB here; half of this machine has "
                f"{memory / 2**31:.0f}"
            )
        content = file.read(expected)
        if len(content) < expected or file.read(1):  # this also reads the checksum
            held = f"{len(content)} bytes" if len(content) < expected else "more bytes"
            raise UserError(f"{path}: holds {held} of data, its header promises {expected}; fetch it again")
    return np.frombuffer(content, dtype=np.uint8).reshape(shape)


def _count(path: Path, dimensions: int) -> int:
    """Return how many images or labels a file promises."""
    with _opened(path) as file:
        return _sizes(path, file, dimensions)[0]


def _sizes(path: Path, file: IO[bytes], dimensions: int) -> tuple[int, ...]:
    """Return the sizes in the header of a file."""
    header = file.read(4 + 4 * dimensions)
    if len(header) < 4 + 4 * dimensions or header[:4] != bytes([0, 0, 8, dimensions]):
        raise UserError(f"{path}: not an idx file of {dimensions}-dimensional bytes; fetch it again")
    shape = tuple(int.from_bytes(header[i : i + 4], "big") for i in range(4, len(header), 4))
    if math.prod(shape) == 0:
        raise UserError(f"{path}: an idx file of nothing (its sizes are {shape}); fetch it again")
    return shape


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """Open a file, unzipping it if needed. Whatever is wrong with it becomes a UserError."""
    whole_file(path)  # opening a pipe would wait
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            yield file  # type: ignore[misc]
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({error}); fetch it again") from None
