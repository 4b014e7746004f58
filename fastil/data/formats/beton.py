"""FFCV's file format, version 2: a reader, and the layout that `fastil convert` writes.

A header, descriptions of the fields, one row per sample (mode, width, height and place of its image; label; id),
pages, and at the end a table of all places (ffcv/types.py, writer.py; numbers are little-endian). A sample never
straddles a page. fastil's own files hold the fields image, label and id, sorted by class, id = row, one mode per file;
the header is written last, so that an unfinished file does not open.
"""

import hashlib
import mmap
import os
from functools import cached_property
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from numpy.typing import NDArray

from fastil.data.formats.identity import Identity
from fastil.data.formats.manifest import Manifest, identity_of, manifest_path, read_manifest, source_files
from fastil.data.formats.pixels import open_stored
from fastil.data.formats.records import (
    MOST_CLASSES,
    ByClass,
    whole_file,
)
from fastil.errors import UserError
from fastil.protocol import Ids

VERSION = 2
PAGE = 8 << 20  # bytes; FFCV's default
SMALLEST_PAGE = 2 << 20  # FFCV takes none below
LARGEST_PAGE = 1 << 31
HEADER = np.dtype(
    [
        ("version", "<u2"), ("num_fields", "<u2"), ("page_size", "<u4"), ("num_samples", "<u8"),
        ("alloc_table_ptr", "<u8"),
    ]
)  # fmt: skip
FIELD = np.dtype([("type_id", "u1"), ("name", "S16"), ("arguments", "V1024")])
IMAGE = np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
PLACE = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
BYTES = np.dtype([("ptr", "<u8"), ("size", "<u8")])  # a dtype, because a list here would be aligned as the row is
INT, IMAGE_FIELD = 1, 2
# What a row holds for each type of field: FFCV's float, int, image, bytes, array, JSON and tensor.
OF_TYPE: dict[int, Any] = {
    0: "<f8", INT: "<i8", IMAGE_FIELD: IMAGE, 3: BYTES, 4: "<u8", 5: BYTES, 6: "<u8",
}  # fmt: skip
FIELDS = (("image", IMAGE_FIELD), ("label", INT), ("id", INT))  # of fastil's own files
ROW = np.dtype([(name, OF_TYPE[kind]) for name, kind in FIELDS], align=True)
JPEG, RAW = 0, 1
TABLE = HEADER.itemsize + len(FIELDS) * FIELD.itemsize  # where their rows begin

# What the writer notes about each sample it has placed.
ENTRY = np.dtype(
    [
        ("ptr", "<u8"), ("size", "<u8"), ("label", "<i8"), ("crc32", "<u4"), ("width", "<u2"), ("height", "<u2"),
    ]
)  # fmt: skip


def page_size_for(largest: int, total: int = PAGE) -> int:
    """Return the page size for a file whose largest sample, and whose samples together, have this many bytes: FFCV's 8
    MiB, less for a small file, more for large samples; a power of two.
    """
    size = max(SMALLEST_PAGE, *(1 << max(0, count - 1).bit_length() for count in (min(total, PAGE), largest)))
    if size > LARGEST_PAGE:
        raise UserError(f"a sample of {largest:,} bytes does not fit into a page of FFCV's format; use --max-side")
    return size


def data_start(capacity: int, page_size: int) -> int:
    """Return where the pages begin in a file with room for `capacity` rows."""
    return -(-(TABLE + capacity * ROW.itemsize) // page_size) * page_size


def place(position: int, size: int, page_size: int) -> int:
    """Return where a sample goes if all before `position` is taken: there, or on the next page if it does not fit."""
    if position % page_size + size > page_size:
        position += page_size - position % page_size
    return position


def front(entries: NDArray[np.void], mode: int, page_size: int, start: int) -> bytes:
    """Return everything before the first page, which begins at `start`: header, fields, rows. entries: ENTRY [n], in
    the order of the file.
    """
    fields = np.zeros(len(FIELDS), FIELD)
    fields["name"], fields["type_id"] = [name for name, _ in FIELDS], [kind for _, kind in FIELDS]
    rows = np.zeros(len(entries), ROW)
    image = rows["image"]
    image["mode"], image["data_ptr"] = mode, entries["ptr"]
    image["width"], image["height"] = entries["width"], entries["height"]
    rows["label"], rows["id"] = entries["label"], np.arange(len(entries))
    header = np.array([(VERSION, len(FIELDS), page_size, len(entries), places_start(entries, page_size))], HEADER)
    return (header.tobytes() + fields.tobytes() + rows.tobytes()).ljust(start, b"\0")


def write_tables(file: IO[bytes], entries: NDArray[np.void], before: bytes, page_size: int) -> None:
    """Write everything but the header around the samples in place. before: what `front` returned for them."""
    file.seek(HEADER.itemsize)
    file.write(memoryview(before)[HEADER.itemsize :])
    places = np.zeros(len(entries), PLACE)
    places["sample_id"], places["ptr"], places["size"] = np.arange(len(entries)), entries["ptr"], entries["size"]
    file.seek(places_start(entries, page_size))
    file.write(places.tobytes())
    file.truncate()


def places_start(entries: NDArray[np.void], page_size: int) -> int:
    """Return where the table of places goes: behind the last page, which is filled up since FFCV reads whole pages."""
    end = int(entries["ptr"][-1] + entries["size"][-1])
    return -(-end // page_size) * page_size


def write_header(file: IO[bytes], before: bytes) -> None:
    """Write the header, which makes the file valid."""
    file.seek(0)
    file.write(memoryview(before)[: HEADER.itemsize])


class Beton(ByClass):
    """A .beton file, FFCV's or fastil's, mapped into memory and never changed.

    labels: int64 [n]. sizes: int32 [n, 2], height and width in pixels. modes: uint8 [n], JPEG or RAW. starts, lengths:
    int64 [n], the bytes of each sample. Raises UserError for a file that is not whole: a wrong header, places outside
    the file or overlapping, a table cut short. It does not look inside the samples (`fastil verify` does).
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        whole_file(self.path)  # opening a pipe would wait
        try:
            with open(self.path, "rb") as file:
                self.bytes = os.fstat(file.fileno()).st_size
                self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "the file is empty"
            raise UserError(f"{self.path}: cannot be read ({reason}); give the path of a .beton file") from None
        header = self._read(HEADER, 1, 0)[0]
        if header["version"] != VERSION:
            unfinished = not any(self.map[: HEADER.itemsize])
            hint = (
                "an unfinished conversion; run its command again" if unfinished else "not a .beton of FFCV's version 2"
            )
            raise UserError(f"{self.path}: {hint}")
        self.page_size = int(header["page_size"])
        if self.page_size < 1 or self.page_size & (self.page_size - 1):
            raise self.damaged("its page size is not a power of two")
        self._read_rows(int(header["num_fields"]), int(header["num_samples"]))
        self._read_places(int(header["alloc_table_ptr"]))

    def _read(self, kind: np.dtype[Any], count: int, offset: int) -> NDArray[Any]:
        if offset + count * kind.itemsize > self.bytes:
            raise self.damaged(f"it is cut short at {self.bytes:,} bytes")
        return np.frombuffer(self.map, kind, count, offset)

    def _read_rows(self, num_fields: int, num_samples: int) -> None:
        fields = self._read(FIELD, num_fields, HEADER.itemsize)
        kinds = [int(field["type_id"]) for field in fields]
        if any(kind not in OF_TYPE for kind in kinds):
            raise UserError(f"{self.path}: has a field of a type of its own, whose layout nothing here tells")
        names = [bytes(field["name"]).decode("ascii", "replace") for field in fields]
        ints = [name for name, kind in zip(names, kinds, strict=True) if kind == INT]
        images = [i for i, kind in enumerate(kinds) if kind == IMAGE_FIELD]
        if not images or not ints or num_samples == 0:
            raise UserError(f"{self.path}: needs an image field, an integer field for the label and samples")
        row = np.dtype([(f"f{i}", OF_TYPE[kind]) for i, kind in enumerate(kinds)], align=True)
        self.rows_end = HEADER.itemsize + num_fields * FIELD.itemsize + num_samples * row.itemsize
        rows = self._read(row, num_samples, HEADER.itemsize + num_fields * FIELD.itemsize)
        self.label_name = "label" if "label" in ints else ints[0]
        self.labels: Ids = rows[f"f{names.index(self.label_name)}"].astype(np.int64)
        self.ids: Ids | None = rows[f"f{names.index('id')}"].astype(np.int64) if "id" in ints else None
        image = rows[f"f{images[0]}"]
        self.modes: NDArray[np.uint8] = image["mode"].copy()
        self.sizes = np.stack([image["height"], image["width"]], axis=1).astype(np.int32)
        self.starts: Ids = image["data_ptr"].astype(np.int64)
        if self.modes.max() > RAW:
            raise self.damaged(f"sample {int(self.modes.argmax())} is neither JPEG nor RAW")
        if self.sizes.min() < 1:
            raise self.damaged(f"sample {int(self.sizes.min(axis=1).argmin())} has no pixels")
        if self.labels.min() < 0:
            raise self.damaged(f"sample {int(self.labels.argmin())} has a negative label")
        if self.labels.max() >= MOST_CLASSES:
            raise self.damaged(f"sample {int(self.labels.argmax())} has the label {int(self.labels.max())}")

    def _read_places(self, start: int) -> None:
        count, rest = divmod(self.bytes - start, PLACE.itemsize)
        if start < self.rows_end or count < len(self) or rest:
            raise self.damaged("its last table is cut short or in a wrong place")
        places = self._read(PLACE, count, start)
        farthest = np.maximum(places["ptr"], places["size"])
        if farthest.max() >= 1 << 62:
            raise self.damaged(f"sample {int(places['sample_id'][farthest.argmax()])} lies outside the file")
        order = np.lexsort((places["size"], places["ptr"]))  # an empty sample before another at the same place
        starts, lengths = (places[key][order].astype(np.int64) for key in ("ptr", "size"))
        found = np.searchsorted(starts, self.starts, side="right") - 1
        ordered = np.sort(self.starts)
        if (ordered[1:] == ordered[:-1]).any():
            raise self.damaged("two of its samples lie at the same place")
        missing = starts[found] != self.starts
        if missing.any():
            raise self.damaged(f"sample {int(missing.argmax())} is not in its table of places")
        self.lengths: Ids = lengths[found]
        self.place_ids: NDArray[np.uint64] = places["sample_id"][order][found]
        ends = starts + lengths
        wrong = np.flatnonzero((starts[1:] < np.maximum.accumulate(ends)[:-1]) & (lengths[1:] > 0))
        if len(wrong) or starts[0] < self.rows_end or ends.max() > start:
            culprit = int(wrong[0]) + 1 if len(wrong) else 0 if starts[0] < self.rows_end else int(ends.argmax())
            named = places["sample_id"][order]
            other = f", sample {int(named[ends[:culprit].argmax()])}" if len(wrong) else ""
            raise self.damaged(f"sample {int(named[culprit])} lies over something else{other}")
        raw = self.modes == RAW
        off = raw & (self.lengths != self.sizes.astype(np.int64).prod(axis=1) * 3)
        if off.any():
            raise self.damaged(f"sample {int(off.argmax())} has another size than its pixels")

    def damaged(self, what: str) -> UserError:
        """Return the UserError for a damaged file. what: the damage."""
        return UserError(f"{self.path}: damaged, {what}; convert it again or fetch another copy")

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        return f"Beton({str(self.path)!r}, {len(self):,} images)"

    def __reduce__(self) -> tuple[type["Beton"], tuple[Path]]:
        return Beton, (self.path,)  # for a worker process, which maps the file itself

    @property
    def mode(self) -> Literal["jpeg", "raw", "mixed"]:
        """How the images are stored: all as JPEG, all as pixels, or some of each."""
        if (self.modes == JPEG).all():
            return "jpeg"
        return "raw" if (self.modes == RAW).all() else "mixed"

    @cached_property
    def manifest(self) -> Manifest | None:
        """The manifest that `fastil convert` wrote next to the file. None: there is none, as with FFCV's own files."""
        found = read_manifest(manifest_path(self.path))
        if found is not None and found.images != len(self):
            raise UserError(f"{manifest_path(self.path)}: belongs to another file, of {found.images:,} images")
        return found

    @cached_property
    def class_names(self) -> list[str]:
        """The names of classes by label; without a manifest, the labels themselves."""
        if self.manifest is None:
            return [str(label) for label in range(int(self.labels.max()) + 1)]
        if self.labels.max() >= len(self.manifest.class_names):
            culprit = int(self.labels.argmax())
            raise self.damaged(f"sample {culprit}: label {self.labels[culprit]} is not one of the manifest's classes")
        return self.manifest.class_names

    @cached_property
    def sha256(self) -> str:
        """The file's hash from its manifest, so that two runs can prove that they saw the same data. Without a
        manifest, the hash of labels, sizes and places.
        """
        if self.manifest is not None:
            return self.manifest.sha256
        digest = hashlib.sha256()
        for table in (self.labels, self.sizes, self.starts, self.lengths):
            digest.update(np.ascontiguousarray(table).data)
        return digest.hexdigest()

    @cached_property
    def identity(self) -> Identity | None:
        """The content of the file in any order: see `fastil.data.formats.identity`. None without a manifest, or with an
        older one that does not say enough.
        """
        return None if self.manifest is None else identity_of(self.manifest, self.labels, self.lengths)

    @cached_property
    def source_bytes(self) -> int:
        """Bytes of the image files that it was made from; of its samples if there is no manifest."""
        files = None if self.manifest is None else source_files(self.manifest, self.lengths)
        return int(self.lengths.sum() if files is None else files[1].sum())

    def name(self, i: int) -> str:
        """Return the sample's name in the source; its id if nothing says it."""
        return self.manifest.names[i] if self.manifest is not None else f"{i:08d}"

    def view(self, i: int) -> memoryview:
        """Return the bytes of a sample, not copied. Valid until `close`."""
        return memoryview(self.map)[self.starts[i] : self.starts[i] + self.lengths[i]]

    def encoded(self, i: int) -> bytes:
        """Return the bytes of a sample: a JPEG file, or pixels [h, w, 3] in RAW mode."""
        return bytes(self.view(i))

    def image(self, i: int) -> NDArray[np.uint8]:
        """Return the pixels, uint8 [h, w, 3]. Pillow decodes a JPEG."""
        height, width = self.sizes[i]
        if self.modes[i] == RAW:
            return np.frombuffer(self.encoded(i), np.uint8).reshape(height, width, 3)
        try:
            with open_stored(self.view(i), int(height) * int(width)) as opened:
                if opened.size == (width, height):
                    return np.asarray(opened.convert("RGB"))
                found = opened.size
        except Exception as error:  # Pillow raises many kinds on damaged bytes
            raise UserError(f"{self.path}: sample {i} does not decode ({error}); convert it again") from None
        raise self.damaged(f"sample {i} has {found[0]}x{found[1]} pixels instead of {width}x{height}")

    def close(self) -> None:
        """Free the map. No views of samples may be left."""
        self.map.close()

    def __enter__(self) -> "Beton":
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            self.close()
        except BufferError:
            if exception[0] is None:  # otherwise the traceback may hold a view
                raise
