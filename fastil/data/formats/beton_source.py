"""A .beton as a source: its samples, its validation half, and the notes of its manifest."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from isal.isal_zlib import crc32
from numpy.typing import NDArray

from fastil.data.formats import class_names
from fastil.data.formats.beton import RAW, Beton
from fastil.data.formats.records import CHANGED, Files, Records, Source, Texts, Unreadable
from fastil.errors import UserError
from fastil.protocol import Ids


@dataclass(frozen=True)
class Stored:
    """Samples of a .beton that stores pixels."""

    beton: Beton
    rows: Ids
    labels: Ids

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, i: int) -> str:
        """Return the name of sample i."""
        return self.beton.name(int(self.rows[i]))

    def where(self, i: int) -> str:
        """Return where sample i lies, for a message."""
        return f"{self.beton.path}: sample {self.rows[i]}"

    def content(self, i: int) -> bytes | NDArray[np.uint8]:
        """Return the pixels of sample i, uint8 [h, w, 3], or its JPEG. Raises Unreadable if it was changed."""
        row = int(self.rows[i])
        manifest = self.beton.manifest
        if manifest is not None and crc32(self.beton.view(row)) != manifest.crc32[row]:
            raise Unreadable(self.where(i), CHANGED)
        return self.beton.image(row) if self.beton.modes[row] == RAW else self.beton.encoded(row)

    def take(self, ids: Ids) -> "Stored":
        """Return the samples `ids`, in that order."""
        return Stored(self.beton, self.rows[ids], self.labels[ids])

    def relabelled(self, labels: Ids) -> "Stored":
        """Return the same samples with other labels, int64 [n]."""
        return Stored(self.beton, self.rows, labels)


def records(beton: Beton) -> Records:
    """Return the samples of a file as a source."""
    if beton.mode != "jpeg":
        return Stored(beton, np.arange(len(beton)), beton.labels)
    names = Texts(beton.name(i) for i in range(len(beton)))
    archive = np.zeros(len(beton), dtype=np.int32)
    known = None if beton.manifest is None else np.array(beton.manifest.crc32, dtype=np.int64)
    folder, archives = str(beton.path.parent), [str(beton.path)]
    return Files(folder, names, beton.labels, beton.lengths, beton.starts, archive, archives, crc32=known)


def check_same_classes(train: Beton, val: Beton) -> None:
    """Raise UserError if the labels of two files do not mean the same classes, as far as their manifests tell."""
    names = train.class_names
    if train.manifest is not None and val.manifest is not None and val.class_names != names:
        class_names.check_same_classes(str(train.path), names, str(val.path), val.class_names)
    if val.labels.max() >= len(names):
        raise UserError(f"{val.path}: has a label {val.labels.max()}, {train.path.name} only {len(names)} classes")


def records_of(path: Path, val_path: Path | None = None) -> Source:
    """Return X.beton as a data set, with another file for its validation images, by default an existing X.val.beton."""
    train = Beton(path)
    val_path = val_path_of(path) if val_path is None else val_path
    val = Beton(val_path) if val_path.exists() else None
    names, titles = train.class_names, train.manifest.titles if train.manifest else None
    if val is not None:
        check_same_classes(train, val)
    name = train.manifest.source["name"] if train.manifest else path.stem
    val_records = None if val is None else records(val)
    return Source("beton", name, names, records(train), val_records, titles, notes_of(train), settled=True)


def notes_of(train: Beton) -> tuple[str, ...]:
    """Return the notes of a conversion, and how it changed image sizes, which a run on the file should share."""
    if train.manifest is None:
        return ()
    notes, storage = tuple(train.manifest.notes), train.manifest.parameters.get("storage", {})
    if storage.get("squash"):
        side = storage["squash"]
        notes += (f"images were squashed to {side}x{side}, whatever their shape (convert --squash): show a network of "
                  "this run images squashed likewise",)  # fmt: skip
    if storage.get("max_side"):
        notes += (
            f"images have at most {storage['max_side']} pixels a side; larger ones were resized (convert --max-side)",
        )
    return notes


def val_path_of(path: Path) -> Path:
    """Return the path of X.beton's validation file, X.val.beton."""
    return path.with_name(path.name.removesuffix(".beton") + ".val.beton")
