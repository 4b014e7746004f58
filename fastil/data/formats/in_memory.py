"""The images of any source decoded into memory, once, all at one size."""

import contextlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from fastil import machine
from fastil.data.formats import pixels
from fastil.data.formats.pixels import DEFAULT, Reading
from fastil.data.formats.records import Item, Pixels, Records, Source, canonical, is_sequential, item_of
from fastil.errors import UserError
from fastil.protocol import Ids

Arrays = tuple[NDArray[np.uint8], NDArray[np.int64]]
SKIP = "on_corrupt=skip"
NAMED = 3  # damaged files that a message names; it counts the rest
TOGETHER = 64  # images that a thread takes at a time, because handing over a small one takes longer than decoding it
AT_ONCE = 2 * TOGETHER * machine.cores()  # encoded images of a sequential source that wait for a thread


def read(
    source: Source, size: int | None, how: Reading = DEFAULT, skip_corrupt: bool = False, by: str = SKIP
) -> tuple[list[Arrays], list[str]]:
    """Return the two splits (uint8 [N, size, size, 3], int64 [N]) in canonical order, and notes.

    size None: images keep their own size, which must be the same for all. A sample that cannot be read is an error that
    names it or, with skip_corrupt, is left out and named in a note. by: the setting that leaves it out, for the error.
    """
    splits, notes = [], []
    for split, records in (("train", source.train), ("val", source.val)):
        assert records is not None
        if size is None and isinstance(records, Pixels):
            splits.append((records.images, records.labels))
            continue
        height, width = (size, size) if size is not None else _own_size(records, how)
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
        errors, others = _decode_all(records, images, place, size, how)
        if others:
            raise UserError(
                f"{records.where(others[0])}: not {width}x{height} pixels as the images before it, so they cannot be "
                "trained on as they are; use the recipe folder, which resizes them"
            )
        if errors:
            listing = "; ".join(f"{records.where(row)} ({error})" for row, error in list(errors.items())[:NAMED])
            more = f" and {len(errors) - NAMED} more" if len(errors) > NAMED else ""
            if not skip_corrupt:
                raise UserError(f"not a readable image: {listing}{more}; repair or remove, or set {by}")
            notes.append(f"skipped {len(errors)} of {len(records)} files: {listing}{more}")
            kept = np.setdiff1d(np.arange(len(records)), place[list(errors)])
            images, labels = images[kept], labels[kept]
        splits.append((images, labels))
    return splits, notes


def _own_size(records: Records, how: Reading) -> tuple[int, int]:
    """Return height and width of the first image that decodes."""
    for row in range(len(records)):
        with contextlib.suppress(Exception):  # damage is reported when all are read
            height, width = decode(item_of(records, row), None, how).shape[:2]
            return height, width
    return 1, 1


def _decode_all(
    records: Records, images: NDArray[np.uint8], place: Ids, size: int | None, how: Reading
) -> tuple[dict[int, str], list[int]]:
    """Put the image of each row in its place. Returns, by row, what is wrong with a sample, and the rows of images that
    have another size.
    """
    errors: dict[int, str] = {}
    others: list[int] = []

    def work(rows: Sequence[int], items: Sequence[Item] | None) -> None:
        for k, row in enumerate(rows):
            try:
                found = decode(item_of(records, row) if items is None else items[k], size, how)
            except MemoryError:  # it is not about the image
                raise UserError(f"{records.where(row)}: not enough memory to decode it; free some") from None
            except Exception as error:  # Pillow's readers raise many kinds on damaged files
                errors[row] = pixels.reason_of(error)
                continue
            if found.shape == images.shape[1:]:
                images[place[row]] = found
            else:
                others.append(row)

    rows = range(len(records))
    with ThreadPoolExecutor(machine.cores()) as pool:  # Pillow decodes and resizes without the GIL
        if not is_sequential(records):
            parts = [rows[start : start + TOGETHER] for start in rows[::TOGETHER]]
            list(pool.map(work, parts, [None] * len(parts)))
        for start in rows[::AT_ONCE] if is_sequential(records) else ():
            some = rows[start : start + AT_ONCE]
            parts = [some[at : at + TOGETHER] for at in range(0, len(some), TOGETHER)]
            list(pool.map(work, parts, [[item_of(records, row) for row in part] for part in parts]))
    return dict(sorted(errors.items())), sorted(others)


def decode(item: Item, size: int | None, how: Reading = DEFAULT) -> NDArray[np.uint8]:
    """Return an image as uint8 [size, size, 3]: the central square after its short side was resized to size. size None:
    as it is, uint8 [h, w, 3]. Raises whatever is wrong with it.
    """
    image = pixels.decoded(pixels.content_of(item, how), how)
    return pixels.as_array(image if size is None else pixels.square(image, size))
