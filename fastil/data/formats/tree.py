"""The files and folders of a data set, on a disk or in a tar archive, behind one interface."""

import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from fastil.data.formats.records import Extent, Listing, special, whole_file
from fastil.data.formats.tar import Tar
from fastil.errors import UserError

DEEPEST = 8  # folders in folders
MOST_PARTS = 64  # in the name of a member of an archive
ABOVE = 4  # levels above a folder at which a file for it is looked for: ILSVRC/Data/CLS-LOC/val

# Endings of what `fastil convert` writes, maybe into the folder that it reads. Without these the source stays the same.
CONVERTED = (
    ".beton", ".beton.partial", ".beton.journal", ".beton.spool", ".manifest.json", ".manifest.json.partial",
)  # fmt: skip


class Entry(NamedTuple):
    """A file in its folder. offset: of its first byte in the archive; broken: a dangling link."""

    name: str
    size: int
    offset: int = 0
    broken: bool = False


class Inside(NamedTuple):
    """What is directly in a folder, sorted, without hidden things."""

    folders: list[str]
    files: list[Entry]


class Tree(ABC):
    """The files and folders below `path`. Places in it are written train/cat; "" is the root."""

    path: Path

    @abstractmethod
    def inside(self, at: str) -> Inside:
        """Return what is directly in a folder; nothing if there is no such folder."""

    @abstractmethod
    def has(self, at: str) -> bool:
        """Return whether there is such a folder."""

    @abstractmethod
    def where(self, at: str) -> str:
        """Return a place as text for a message."""

    @abstractmethod
    def add(self, listing: Listing, label: int, at: str, file: Entry) -> None:
        """Put a file of a folder on a list."""

    @abstractmethod
    def find(self, at: str, name: str) -> Extent | None:
        """Return a file of this name in a folder or in one of the ABOVE folders that contain it, or None."""

    def listing(self) -> Listing:
        """Return an empty list for files of this tree."""
        return Listing(self.path)

    def below(self, at: str, folders: list[str]) -> Iterator[Entry]:
        """Yield the files in these folders of a folder and in all below them. A link to a folder counts as a file."""
        left = [f"{at}/{name}" for name in folders]
        while left:
            folder = left.pop()
            if self.is_link(folder):  # a link can lead round in a circle
                yield Entry(folder, 0)
                continue
            further, files = self.inside(folder)
            yield from files
            left += [f"{folder}/{name}" for name in further]

    def is_link(self, at: str) -> bool:
        """Return whether a folder is a link to one."""
        return False


class Folder(Tree):
    """A folder on a disk. Links are followed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def inside(self, at: str) -> Inside:
        folders, files = [], []
        place = self.path / at
        if not place.is_dir():
            return Inside([], [])
        with os.scandir(place) as found:
            for entry in found:
                if is_hidden(entry.name):
                    continue
                try:
                    status = entry.stat()
                except OSError:  # a link to nothing or to itself
                    files.append(Entry(entry.name, 0, broken=True))
                    continue
                if stat.S_ISDIR(status.st_mode):
                    folders.append(entry.name)
                    continue
                what = special(status.st_mode)
                if what:
                    raise UserError(f"{entry.path}: is {what}, not a file; remove it")
                files.append(Entry(entry.name, status.st_size))
        return Inside(sorted(folders), sorted(files))

    def has(self, at: str) -> bool:
        return (self.path / at).is_dir()

    def is_link(self, at: str) -> bool:
        return (self.path / at).is_symlink()

    def where(self, at: str) -> str:
        return str(self.path / at)

    def add(self, listing: Listing, label: int, at: str, file: Entry) -> None:
        listing.add(f"{at}/{file.name}".lstrip("/"), label, file.size)

    def find(self, at: str, name: str) -> Extent | None:
        place = (self.path / at).resolve()
        found = (folder / name for folder in (place, *place.parents[:ABOVE]))
        return next((whole_file(path) for path in found if path.is_file()), None)


class Archive(Tree):
    """A tar archive. Places start below the folder that all its files share."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.of_folder: dict[str, Inside] = {"": Inside([], [])}
        with Tar(path) as tar:
            for member in tar.members():
                parts = member.name.split("/")
                if any(is_hidden(part) for part in parts):
                    continue
                if len(parts) > MOST_PARTS:
                    raise UserError(f"{path}: {member.name[:80]}... lies in {len(parts)} folders; write it again")
                if member.is_folder:
                    self._folder(member.name)
                else:
                    folder, _, name = member.name.rpartition("/")
                    self._folder(folder).files.append(Entry(name, member.size, member.offset))
        for folder, (folders, files) in self.of_folder.items():
            folders.sort()
            files.sort()
            twice = next((one.name for one, other in pairwise(files) if one.name == other.name), None)
            if twice:
                name = f"{folder}/{twice}" if folder else twice
                raise UserError(f"{path}: {name} is in it twice; write the archive again")
        self.lead = ""

    def _folder(self, name: str) -> Inside:
        """Return a folder; it and all it contains are known from now on."""
        if name not in self.of_folder:
            self.of_folder[name] = Inside([], [])
            above, _, own = name.rpartition("/")
            self._folder(above).folders.append(own)
        return self.of_folder[name]

    def skip_shared(self, splits: tuple[str, ...]) -> None:
        """Make places start in the folder that holds the splits or classes, if all is in one folder."""
        for _ in range(DEEPEST):
            folders = self.inside("").folders
            if len(folders) != 1 or folders[0] in splits or not self.inside(folders[0]).folders:
                break
            self.lead += f"{folders[0]}/"

    def _name(self, at: str) -> str:
        return f"{self.lead}{at}".rstrip("/")

    def inside(self, at: str) -> Inside:
        return self.of_folder.get(self._name(at), Inside([], []))

    def has(self, at: str) -> bool:
        return self._name(at) in self.of_folder

    def where(self, at: str) -> str:
        name = self._name(at)
        return f"{self.path}: {name}" if name else str(self.path)

    def add(self, listing: Listing, label: int, at: str, file: Entry) -> None:
        listing.add(f"{self._name(at)}/{file.name}".lstrip("/"), label, file.size, str(self.path), file.offset)

    def find(self, at: str, name: str) -> Extent | None:
        folder = self._name(at)
        for _ in range(ABOVE + 1):
            for file in self.of_folder[folder].files if folder in self.of_folder else ():
                if file.name == name:
                    return Extent(str(self.path), file.offset, file.size)
            folder = folder.rpartition("/")[0]
        return None


Place = tuple[Tree, str]  # a folder of a tree


def is_hidden(name: str) -> bool:
    """Return whether a file or folder is no part of a data set, whatever its place."""
    return name.startswith(".") or name == "__MACOSX" or name.endswith(CONVERTED)
