"""The parts of every data source: samples with a label and a name, as encoded files somewhere or as pixels.

A source is listed, not read: a million samples take about 70 bytes each. `fastil.data.formats.detect` finds the parser.
"""

import os
import stat
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from isal.isal_zlib import crc32  # zlib's, in less than half the time
from numpy.typing import NDArray

from fastil.errors import UserError
from fastil.protocol import Ids

SAME = "same"  # instead of a path of validation images: take the training images again
MOST_CLASSES = 1_000_000  # a higher label is damage, and would create as many classes
CHANGED = "a sample has changed since it was written; see fastil verify, and take another copy"
MOST_TEXT = 1 << 28  # bytes of a text file with a list


class Unreadable(UserError):
    """A sample that cannot be read. reason: why, without where it is."""

    def __init__(self, where: str, reason: str) -> None:
        super().__init__(f"{where}: {reason}")
        self.where, self.reason = where, reason

    def __reduce__(self) -> tuple[type["Unreadable"], tuple[str, str]]:
        return Unreadable, (self.where, self.reason)  # for a worker process


class Texts(Sequence[str]):
    """A list of strings in one block of memory."""

    def __init__(self, texts: Iterable[str] = ()) -> None:
        encoded = [os.fsencode(text) for text in texts]
        self._hold(b"".join(encoded), np.cumsum([len(text) for text in encoded], dtype=np.int64))

    def _hold(self, block: bytes, ends: Ids) -> None:
        self.block, self.ends = block, ends.data  # a memoryview gives plain ints

    @classmethod
    def of_block(cls, block: bytes, ends: Ids) -> "Texts":
        """Return the texts encoded in a block. ends: int64 [n], where each ends."""
        texts = cls()
        texts._hold(block, ends)
        return texts

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, i: int) -> str:  # type: ignore[override]
        end = self.ends[i]
        start = self.ends[i - 1] if i % len(self) else 0
        return os.fsdecode(self.block[start:end])

    def __iter__(self) -> Iterator[str]:
        return (self[i] for i in range(len(self)))


class ByClass:
    """Samples by label. labels: int64 [n]."""

    labels: Ids

    def of_class(self, class_id: int) -> Ids:
        """Return the sample ids of one class, ascending, int64."""
        return self._by_class[0][self._by_class[1][class_id] : self._by_class[1][class_id + 1]]

    @cached_property
    def _by_class(self) -> tuple[Ids, Ids]:
        order = np.argsort(self.labels, kind="stable")
        bounds = np.searchsorted(self.labels[order], np.arange(self.labels.max() + 2))
        return order, bounds


class Records(Protocol):
    """The samples of a split. labels: int64 [n]."""

    @property
    def labels(self) -> Ids: ...

    def __len__(self) -> int: ...

    def name(self, i: int) -> str:
        """Return the name of a sample in its source."""
        ...

    def where(self, i: int) -> str:
        """Return where a sample lies, for a message: the way to it from outside."""
        ...

    def content(self, i: int) -> "bytes | NDArray[np.uint8]":
        """Return an encoded image, or pixels [h, w, 3]."""
        ...

    def take(self, ids: Ids) -> "Records":
        """Return some of the samples, in that order."""
        ...

    def relabelled(self, labels: Ids) -> "Records":
        """Return the same samples with other labels."""
        ...


class Extent(NamedTuple):
    """A range of bytes of a file. crc32: the checksum of them, if the source knows it. Reading raises Unreadable."""

    path: str
    offset: int
    size: int
    crc32: int | None = None

    def read(self) -> bytes:
        """Return the bytes. Raises Unreadable if the file has become shorter, cannot be read, or holds other bytes."""
        content = self.front(self.size)
        self._check(len(content), content)
        return content

    def read_into(self, room: memoryview) -> None:
        """Fill `room`, which has its size, with the bytes. Raises like `read`."""
        self._check(self._fill(room), room)

    def _check(self, count: int, content: bytes | memoryview) -> None:
        if count != self.size:
            raise Unreadable(self.path, f"ends before byte {self.offset + self.size}; it was cut short")
        if self.crc32 is not None and crc32(content) != self.crc32:
            raise Unreadable(self.path, f"{CHANGED} (bytes {self.offset} to {self.offset + self.size})")

    def front(self, most: int) -> bytes:
        """Return at most this many of the first bytes. Raises Unreadable if the file cannot be read."""
        room = bytearray(min(most, self.size))
        count = self._fill(memoryview(room))
        return bytes(memoryview(room)[:count])

    def _fill(self, room: memoryview) -> int:
        """Return how many bytes there were."""
        count = 0
        try:
            # Half the system calls of open(). It does not wait for a pipe that has taken the place of a file.
            descriptor = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK)
            try:
                while count < len(room) and (more := os.preadv(descriptor, [room[count:]], self.offset + count)):
                    count += more
            finally:
                os.close(descriptor)
        except OSError as error:
            raise Unreadable(self.path, f"cannot be read ({error.strerror})") from None
        return count


def whole_file(path: Path) -> Extent:
    """Return all of a file. Raises Unreadable if it is not a file."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise Unreadable(str(path), f"cannot be read ({error.strerror})") from None
    what = special(status.st_mode)
    if what:
        raise Unreadable(str(path), f"cannot be read, it is {what}")
    return Extent(str(path), 0, status.st_size)


def special(mode: int) -> str | None:
    """Return what a thing with this st_mode is, if it is no regular file. Opening it may wait for ever."""
    kinds = {
        stat.S_IFDIR: "a folder", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }  # fmt: skip
    return None if stat.S_ISREG(mode) else kinds.get(stat.S_IFMT(mode), "something special")


Item = Extent | bytes | NDArray[np.uint8] | Unreadable  # an image: where it lies, or its content


@dataclass(frozen=True)
class Files:
    """Samples that are encoded images: files of their own below `root`, or members of archives.

    labels: int64 [n]. names: each sample's, relative to root or to its archive. archive: int32 [n], an index into
    `archives`, or -1 for a file of its own. offset, size: int64 [n], bytes.
    """

    root: str
    names: Texts
    labels: Ids
    size: Ids
    offset: Ids
    archive: NDArray[np.int32]
    archives: list[str] = field(default_factory=list)
    rows: Ids | None = None  # of `names`, if these are a part of a larger list
    crc32: Ids | None = None  # of each one's bytes, if the source knows it

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, i: int) -> str:
        """Return the name of sample i."""
        return self.names[i if self.rows is None else int(self.rows[i])]

    def where(self, i: int) -> str:
        """Return where sample i lies, for a message."""
        if self.archive[i] < 0:
            return os.path.join(self.root, self.name(i))
        return f"{self.archives[self.archive[i]]}: {self.name(i)}"

    def extent(self, i: int) -> Extent:
        """Return where its bytes are."""
        path = os.path.join(self.root, self.name(i)) if self.archive[i] < 0 else self.archives[self.archive[i]]
        crc32 = None if self.crc32 is None else int(self.crc32[i])
        return Extent(path, int(self.offset[i]), int(self.size[i]), crc32)

    def content(self, i: int) -> bytes:
        """Return the encoded bytes of sample i."""
        return self.extent(i).read()

    def take(self, ids: Ids) -> "Files":
        """Return the samples `ids`, in that order."""
        rows = ids if self.rows is None else self.rows[ids]
        return Files(
            self.root, self.names, self.labels[ids], self.size[ids], self.offset[ids], self.archive[ids],
            self.archives, rows, None if self.crc32 is None else self.crc32[ids],
        )  # fmt: skip

    def relabelled(self, labels: Ids) -> "Files":
        """Return the same samples with other labels, int64 [n]."""
        return replace(self, labels=labels)


@dataclass(frozen=True)
class Pixels:
    """Samples that are pixels already. images: uint8 [n, h, w, 3], all of one size; labels: int64 [n]."""

    source: str
    images: NDArray[np.uint8]
    labels: Ids
    rows: Ids | None = None  # of the source, if these are a part of it

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, i: int) -> str:
        """Return the row of sample i in its source, as text."""
        return f"{i if self.rows is None else int(self.rows[i]):06d}"

    def where(self, i: int) -> str:
        """Return where sample i lies, for a message."""
        return f"{self.source}: image {self.name(i)}"

    def content(self, i: int) -> NDArray[np.uint8]:
        """Return the pixels of sample i, uint8 [h, w, 3]."""
        image: NDArray[np.uint8] = self.images[i]
        return image

    def take(self, ids: Ids) -> "Pixels":
        """Return the samples `ids`, in that order."""
        return Pixels(self.source, self.images[ids], self.labels[ids], ids if self.rows is None else self.rows[ids])

    def relabelled(self, labels: Ids) -> "Pixels":
        """Return the same samples with other labels, int64 [n]."""
        return replace(self, labels=labels)


@dataclass(frozen=True)
class Source:
    """A data set as listed by its files.

    class_names: by label, the data set's own ids (wnids for ImageNet). titles: the usual names of the classes, if the
    data set has them. train, val: None if the source has no such split. settled: its images are shown as stored,
    whatever their EXIF tags say (a .beton).
    """

    kind: str
    name: str
    class_names: list[str]
    train: Records | None
    val: Records | None
    titles: list[str] | None = None
    notes: tuple[str, ...] = ()
    settled: bool = False


def item_of(records: Records, i: int) -> Item:
    """Return a sample as an Item: a place to read from if there is one, otherwise its content, or why there is none."""
    if isinstance(records, Files):
        return records.extent(i)
    try:
        return records.content(i)
    except Unreadable as error:
        return error


def is_sequential(records: Records) -> bool:
    """Return whether content(i) is cheap for ascending rows only, so that another order needs a copy to pick from."""
    return bool(getattr(records, "sequential", False))


def relabelled(source: Source, labels: Sequence[int], class_names: list[str]) -> Source:
    """Return the same images under other labels. labels: the new label of each class; class_names: by new label."""
    table = np.array(labels, dtype=np.int64)
    splits = (None if split is None else split.relabelled(table[split.labels]) for split in (source.train, source.val))
    train, val = splits
    return replace(source, class_names=class_names, titles=None, train=train, val=val)


def canonical(records: Records) -> Ids:
    """Return the samples by class, then by name, as a folder has them: one order whatever the container, int64 [n].

    Samples that only have a number keep the order of their numbers. Pixels keep their order, because their files have
    an official one.
    """
    if isinstance(records, Pixels):
        return np.arange(len(records))
    order = np.argsort(records.labels, kind="stable")
    bounds = np.flatnonzero(np.diff(records.labels[order])) + 1
    for part in np.split(order, bounds):  # views; one class at a time keeps few names in memory
        names = [_sort_key(records.name(int(i))) for i in part]
        part[...] = part[sorted(range(len(names)), key=names.__getitem__)]
    return order


def _sort_key(name: str) -> tuple[str, int]:
    """Return the sort key of a sample's name. Rows without a name (train-00000-of-00001:17) sort by their number."""
    stem, _, row = name.rpartition(":")
    return (stem, int(row)) if stem and row.isdecimal() and len(row) < 20 else (name, 0)


def read_lines(path: Path) -> list[str]:
    """Return the non-blank lines of a text file. Raises UserError if it is missing, no text or far too large."""
    try:
        if not path.is_file():
            raise UserError(f"{path}: {'not a file' if path.exists() else 'no such file'}; fetch the data set again")
        if path.stat().st_size > MOST_TEXT:
            raise UserError(f"{path}: {path.stat().st_size >> 20} MiB, no list of that size is known; fetch it again")
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8; it is damaged, fetch it again") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    return [line.strip() for line in text.split("\n") if line.strip()]


def numbered(labels: Iterable[Ids]) -> list[str]:
    """Return names for classes that are only numbers: 0 up to the highest label."""
    return [str(label) for label in range(max((int(part.max(initial=-1)) for part in labels), default=-1) + 1)]


class Listing:
    """Collects the samples of a split and makes Files of them."""

    def __init__(self, root: Path | str) -> None:
        self.root = str(root)
        self.names, self.ends = bytearray(), array("q")
        self.labels = array("q")  # a list would take four times the memory
        self.sizes = array("q")
        self.offsets = array("q")
        self.archive = array("q")
        self.archives: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self.labels)

    def add(self, name: str, label: int, size: int, archive: str | None = None, offset: int = 0) -> None:
        """Add a sample. size, offset: in bytes; offset: where it begins in `archive`."""
        self.names += os.fsencode(name)
        self.ends.append(len(self.names))
        self.labels.append(label)
        self.sizes.append(size)
        self.offsets.append(offset)
        self.archive.append(-1 if archive is None else self.archives.setdefault(archive, len(self.archives)))

    def files(self) -> Files:
        """Return all samples added so far."""
        return Files(
            self.root,
            Texts.of_block(bytes(self.names), np.array(self.ends, dtype=np.int64)),
            np.array(self.labels, dtype=np.int64),
            np.array(self.sizes, dtype=np.int64),
            np.array(self.offsets, dtype=np.int64),
            np.array(self.archive, dtype=np.int32),
            list(self.archives),
        )
