"""Files that outlast a kill: locked while they are written, synced, read back, renamed."""

import contextlib
import fcntl
import hashlib
import io
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from fastil.data.records import Files, Ids, Listing, Records
from fastil.errors import UserError
from fastil.tools.reporting import Reporter

READ = 4 << 20  # bytes at once when a file is read back


@contextlib.contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """The file for reading and writing, made if it is not there, locked against a second conversion. One in which
    nothing was written is removed again."""
    try:
        raw = io.FileIO(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); choose another output") from None
    with io.BufferedRandom(raw, 1 << 20) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{path}: another conversion is writing it; wait for it") from None
        except OSError:  # a file system without locks
            pass
        if not is_at(path, file):
            raise UserError(f"{path}: another conversion has just finished it; run the command again")
        try:
            yield file
        finally:
            if is_at(path, file) and not os.fstat(file.fileno()).st_size:
                path.unlink()


def is_at(path: Path, file: IO[bytes]) -> bool:
    """Whether this is the file that has the name now."""
    return path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno()))


@contextlib.contextmanager
def full_disk(path: Path) -> Iterator[None]:
    """Turn a failed write into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path}: {error.strerror or error}; what is written stays: once it can go on, the same command does"
        ) from None


def read_back(path: Path, entries: NDArray[np.void], reporter: Reporter) -> str:
    """sha256 of the file as the disk gives it back; a UserError if a sample is not what was written."""
    digest, at, crc, position = hashlib.sha256(), 0, 0, 0
    starts, ends = entries["ptr"].astype(np.int64), (entries["ptr"] + entries["size"]).astype(np.int64)
    reporter.begin("read back", len(entries))
    with open(path, "rb") as file:
        while block := file.read(READ):
            digest.update(block)
            stop = position + len(block)
            while at < len(entries) and starts[at] < stop:
                piece = memoryview(block)[max(0, starts[at] - position) : ends[at] - position]
                crc = zlib.crc32(piece, crc)
                if ends[at] > stop:
                    break
                if crc != entries["crc32"][at]:
                    raise UserError(
                        f"{path}: the disk gave back other bytes for sample {at}; check the disk, remove it"
                    )
                at, crc = at + 1, 0
                reporter.advance(1, len(piece))
            position = stop
    reporter.end()
    return digest.hexdigest()


@dataclass(frozen=True)
class Spooled(Files):
    """A copy of what `origin` holds."""

    origin: Records | None = None

    def where(self, i: int) -> str:
        return self.origin.where(i) if self.origin else super().where(i)


def reading_order(records: Records) -> Ids:
    """Samples of a source that is read from front to back, in the order in which that is."""
    return np.argsort(getattr(records, "rows"), kind="stable")  # noqa: B009


def spooled(records: Records, path: Path, reporter: Reporter) -> Files:
    """The encoded images of a source that can only be read from front to back, in a file of their own."""
    order = reading_order(records)
    offset, size = np.zeros(len(records), np.int64), np.zeros(len(records), np.int64)
    reporter.begin("unpack", len(records))
    with open(path, "wb") as file:
        for i in order:
            content = records.content(int(i))
            assert isinstance(content, bytes)
            offset[i], size[i] = file.tell(), len(content)
            file.write(content)
            reporter.advance(1, len(content))
    reporter.end()
    listing = Listing(path.parent)
    for i in range(len(records)):
        listing.add(records.name(i), int(records.labels[i]), int(size[i]), str(path), int(offset[i]))
    return Spooled(**vars(listing.files()), origin=records)


def write_synced(path: Path, text: str) -> None:
    """Whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def sync_folder(folder: Path) -> None:
    """Make a rename last."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
