"""The choice of classes, and of how many images of each go into a file."""

import dataclasses
import os
from pathlib import Path

import numpy as np

from fastil.data.formats.records import Records, Source, canonical
from fastil.errors import UserError
from fastil.protocol import Ids, imagenet_subset

SUBSETS = ("lucir", "first100")


def subset(source: Source, classes: str | None, per_class: int | None) -> Source:
    """Return the source with these classes only, labels renumbered in the source's order, and every split sorted by
    class, then by name. Images whose files have an official order keep it within a class.

    classes: a number (that many of the first), names separated by commas, the path of a file with a name per line, or
    "lucir" or "first100", the two ImageNet-100 subsets. per_class: at most so many training images of each class; also
    of validation images, if they are the training images.
    """
    kept = _wanted(source, classes)
    table = np.full(len(source.class_names), -1, dtype=np.int64)
    table[kept] = np.arange(len(kept))
    if per_class is not None and per_class < 1:
        raise UserError(f"--per-class {per_class}: must be at least 1")
    return dataclasses.replace(
        source,
        class_names=[source.class_names[c] for c in kept],
        titles=None if source.titles is None else [source.titles[c] for c in kept],
        train=None if source.train is None else _reduced(source.train, table, per_class),
        val=None
        if source.val is None
        else _reduced(source.val, table, per_class if source.val is source.train else None),
    )


def _reduced(records: Records, table: Ids, per_class: int | None) -> Records:
    if records.labels.max(initial=-1) >= len(table):
        i = int(records.labels.argmax())
        raise UserError(
            f"{records.where(i)}: is of class {records.labels[i]}, but there are {len(table)} classes; fetch it again"
        )
    labels = table[records.labels]
    order = canonical(records)
    order = order[np.argsort(labels[order], kind="stable")]
    order = order[labels[order] >= 0]
    if per_class is not None:
        sorted_labels = labels[order]
        rank = np.arange(len(order)) - np.searchsorted(sorted_labels, sorted_labels)
        order = order[rank < per_class]
    return records.take(order).relabelled(labels[order])


def _wanted(source: Source, classes: str | None) -> Ids:
    """Return the labels of the chosen classes, ascending."""
    names = source.class_names
    if classes is None:
        return np.arange(len(names))
    if classes in SUBSETS:
        if len(names) != 1000:
            raise UserError(f"--classes {classes}: is a subset of ImageNet's 1,000 classes; this set has {len(names)}")
        return np.sort(imagenet_subset(classes))
    if classes.isdecimal():
        if not 1 <= int(classes) <= len(names):
            raise UserError(f"--classes {classes}: there are {len(names)} classes")
        return np.arange(int(classes))
    known = {name: label for label, name in enumerate(names)}
    wanted = [part.strip() for part in classes.split(",")]
    if os.path.isfile(classes):
        try:
            lines = [line.strip() for line in Path(classes).read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError):
            raise UserError(f"--classes {classes}: not a text file that can be read") from None
        wanted = [line if line in known else line.split()[0] for line in lines]
    unknown = [name for name in wanted if name not in known]
    if unknown or not wanted:
        raise UserError(
            f"--classes: no class {unknown[0] if unknown else 'is named'}; give a number, names ({names[0]}, ...), a "
            f"file with a name per line, or {' or '.join(SUBSETS)}"
        )
    if len(set(wanted)) < len(wanted):
        raise UserError("--classes: a class is named twice")
    return np.sort(np.array([known[name] for name in wanted], dtype=np.int64))
