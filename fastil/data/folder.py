"""Image folders: <split>/<class>/<file>, decoded and resized once."""

import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastil.errors import UserError

Arrays = tuple[NDArray[np.uint8], NDArray[np.int64]]
NAMED = 3  # how many damaged files a message names before it counts the rest


def read(train: Path, val: Path, size: int, skip_corrupt: bool) -> tuple[list[str], list[Arrays], list[str]]:
    """Class names (sorted folder names), the two splits (uint8 [N, size, size, 3], int64 [N]), and notes.

    Files are taken in sorted order, hidden ones left out. A file that does not decode is an error that names it, or,
    with skip_corrupt, left out and named in a note.
    """
    names = _classes(train)
    val_names = _classes(val)
    if names != val_names:
        odd = sorted(set(names) ^ set(val_names))[0]
        where, missing = (train, val) if odd in names else (val, train)
        raise UserError(f"class {odd} is in {where} but not in {missing}; both need the same class folders")
    splits, notes = [], []
    for root in (train, val):
        files, labels = _files(root, names)
        needed = len(files) * size * size * 3
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if needed > memory // 2:
            raise UserError(
                f"{root}: {len(files)} images at {size}x{size} need {needed / 2**30:.0f} GiB, half of this machine has "
                f"{memory / 2**31:.0f}; lower size"
            )
        images = np.empty((len(files), size, size, 3), dtype=np.uint8)
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow decodes and resizes without the GIL
            outcomes = list(pool.map(partial(_decode_into, size=size), images, files))
        errors = {row: outcome for row, outcome in enumerate(outcomes) if outcome}
        if errors:
            listing = "; ".join(f"{files[row]} ({error})" for row, error in list(errors.items())[:NAMED])
            more = f" and {len(errors) - NAMED} more" if len(errors) > NAMED else ""
            if not skip_corrupt:
                raise UserError(f"not a readable image: {listing}{more}; repair or remove, or set on_corrupt=skip")
            notes.append(f"skipped {len(errors)} of {len(files)} files: {listing}{more}")
            kept = np.setdiff1d(np.arange(len(files)), list(errors))
            images, labels = images[kept], labels[kept]
        splits.append((images, labels))
    return names, splits, notes


def _decode_into(target: NDArray[np.uint8], path: Path, size: int) -> str | None:
    """Fill one row of the split; returns what is wrong with the file."""
    try:
        target[:] = decode(path, size)
    except Exception as error:  # Pillow's readers raise many kinds on damaged files
        return str(error) or type(error).__name__
    return None


def decode(path: Path, size: int) -> NDArray[np.uint8]:
    """One image as uint8 [size, size, 3]: RGB, short side resized to size (bilinear, antialiased), centre crop.

    Grayscale, palette and CMYK become RGB, 16-bit samples lose their low byte, alpha is dropped, and the orientation
    tag is not applied: what the field's PIL loaders do, except that those clip 16 bits to white.
    """
    with Image.open(path) as opened:
        image: Image.Image = opened
        if image.mode.startswith("I"):  # 16-bit grayscale opens as I or I;16, which convert("RGB") would clip
            image = Image.fromarray((np.asarray(image).astype(np.int64).clip(0, 65535) >> 8).astype(np.uint8))
        elif image.mode == "F":
            raise ValueError("floating-point samples have no agreed range; convert it to 8 bits")
        if "transparency" in image.info:  # a palette with transparent entries, which Pillow wants spelled out
            image = image.convert("RGBA")
        image = image.convert("RGB")
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (width - size) // 2, (height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))


def _classes(root: Path) -> list[str]:
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; give --data with train/<class>/* and val/<class>/*, or --val as well")
    names = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if len(names) < 2:
        found = f"only one class folder ({names[0]})" if names else "no class folder"
        raise UserError(f"{root}: {found}; incremental training needs two classes or more, one folder each")
    return names


def _files(root: Path, names: list[str]) -> tuple[list[Path], NDArray[np.int64]]:
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(names):
        found = sorted(entry for entry in (root / name).iterdir() if entry.is_file() and not entry.name.startswith("."))
        if not found:
            raise UserError(f"{root / name}: no image in it; add some or remove the class folder")
        files += found
        labels += [label] * len(found)
    return files, np.array(labels, dtype=np.int64)
