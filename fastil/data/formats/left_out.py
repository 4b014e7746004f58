"""Files of a source that are not read: those in a class that are no images by their endings, counted for a note."""

import os
from collections import Counter, defaultdict
from dataclasses import dataclass, field

from fastil.data.formats.class_names import some
from fastil.data.formats.pixels import advice, suffixes
from fastil.errors import UserError

NAMED = 3  # classes that a note names; it counts the rest
# Endings of files that come with images but are none: labels, notes, films, what systems put there.
COMPANIONS = frozenset(
    (".txt", ".json", ".xml", ".csv", ".tsv", ".yaml", ".yml", ".md", ".html", ".htm", ".log", ".pdf", ".npy", ".npz",
     ".pkl", ".mat", ".pt", ".cls", ".md5", ".sha256", ".py", ".sh", ".mov", ".mp4", ".avi", ".aae", ".xmp", ".db",
     ".ini", ".url", ".lnk", ".identifier")
)  # fmt: skip


def suffix_of(name: str) -> str:
    """Return the ending of a file's name in lower case: ".jpg"; "" if it has none."""
    return os.path.splitext(name)[1].lower()


def is_image(name: str) -> bool:
    """Return whether a file is taken for an image, by its ending; a file without an ending may be one."""
    suffix = suffix_of(name)
    return not suffix or suffix in suffixes()


@dataclass
class LeftOut:
    """The files of a source that are left out.

    by_suffix: counts by ending and class of a split. deeper: images in folders below the folder of a class. stray:
    files in no class. problems: for classes that lose too much, by their names.
    """

    by_suffix: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    deeper: "Counter[str]" = field(default_factory=Counter)
    stray: list[str] = field(default_factory=list)
    problems: dict[str, str] = field(default_factory=dict)

    def count(self, split: str, name: str, suffix: str, count: int = 1) -> None:
        """Note that this many files of a class, with this ending, are left out."""
        self.by_suffix[suffix][_called(split, name)] += count

    def count_deeper(self, split: str, name: str, file: str) -> None:
        """Note that a file in a folder below its class's folder is left out."""
        if is_image(file):
            self.deeper[_called(split, name)] += 1
        else:
            self.count(split, name, suffix_of(file))

    def check(self, split: str, name: str, images: int, where: str) -> None:
        """Note, for `refuse`, a class without an image or with half of its files or more left out."""
        called = _called(split, name)
        lost = {
            suffix: found[called]
            for suffix, found in sorted(self.by_suffix.items())
            if suffix not in COMPANIONS and found[called]
        }
        deeper = self.deeper[called]
        count = sum(lost.values()) + deeper
        if images and 2 * count < images + count:
            return
        what = [f"{number:,} {suffix}" for suffix, number in lost.items()]
        todo = list(dict.fromkeys(advice(suffix) for suffix in lost))
        if deeper:
            what.append(f"{deeper:,} in folders below")
            todo.append("move its images up")
        if not count:
            self.problems[name] = f"{where}: no image in it; add some, or remove the class folder"
            return
        lose = f"{count:,} of its {images + count:,} files would be left out" if images else "no image in it"
        self.problems[name] = f"{where}: {lose} ({', '.join(what)}); {'; '.join(todo)}, or remove them"

    def refuse(self) -> None:
        """Raise UserError naming the classes that have no image or lose too many."""
        if self.problems:
            first, *others = self.problems
            more = f" (and so for class {some(others)})" if others else ""
            raise UserError(f"{self.problems[first]}{more}")

    def notes(self) -> list[str]:
        """Return a line for each kind of file."""
        lines = []
        for suffix, found in sorted(self.by_suffix.items()):
            fix = "" if suffix in COMPANIONS else f"; {advice(suffix)}"
            lines.append(f"{suffix or 'no ending'}: {listed(found)} left out{fix}")
        if self.deeper:
            lines.append(f"images in folders below their class: {listed(self.deeper)} left out; move them up")
        if self.stray:
            lines.append(f"{len(self.stray):,} files in no class folder are left out, such as {self.stray[0]}")
        return lines


def _called(split: str, name: str) -> str:
    return f"class {name}" if split == "train" else f"class {name} of {split}"


def listed(found: "Counter[str]") -> str:
    """Return how many there are of each class: 12 in class dog, 3 in class cat."""
    order = sorted(found, key=lambda called: (-found[called], called))
    rest = sum(found[called] for called in order[NAMED:])
    most = ", ".join(f"{found[called]:,} in {called}" for called in order[:NAMED])
    return most + (f" and {rest:,} in {len(order) - NAMED:,} more" if rest else "")
