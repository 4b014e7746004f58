"""WebDataset: tar archives whose members belong together by their name up to its first dot.

    train-0000.tar: n01440764/10026.jpg  n01440764/10026.cls  n01440764/10026.txt  n01440764/10027.jpg ...

Samples keep the order of the archives; the label is the number in .cls, or "label" or "cls" of .json.
"""

import json
import re
from pathlib import Path

from fastil.data.formats import shards
from fastil.data.formats.records import MOST_CLASSES, SAME, Files, Listing, Source, numbered, read_lines
from fastil.data.formats.tar import Member, Tar
from fastil.errors import UserError

IMAGES = ("jpg", "jpeg", "png", "webp", "bmp")
LABELS = ("cls", "json")
KEY = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)")
LOOK_AT = 100  # members, to tell this kind from a folder of class folders
MOST_LABEL_TEXT = 1 << 24  # bytes of a label's member: a .json may hold more than the label


def looks_like_webdataset(path: Path) -> bool:
    """Whether a tar begins with images that have labels beside them."""
    suffixes: dict[str, set[str]] = {}
    with Tar(path) as tar:
        for number, member in enumerate(tar.members()):
            match = KEY.fullmatch(member.name)
            if match and not member.is_folder and not member.hidden:
                suffixes.setdefault(match[1], set()).add(match[2].lower())
            if number == LOOK_AT:
                break
    return any(found & set(IMAGES) and found & set(LABELS) for found in suffixes.values())


def open_webdataset(path: Path, val: str | None) -> Source:
    """A folder of shards, a shard, or a name with braces; val: the same for validation images. Classes are the lines of
    classnames.txt beside the shards, otherwise numbers."""
    train_shards, val_shards = shards.split_files(path, ".tar")
    if val == SAME:
        val_shards = []
    elif val is not None:
        val_shards = shards.val_files(Path(val), ".tar")
    train = _listed(train_shards)
    val_records = _listed(val_shards) if val_shards else None
    splits = [train] + ([val_records] if val_records else [])
    names_path = _class_names(path, train_shards[0])
    names = read_lines(names_path) if names_path else numbered(split.labels for split in splits)
    if len(set(names)) < len(names):
        raise UserError(f"{names_path}: a class is in it twice; write every class once, in the order of the labels")
    for split in splits:
        if split.labels.max() >= len(names):
            row = int(split.labels.argmax())
            raise UserError(
                f"{split.where(row)}: label {split.labels[row]}, but {names_path} names {len(names)} classes"
            )
    notes = [f"{path}: {note}" for files in (train_shards, val_shards) if (note := shards.gaps(files))]
    name = path.resolve().name if path.is_dir() else path.parent.resolve().name
    return Source("webdataset", name, names, train, val_records, None, tuple(notes))


def _class_names(path: Path, shard: Path) -> Path | None:
    for folder in (path, shard.parent):
        if (folder / "classnames.txt").is_file():
            return folder / "classnames.txt"
    return None


def _listed(paths: list[Path]) -> Files:
    listing = Listing(paths[0].parent)
    seen: set[Path] = set()
    for path in paths:
        if path in seen:
            raise UserError(f"{path}: given twice; check the braces")
        before = len(listing.names)
        with Tar(path) as tar:
            for key, parts in _samples(tar).items():
                _add(listing, tar, key, parts)
        if len(listing.names) == before:
            raise UserError(f"{path}: no image in it; fetch it again")
        seen.add(path)
    return listing.files()


def _samples(tar: Tar) -> dict[str, dict[str, Member]]:
    """By key, what matters of its members by suffix."""
    samples: dict[str, dict[str, Member]] = {}
    for member in tar.members():
        match = KEY.fullmatch(member.name)
        if member.is_folder or member.hidden or not match:
            continue
        key, suffix = match[1], match[2].lower()
        if suffix in IMAGES or suffix in LABELS:
            parts = samples.setdefault(key, {})
            if suffix in parts:
                raise UserError(f"{tar.path}: {key} has two members .{suffix}; write the shard again")
            parts[suffix] = member
    return samples


def _add(listing: Listing, tar: Tar, key: str, parts: dict[str, Member]) -> None:
    images = [suffix for suffix in IMAGES if suffix in parts]
    if not images:
        raise UserError(
            f"{tar.path}: {key} has a label ({', '.join(sorted(parts))}) but no image (.{', .'.join(IMAGES)}); write "
            "the shard again"
        )
    if len(images) > 1:
        raise UserError(f"{tar.path}: {key} has several images ({', '.join(images)}); keep one of them")
    label = _label(tar, key, parts)
    image = parts[images[0]]
    listing.add(image.name, label, image.size, tar.path, image.offset)


def _label(tar: Tar, key: str, parts: dict[str, Member]) -> int:
    member = parts.get("cls") or parts.get("json")
    if member is None:
        raise UserError(f"{tar.path}: {key} has an image but no label (.cls or .json); write the shard again")
    where = f"{tar.path}: {member.name}"
    if member.size > MOST_LABEL_TEXT:
        raise UserError(f"{where}: {member.size} bytes are no label; write the shard again")
    text = tar.read(member.offset, member.size)
    label: object = None
    if "cls" in parts:
        digits = text.strip()
        label = int(digits) if digits.isdigit() and len(digits) < 10 else None
    else:
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            raise UserError(f"{where}: not JSON; write the shard again") from None
        if isinstance(found, dict):
            label = found.get("label", found.get("cls"))
    if type(label) is not int or not 0 <= label < MOST_CLASSES:
        expected = "a number from 0" if "cls" in parts else '"label" or "cls" with a number from 0'
        raise UserError(f"{where}: no label in it ({expected} is expected); write the shard again")
    return label
