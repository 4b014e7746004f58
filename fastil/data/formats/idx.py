"""The idx files of MNIST and its relatives: four files of unsigned bytes, gzipped or not."""

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastil.errors import UserError

Arrays = tuple[NDArray[np.uint8], NDArray[np.int64]]
TRAIN_IMAGES = "train-images-idx3-ubyte"


def read(path: Path) -> tuple[list[str], tuple[Arrays, Arrays]]:
    """Class names (numbers) and (train, test), each uint8 [N, h, w, 3] and int64 [N], of the files in a folder."""
    splits = []
    for prefix in ("train", "t10k"):
        images = read_idx(_idx_file(path, f"{prefix}-images-idx3-ubyte"), dimensions=3)
        labels = read_idx(_idx_file(path, f"{prefix}-labels-idx1-ubyte"), dimensions=1).astype(np.int64)
        if len(images) != len(labels):
            raise UserError(
                f"{path}: {prefix} has {len(images)} images but {len(labels)} labels; fetch both files again"
            )
        splits.append((np.repeat(images[..., None], 3, axis=3), labels))
    train, test = splits
    return [str(label) for label in range(int(train[1].max(initial=-1)) + 1)], (train, test)


def _idx_file(path: Path, name: str) -> Path:
    for candidate in (path / name, path / f"{name}.gz"):
        if candidate.exists():
            return candidate
    raise UserError(f"{path}: no {name} (or .gz) there; --data must name the folder with the four idx files")


def read_idx(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """An idx file of unsigned bytes, gzipped or not: 0 0 8 ndim, big-endian sizes, then the bytes."""
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({error}); fetch it again") from None
    header = 4 + 4 * dimensions
    if len(raw) < header or raw[:4] != bytes([0, 0, 8, dimensions]):
        raise UserError(f"{path}: not an idx file of {dimensions}-dimensional bytes; fetch it again")
    shape = tuple(int.from_bytes(raw[i : i + 4], "big") for i in range(4, header, 4))
    expected = math.prod(shape)
    if expected == 0:
        raise UserError(f"{path}: an idx file of nothing (its sizes are {shape}); fetch it again")
    if len(raw) - header != expected:
        raise UserError(
            f"{path}: holds {len(raw) - header} bytes of data, its header promises {expected}; fetch it again"
        )
    return np.frombuffer(raw, dtype=np.uint8, offset=header).reshape(shape)
