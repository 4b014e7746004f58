"""Validation images in one folder, as in ImageNet's archive and Kaggle's: a list gives the class of each."""

import csv
import io
import os

from fastil.data.formats.devkit import DEVKIT, MOST_BYTES, read_devkit
from fastil.data.formats.left_out import LeftOut, is_image
from fastil.data.formats.records import MOST_TEXT, Files
from fastil.data.formats.tree import Place, Tree
from fastil.errors import UserError

SOLUTION = "LOC_val_solution.csv"
HEAD = ["ImageId", "PredictionString"]


def is_flat(tree: Tree, at: str) -> bool:
    """Return whether a folder holds images and no folders."""
    folders, files = tree.inside(at)
    return not folders and any(is_image(file.name) for file in files)


def list_flat(tree: Tree, at: str, names: list[str], homes: list[Place], left: LeftOut) -> Files:
    """Return the images of a folder with the classes from a list. names: of the classes. homes: the folders in which,
    or above which, the list may lie. Raises UserError if there is no list or it does not fit.
    """
    source, classes = _classes(tree, at, homes)
    labels = {name: label for label, name in enumerate(names)}
    listing, missing, found = tree.listing(), [], []
    for file in tree.inside(at).files:
        stem = os.path.splitext(file.name)[0]
        name = classes.get(stem, classes.get(file.name))
        if not is_image(file.name):
            left.stray.append(f"{at.rpartition('/')[2] or 'val'}/{file.name}")
        elif name is None:
            missing.append(file.name)
        elif name not in labels:
            raise UserError(f"{source}: {file.name} is of class {name}, which the training images have not")
        else:
            found.append((labels[name], file))
    if missing:
        raise UserError(f"{source}: no class of {missing[0]} ({len(missing):,} such images); take the whole list")
    for label, file in sorted(found):
        tree.add(listing, label, at, file)
    return listing.files()


def _classes(tree: Tree, at: str, homes: list[Place]) -> tuple[str, dict[str, str]]:
    """Return where the list lies, and the class of each image by its name without the ending."""
    for home, place in homes:
        solution, devkit = home.find(place, SOLUTION), home.find(place, DEVKIT)
        if solution is not None:
            return f"{solution.path}: {SOLUTION}" if not solution.path.endswith(SOLUTION) else solution.path, _solution(
                solution.path, solution.front(MOST_TEXT)
            )
        if devkit is not None:
            kit = read_devkit(devkit.path, devkit.front(MOST_BYTES + 1))
            numbers = enumerate(kit.truth, start=1)
            return devkit.path, {f"ILSVRC2012_val_{n:08d}": kit.wnids[i] for n, i in numbers if i in kit.wnids}
    count = len(tree.inside(at).files)
    raise UserError(
        f"{tree.where(at)}: {count:,} files and no class folders, so nothing says which class each image is of: put "
        f"{SOLUTION} (Kaggle's; first line {','.join(HEAD)}, then a line such as ILSVRC2012_val_00000001,n01440764 for "
        f"each) or {DEVKIT} into {homes[-1][0].path}, or sort the images into {tree.where(at)}/<class>/"
    )


def _solution(where: str, raw: bytes) -> dict[str, str]:
    """Return Kaggle's list: each image, then its class; bounding boxes follow it in the file."""
    try:
        rows = list(csv.reader(io.StringIO(raw.decode("utf-8-sig"))))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{where}: cannot be read as CSV ({error}); fetch it again") from None
    if not rows or rows[0] != HEAD:
        raise UserError(f"{where}: its first line is not {','.join(HEAD)}; fetch it again")
    classes: dict[str, str] = {}
    for number, row in enumerate(rows[1:], start=2):
        if not row:
            continue
        words = row[1].split() if len(row) == 2 else []
        if not words:
            raise UserError(f"{where}: line {number} is no image with its class; fetch it again")
        if classes.setdefault(row[0], words[0]) != words[0]:
            raise UserError(f"{where}: line {number} gives {row[0]} a second class; fetch it again")
    return classes
