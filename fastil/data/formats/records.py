"""What every data source is made of: samples that lie somewhere as encoded files or as pixels, with a label and a name.

A source is listed, not read: a million samples take some 70 bytes each. `fastil.data.formats.detect` finds the parser.
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

SAME = "same"  # in place of a path of validation images: the training images are taken again
MOST_CLASSES = 1_000_000  # a label beyond is no class but damage, and would name as many classes
CHANGED = "a sample has changed since it was written; see fastil verify, and take another copy"
MOST_TEXT = 1 << 28  # bytes of a text file that lists something


class Unreadable(UserError):
    """A sample that cannot be had. reason: why, without its place."""

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
        self.block, self.ends = block, ends.data  # which gives plain ints

    @classmethod
    def of_block(cls, block: bytes, ends: Ids) -> "Texts":
        """The texts that are encoded in a block. ends: int64 [n], where each ends."""
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
    """Samples by their label. labels: int64 [n]."""

    labels: Ids

    def of_class(self, class_id: int) -> Ids:
        """Sample ids of one class, ascending. int64."""
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
        """The name of a sample, as its source calls it."""
        ...

    def where(self, i: int) -> str:
        """Where a sample lies, for a message: the way to it from outside."""
        ...

    def content(self, i: int) -> "bytes | NDArray[np.uint8]":
        """An encoded image, or pixels [h, w, 3]."""
        ...

    def take(self, ids: Ids) -> "Records":
        """Some of the samples, in that order."""
        ...

    def relabelled(self, labels: Ids) -> "Records":
        """The same samples with other labels."""
        ...


class Extent(NamedTuple):
    """A range of bytes of a file. crc32: of them, where the source knows it. Reading raises Unreadable."""

    path: str
    offset: int
    size: int
    crc32: int | None = None

    def read(self) -> bytes:
        """Its bytes; Unreadable if the file has become shorter, cannot be read, or holds other bytes."""
        content = self.front(self.size)
        self._check(len(content), content)
        return content

    def read_into(self, room: memoryview) -> None:
        """Fill `room`, of its size, with its bytes. Errors as of `read`."""
        self._check(self._fill(room), room)

    def _check(self, count: int, content: bytes | memoryview) -> None:
        if count != self.size:
            raise Unreadable(self.path, f"ends before byte {self.offset + self.size}; it was cut short")
        if self.crc32 is not None and crc32(content) != self.crc32:
            raise Unreadable(self.path, f"{CHANGED} (bytes {self.offset} to {self.offset + self.size})")

    def front(self, most: int) -> bytes:
        """The first of its bytes, so many at most, or fewer where the file ends; Unreadable if it cannot be read."""
        room = bytearray(min(most, self.size))
        count = self._fill(memoryview(room))
        return bytes(memoryview(room)[:count])

    def _fill(self, room: memoryview) -> int:
        """How many bytes there were."""
        count = 0
        try:
            # Half the system calls of open(). A pipe that has taken the place of a file is not waited for.
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
    """All of a file. Raises Unreadable for what is none."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise Unreadable(str(path), f"cannot be read ({error.strerror})") from None
    what = special(status.st_mode)
    if what:
        raise Unreadable(str(path), f"cannot be read, it is {what}")
    return Extent(str(path), 0, status.st_size)


def special(mode: int) -> str | None:
    """What a thing with this st_mode is, if it is no regular file: opening it may wait for ever."""
    kinds = {
        stat.S_IFDIR: "a folder", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }  # fmt: skip
    return None if stat.S_ISREG(mode) else kinds.get(stat.S_IFMT(mode), "something special")


Item = Extent | bytes | NDArray[np.uint8] | Unreadable  # what is known of an image: where it lies, or its content


@dataclass(frozen=True)
class Files:
    """Samples that are encoded images: files of their own below `root`, or members of archives.

    labels: int64 [n]. names: of each sample, relative to root or to its archive. archive: int32 [n], an index into
    `archives`, or -1 for a file of its own; offset and size: int64 [n], bytes.
    """

    root: str
    names: Texts
    labels: Ids
    size: Ids
    offset: Ids
    archive: NDArray[np.int32]
    archives: list[str] = field(default_factory=list)
    rows: Ids | None = None  # of `names`, where these are a part of a larger list
    crc32: Ids | None = None  # of the bytes of each, where the source knows it

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, i: int) -> str:
        """The name of sample i."""
        return self.names[i if self.rows is None else int(self.rows[i])]

    def where(self, i: int) -> str:
        """Where sample i lies, for a message."""
        if self.archive[i] < 0:
            return os.path.join(self.root, self.name(i))
        return f"{self.archives[self.archive[i]]}: {self.name(i)}"

    def extent(self, i: int) -> Extent:
        """Where its bytes are."""
        path = os.path.join(self.root, self.name(i)) if self.archive[i] < 0 else self.archives[self.archive[i]]
        crc32 = None if self.crc32 is None else int(self.crc32[i])
        return Extent(path, int(self.offset[i]), int(self.size[i]), crc32)

    def content(self, i: int) -> bytes:
        """The encoded bytes of sample i."""
        return self.extent(i).read()

    def take(self, ids: Ids) -> "Files":
        """The samples `ids`, in that order."""
        rows = ids if self.rows is None else self.rows[ids]
        return Files(
            self.root, self.names, self.labels[ids], self.size[ids], self.offset[ids], self.archive[ids],
            self.archives, rows, None if self.crc32 is None else self.crc32[ids],
        )  # fmt: skip

    def relabelled(self, labels: Ids) -> "Files":
        """The same samples with other labels, int64 [n]."""
        return replace(self, labels=labels)


@dataclass(frozen=True)
class Pixels:
    """Samples that are pixels already. images: uint8 [n, h, w, 3], all of one size; labels: int64 [n]."""

    source: str
    images: NDArray[np.uint8]
    labels: Ids
    rows: Ids | None = None  # of the source, where these are a part of it

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, i: int) -> str:
        """The row of sample i in its source, as text."""
        return f"{i if self.rows is None else int(self.rows[i]):06d}"

    def where(self, i: int) -> str:
        """Where sample i lies, for a message."""
        return f"{self.source}: image {self.name(i)}"

    def content(self, i: int) -> NDArray[np.uint8]:
        """The pixels of sample i, uint8 [h, w, 3]."""
        image: NDArray[np.uint8] = self.images[i]
        return image

    def take(self, ids: Ids) -> "Pixels":
        """The samples `ids`, in that order."""
        return Pixels(self.source, self.images[ids], self.labels[ids], ids if self.rows is None else self.rows[ids])

    def relabelled(self, labels: Ids) -> "Pixels":
        """The same samples with other labels, int64 [n]."""
        return replace(self, labels=labels)


@dataclass(frozen=True)
class Source:
    """A data set as its files list it.

    class_names: by label, the ids that the data set itself uses (wnids for ImageNet). titles: what people call the
    classes, where the data set says so. train, val: None where the source has no such split. settled: its images are
    shown as they lie there, whatever their EXIF tags say (a .beton).
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
    """What is known of a sample: a place to read from where there is one, otherwise its content, or why there is
    none."""
    if isinstance(records, Files):
        return records.extent(i)
    try:
        return records.content(i)
    except Unreadable as error:
        return error


def is_sequential(records: Records) -> bool:
    """Whether content(i) is cheap for ascending rows only, so that another order wants a copy to pick from."""
    return bool(getattr(records, "sequential", False))


def relabelled(source: Source, labels: Sequence[int], class_names: list[str]) -> Source:
    """The same images under other labels. labels: the new one of each class; class_names: by new label."""
    table = np.array(labels, dtype=np.int64)
    splits = (None if split is None else split.relabelled(table[split.labels]) for split in (source.train, source.val))
    train, val = splits
    return replace(source, class_names=class_names, titles=None, train=train, val=val)


def canonical(records: Records) -> Ids:
    """The samples by class, then by name, as a folder has them: one order for whatever they lie in. int64 [n].

    Samples that only have a number keep its order, and pixels, whose files have an official one, are left in it.
    """
    if isinstance(records, Pixels):
        return np.arange(len(records))
    order = np.argsort(records.labels, kind="stable")
    bounds = np.flatnonzero(np.diff(records.labels[order])) + 1
    for part in np.split(order, bounds):  # views; a class at a time keeps few names in memory
        names = [_sort_key(records.name(int(i))) for i in part]
        part[...] = part[sorted(range(len(names)), key=names.__getitem__)]
    return order


def _sort_key(name: str) -> tuple[str, int]:
    """The sort key of a sample's name; rows without one (train-00000-of-00001:17) sort by their number."""
    stem, _, row = name.rpartition(":")
    return (stem, int(row)) if stem and row.isdecimal() and len(row) < 20 else (name, 0)


def read_lines(path: Path) -> list[str]:
    """The lines of a text file without the blank ones; a UserError if it is missing, no text or far too large."""
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
    """Names for classes that are only numbers: 0 up to the highest label."""
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
        """Add a sample. size, offset: bytes; offset: where it begins in `archive`."""
        self.names += os.fsencode(name)
        self.ends.append(len(self.names))
        self.labels.append(label)
        self.sizes.append(size)
        self.offsets.append(offset)
        self.archive.append(-1 if archive is None else self.archives.setdefault(archive, len(self.archives)))

    def files(self) -> Files:
        """All samples added so far."""
        return Files(
            self.root,
            Texts.of_block(bytes(self.names), np.array(self.ends, dtype=np.int64)),
            np.array(self.labels, dtype=np.int64),
            np.array(self.sizes, dtype=np.int64),
            np.array(self.offsets, dtype=np.int64),
            np.array(self.archive, dtype=np.int32),
            list(self.archives),
        )
