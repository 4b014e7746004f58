"""ImageNet as it is handed out: the ILSVRC2012 archives, and Tiny ImageNet's own layout. Nothing is unpacked.

The devkit numbers the classes in an order of its own (ILSVRC2012_ID 1 to 1,000, then inner nodes of WordNet), and the
ground truth of the validation images is written in it. A label here is the place of the wnid in sorted order, as for a
folder of class folders.
"""

import gzip
import io
import re
import tarfile
import zlib
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple

from fastil.data.formats import folder
from fastil.data.formats.folder_tar import add_sorted, list_val
from fastil.data.formats.matfile import read_variables
from fastil.data.formats.records import MOST_TEXT, SAME, Listing, Records, Source, read_lines
from fastil.data.formats.tar import Member, Tar
from fastil.errors import UserError

TRAIN, VAL, DEVKIT = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"
META, TRUTH = "data/meta.mat", "data/ILSVRC2012_validation_ground_truth.txt"
CLASS_ARCHIVE = re.compile(r"n\d{8}\.tar")
VAL_IMAGE = re.compile(r"ILSVRC2012_val_(\d{8})\.\w+")


class Devkit(NamedTuple):
    """wnids: by devkit id, of the classes only. titles, images: by wnid. truth: devkit id of each validation image."""

    wnids: dict[int, str]
    titles: dict[str, str]
    images: dict[str, int]
    truth: list[int]


def is_ilsvrc(path: Path) -> bool:
    """Whether a file is the train archive: by its name, or by the archives in it."""
    if path.name == TRAIN:
        return True
    with Tar(path) as tar:
        first = list(islice(tar.members(), 1))
    return bool(first and CLASS_ARCHIVE.fullmatch(first[0].name))


def open_ilsvrc(path: Path, val: str | None) -> Source:
    """The folder of the downloaded archives, or the train archive with the others beside it. val: the val archive
    elsewhere, or a folder of class folders."""
    home, train_path = (path, path / TRAIN) if path.is_dir() else (path.parent, path)
    devkit_path = next((at for at in (home / DEVKIT, home / DEVKIT.removesuffix(".gz")) if at.exists()), None)
    devkit = _read_devkit(devkit_path) if devkit_path else None
    names, train = _list_train(train_path)
    notes = _compared(train_path, names, train, devkit) if devkit else []
    if not devkit:
        notes.append(f"no {DEVKIT} beside {train_path}: classes have no titles, and their counts were not compared")

    val_records: Records | None = None
    val_path = home / VAL if val is None else Path(val)
    if val_path.is_dir() and (val_path / VAL).exists():
        val_path = val_path / VAL
    if val == SAME:
        pass
    elif val is not None and val_path.is_dir():
        val_names, val_records = list_val(val_path)
        folder.check_same_classes(str(train_path), names, val, val_names)
    elif val is not None or val_path.exists():
        if not devkit or not devkit_path:
            raise UserError(
                f"{home / DEVKIT}: missing; it says which class each validation image is of; put it beside {TRAIN}, or "
                "leave the validation images out with --val same"
            )
        val_records = _list_val_images(val_path, names, devkit, devkit_path)
    else:
        notes.append(f"no {VAL} beside {train_path}: there are no validation images")
    titles = [devkit.titles[name] for name in names] if devkit else None
    return Source("ilsvrc", "imagenet", names, train, val_records, titles, tuple(notes))


def _list_train(path: Path) -> tuple[list[str], Records]:
    listing = Listing(path.parent)
    with Tar(path) as tar:
        archives: dict[str, Member] = {}
        for member in tar.members():
            if member.is_folder or member.hidden:
                continue
            wnid, tar_suffix, rest = member.name.rpartition("/")[2].rpartition(".tar")
            if not tar_suffix or rest or not wnid:
                raise UserError(f"{path}: {member.name} is no class's archive (such as n01440764.tar); fetch it again")
            if wnid in archives:
                raise UserError(f"{path}: {wnid}.tar is in it twice; write the archive again")
            archives[wnid] = member
        names = folder.check_classes(str(path), archives)
        for label, wnid in enumerate(names):
            archive = archives[wnid]
            inner = (member for member in tar.members(archive) if not member.is_folder and not member.hidden)
            add_sorted(listing, label, inner, path, f"{archive.name}/", f"{path}: {archive.name}")
    return names, listing.files()


def _list_val_images(path: Path, names: list[str], devkit: Devkit, devkit_path: Path) -> Records:
    """By class and then by name, as torchvision unpacks them to class folders."""
    images: dict[int, Member] = {}
    with Tar(path) as tar:
        for member in tar.members():
            if member.is_folder or member.hidden:
                continue
            match = VAL_IMAGE.fullmatch(member.name.rpartition("/")[2])
            if not match:
                raise UserError(f"{path}: {member.name} is not named like ILSVRC2012_val_00000001.JPEG; fetch it again")
            number = int(match[1])
            if number in images:
                raise UserError(f"{path}: image {number} is in it twice; fetch it again")
            images[number] = member
    if len(images) != len(devkit.truth):
        raise UserError(
            f"{path}: {len(images)} images, but {devkit_path} has the classes of {len(devkit.truth)}; fetch both again"
        )
    missing = next((number for number in range(1, len(images) + 1) if number not in images), None)
    if missing is not None:
        raise UserError(f"{path}: image {missing} of {len(images)} is not in it; fetch it again")
    by_class: dict[str, list[Member]] = {name: [] for name in names}
    for number, devkit_id in enumerate(devkit.truth, start=1):
        wnid = devkit.wnids.get(devkit_id)
        if wnid is None:
            raise UserError(
                f"{devkit_path}: validation image {number} is of class {devkit_id}, which meta.mat has not; fetch it "
                "again"
            )
        by_class[wnid].append(images[number])
    listing = Listing(path.parent)
    for label, name in enumerate(names):
        add_sorted(listing, label, by_class[name], path, where=f"{path}: class {name}")
    return listing.files()


def _compared(path: Path, names: list[str], train: Records, devkit: Devkit) -> list[str]:
    """Notes about counts that differ; other classes than the devkit's are an error."""
    odd = sorted(set(names) ^ set(devkit.titles))
    if odd:
        problem = "is not in it, but is a class of" if odd[0] in devkit.titles else "is in it, but is no class of"
        raise UserError(f"{path}: {odd[0]} {problem} the devkit ({len(odd)} such classes); fetch both again")
    counts = dict.fromkeys(names, 0)
    for label in train.labels.tolist():
        counts[names[label]] += 1
    differ = [name for name in names if devkit.images[name] and devkit.images[name] != counts[name]]
    if not differ:
        return []
    first = f"{differ[0]} has {counts[differ[0]]} instead of {devkit.images[differ[0]]}"
    return [f"{len(differ)} classes have other counts of training images than the devkit says: {first}"]


def _read_devkit(path: Path) -> Devkit:
    try:
        raw = path.read_bytes()
        if raw.startswith(b"\x1f\x8b"):
            with gzip.open(io.BytesIO(raw)) as file:  # read to its end, where the checksum is
                raw = file.read(MOST_TEXT)
        parts: dict[str, bytes] = {}
        with tarfile.open(fileobj=io.BytesIO(raw)) as tar:
            for member in tar:
                part = next((part for part in (META, TRUTH) if member.name.endswith(f"/{part}")), None)
                opened = tar.extractfile(member) if part and member.isfile() else None
                if part and opened:
                    parts[part] = opened.read()
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        line = " ".join(str(error).split())
        raise UserError(f"{path}: cannot be read ({line}); fetch it again") from None
    for part in (META, TRUTH):
        if part not in parts:
            raise UserError(f"{path}: no {part} in it; fetch it again")
    wnids, titles, images = _parse_meta(parts[META], f"{path}: {META}")
    numbers = parts[TRUTH].split()
    if not numbers or not all(number.isdigit() and len(number) < 10 for number in numbers):
        raise UserError(f"{path}: {TRUTH} is not a list of numbers; fetch it again")
    return Devkit(wnids, titles, images, [int(number) for number in numbers])


def _parse_meta(content: bytes, where: str) -> tuple[dict[int, str], dict[str, str], dict[str, int]]:
    """Wnids by devkit id, titles and counts of training images by wnid: of the leaves, the others are inner nodes."""
    try:
        found = [
            (_whole(row["ILSVRC2012_ID"]), row["WNID"].strip(), row["words"].strip(), _whole(row["num_train_images"]))
            for row in read_variables(content)["synsets"]
            if _whole(row["num_children"]) == 0
        ]
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise UserError(f"{where} cannot be read ({error or type(error).__name__}); fetch it again") from None
    wnids = {devkit_id: wnid for devkit_id, wnid, _, _ in found}
    titles = {wnid: words for _, wnid, words, _ in found}
    if not found or len(wnids) != len(found) or len(titles) != len(found):
        raise UserError(f"{where} names no class, or one twice; fetch it again")
    return wnids, titles, {wnid: count for _, wnid, _, count in found}


def _whole(array: Any) -> int:
    """The one number of an array."""
    if len(array) != 1:
        raise ValueError(f"{len(array)} numbers where one should be")
    return int(array[0])


def open_tiny_imagenet(path: Path, val: str | None) -> Source:
    """wnids.txt, words.txt, train/<wnid>/images/*, val/images/* with val/val_annotations.txt. Labels are places in the
    sorted wnids (wnids.txt is not sorted). val: a folder of class folders."""
    names = sorted(read_lines(path / "wnids.txt"))
    twice = next((name for name, following in pairwise(names) if name == following), None)
    if twice:
        raise UserError(f"{path / 'wnids.txt'}: {twice} is in it twice; unpack the archive again")
    train_root = path / "train"
    there = folder.class_folders(train_root)
    if there != names:
        odd = sorted(set(there) ^ set(names))
        where, missing = (train_root, "wnids.txt") if odd[0] in there else ("wnids.txt", train_root)
        raise UserError(
            f"{path}: {odd[0]} is in {where} but not in {missing} ({len(odd)} such); unpack the archive again"
        )
    train = Listing(path)
    for label, name in enumerate(names):
        found = sorted(folder.image_files(train_root / name / "images"))
        if not found:
            raise UserError(f"{train_root / name / 'images'}: no image in it; unpack the archive again")
        for file, size in found:
            train.add(f"train/{name}/images/{file}", label, size)
    val_records: Records | None = None
    if val is None:
        val_records = _tiny_val(path, names)
    elif val != SAME:
        val_names, val_records = list_val(Path(val))
        folder.check_same_classes(str(train_root), names, val, val_names)
    return Source(
        "tiny-imagenet", path.resolve().name, names, train.files(), val_records, _tiny_titles(path / "words.txt", names)
    )


def _tiny_val(path: Path, names: list[str]) -> Records:
    annotations = path / "val/val_annotations.txt"
    labels = {name: label for label, name in enumerate(names)}
    sizes = dict(folder.image_files(path / "val/images"))
    found: dict[str, int] = {}
    for line in read_lines(annotations):
        file, *rest = line.split("\t")
        if not rest or rest[0] not in labels:
            raise UserError(
                f"{annotations}: {file} is of class {rest[0] if rest else '(none)'}, which wnids.txt has not"
            )
        if file in found:
            raise UserError(f"{annotations}: {file} is in it twice; unpack the archive again")
        if file not in sizes:
            raise UserError(f"{path / 'val/images' / file}: no such file, but {annotations} names it; unpack it again")
        found[file] = labels[rest[0]]
    unnamed = sorted(set(sizes) - set(found))
    if unnamed:
        raise UserError(
            f"{annotations}: no class of {unnamed[0]} ({len(unnamed)} such images); unpack the archive again"
        )
    listing = Listing(path)
    for label, file in sorted((label, file) for file, label in found.items()):
        listing.add(f"val/images/{file}", label, sizes[file])
    return listing.files()


def _tiny_titles(path: Path, names: list[str]) -> list[str] | None:
    """Wnid, tab, words: of all of WordNet."""
    if not path.exists():
        return None
    words = dict(line.split("\t", 1) for line in read_lines(path) if "\t" in line)
    return [words.get(name, name).strip() for name in names]
