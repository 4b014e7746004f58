"""Data sets of several files: which files are there, which are missing, and which split each belongs to."""

import re
from collections.abc import Iterable
from pathlib import Path

from fastil.data.formats.records import special
from fastil.errors import UserError

SPLIT = re.compile(r"(?:^|[-_.])(train|training|val|valid|validation|test)(?:[-_.\d]|$)")
COUNTED = re.compile(r"(.+?)-(\d+)-of-(\d+)(?:-[0-9a-f]+)?\.\w+")
RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}")
MOST = 100_000
NAMED = 5  # missing shards that a message names; it counts the rest


def split_of(name: str) -> str | None:
    """Return train, val or test, whichever the name of a shard or of its folder says."""
    match = SPLIT.search(name.lower())
    if not match:
        return None
    return {"train": "train", "training": "train", "test": "test"}.get(match[1], "val")


def grouped(path: Path, suffix: str) -> dict[str | None, list[Path]]:
    """Return the files of a folder, and of its folders named data or like a split, by split, each list sorted."""
    splits: dict[str | None, list[Path]] = {}
    below = [entry for entry in sorted(path.iterdir()) if entry.is_dir() and not entry.name.startswith(".")]
    for home in (path, *(entry for entry in below if entry.name == "data" or split_of(entry.name))):
        if home.name.startswith("partial-"):  # Hugging Face's automatic conversion stops after 5 GB
            raise UserError(f"{home}: holds only the first part of a data set; fetch the whole of it")
        of_folder = split_of(home.name) if home != path else None
        for file in sorted(home.iterdir()):
            if not file.name.endswith(suffix) or file.name.startswith(".") or file.is_dir():
                continue
            what = special(file.stat().st_mode) if file.exists() else "a link to nothing"
            if what:
                raise UserError(f"{file}: is {what}, not a file; remove it")
            splits.setdefault(split_of(file.name) or of_folder, []).append(file)
    return splits


def split_files(path: Path, suffix: str) -> tuple[list[Path], list[Path]]:
    """Return train and val shards of a path that is a shard, a name with braces, or a folder.

    If no name tells a split, all are training shards; test stands in for val.
    """
    if "{" in str(path) or not path.is_dir():
        return expand(path), []
    splits = grouped(path, suffix)
    unnamed = splits.get(None, [])
    if unnamed and len(splits) > 1:
        raise UserError(f"{unnamed[0]}: its name says neither train nor val, as others do; rename it or move it away")
    train = splits.get("train", unnamed)
    if not train:
        others = f"only of {', '.join(sorted(map(str, splits)))}" if splits else "at all"
        raise UserError(f"{path}: no *{suffix} of the training images, and none {others}; name them train-*{suffix}")
    return train, splits.get("val") or splits.get("test") or []


def val_files(path: Path, suffix: str) -> list[Path]:
    """Return the shards of a path for the validation images; of a folder only those named val, if there are any."""
    if "{" in str(path) or not path.is_dir():
        return expand(path)
    splits = grouped(path, suffix)
    shards = splits.get("val") or splits.get("test") or splits.get(None) or splits.get("train")
    if not shards:
        raise UserError(f"{path}: no *{suffix} in it; give a folder of shards, or a shard")
    return shards


def check_complete(files: list[Path]) -> None:
    """Check that the shards are complete: names like train-00003-of-00294 say how many there must be."""
    parts = [(file, match) for file in files if (match := COUNTED.fullmatch(file.name))]
    families: dict[tuple[str, int], dict[int, Path]] = {}
    for file, match in parts:
        family = families.setdefault((match[1], int(match[3])), {})
        if int(match[2]) in family:
            raise UserError(f"{file}: the same shard as {family[int(match[2])].name}; keep one of them")
        family[int(match[2])] = file
    for (name, count), found in families.items():
        if count > MOST or max(found) >= count:
            raise UserError(f"{found[max(found)]}: no shard of {count}; fetch the data set again")
        missing = [number for number in range(count) if number not in found]
        if missing:
            first = ", ".join(f"{number:05d}" for number in missing[:NAMED])
            more = f" and {len(missing) - NAMED} more" if len(missing) > NAMED else ""
            where = next(iter(found.values())).parent
            raise UserError(f"{where}: of the {count} shards {name}-* {first}{more} are missing; fetch them")
    if len({name for name, _ in families}) < len(families):
        raise UserError(f"{files[0].parent}: shards of different counts; remove those of the other version")


def gaps(files: list[Path]) -> str | None:
    """Return a note if the numbers in the names have gaps."""
    numbers: dict[tuple[str, str], set[int]] = {}
    for file in files:
        match = re.fullmatch(r"(.*?)(\d+)(\D*)", file.name)
        if match and len(match[2]) < 10:
            numbers.setdefault((match[1], match[3]), set()).add(int(match[2]))
    for (prefix, suffix), found in numbers.items():
        missing = max(found) - min(found) + 1 - len(found)
        if missing:
            return f"{missing} numbers between {min(found)} and {max(found)} have no shard {prefix}*{suffix}"
    return None


def expand(path: Path) -> list[Path]:
    """Return the paths of train-{0000..0003}.tar, four here; any other path alone."""
    if path.exists():
        return [path]
    names = [str(path)]
    while any("{" in name for name in names):
        expanded: list[str] = []
        for name in names:
            match = RANGE.search(name)
            if not match:
                raise UserError(f"{path}: braces that cannot be read; write them like train-{{0000..0003}}.tar")
            parts: Iterable[str] = match[3].split(",") if match[3] is not None else []
            if match[3] is None:
                first, last = int(match[1]), int(match[2])
                if not first <= last < first + MOST:
                    raise UserError(f"{path}: {match[0]} is no range of shards; write it like {{0000..0003}}")
                parts = (f"{number:0{len(match[1])}d}" for number in range(first, last + 1))
            expanded += [name[: match.start()] + part + name[match.end() :] for part in parts]
            if len(expanded) > MOST:
                raise UserError(f"{path}: more than {MOST} shards; check the braces")
        names = expanded
    return [Path(name) for name in names]
