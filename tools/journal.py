"""The journal beside an unfinished .beton: what is in place and on the disk, so that a killed conversion goes on.

One record after each commit: a length, a checksum, a line of JSON, and the new entries as bytes. A record that was cut
short by the kill is dropped, and with it what it told of.
"""

import json
import os
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastil.data.beton import ENTRY
from fastil.errors import UserError

HEAD = np.dtype([("length", "<u4"), ("crc32", "<u4"), ("line", "<u4")])


@dataclass
class Progress:
    """How far a conversion is. done: candidates dealt with, in the order of the file; position: the first free byte;
    entries: ENTRY [capacity], the first `placed` of them in place; changed, skipped: (candidate, reason)."""

    entries: NDArray[np.void]
    done: int = 0
    placed: int = 0
    position: int = 0
    changed: list[tuple[int, str]] = field(default_factory=list)
    skipped: list[tuple[int, str]] = field(default_factory=list)

    def line(self, told: "Told") -> dict[str, Any]:
        """What has come since."""
        return {
            "done": self.done,
            "position": self.position,
            "changed": self.changed[told.changed :],
            "skipped": self.skipped[told.skipped :],
        }

    def replay(self, line: dict[str, Any], entries: NDArray[np.void]) -> None:
        """Add what a record tells."""
        self.entries[self.placed : self.placed + len(entries)] = entries
        self.placed += len(entries)
        self.done, self.position = line["done"], line["position"]
        self.changed += [(candidate, reason) for candidate, reason in line["changed"]]
        self.skipped += [(candidate, reason) for candidate, reason in line["skipped"]]


class Told(NamedTuple):
    """How much of a Progress the journal holds."""

    placed: int = 0
    changed: int = 0
    skipped: int = 0


class Journal:
    """The file at `path`. identity: what decides the bytes of the .beton; it must be the same to go on."""

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self.path, self.identity = path, identity
        self.told = Told()

    def begin(self) -> None:
        """Start anew."""
        self.path.unlink(missing_ok=True)
        self._append({"identity": self.identity}, b"")

    def commit(self, progress: Progress) -> None:
        """Tell what came since the last commit. The bytes of the samples must be on the disk already."""
        self._append(progress.line(self.told), progress.entries[self.told.placed : progress.placed].tobytes())
        self.told = Told(progress.placed, len(progress.changed), len(progress.skipped))

    def _append(self, line: dict[str, Any], content: bytes) -> None:
        text = json.dumps(line).encode()
        record = text + content
        head = np.array([(len(record), zlib.crc32(record), len(text))], HEAD)
        with open(self.path, "ab") as file:
            file.write(head.tobytes() + record)
            file.flush()
            os.fsync(file.fileno())

    def resume(self, progress: Progress, partial: Path) -> bool:
        """Bring an empty `progress` to where the file `partial` is, by every whole record whose samples are in it.
        Returns False if there is nothing to go on from. Raises UserError if it is of another conversion."""
        try:
            raw, size = self.path.read_bytes(), partial.stat().st_size
        except FileNotFoundError:
            return False
        end, first = 0, True
        while end + HEAD.itemsize <= len(raw):
            head = np.frombuffer(raw, HEAD, 1, end)[0]
            begin, stop = end + HEAD.itemsize, end + HEAD.itemsize + int(head["length"])
            record = raw[begin:stop]
            if len(record) < head["length"] or zlib.crc32(record) != head["crc32"]:
                break
            line, content = json.loads(record[: head["line"]]), record[head["line"] :]
            if first:
                self._compare(line.get("identity", {}), partial)
            elif line["position"] > size:
                break
            else:
                progress.replay(line, np.frombuffer(content, ENTRY))
            end, first = stop, False
        if first:
            return False
        os.truncate(self.path, end)  # what comes next must follow a whole record
        self.told = Told(progress.placed, len(progress.changed), len(progress.skipped))
        return True

    def _compare(self, theirs: dict[str, Any], partial: Path) -> None:
        ours = json.loads(json.dumps(self.identity))
        different = sorted(key for key in ours if ours[key] != theirs.get(key))
        if different:
            raise UserError(
                f"{partial}: is of another conversion (other {', '.join(different)}); give the options of that one to "
                "go on, or remove it to start anew"
            )
