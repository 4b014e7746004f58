"""MATLAB's .mat files, version 5 to 7: structs of text and numbers, as the devkit of ILSVRC2012 holds them.

scipy reads more, but crashes on some damaged files. Here every length is checked, and damage is a ValueError. Format:
"MAT-File Format", The MathWorks: a header of 128 bytes, then elements (type, bytes, content, padding to 8).
"""

import math
import struct
import zlib
from typing import Any

import numpy as np

MATRIX, COMPRESSED, UTF8, UTF16, UTF32 = 14, 15, 16, 17, 18
NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
CELL, STRUCT, CHAR = 1, 2, 4
NUMERIC = range(6, 16)  # classes of arrays: double, single, and whole numbers of every size
LARGEST = 1 << 26  # bytes unpacked
DEEPEST = 16  # structs in structs


def read_variables(content: bytes) -> dict[str, Any]:
    """Return the variables of a file: text as str, numbers as a flat array, cells as a list, structs as dicts in a
    list.
    """
    order = {b"IM": "<", b"MI": ">"}.get(content[126:128])
    if order is None:
        raise ValueError("no MATLAB file of version 5 to 7")
    variables = {}
    reader = _Reader(content, 128, order)
    while not reader.at_end:
        kind, part = reader.element()
        if kind == COMPRESSED:
            kind, part = _Reader(_unpacked(part, order), 0, order).element()
        if kind != MATRIX:
            raise ValueError(f"an element of type {kind} where a variable should be")
        name, value = _matrix(part, order, 0)
        variables[name] = value
    return variables


def _unpacked(part: bytes, order: str) -> bytes:
    """Return the one element that is compressed here, unpacked only as far as its own size promises."""
    unpacker = zlib.decompressobj()
    try:
        head = unpacker.decompress(part, 8)
        if len(head) < 8:
            raise ValueError("cut short")
        promised = struct.unpack(f"{order}II", head)[1]
        if promised > LARGEST:
            raise ValueError("far too large")
        unpacked = head + unpacker.decompress(unpacker.unconsumed_tail, promised + 8)  # and its padding
    except zlib.error as error:
        raise ValueError(f"damaged ({error})") from None
    if not unpacker.eof:
        raise ValueError("cut short, or more than it promises")
    return unpacked


class _Reader:
    """Reads elements in a row."""

    def __init__(self, content: bytes, position: int, order: str) -> None:
        self.content, self.position, self.order = content, position, order

    @property
    def at_end(self) -> bool:
        """Whether all elements are read."""
        return self.position >= len(self.content)

    def element(self) -> tuple[int, bytes]:
        """Return type and content of the next element."""
        start = self.position + 8
        if start > len(self.content):
            raise ValueError("cut short")
        kind, size = struct.unpack_from(f"{self.order}II", self.content, self.position)
        if kind >> 16:  # a small element: type and size share four bytes, the content takes the other four
            kind, size = kind & 0xFFFF, kind >> 16
            if size > 4:
                raise ValueError("a small element of more than four bytes")
            self.position = start
            return kind, self.content[start - 4 : start - 4 + size]
        end = start + size
        if end > len(self.content):
            raise ValueError("cut short")
        self.position = end if kind == COMPRESSED else end + -size % 8
        return kind, self.content[start:end]

    def numbers(self) -> Any:
        """Return the next element, which must be numbers, as a flat array."""
        kind, part = self.element()
        if kind not in NUMBERS or len(part) % np.dtype(NUMBERS[kind]).itemsize:
            raise ValueError(f"an element of type {kind} where numbers should be")
        return np.frombuffer(part, dtype=f"{self.order}{NUMBERS[kind]}")


def _matrix(content: bytes, order: str, depth: int) -> tuple[str, Any]:
    """Return name and value of an array of any class."""
    if not content:
        return "", np.empty(0)
    if depth > DEEPEST:
        raise ValueError("nested too deep")
    reader = _Reader(content, 0, order)
    flags, shape = reader.numbers(), reader.numbers()
    _, name = reader.element()
    count = math.prod(int(size) for size in shape)
    if len(flags) != 2 or count < 0 or any(size < 0 for size in shape):
        raise ValueError("an array without a class or shape")
    kind = int(flags[0]) & 0xFF
    value: Any
    if kind == CHAR:
        value = _text(*reader.element(), order)
    elif kind in NUMERIC:
        value = reader.numbers()
        if len(value) != count:
            raise ValueError(f"{len(value)} numbers where {count} should be")
    elif kind == STRUCT:
        value = _structs(reader, count, depth)
    elif kind == CELL:
        value = [_child(reader, depth) for _ in range(_plausible(count, content))]
    else:
        raise ValueError(f"an array of class {kind}, which is not read here")
    return name.decode("latin-1"), value


def _structs(reader: _Reader, count: int, depth: int) -> list[dict[str, Any]]:
    widths, (_, names) = reader.numbers(), reader.element()
    if len(widths) != 1 or widths[0] <= 0 or len(names) % int(widths[0]):
        raise ValueError("a struct whose fields have no names")
    width = int(widths[0])
    fields = [names[i : i + width].partition(b"\0")[0].decode("latin-1") for i in range(0, len(names), width)]
    _plausible(count * max(1, len(fields)), reader.content)
    return [{field: _child(reader, depth) for field in fields} for _ in range(count)]


def _plausible(count: int, content: bytes) -> int:
    """Return a count of arrays in an array. Raises ValueError if it cannot be right: each takes eight bytes or more."""
    if count > len(content) // 8:
        raise ValueError("cut short")
    return count


def _child(reader: _Reader, depth: int) -> Any:
    kind, part = reader.element()
    if kind != MATRIX:
        raise ValueError(f"an element of type {kind} where an array should be")
    return _matrix(part, reader.order, depth + 1)[1]


def _text(kind: int, content: bytes, order: str) -> str:
    ending = "le" if order == "<" else "be"
    encodings = {
        1: "latin-1", 2: "latin-1", 4: f"utf-16-{ending}", UTF8: "utf-8", UTF16: f"utf-16-{ending}",
        UTF32: f"utf-32-{ending}",
    }  # fmt: skip
    if kind not in encodings:
        raise ValueError(f"an element of type {kind} where text should be")
    return content.decode(encodings[kind])
