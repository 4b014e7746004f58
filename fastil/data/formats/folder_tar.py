"""An image folder inside one tar archive: train/<class>/* and val/<class>/*, addressed where they lie."""

from collections.abc import Iterable
from pathlib import Path

from fastil.data.formats import folder
from fastil.data.formats.records import SAME, Listing, Records, Source
from fastil.data.formats.tar import Member, Tar
from fastil.errors import UserError

SPLITS = ("train", *folder.VALS)
DEEPEST = 8  # leading folders


def open_folder_tar(path: Path, val: str | None) -> Source:
    """The same order and the same checks as of the unpacked folder. val: another archive, or a folder."""
    tree = _Tree(path)
    at_top = not tree.has("train") and (val is not None or not tree.has("val"))
    if not at_top and not tree.has("train"):
        raise UserError(
            f"{path}: no train/ in it; an archive needs train/<class>/* and val/<class>/*, or --val as well"
        )
    names, train = tree.split("" if at_top else "train")
    train_name = str(path) if at_top else f"{path}: train"
    found: tuple[str, list[str], Records] | None = None
    own_val = next(
        (name for name in folder.VALS if tree.has(name) and (name == "val" or tree.classes(name) == names)), None
    )
    if val is None and own_val is not None and not at_top:
        found = (f"{path}: {own_val}", *tree.split(own_val))
    elif val is not None and val != SAME:
        found = (val, *list_val(Path(val)))
    if found:
        folder.check_same_classes(train_name, names, *found[:2])
    return Source("folder-tar", path.resolve().stem, names, train, found[2] if found else None)


def list_val(path: Path) -> tuple[list[str], Records]:
    """Classes and validation images of a folder of class folders, or of an archive that holds val/ or class folders."""
    if path.is_file():
        tree = _Tree(path)
        return tree.split("val" if tree.has("val") else "")
    return folder.list_split(path)


def add_sorted(
    listing: Listing, label: int, members: Iterable[Member], archive: Path | str, prefix: str = "", where: str = ""
) -> int:
    """Add the members of a class in the order of their names; returns their number.

    prefix: of the archive inside `archive` that they come from.
    """
    previous, count = "", 0
    for member in sorted(members):
        if member.name == previous:
            raise UserError(f"{archive}: {prefix}{member.name} is in it twice; write the archive again")
        previous = member.name
        listing.add(prefix + member.name, label, member.size, str(archive), member.offset)
        count += 1
    if not count:
        raise UserError(f"{where}: no image in it; add some or remove the class folder")
    return count


class _Tree:
    """The files and folders of an archive, below the folders that all of them share."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files: list[Member] = []
        self.folders: set[str] = set()
        with Tar(path) as tar:
            for member in tar.members():
                if member.hidden:
                    continue
                if member.is_folder:
                    self.folders.add(member.name)
                else:
                    self.files.append(member)
                    self.folders.add(member.name.rpartition("/")[0])
        for name in list(self.folders):
            while name := name.rpartition("/")[0]:
                self.folders.add(name)
        self.folders.discard("")
        self.lead = self._leading()

    def _leading(self) -> str:
        """The folder, ending in /, that holds the splits or classes."""
        lead = ""
        for _ in range(DEEPEST):
            tops = self._below(lead)
            if any(split in tops for split in SPLITS) or len(tops) != 1 or not self._below(f"{lead}{tops[0]}/"):
                break
            lead += f"{tops[0]}/"
        return lead

    def _below(self, lead: str) -> list[str]:
        """Folders directly below one."""
        return [name[len(lead) :] for name in self.folders if name.startswith(lead) and "/" not in name[len(lead) :]]

    def has(self, split: str) -> bool:
        return f"{self.lead}{split}" in self.folders

    def classes(self, split: str) -> list[str]:
        return sorted(self._below(f"{self.lead}{split}/"))

    def split(self, split: str) -> tuple[list[str], Records]:
        """Sorted classes, and the samples by class and name. split: '' for class folders at the top."""
        lead = f"{self.lead}{split}/" if split else self.lead
        where = f"{self.path}: {lead[:-1]}" if lead else str(self.path)
        names = folder.check_classes(where, self._below(lead))
        members: dict[str, list[Member]] = {name: [] for name in names}
        for member in self.files:
            if member.name.startswith(lead):
                name, slash, file = member.name[len(lead) :].partition("/")
                if slash and "/" not in file and folder.is_image(file):
                    members[name].append(member)
        listing = Listing(self.path)
        for label, name in enumerate(names):
            add_sorted(listing, label, members[name], self.path, where=f"{self.path}: {lead}{name}")
        return names, listing.files()
