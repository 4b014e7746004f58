"""The journal next to an unfinished .beton, which says what is in place and on the disk, so that a killed conversion
continues.

Each commit appends one record: a checksum, lengths, a line of JSON, and the new entries as bytes. The checksum covers
everything before it and the record itself. A record that the kill cut short is dropped, with the samples that it
describes.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastil.data.formats.beton import ENTRY
from fastil.data.formats.records import Files, Records
from fastil.errors import UserError

HEAD = np.dtype([("crc32", "<u4"), ("length", "<u4"), ("line", "<u4")])
CHECKED = 4  # where the checksummed bytes begin


@dataclass
class Progress:
    """How far a conversion is. done: candidates dealt with, in the order of the file; position: the first free byte;
    entries: ENTRY [capacity], the first `placed` of them in place; changed: (candidate, reason, crc32 of the source);
    skipped: (candidate, reason).
    """

    entries: NDArray[np.void]
    done: int = 0
    placed: int = 0
    position: int = 0
    changed: list[tuple[int, str, int | None]] = field(default_factory=list)
    skipped: list[tuple[int, str]] = field(default_factory=list)

    def line(self, told: "Told") -> dict[str, Any]:
        """Return what has come since the last record, as JSON."""
        return {
            "done": self.done,
            "position": self.position,
            "changed": self.changed[told.changed :],
            "skipped": self.skipped[told.skipped :],
        }

    def told(self, line: dict[str, Any], entries: NDArray[np.void]) -> Iterator["Candidate"]:
        """Yield what a record says about each candidate."""
        checksums = iter(entries["crc32"].tolist())
        skipped = dict(line["skipped"])
        changed = {one[0]: one[2] if len(one) > 2 else None for one in line["changed"]}
        for i in range(self.done, line["done"]):
            checksum = None if i in skipped else next(checksums)
            yield Candidate(i, changed.get(i, checksum), skipped.get(i))

    def replay(self, line: dict[str, Any], entries: NDArray[np.void]) -> None:
        """Apply a record."""
        self.entries[self.placed : self.placed + len(entries)] = entries
        self.placed += len(entries)
        self.done, self.position = line["done"], line["position"]
        # Older versions wrote no checksum.
        self.changed += [(one[0], one[1], one[2] if len(one) > 2 else None) for one in line["changed"]]
        self.skipped += [(candidate, reason) for candidate, reason in line["skipped"]]


class Candidate(NamedTuple):
    """An image of the source that a conversion has dealt with. crc32: of its bytes there; None if it was left out or an
    older version did not note it. problem: why it was left out.
    """

    number: int
    crc32: int | None
    problem: str | None


class ListingDigest:
    """Digests of the first so many samples of a listing."""

    def __init__(self, records: Records) -> None:
        self.records = records
        self.sizes = records.size if isinstance(records, Files) else None
        self._restart()

    def _restart(self) -> None:
        self.at, self.hash = 0, hashlib.sha256()

    def digest(self, count: int) -> str:
        """Return the digest of the first `count` samples. It is cheap for growing counts."""
        if count < self.at:
            self._restart()
        for i in range(self.at, min(count, len(self.records))):
            size = -1 if self.sizes is None else self.sizes[i]
            self.hash.update(
                f"{self.records.labels[i]} {size} {self.records.name(i)}\0".encode(errors="surrogateescape")
            )
        self.at = count
        return self.hash.hexdigest()


class Told(NamedTuple):
    """How much of a Progress the journal has."""

    placed: int = 0
    changed: int = 0
    skipped: int = 0


class Journal:
    """The journal at `path`. identity: decides the bytes of the .beton, together with the listing of `records`, and
    must be the same to continue.
    """

    def __init__(self, path: Path, identity: dict[str, Any], records: Records) -> None:
        self.path, self.identity, self.listing = path, identity, ListingDigest(records)
        self.told, self.crc = Told(), 0

    def begin(self) -> None:
        """Start a new journal."""
        self.told, self.crc = Told(), 0
        self.path.unlink(missing_ok=True)
        self.append(self._record({"identity": self.identity}, b""))

    def record(self, progress: Progress) -> bytes:
        """Return a record of all that came since the last one. It may be appended, in the order of the calls, once the
        samples' bytes are on the disk.
        """
        line = progress.line(self.told) | {"listing": self.listing.digest(progress.done)}
        record = self._record(line, progress.entries[self.told.placed : progress.placed].tobytes())
        self.told = Told(progress.placed, len(progress.changed), len(progress.skipped))
        return record

    def _record(self, line: dict[str, Any], content: bytes) -> bytes:
        text = json.dumps(line).encode()
        record = text + content
        checked = np.array([(0, len(record), len(text))], HEAD).tobytes()[CHECKED:] + record
        self.crc = zlib.crc32(checked, self.crc)
        return self.crc.to_bytes(CHECKED, "little") + checked

    def append(self, record: bytes) -> None:
        """Append a record and wait until the disk has it."""
        with open(self.path, "ab") as file:
            file.write(record)
            file.flush()
            os.fsync(file.fileno())

    def resume(self, progress: Progress, partial: Path, unchanged: Callable[[Candidate], bool]) -> bool:
        """Bring an empty `progress` to the state of the file `partial`, applying every whole record whose samples are
        in the file and unchanged in the source's listing and content (`unchanged` says so). Returns False if there is
        nothing to continue from. Raises UserError if it belongs to another conversion.
        """
        try:
            raw, size = self.path.read_bytes(), partial.stat().st_size
        except FileNotFoundError:
            return False
        if not size:
            return False
        end, first = 0, True
        while end + HEAD.itemsize <= len(raw):
            head = np.frombuffer(raw, HEAD, 1, end)[0]
            begin, stop = end + HEAD.itemsize, end + HEAD.itemsize + int(head["length"])
            if stop > len(raw) or zlib.crc32(raw[end + CHECKED : stop], self.crc) != head["crc32"]:
                break
            record = raw[begin:stop]
            line, content = json.loads(record[: head["line"]]), record[head["line"] :]
            if first:
                self._compare(line.get("identity", {}), partial)
            else:
                entries = np.frombuffer(content, ENTRY)
                if line["position"] > size or line["listing"] != self.listing.digest(line["done"]):
                    break
                if not all(map(unchanged, progress.told(line, entries))):
                    break
                progress.replay(line, entries)
            end, first, self.crc = stop, False, int(head["crc32"])
        if first:
            return False
        os.truncate(self.path, end)  # the next record must follow a whole one
        self.told = Told(progress.placed, len(progress.changed), len(progress.skipped))
        return True

    def _compare(self, theirs: dict[str, Any], partial: Path) -> None:
        ours = json.loads(json.dumps(self.identity))
        different = sorted(key for key in ours if ours[key] != theirs.get(key))
        if different:
            raise UserError(
                f"{partial}: is of another conversion (other {', '.join(different)}); give the options of that one to "
                "go on, or remove it to start again"
            )
