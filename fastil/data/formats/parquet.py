"""Parquet as Hugging Face writes it: a column image of struct{bytes, path} (or plain bytes), and a column of labels,
which are numbers or the names of classes.

Image bytes are compressed together with others, so they have no address: they are read a row group at a time.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from fastil.data.formats import shards
from fastil.data.formats.class_names import check_same_classes, in_order
from fastil.data.formats.records import MOST_CLASSES, SAME, Source, Texts, Unreadable, numbered
from fastil.errors import UserError
from fastil.protocol import Ids

IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "fine_label", "labels")
MOST_TEXTS = 100_000  # names of classes in a column; with more it holds something else


class _Columns(NamedTuple):
    """The columns read of a file. image: the one with the bytes; path: the one with the image's name in the source, if
    any; text: whether labels are the names of classes.
    """

    image: str
    label: str
    path: str | None
    text: bool


class _Group(NamedTuple):
    """A row group. start: its first row in the split; file_start: its file's first row in the split; rows: how many."""

    path: str
    number: int
    start: int
    rows: int
    file_start: int
    bytes: int  # uncompressed


@dataclass
class _Reader:
    """Reads images by their row in the split, and keeps the row group that it read last."""

    groups: list[_Group]
    column: str  # with the bytes: image, or image.bytes
    starts: Ids = field(init=False)  # int64 [groups]
    held: tuple[int, Any] = (-1, None)  # a row group's number and its bytes

    def __post_init__(self) -> None:
        self.starts = np.array([group.start for group in self.groups], dtype=np.int64)

    def group_of(self, row: int) -> int:
        """Return the number of the row group that holds this row of the split."""
        return int(np.searchsorted(self.starts, row, side="right")) - 1

    def read(self, row: int) -> bytes | None:
        """Return the bytes of an image, reading its row group if it is not held. None: the row has none."""
        number = self.group_of(row)
        held = self.held
        if held[0] != number:
            self.held = (-1, None)  # before the next is read, so that only one is in memory
            group = self.groups[number]
            with _opened(Path(group.path)) as file:
                table = file.read_row_group(group.number, columns=[self.column])
            if len(table) != group.rows:  # pages can be damaged in one column only
                raise UserError(f"{group.path}: row group {group.number} has {len(table)} images; fetch it again")
            held = self.held = (number, _leaf(table, self.column))
        content: bytes | None = held[1][row - int(self.starts[number])].as_py()
        return content


@dataclass(frozen=True)
class Rows:
    """Samples that are rows of parquet files. labels: int64 [n]; rows: int64 [n], rows of the split."""

    reader: _Reader
    names: Texts  # of all rows of the split
    labels: Ids
    rows: Ids
    sequential: ClassVar[bool] = True  # content(i) is cheap for ascending rows only

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, i: int) -> str:
        """Return the name of sample i."""
        return self.names[int(self.rows[i])]

    @property
    def total_bytes(self) -> int:
        """About how many bytes the images take: their share of the row groups' uncompressed size."""
        total = sum(group.bytes for group in self.reader.groups)
        return total * len(self) // max(1, sum(group.rows for group in self.reader.groups))

    def where(self, i: int) -> str:
        """Return the file and row of sample i, for a message."""
        row = int(self.rows[i])
        group = self.reader.groups[self.reader.group_of(row)]
        return f"{group.path}: row {row - group.file_start} ({self.name(i)})"

    def content(self, i: int) -> bytes:
        """Return the encoded bytes of sample i. Raises Unreadable if the row holds none."""
        found = self.reader.read(int(self.rows[i]))
        if found is None:
            raise Unreadable(self.where(i), "no image bytes in it; write the file again with its images embedded")
        return found

    def take(self, ids: Ids) -> "Rows":
        """Return the samples `ids`, in that order."""
        return replace(self, labels=self.labels[ids], rows=self.rows[ids])

    def relabelled(self, labels: Ids) -> "Rows":
        """Return the same samples with other labels, int64 [n]."""
        return replace(self, labels=labels)


def open_parquet(path: Path, val: str | None, image: str | None = None, label: str | None = None) -> Source:
    """Return the data set in a folder with train-*.parquet and validation-*, val-* or test-*.parquet (in it, in data/,
    or in folders named like the splits), or in a single file.

    val: the same for validation images. image, label: the names of the columns, if they are not the usual ones. Labels
    that are text are names of classes, which are then sorted.
    """
    train_files, val_files = shards.split_files(path, ".parquet")
    if val == SAME:
        val_files = []
    elif val is not None:
        val_files = shards.val_files(Path(val), ".parquet")
    for files in (train_files, val_files):
        shards.check_complete(files)
    train, names = _listed(train_files, image, label)
    val_rows, val_names = _listed(val_files, image, label) if val_files else (None, names)
    if names is not None and val_names is not None:
        check_same_classes(str(train_files[0]), names, str(val_files[0]) if val_files else "", val_names)
    elif names != val_names:
        raise UserError(f"{val_files[0]}: its classes are not those of {train_files[0]}; take both from one data set")
    parts = [train] + ([val_rows] if val_rows else [])
    names = names or numbered(rows.labels for rows in parts)
    name = (path if path.is_dir() else path.parent).resolve().name
    return Source("parquet", name, names, train, val_rows)


def _listed(files: list[Path], image: str | None, label: str | None) -> tuple[Rows, list[str] | None]:
    """Return the samples of a split, and the names of the classes if the files give them."""
    groups: list[_Group] = []
    labels: list[Ids] = []
    texts: list[str] = []
    written: dict[str, int] = {}  # labels that are text, with their place in the order of appearance
    first: tuple[_Columns, list[str] | None] | None = None
    for file in files:
        file_start = len(texts)
        with _opened(file) as opened:
            columns = _columns(file, opened.schema_arrow, image, label)
            names = _class_names(file, opened.schema_arrow, columns.label)
            if first is not None and (columns, names) != first:
                raise UserError(f"{file}: other columns or classes than {files[0]}; take all files from one data set")
            first = columns, names
            for number in range(opened.num_row_groups):
                table = opened.read_row_group(
                    number, columns=[column for column in (columns.label, columns.path) if column]
                )
                noted = opened.metadata.row_group(number)
                if len(table) != noted.num_rows:
                    raise UserError(f"{file}: row group {number} has another number of rows than noted; fetch it again")
                groups.append(_Group(str(file), number, len(texts), len(table), file_start, noted.total_byte_size))
                start = len(texts) - file_start
                if columns.text:
                    labels.append(_text_labels(file, table[columns.label], written, start))
                else:
                    labels.append(_labels(file, table[columns.label], names, start))
                paths = _leaf(table, columns.path).to_pylist() if columns.path else [None] * len(table)
                texts += [_name(path, file, row) for row, path in enumerate(paths, start=start)]
        if len(texts) == file_start:
            raise UserError(f"{file}: no row in it; fetch it again")
    assert first is not None
    joined, names = np.concatenate(labels), first[1]
    if first[0].text:
        names = in_order(written)
        places = {name: place for place, name in enumerate(names)}
        joined = np.array([places[name] for name in written], dtype=np.int64)[joined]
    return Rows(_Reader(groups, first[0].image), Texts(texts), joined, np.arange(len(joined))), names


def _name(path: str | None, file: Path, row: int) -> str:
    """Return an image's name in the source, without the folders of the machine where it was written."""
    if path and (path.startswith("/") or ".." in path.split("/")):
        path = path.rpartition("/")[2]
    return path or f"{file.stem}:{row}"


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Open a parquet file. pyarrow's errors on a damaged one become a UserError."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise UserError(f"{path}: parquet files need pyarrow; pip install pyarrow") from None
    if not path.is_file():
        raise UserError(f"{path}: {'not a file' if path.exists() else 'no such file'}; fetch the data set again")
    try:
        with pq.ParquetFile(path) as file:
            yield file
    except UserError:
        raise
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        line = " ".join(str(error).split())
        raise UserError(f"{path}: cannot be read as parquet ({line}); fetch it again") from None


def _leaf(table: Any, column: str) -> Any:
    """Return a column of a table, or of the struct in it, such as image.bytes."""
    import pyarrow.compute as pc

    top, _, field_name = column.partition(".")
    return pc.struct_field(table[top], field_name) if field_name else table[top]


def _columns(path: Path, schema: Any, image: str | None, label: str | None) -> _Columns:
    import pyarrow.types as types

    found = []
    for wanted, usual, key in ((image, IMAGE_COLUMNS, "image"), (label, LABEL_COLUMNS, "label")):
        name = next((name for name in ((wanted,) if wanted else usual) if name in schema.names), None)
        if name is None:
            raise UserError(
                f"{path}: no column {wanted or ' or '.join(usual)}, only {', '.join(schema.names)}; name the right one "
                f"by --{key}-column ({key}_column= for a run)"
            )
        found.append(name)
    image, label = found
    kind = schema.field(label).type
    text = _is_text(kind) or (types.is_dictionary(kind) and _is_text(kind.value_type))
    if not text and not types.is_integer(kind):
        raise UserError(
            f"{path}: column {label} holds {kind}; whole numbers from 0, or names of classes, are needed "
            "(--label-column, or label_column= for a run, names another)"
        )
    kind = schema.field(image).type
    if _is_bytes(kind):
        return _Columns(image, label, None, text)
    fields = {kind.field(i).name: kind.field(i).type for i in range(kind.num_fields)} if types.is_struct(kind) else {}
    if "bytes" not in fields or not _is_bytes(fields["bytes"]):
        raise UserError(f"{path}: column {image} holds {kind}; struct{{bytes, path}} or bytes are needed")
    named = "path" in fields and _is_text(fields["path"])
    return _Columns(f"{image}.bytes", label, f"{image}.path" if named else None, text)


def _is_text(kind: Any) -> bool:
    return str(kind) in ("string", "large_string", "string_view")


def _is_bytes(kind: Any) -> bool:
    return str(kind) in ("binary", "large_binary", "binary_view")


def _class_names(path: Path, schema: Any, label: str) -> list[str] | None:
    """Return class names from the notes of Hugging Face's datasets library in the schema."""
    noted = (schema.metadata or {}).get(b"huggingface")
    if noted is None:
        return None
    try:
        features = json.loads(noted)["info"]["features"]
        names = features[label].get("names")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{path}: its notes about the data set (huggingface) cannot be read; write it again") from None
    if names is None:
        return None
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name for name in names):
        raise UserError(f"{path}: the names of its classes cannot be read; write it again")
    if len(set(names)) < len(names):
        raise UserError(f"{path}: names a class twice; write it again")
    return names


def _text_labels(path: Path, column: Any, written: dict[str, int], start: int) -> Ids:
    """Return int64 [rows], places in `written`, which grows, for a row group with labels that are text.

    start: its first row in the file.
    """
    if column.null_count:
        raise UserError(f"{path}: {column.null_count} rows from row {start} on have no label; write it again")
    labels = [written.setdefault(name, len(written)) for name in column.to_pylist()]
    if "" in written:
        raise UserError(f"{path}: row {start + labels.index(written[''])} has an empty label; write it again")
    if len(written) > MOST_TEXTS:
        raise UserError(
            f"{path}: more than {MOST_TEXTS:,} different labels; name the column of classes by --label-column"
        )
    return np.array(labels, dtype=np.int64)


def _labels(path: Path, column: Any, names: list[str] | None, start: int) -> Ids:
    """Return int64 [rows] for a row group. start: its first row in the file."""
    if column.null_count:
        raise UserError(f"{path}: {column.null_count} rows from row {start} on have no label; write it again")
    labels = column.to_numpy()
    classes = len(names) if names else MOST_CLASSES
    wrong = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(wrong):
        label = int(labels[wrong[0]])
        hint = (
            "-1 marks images without a label, as of a test set; leave that file out"
            if label == -1
            else "fetch it again"
        )
        raise UserError(f"{path}: row {start + int(wrong[0])} has label {label}, not one of {classes} classes; {hint}")
    found: Ids = labels.astype(np.int64)
    return found
