"""Tar archives read by address: it finds where the bytes of each member are, so nothing is unpacked.

Python's tarfile stops without a word at a damaged header or a truncated end, and keeps every member in memory. Here an
archive that is not whole is a UserError: checksums, sizes and the end mark are checked, and memory does not grow.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from fastil.errors import UserError

BLOCK = 512
ZEROS = bytes(BLOCK)
MOST_REST = 1 << 20  # bytes of padding after the end mark; tapes had less
MOST_HEADER = 1 << 20  # bytes of a long name or of pax records
COMPRESSED = {
    b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ": "unxz", b"\x28\xb5\x2f\xfd": "unzstd",
    b"PK\x03\x04": "unzip",
}  # fmt: skip
# Types of headers: members with plain content, members that are refused, and descriptions of the next header.
REGULAR, FOLDER, VOLUME = b"\0" + b"07", b"5", b"V"
LONG_NAME, LONG_LINK, PAX, PAX_SOLARIS, PAX_GLOBAL = b"L", b"K", b"x", b"X", b"g"
REFUSED = {
    b"1": "a hard link; write the archive again with --hard-dereference",
    b"2": "a link; write the archive again with --dereference",
    b"3": "a device", b"4": "a device", b"6": "a pipe", b"S": "a sparse file; write the archive again without --sparse",
    b"M": "the rest of another volume; put the volumes together first",
}  # fmt: skip


class Member(NamedTuple):
    """A regular file or a folder of an archive. offset: of its first byte, in the outermost file."""

    name: str
    offset: int
    size: int
    is_folder: bool = False

    @property
    def hidden(self) -> bool:
        """Whether the name, or a folder on the way to it, begins with a dot, like the ._ files that macOS adds."""
        return "/." in f"/{self.name}"


class Tar:
    """An archive, open for reading."""

    def __init__(self, path: Path | str) -> None:
        self.path = str(path)
        try:
            if not os.path.isfile(self.path):  # a pipe would never open, and a folder cannot be read
                what = "a folder or device, not an archive" if os.path.exists(self.path) else "no such file"
                raise UserError(f"{self.path}: {what}; give the path of a tar archive")
            self._file = open(self.path, "rb")  # noqa: SIM115
            self.size = os.fstat(self._file.fileno()).st_size
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror})") from None

    def __enter__(self) -> "Tar":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()

    def read(self, offset: int, size: int) -> bytes:
        """Return bytes of the file; fewer if it ends."""
        try:
            return os.pread(self._file.fileno(), size, offset)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror})") from None

    def members(self, of: Member | None = None) -> Iterator[Member]:
        """Yield all files and folders in order, hidden ones too. of: instead those of an archive that is a member of
        this one.

        Raises UserError at the first thing that is wrong, at the latest at the end.
        """
        where = f"{self.path}: {of.name}" if of else self.path
        start = of.offset if of else 0
        end = start + of.size if of else self.size
        general: dict[str, bytes] = {}
        special: dict[str, bytes] = {}
        position = start
        while True:
            header = self.read(position, BLOCK) if position + BLOCK <= end else b""
            if len(header) < BLOCK:
                if position == start:
                    raise UserError(f"{where}: {end - start} bytes are no tar archive; fetch it again")
                raise UserError(
                    f"{where}: has no end mark after byte {position - start}; it was cut short, fetch it again"
                )
            if header == ZEROS:
                if special:
                    raise UserError(f"{where}: ends within the description of a member; it is damaged, fetch it again")
                self._check_rest(position, end, where)
                return
            size = _number(header[124:136])
            if size is None or not _sums_up(header):
                raise UserError(f"{where}: {_complaint(header, position - start)}")
            kind = header[156:157]
            content = position + BLOCK
            has_content = kind not in REFUSED and kind not in FOLDER
            if kind in (LONG_NAME, LONG_LINK, PAX, PAX_SOLARIS, PAX_GLOBAL):
                if size > MOST_HEADER:
                    raise UserError(f"{where}: a description of {size} bytes at byte {position - start}; it is damaged")
                if content + size > end:
                    raise UserError(f"{where}: ends within a description; it was cut short, fetch it again")
                text = self.read(content, size)
                if kind == LONG_NAME:
                    special["path"] = text.partition(b"\0")[0]
                elif kind == PAX_GLOBAL:
                    general |= _pax(text, where)
                elif kind != LONG_LINK:
                    special |= _pax(text, where)
                position = content + -(-size // BLOCK) * BLOCK
                continue
            described = {**general, **special}
            special = {}
            name = _name(described.get("path") or _header_name(header), where)
            if any(key.startswith("GNU.sparse.") for key in described):
                raise UserError(f"{where}: {name} is {REFUSED[b'S']}")
            if kind in REFUSED:
                raise UserError(f"{where}: {name} is {REFUSED[kind]}")
            if "size" in described and has_content:
                size = _digits(described["size"])
                if size is None:
                    raise UserError(f"{where}: {name} has no size that could be read; it is damaged, fetch it again")
            if kind in FOLDER or (kind in b"\0" + b"0" and _header_name(header).endswith(b"/")):  # the latter: old tars
                yield Member(name, content, 0, is_folder=True)
                position = content
                continue
            if kind not in REGULAR and kind != VOLUME:
                raise UserError(f"{where}: {name} is of the unknown type {kind!r}; write the archive again")
            if content + size > end:
                raise UserError(f"{where}: ends within {name}; it was cut short, fetch it again")
            if kind != VOLUME:
                if not name:
                    raise UserError(f"{where}: a member without a name at byte {position - start}; it is damaged")
                yield Member(name, content, size)
            position = content + -(-size // BLOCK) * BLOCK

    def _check_rest(self, position: int, end: int, where: str) -> None:
        """Check that only padding follows the end mark. Much padding means that a download did not finish."""
        rest = end - position
        if rest > MOST_REST:
            raise UserError(
                f"{where}: {rest} of {end} bytes lie behind its end mark; the download is not complete, or archives "
                "were joined with cat (join them with tar -A)"
            )
        if self.read(position, rest).strip(b"\0"):
            raise UserError(f"{where}: data behind its end mark; it is damaged, or archives were joined with cat")


def _complaint(header: bytes, position: int) -> str:
    if position:
        return f"no member where one should begin, at byte {position}; it is damaged, fetch it again"
    for magic, tool in COMPRESSED.items():
        if header.startswith(magic):
            return f"is compressed, so its images have no address; {tool} it first"
    return "not a tar archive; fetch it again"


def _digits(text: bytes) -> int | None:
    return int(text) if text.isdigit() and len(text) < 20 else None


def _number(field: bytes) -> int | None:
    """Return the number in octal digits, or a big-endian one behind a byte 0x80."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    text = field.partition(b"\0")[0].strip() or b"0"
    try:
        return int(text, 8) if text.isdigit() else None  # int() alone takes signs and underscores
    except ValueError:
        return None


def _sums_up(header: bytes) -> bool:
    stored = _number(header[148:156])
    counted = header[:148] + b" " * 8 + header[156:]
    return stored == sum(counted) or stored == sum(byte - 256 * (byte > 127) for byte in counted)  # old ones are signed


def _header_name(header: bytes) -> bytes:
    name = header[:100].partition(b"\0")[0]
    if header[257:263] == b"ustar\0" and header[345]:
        return header[345:500].partition(b"\0")[0] + b"/" + name
    return name


def _name(raw: bytes, where: str) -> str:
    """Return a name without ./ and doubled slashes. Raises UserError for one that leaves the folder it is unpacked
    into.
    """
    name = raw.decode("utf-8", "surrogateescape")
    parts = name.split("/")
    if "" in parts or "." in parts or ".." in parts or "\0" in name:
        if name.startswith("/") or ".." in parts or "\0" in name:
            raise UserError(f"{where}: the name {name!r} of a member leaves the archive; write it with relative names")
        name = "/".join(part for part in parts if part not in ("", "."))
    return name


def _pax(text: bytes, where: str) -> dict[str, bytes]:
    """Return the records 'LENGTH KEY=VALUE\\n', where LENGTH counts all of a record."""
    records: dict[str, bytes] = {}
    start = 0
    while start < len(text):
        space = text.find(b" ", start, start + 10)
        length = _digits(text[start:space]) if space > 0 else None
        end = start + (length or 0)
        if length is None or not space < end <= len(text) or text[end - 1 : end] != b"\n":
            raise UserError(f"{where}: a description of a member cannot be read; it is damaged, fetch it again")
        key, _, value = text[space + 1 : end - 1].partition(b"=")
        records[key.decode("utf-8", "replace")] = value
        start = end
    return records
