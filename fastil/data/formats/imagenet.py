"""ImageNet as downloaded: the ILSVRC2012 archives, and Tiny ImageNet's own layout. Nothing is unpacked.

A label is the place of the wnid in sorted order, as with a folder of class folders.
"""

import re
from collections.abc import Iterable
from itertools import islice, pairwise
from pathlib import Path

from fastil.data.formats.class_names import check_classes, check_same_classes
from fastil.data.formats.devkit import DEVKIT, MOST_BYTES, Devkit, read_devkit
from fastil.data.formats.folder import list_val, val_at
from fastil.data.formats.left_out import LeftOut, is_image, suffix_of
from fastil.data.formats.records import SAME, Listing, Records, Source, read_lines, whole_file
from fastil.data.formats.tar import Member, Tar
from fastil.data.formats.tree import Folder
from fastil.errors import UserError

TRAIN, VAL = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
CLASS_ARCHIVE = re.compile(r"n\d{8}\.tar")
VAL_IMAGE = re.compile(r"ILSVRC2012_val_(\d{8})\.\w+")


def is_ilsvrc(path: Path) -> bool:
    """Return whether a file is the train archive, by its name or by the archives in it."""
    if path.name == TRAIN:
        return True
    with Tar(path) as tar:
        first = list(islice(tar.members(), 1))
    return bool(first and CLASS_ARCHIVE.fullmatch(first[0].name))


def open_ilsvrc(path: Path, val: str | None) -> Source:
    """Return the data set in the folder of the downloaded archives, or in the train archive with the others next to it.
    val: the val archive elsewhere, or a folder of class folders.
    """
    home, train_path = (path, path / TRAIN) if path.is_dir() else (path.parent, path)
    devkit_path = next((at for at in (home / DEVKIT, home / DEVKIT.removesuffix(".gz")) if at.exists()), None)
    devkit = None
    if devkit_path:
        devkit = read_devkit(str(devkit_path), whole_file(devkit_path).front(MOST_BYTES + 1))
    names, train = _list_train(train_path)
    notes = _compared(train_path, names, train, devkit) if devkit else []
    if not devkit:
        notes.append(f"no {DEVKIT} next to {train_path}: classes have no titles, and their counts were not compared")

    val_records: Records | None = None
    val_path = home / VAL if val is None else Path(val)
    if val_path.is_dir() and (val_path / VAL).exists():
        val_path = val_path / VAL
    if val == SAME:
        pass
    elif val is not None and val_path.is_dir():
        left = LeftOut()
        val_records = list_val(val_at(val_path), (Folder(home), ""), names, left)
        notes += left.notes()
    elif val is not None or val_path.exists():
        if not devkit or not devkit_path:
            raise UserError(
                f"{home / DEVKIT}: missing; it says which class each validation image is of; put it by {TRAIN}, or "
                "leave the validation images out with --val same"
            )
        val_records = _list_val_images(val_path, names, devkit, devkit_path)
    else:
        notes.append(f"no {VAL} next to {train_path}: there are no validation images")
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
        names = check_classes(str(path), archives)
        for label, wnid in enumerate(names):
            archive = archives[wnid]
            inner = (member for member in tar.members(archive) if not member.is_folder and not member.hidden)
            add_sorted(listing, label, inner, path, f"{archive.name}/", f"{path}: {archive.name}")
    return names, listing.files()


def add_sorted(
    listing: Listing, label: int, members: Iterable[Member], archive: Path, prefix: str = "", where: str = ""
) -> None:
    """Add the members of a class in the order of their names. prefix: of the archive in `archive` they come from."""
    found = sorted(members)
    twice = next((one.name for one, other in pairwise(found) if one.name == other.name), None)
    if twice:
        raise UserError(f"{archive}: {prefix}{twice} is in it twice; write the archive again")
    for member in found:
        listing.add(prefix + member.name, label, member.size, str(archive), member.offset)
    if not found:
        raise UserError(f"{where}: no image in it; add some or remove the class folder")


def _list_val_images(path: Path, names: list[str], devkit: Devkit, devkit_path: Path) -> Records:
    """Return them by class and then by name, as torchvision unpacks them into class folders."""
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
    """Return notes about counts that differ. Other classes than the devkit's raise UserError."""
    check_same_classes(str(path), names, "the devkit", sorted(devkit.titles))
    counts = dict.fromkeys(names, 0)
    for label in train.labels.tolist():
        counts[names[label]] += 1
    differ = [name for name in names if devkit.images[name] and devkit.images[name] != counts[name]]
    if not differ:
        return []
    first = f"{differ[0]} has {counts[differ[0]]} instead of {devkit.images[differ[0]]}"
    return [f"{len(differ)} classes have other counts of training images than the devkit says: {first}"]


def open_tiny_imagenet(path: Path, val: str | None) -> Source:
    """Return wnids.txt, words.txt, train/<wnid>/images/* and val/images/* with val/val_annotations.txt as a data set.
    Labels are places in the sorted wnids (wnids.txt is not sorted). val: a folder of class folders.
    """
    names = sorted(read_lines(path / "wnids.txt"))
    twice = next((name for name, following in pairwise(names) if name == following), None)
    if twice:
        raise UserError(f"{path / 'wnids.txt'}: {twice} is in it twice; unpack the archive again")
    tree, left, train = Folder(path), LeftOut(), Listing(path)
    check_same_classes(tree.where("wnids.txt"), names, tree.where("train"), tree.inside("train").folders)
    for label, name in enumerate(names):
        at = f"train/{name}/images"
        if not tree.has(at):
            raise UserError(f"{tree.where(at)}: no such folder; unpack the archive again")
        images = 0
        for file in tree.inside(at).files:
            if is_image(file.name):
                tree.add(train, label, at, file)
                images += 1
            else:
                left.count("train", name, suffix_of(file.name))
        left.check("train", name, images, tree.where(at))
    left.refuse()
    val_records: Records | None = None
    if val is None:
        val_records = _tiny_val(tree, names)
    elif val != SAME:
        val_records = list_val(val_at(Path(val)), (tree, "train"), names, left)
    titles = _tiny_titles(path / "words.txt", names)
    return Source("tiny-imagenet", path.resolve().name, names, train.files(), val_records, titles, tuple(left.notes()))


def _tiny_val(tree: Folder, names: list[str]) -> Records:
    annotations = tree.path / "val/val_annotations.txt"
    labels = {name: label for label, name in enumerate(names)}
    files = {file.name: file for file in tree.inside("val/images").files if is_image(file.name)}
    found: dict[str, int] = {}
    for line in read_lines(annotations):
        file, *rest = line.split("\t")
        if not rest or rest[0] not in labels:
            raise UserError(
                f"{annotations}: {file} is of class {rest[0] if rest else '(none)'}, which wnids.txt has not"
            )
        if file in found:
            raise UserError(f"{annotations}: {file} is in it twice; unpack the archive again")
        if file not in files:
            place = tree.where(f"val/images/{file}")
            raise UserError(f"{place}: no such file, but {annotations} names it; unpack it again")
        found[file] = labels[rest[0]]
    unnamed = sorted(set(files) - set(found))
    if unnamed:
        raise UserError(
            f"{annotations}: no class of {unnamed[0]} ({len(unnamed)} such images); unpack the archive again"
        )
    listing = tree.listing()
    for label, name in sorted((label, name) for name, label in found.items()):
        tree.add(listing, label, "val/images", files[name])
    return listing.files()


def _tiny_titles(path: Path, names: list[str]) -> list[str] | None:
    """Return titles by wnid, from lines of wnid, tab, words, for all of WordNet."""
    if not path.exists():
        return None
    words = dict(line.split("\t", 1) for line in read_lines(path) if "\t" in line)
    return [words.get(name, name).strip() for name in names]
