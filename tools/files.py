"""Files that survive a kill: locked while they are written, synced, read back, renamed."""

import contextlib
import hashlib
import io
import os
import shutil
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from isal.isal_zlib import crc32
from numpy.typing import NDArray

from fastil import files
from fastil.data.formats.beton import place
from fastil.data.formats.records import Files, Listing, Records, item_of
from fastil.errors import UserError
from fastil.protocol import Ids
from fastil.tools.reporting import Reporter

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer as Buffer

READ = 1 << 20  # bytes per read when a file is read back
AGAIN = "run the same command, which goes on from what is in place"  # advice once a file can be written
WRITTEN = 1 << 20  # bytes per write, which stay in a cache of the processor


class WholeWrites(io.FileIO):
    """An unbuffered file that writes all it is given, or raises OSError."""

    def write(self, content: "Buffer") -> int:
        view = memoryview(content).cast("B")
        done = 0
        while done < len(view):
            done += super().write(view[done:])
        return done


@contextlib.contextmanager
def opened(path: Path) -> Iterator[io.FileIO]:
    """Open the file for reading and writing, made if it is missing, and locked against a second conversion. A file in
    which nothing was written is removed again.
    """
    try:
        raw = WholeWrites(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); choose another output") from None
    with raw as file:
        with contextlib.suppress(OSError):  # a file system without locks
            if not files.lock(file.fileno()):
                raise UserError(f"{path}: another conversion is writing it; wait for it")
        if not is_at(path, file):
            raise UserError(f"{path}: another conversion has just finished it; run the command again")
        try:
            yield file
        finally:
            if is_at(path, file) and not os.fstat(file.fileno()).st_size:
                path.unlink()


def is_at(path: Path, file: io.FileIO) -> bool:
    """Return whether this is the file that has the name now."""
    return path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno()))


class Pages:
    """The front of a file that is being written: the page into which samples are put, until it is full or must be on
    the disk. position: the first free byte of the file. A sample never straddles a page.
    """

    def __init__(self, file: io.FileIO, page_size: int, position: int) -> None:
        self.file, self.page_size, self.position = file, page_size, position
        self.page = memoryview(bytearray(page_size))
        self.begin = position - position % page_size  # of the page in the file
        self.written = position % page_size  # bytes of the page that are in the file

    def room(self, size: int) -> memoryview:
        """Return memory for the next sample, which must be filled before the next call; call `taken` when it is."""
        at = place(self.position, size, self.page_size)
        if at >= self.begin + self.page_size:
            self.flush()
            self.begin, self.written = at, 0
        return self.page[at - self.begin :][:size]

    def taken(self, size: int) -> int:
        """Return where the sample of the last `room` is."""
        at = place(self.position, size, self.page_size)
        self.position = at + size
        if self.position - self.begin - self.written >= WRITTEN:
            self._write((self.position - self.begin) // WRITTEN * WRITTEN)
        return at

    def flush(self) -> None:
        """Hand what is in the page to the system."""
        self._write(self.position - self.begin)

    def _write(self, end: int) -> None:
        if end > self.written:
            self.file.seek(self.begin + self.written)
            self.file.write(self.page[self.written : end])
            self.written = end


class ReadBack:
    """Reads a file behind its writer, for its sha256 (`digest`) and to check that every sample is what was written.

    entries: ENTRY, of the samples in place. front: the beginning of the file, if it is known before it is written;
    otherwise it is read as well. What has been read leaves the page cache if it is on the disk, because a large
    conversion would push everything else out.
    """

    def __init__(self, path: Path, entries: NDArray[np.void], front: bytes = b"") -> None:
        self.path, self.entries, self.front = path, entries, front
        self.digest, self.position = hashlib.sha256(front), len(front)
        self.at = 0  # the next sample
        self.blocks = [memoryview(bytearray(READ)) for _ in range(2)]  # one is hashed while the other is filled

    def to(self, end: int, placed: int, reporter: Reporter | None = None) -> None:
        """Read up to this byte of the file, behind so many samples. Raises UserError if one is not what was written."""
        new = self.entries[self.at : placed]
        samples = zip(new["ptr"].tolist(), new["size"].tolist(), new["crc32"].tolist(), strict=True)
        sample, found = next(samples, None), 0
        with open(self.path, "rb", buffering=0) as file, ThreadPoolExecutor(1) as thread:
            file.seek(self.position)
            hashed: deque[Future[None]] = deque()
            while self.position < end:
                count = file.readinto(self.blocks[0][: end - self.position])
                if not count:
                    raise UserError(f"{self.path}: has become shorter while it was written; is something writing it?")
                block = self.blocks[0][:count]
                hashed.append(thread.submit(self.digest.update, block))
                stop = self.position + count
                while sample is not None and sample[0] < stop:
                    start, size, expected = sample
                    found = crc32(block[max(0, start - self.position) : start + size - self.position], found)
                    if start + size > stop:
                        break
                    if found != expected:
                        raise UserError(
                            f"{self.path}: sample {self.at} is not what was read of its source, which has changed or "
                            "lies on a failing disk; remove the file and convert again"
                        )
                    self.at, found, sample = self.at + 1, 0, next(samples, None)
                    if reporter is not None:
                        reporter.advance(1, size)
                self.position = stop
                self.blocks.reverse()
                if len(hashed) == len(self.blocks):
                    hashed.popleft().result()
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, self.position, os.POSIX_FADV_DONTNEED)


@dataclass(frozen=True)
class Spooled(Files):
    """A copy of what `origin` holds."""

    origin: Records | None = None

    def where(self, i: int) -> str:
        return self.origin.where(i) if self.origin else super().where(i)


def reading_order(records: Records) -> Ids:
    """Return the samples of a source that is read from front to back, in reading order."""
    return np.argsort(getattr(records, "rows"), kind="stable")  # noqa: B009


def spooled(records: Records, path: Path, reporter: Reporter) -> Files:
    """Copy the encoded images of a source that can only be read from front to back into a file of their own."""
    order = reading_order(records)
    needed, free = getattr(records, "total_bytes", 0), shutil.disk_usage(path.parent).free
    if needed > free:
        raise UserError(
            f"{path.parent}: {needed / 1e6:,.0f} MB are needed to unpack the images, {free / 1e6:,.0f} MB are free; "
            "free some"
        )
    offset, size = np.zeros(len(records), np.int64), np.zeros(len(records), np.int64)
    reporter.begin("unpack", len(records))
    with open(path, "wb") as file:
        for i in order:
            content = item_of(records, int(i))
            if not isinstance(content, bytes):  # an image without bytes, which the audit reports
                content = b""
            offset[i], size[i] = file.tell(), len(content)
            file.write(content)
            reporter.advance(1, len(content))
    reporter.end()
    listing = Listing(path.parent)
    for i in range(len(records)):
        listing.add(records.name(i), int(records.labels[i]), int(size[i]), str(path), int(offset[i]))
    return Spooled(**vars(listing.files()), origin=records)
