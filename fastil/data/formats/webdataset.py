"""WebDataset: tar archives in which members with the same name up to its first dot, the key, are one sample.

    train-0000.tar: n01440764/10026.jpg  n01440764/10026.cls  n01440764/10026.txt  n01440764/10027.jpg ...

Samples keep the order of the archives; the label is the number in .cls, or "label" or "cls" of .json. Members whose key
begins and ends with __ describe the shard.
"""

import json
import re
import sys
from array import array
from collections import Counter
from pathlib import Path

import numpy as np

from fastil.data.formats import shards
from fastil.data.formats.left_out import COMPANIONS, LeftOut
from fastil.data.formats.pixels import suffixes
from fastil.data.formats.records import MOST_CLASSES, SAME, Files, Listing, Source, numbered, read_lines
from fastil.data.formats.tar import Member, Tar
from fastil.errors import UserError

USUAL = ("jpg", "jpeg", "png", "webp", "bmp")  # images; other formats only if a sample has none of these
LABELS = ("cls", "json")  # the first one found counts
KEY = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)")
META = re.compile(r"(?:.*/)?__[^/]*__(?:/.*)?")
LOOK_AT = 100  # members to look at, to tell this kind from a folder of class folders
MOST_LABEL_TEXT = 1 << 24  # bytes of a label's member; a .json may hold more than the label


def looks_like_webdataset(path: Path) -> bool:
    """Return whether a tar begins with images that have labels next to them."""
    found: dict[str, set[str]] = {}
    with Tar(path) as tar:
        for number, member in enumerate(tar.members()):
            parts = _key_of(member)
            if parts is not None:
                suffix = parts[1].lower()
                if suffix == "json" and not _has_label(tar.read(member.offset, min(member.size, MOST_LABEL_TEXT))):
                    suffix = ""  # notes on an image in a class folder
                found.setdefault(parts[0], set()).add(suffix)
            if number == LOOK_AT:
                break
    images = _images()
    return any(parts & images and parts & set(LABELS) for parts in found.values())


def _has_label(text: bytes) -> bool:
    try:
        return _in_json(text) is not None
    except (ValueError, RecursionError):
        return False


def _in_json(text: bytes) -> object:
    """Return the label in a .json. Raises ValueError or RecursionError if there is none."""
    found = json.loads(text)
    return found.get("label", found.get("cls")) if isinstance(found, dict) else None


def open_webdataset(path: Path, val: str | None) -> Source:
    """Return the data set of a folder of shards, a shard, or a name with braces. val: the same for validation images.
    Classes are the lines of classnames.txt next to the shards, otherwise numbers.
    """
    train_shards, val_shards = shards.split_files(path, ".tar")
    if val == SAME:
        val_shards = []
    elif val is not None:
        val_shards = shards.val_files(Path(val), ".tar")
    found = {"train": _Split(train_shards)} | ({"val": _Split(val_shards)} if val_shards else {})
    records = {name: split.listing.files() for name, split in found.items()}
    names_path = _class_names(path, train_shards[0])
    labels = {split: np.append(files.labels, np.array(found[split].lost, np.int64)) for split, files in records.items()}
    names = read_lines(names_path) if names_path else numbered(labels.values())
    if len(set(names)) < len(names):
        raise UserError(f"{names_path}: a class is in it twice; write every class once, in the order of the labels")
    left = LeftOut()
    for split, files in records.items():
        if labels[split].max() >= len(names):
            row = int(labels[split].argmax())
            where = files.where(row) if row < len(files) else files.archives[0]
            raise UserError(f"{where}: label {labels[split][row]}, but {names_path} names {len(names)} classes")
        found[split].tell(left, split, files, names)
    notes = [f"{path}: {note}" for files in (train_shards, val_shards) if (note := shards.gaps(files))]
    name = path.resolve().name if path.is_dir() else path.parent.resolve().name
    return Source("webdataset", name, names, records["train"], records.get("val"), None, (*notes, *left.notes()))


def _class_names(path: Path, shard: Path) -> Path | None:
    for folder in (path, shard.parent):
        if (folder / "classnames.txt").is_file():
            return folder / "classnames.txt"
    return None


def _images() -> set[str]:
    return {suffix[1:] for suffix in suffixes()}


def _key_of(member: Member) -> tuple[str, str] | None:
    """Return key and suffix of a member. None: it belongs to no sample."""
    match = KEY.fullmatch(member.name)
    if member.is_folder or member.hidden or not match or META.fullmatch(match[1]):
        return None
    return match[1], match[2]


class _Split:
    """The samples of some shards. other: counts of samples without an image, by label and by ending."""

    def __init__(self, paths: list[Path]) -> None:
        self.listing = Listing(paths[0].parent)
        self.other: Counter[tuple[int, str]] = Counter()
        self.stray: list[str] = []
        self.images = _images()
        seen: set[Path] = set()
        for path in paths:
            if path in seen:
                raise UserError(f"{path}: given twice; check the braces")
            before = len(self.listing)
            with Tar(path) as tar:
                self._add(tar, _Shard(tar))
            if len(self.listing) == before:
                raise UserError(f"{path}: no image in it; fetch it again")
            seen.add(path)

    def _add(self, tar: Tar, shard: "_Shard") -> None:
        for key, row in shard.rows.items():
            image, other = shard.image[row], shard.other.get(row)
            if image is None and other is not None and other.rpartition(".")[2].lower() in self.images:
                raise UserError(
                    f"{tar.path}: {key}.{other}: WebDataset ends a key at the first dot of a name, so this is {other} "
                    f"of the sample {key}, which has no image of its own; write the shard again without that dot"
                )
            if image is None and shard.has_label[row]:
                if other is None:
                    raise UserError(
                        f"{tar.path}: {key} has a label ({shard.labels(row)}) but no image "
                        f"(.{', .'.join(USUAL)}, ...); write the shard again"
                    )
                self.other[_label(tar, key, shard, row), f".{other.rpartition('.')[2].lower()}"] += 1
            elif image is None:
                if other is not None:
                    self.stray.append(f"{key}.{other}")
            else:
                label = _label(tar, key, shard, row)
                self.listing.add(f"{key}.{image}", label, shard.size[row], tar.path, shard.offset[row])

    @property
    def lost(self) -> list[int]:
        """The labels of the samples of which no image is read."""
        return [label for label, _ in self.other]

    def tell(self, left: LeftOut, split: str, files: Files, names: list[str]) -> None:
        """Note what is left out."""
        left.stray += self.stray
        counts = np.bincount(files.labels, minlength=len(names))
        for (label, suffix), count in self.other.items():
            left.count(split, names[label], suffix, count=count)
        for label in sorted(set(self.lost)):
            left.check(split, names[label], int(counts[label]), f"{files.archives[0]}: class {names[label]}")
        left.refuse()


class _Shard:
    """The members of an archive by sample, in little memory: a shard may have a million samples.

    rows: by key, the place of a sample in the lists. image: the ending of its image, as written. offset, size: of the
    image. label_offset, label_size: of its label. has_label: bits, 1 << i for LABELS[i]. other: an ending of another
    member, if there is one.
    """

    def __init__(self, tar: Tar) -> None:
        self.rows: dict[str, int] = {}
        self.image: list[str | None] = []
        self.offset, self.size = array("q"), array("q")
        self.label_offset, self.label_size = array("q"), array("q")
        self.has_label = bytearray()
        self.other: dict[int, str] = {}
        images = _images()
        for member in tar.members():
            parts = _key_of(member)
            if parts is None:
                continue
            key, written = parts
            suffix = sys.intern(written.lower())
            if suffix in images:
                self._add_image(tar, key, written, member)
            elif suffix in LABELS:
                self._add_label(tar, key, suffix, member)
            elif f".{suffix}" not in COMPANIONS:
                row = self._row(key)
                if row not in self.other or suffix.rpartition(".")[2] in images:  # an image's ending is more useful
                    self.other[row] = sys.intern(written)

    def _row(self, key: str) -> int:
        row = self.rows.setdefault(key, len(self.image))
        if row == len(self.image):
            self.image.append(None)
            self.has_label.append(0)
            for numbers in (self.offset, self.size, self.label_offset, self.label_size):
                numbers.append(0)
        return row

    def _add_image(self, tar: Tar, key: str, written: str, member: Member) -> None:
        row = self._row(key)
        before, suffix = self.image[row], written.lower()
        if before is not None:
            if before.lower() == suffix:
                raise UserError(f"{tar.path}: {key} has two members .{suffix}; write the shard again")
            if (before.lower() in USUAL) == (suffix in USUAL):
                found = ", ".join(sorted((before.lower(), suffix)))
                raise UserError(f"{tar.path}: {key} has several images ({found}); keep one of them")
        if before is None or suffix in USUAL:
            self.image[row] = sys.intern(written)
            self.offset[row], self.size[row] = member.offset, member.size

    def _add_label(self, tar: Tar, key: str, suffix: str, member: Member) -> None:
        row, bit = self._row(key), 1 << LABELS.index(suffix)
        if self.has_label[row] & bit:
            raise UserError(f"{tar.path}: {key} has two members .{suffix}; write the shard again")
        if not self.has_label[row] & 1:  # .cls wins
            self.label_offset[row], self.label_size[row] = member.offset, member.size
        self.has_label[row] |= bit

    def labels(self, row: int) -> str:
        """Return the endings of a sample's labels, for a message."""
        return ", ".join(suffix for i, suffix in enumerate(LABELS) if self.has_label[row] & 1 << i)


def _label(tar: Tar, key: str, shard: _Shard, row: int) -> int:
    if not shard.has_label[row]:
        raise UserError(f"{tar.path}: {key} has an image but no label (.cls or .json); write the shard again")
    is_cls = bool(shard.has_label[row] & 1)
    where = f"{tar.path}: {key}.{'cls' if is_cls else 'json'}"
    if shard.label_size[row] > MOST_LABEL_TEXT:
        raise UserError(f"{where}: {shard.label_size[row]} bytes are no label; write the shard again")
    text = tar.read(shard.label_offset[row], shard.label_size[row])
    label: object = None
    if is_cls:
        digits = text.strip()
        label = int(digits) if digits.isdigit() and len(digits) < 10 else None
    else:
        try:
            label = _in_json(text)
        except (ValueError, RecursionError):
            raise UserError(f"{where}: not JSON; write the shard again") from None
    if type(label) is not int or not 0 <= label < MOST_CLASSES:
        expected = "a number from 0" if is_cls else '"label" or "cls" with a number from 0'
        raise UserError(f"{where}: no label in it ({expected} is expected); write the shard again")
    return label
