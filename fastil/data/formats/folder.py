"""Image folders: <split>/<class>/<file>, listed; and the images of any source decoded and resized once."""

import contextlib
import io
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastil import machine
from fastil.data.formats.pixels import to_rgb
from fastil.data.formats.records import SAME, Ids, Listing, Pixels, Records, Source, canonical, is_sequential
from fastil.errors import UserError

Arrays = tuple[NDArray[np.uint8], NDArray[np.int64]]
Content = bytes | NDArray[np.uint8]
MISSING = "no such folder; train/<class>/* and val/<class>/* are needed, or --val as well"
VALS = ("val", "validation", "valid", "test")  # folders of validation images, if they have the classes of train
# Endings of image files; a file without one may be an image.
IMAGES = frozenset(
    ("", ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm",
     ".pnm")
)  # fmt: skip
NAMED = 3  # how many damaged files a message names before it counts the rest
TOGETHER = 64  # images that a thread takes in one go: small ones decode in less time than they are handed over
AT_ONCE = 2 * TOGETHER * machine.cores()  # encoded images of a sequential source that wait for a thread


def open_folder(path: Path, val: str | None) -> Source:
    """train/<class>/* and val/<class>/*, or class folders alone. Files in sorted order, hidden ones and those whose
    ending is no image's left out, links followed."""
    train_root, val_root = path / "train", path / VALS[0]
    if not train_root.is_dir() and (val is not None or not val_root.is_dir()):
        train_root = path
    names = _classes(train_root)
    if val not in (None, SAME):
        val_root = Path(str(val))
    elif train_root != path:
        val_root = next((path / name for name in VALS if has_classes(path / name, names)), val_root)
    has_val = val != SAME and (val is not None or val_root.is_dir())
    if has_val:
        check_same_classes(str(train_root), names, str(val_root), _classes(val_root))
    notes = []
    if has_val and val is None and val_root.name != VALS[0]:
        notes.append(f"{val_root.name}/ is taken for the validation images")
    train, others = _listed(path, train_root, names)
    val_records = None
    if has_val:
        val_records, more = _listed(val_root if val else path, val_root, names)
        others += more
    if others:
        notes.append(
            f"{len(others):,} files or folders are left out, no images by their names or in no class, such as "
            f"{others[0]}"
        )
    return Source("folder", path.resolve().name, names, train, val_records, notes=tuple(notes))


def has_classes(root: Path, names: list[str]) -> bool:
    return root.is_dir() and (root.name == VALS[0] or class_folders(root) == names)


def list_split(root: Path) -> tuple[list[str], Records]:
    """Classes and samples of a folder of class folders."""
    names = _classes(root)
    return names, _listed(root, root, names)[0]


def check_same_classes(train: str, names: list[str], val: str, val_names: list[str]) -> None:
    if names != val_names:
        odd = sorted(set(names) ^ set(val_names))[0]
        where, missing = (train, val) if odd in names else (val, train)
        raise UserError(f"class {odd} is in {where} but not in {missing}; both need the same class folders")


def _listed(base: Path, root: Path, names: list[str]) -> tuple[Records, list[str]]:
    """The images in root's class folders, their names relative to base; and the files that are left out."""
    listing = Listing(base)
    others = [f"{root}/{name}" for name, _ in sorted(entries(root)) if not name.endswith("/")]
    for label, name in enumerate(names):
        folder = root / name
        prefix, count = folder.relative_to(base).as_posix(), 0
        for file, size in sorted(entries(folder)):
            if is_image(file):
                listing.add(f"{prefix}/{file}", label, size)
                count += 1
            else:
                others.append(f"{folder}/{file}")
        if not count:
            below = next((other for other in others if other.startswith(f"{folder}/") and other.endswith("/")), None)
            hint = f", only the folder {below}; move its images up" if below else "; add some"
            raise UserError(f"{folder}: no image in it{hint}, or remove the class folder")
    return listing.files(), others


def image_files(folder: Path) -> Iterator[tuple[str, int]]:
    """Names and sizes of the image files of a folder."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; unpack the data set again")
    return ((name, size) for name, size in entries(folder) if is_image(name))


def entries(folder: Path) -> Iterator[tuple[str, int]]:
    """Names and sizes of the files of a folder, hidden ones left out; of a folder in it the name ends in /."""
    with os.scandir(folder) as found:
        for entry in found:
            if is_hidden(entry.name):
                continue
            try:
                status = entry.stat()
            except OSError as error:  # a link to nowhere, or to itself
                raise UserError(f"{entry.path}: cannot be read ({error.strerror}); repair or remove it") from None
            yield entry.name + "/" * entry.is_dir(), status.st_size


def is_image(name: str) -> bool:
    """By its ending; a file without one may be an image."""
    return not name.endswith("/") and os.path.splitext(name)[1].lower() in IMAGES


def is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _classes(root: Path) -> list[str]:
    if not root.is_dir():
        raise UserError(f"{root}: {'a file, not a folder of class folders' if root.exists() else MISSING}")
    return check_classes(str(root), class_folders(root))


def class_folders(root: Path) -> list[str]:
    """Sorted, hidden ones left out."""
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; unpack the data set again")
    return sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not is_hidden(entry.name))


def check_classes(where: str, found: Iterable[str]) -> list[str]:
    """Sorted; two or more of them."""
    names = sorted(found)
    if len(names) < 2:
        only = f"only one class folder ({names[0]})" if names else "no class folder"
        raise UserError(f"{where}: {only}; incremental training needs two classes or more, one folder each")
    return names


def read(source: Source, size: int | None, skip_corrupt: bool) -> tuple[list[Arrays], list[str]]:
    """The two splits (uint8 [N, size, size, 3], int64 [N]) in canonical order, and notes.

    size None: images keep their own, which must be one. A sample that does not decode is an error that names it, or,
    with skip_corrupt, left out and named in a note.
    """
    splits, notes = [], []
    for split, records in (("train", source.train), ("val", source.val)):
        assert records is not None
        if size is None and isinstance(records, Pixels):
            splits.append((records.images, records.labels))
            continue
        height, width = (size, size) if size is not None else _own_size(records)
        needed = len(records) * height * width * 3
        memory = machine.memory()
        if needed > memory // 2:
            raise UserError(
                f"{source.name}, {split}: {len(records)} images at {width}x{height} need {needed / 2**30:.0f} GiB, "
                f"half of this machine has {memory / 2**31:.0f}; lower size"
            )
        order = canonical(records)
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        images, labels = np.empty((len(records), height, width, 3), dtype=np.uint8), records.labels[order]
        errors, others = _decode_all(records, images, place, size)
        if others:
            raise UserError(
                f"{records.where(others[0])}: not {width}x{height} pixels as the images before it, so they cannot be "
                "trained on as they are; use the recipe folder, which resizes them"
            )
        if errors:
            listing = "; ".join(f"{records.where(row)} ({error})" for row, error in list(errors.items())[:NAMED])
            more = f" and {len(errors) - NAMED} more" if len(errors) > NAMED else ""
            if not skip_corrupt:
                raise UserError(f"not a readable image: {listing}{more}; repair or remove, or set on_corrupt=skip")
            notes.append(f"skipped {len(errors)} of {len(records)} files: {listing}{more}")
            kept = np.setdiff1d(np.arange(len(records)), place[list(errors)])
            images, labels = images[kept], labels[kept]
        splits.append((images, labels))
    return splits, notes


def _own_size(records: Records) -> tuple[int, int]:
    """Height and width of the first image that decodes."""
    for row in range(len(records)):
        with contextlib.suppress(Exception):  # what is damaged, in many ways, is told when all are read
            height, width = decode(records.content(row), None).shape[:2]
            return height, width
    return 1, 1


def _decode_all(
    records: Records, images: NDArray[np.uint8], place: Ids, size: int | None
) -> tuple[dict[int, str], list[int]]:
    """Put the image of each row in its place; returns by row what is wrong with a sample, and the rows of images of
    another size than theirs."""
    errors: dict[int, str] = {}
    others: list[int] = []

    def work(rows: Sequence[int], contents: Sequence[Content | UserError] | None) -> None:
        for k, row in enumerate(rows):
            content = fetch(row) if contents is None else contents[k]
            try:
                if isinstance(content, UserError):
                    raise content
                pixels = decode(content, size)
            except Exception as error:  # Pillow's readers raise many kinds on damaged files
                errors[row] = str(error) or type(error).__name__
                continue
            if pixels.shape == images.shape[1:]:
                images[place[row]] = pixels
            else:
                others.append(row)

    def fetch(row: int) -> Content | UserError:
        try:
            return records.content(row)
        except UserError as error:
            return error

    rows = range(len(records))
    with ThreadPoolExecutor(machine.cores()) as pool:  # Pillow decodes and resizes without the GIL
        if not is_sequential(records):
            parts = [rows[start : start + TOGETHER] for start in rows[::TOGETHER]]
            list(pool.map(work, parts, [None] * len(parts)))
        for start in rows[::AT_ONCE] if is_sequential(records) else ():
            some = rows[start : start + AT_ONCE]
            parts = [some[at : at + TOGETHER] for at in range(0, len(some), TOGETHER)]
            list(pool.map(work, parts, [[fetch(row) for row in part] for part in parts]))
    return dict(sorted(errors.items())), sorted(others)


def decode(source: Path | Content, size: int | None) -> NDArray[np.uint8]:
    """One image as uint8 [size, size, 3]: RGB, short side resized to size (bilinear, antialiased), centre crop. size
    None: as it is, uint8 [h, w, 3].

    source: an image file, the bytes of one, or pixels uint8 [h, w, 3]. Grayscale, palette and CMYK become RGB, 16-bit
    samples lose their low byte, alpha is dropped, and the orientation tag is not applied: what the field's PIL loaders
    do, except that those clip 16 bits to white.
    """
    if isinstance(source, np.ndarray):
        if size is None or source.shape[:2] == (size, size):
            return source
        image = Image.fromarray(source)
    else:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as opened:
            if opened.mode == "RGB" and (size is None or opened.size == (size, size)):
                return np.frombuffer(opened.tobytes(), np.uint8).reshape(opened.height, opened.width, 3)
            image = to_rgb(opened)
    if size is None:
        return np.asarray(image)
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (width - size) // 2, (height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))
