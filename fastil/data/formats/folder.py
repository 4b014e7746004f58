"""Class folders: <split>/<class>/<file>, on a disk or in one tar archive, listed by the same rules."""

from pathlib import Path

from fastil.data.formats.class_names import check_classes, check_same_classes
from fastil.data.formats.flat_val import is_flat, list_flat
from fastil.data.formats.left_out import LeftOut, is_image, suffix_of
from fastil.data.formats.records import SAME, Files, Source
from fastil.data.formats.tree import Archive, Folder, Place, Tree
from fastil.errors import UserError

NEEDED = "train/<class>/* and val/<class>/* are needed, or --val as well"
VALS = ("val", "validation", "valid", "test")  # folders of validation images; the first always counts as one
KAGGLE = ("Data/CLS-LOC", "ILSVRC/Data/CLS-LOC")  # where Kaggle's ImageNet has train/ and val/


def open_folder(path: Path, val: str | None) -> Source:
    """Return train/<class>/* and val/<class>/*, or class folders alone, from a folder or a tar archive.

    Files come in sorted order. Hidden files and those with other endings than an image's are left out; links are
    followed. val: another folder or archive. Validation images may lie in one folder if a list says which class each
    belongs to (Kaggle's, ImageNet's devkit).
    """
    tree = tree_at(path)
    base = next((f"{at}/" for at in KAGGLE if tree.has(f"{at}/train")), "")
    at_top = not _is_train(tree, f"{base}train") and (val is not None or not tree.has("val"))
    train_at = "" if at_top else f"{base}train"
    if not tree.has(train_at):
        raise UserError(f"{tree.where(train_at)}: no such folder; {NEEDED}")
    left, notes = LeftOut(), []
    names = classes_in(tree, train_at)
    train = _listed(tree, train_at, names, left, "train")
    place: Place | None = None
    if val not in (None, SAME):
        place = val_at(Path(str(val)))
    elif val is None and not at_top:
        own = next((f"{base}{name}" for name in VALS if _is_val(tree, f"{base}{name}", names)), None)
        place = None if own is None else (tree, own)
        if own is not None and own != f"{base}{VALS[0]}":
            notes.append(f"{own}/ is taken for the validation images")
    val_records = None if place is None else list_val(place, (tree, train_at), names, left)
    kind, name = ("folder-tar", path.resolve().stem) if path.is_file() else ("folder", path.resolve().name)
    return Source(kind, name, names, train, val_records, notes=(*notes, *left.notes()))


def tree_at(path: Path) -> Tree:
    """Return the files of a folder or of a tar archive."""
    if not path.is_file():
        if not path.is_dir():
            raise UserError(f"{path}: {'neither a file nor a folder' if path.exists() else 'no such folder'}; {NEEDED}")
        return Folder(path)
    archive = Archive(path)
    archive.skip_shared(("train", *VALS))
    return archive


def val_at(path: Path) -> Place:
    """Return where a folder or archive given for the validation images has them: in val/, or in itself."""
    tree = tree_at(path)
    return tree, "val" if tree.has("val") else ""


def list_val(place: Place, train: Place, names: list[str], left: LeftOut) -> Files:
    """Return the validation images in class folders, or in one folder with a list of their classes. train: where the
    training images lie, whose classes are `names`.
    """
    tree, at = place
    if is_flat(tree, at):
        return list_flat(tree, at, names, [place, train], left)
    check_same_classes(train[0].where(train[1]), names, tree.where(at), classes_in(tree, at))
    return _listed(tree, at, names, left, "val")


def _is_train(tree: Tree, at: str) -> bool:
    """Return whether a folder holds the training images. A class may also be called train (CIFAR-100 has one)."""
    others = set(tree.inside("").folders) - {"train", *VALS}
    return tree.has(at) and (bool(tree.inside(at).folders) or "/" in at or len(others) < 2)


def _is_val(tree: Tree, at: str, names: list[str]) -> bool:
    """Return whether a folder is meant for the validation images: by name, or because it has most of train's
    classes.
    """
    shared = set(tree.inside(at).folders) & set(names)
    return tree.has(at) and (at.rpartition("/")[2] == VALS[0] or 2 * len(shared) > len(names))


def classes_in(tree: Tree, at: str) -> list[str]:
    """Return the classes that the folders in a folder stand for, in their order."""
    folders, files = tree.inside(at)
    broken = next((file.name for file in files if file.broken), None)
    if broken:  # it may have been a class
        raise UserError(f"{tree.where(at)}/{broken}: links to nothing; repair or remove it")
    return check_classes(tree.where(at), folders)


def _listed(tree: Tree, at: str, names: list[str], left: LeftOut, split: str) -> Files:
    """Return the images in the class folders of a folder."""
    listing = tree.listing()
    left.stray += [f"{split}/{file.name}" for file in tree.inside(at).files]
    for label, name in enumerate(names):
        folder = f"{at}/{name}".lstrip("/")
        images = 0
        folders, files = tree.inside(folder)
        for file in files:
            if is_image(file.name):
                tree.add(listing, label, folder, file)
                images += 1
            else:
                left.count(split, name, suffix_of(file.name))
        for file in tree.below(folder, folders):
            left.count_deeper(split, name, file.name)
        left.check(split, name, images, tree.where(folder))
    left.refuse()
    return listing.files()
