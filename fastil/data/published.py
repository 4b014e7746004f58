"""Data sets as published: classes, counts, and the identity of their images if it could be computed.

published.json holds an entry per data set, which `entry` made from its images as fastil reads them. CIFAR-100's was
made from a lossless PNG copy, not from the official archives; docs/decisions.md says how to check it. Data sets without
an identity there (CIFAR-10, ImageNet) are recognised by classes and counts, ImageNet also by the size of its files.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from typing import Any

from fastil.data.formats.identity import Identity

DIGITS = 12  # hexadecimal digits to keep of a class's digest
NAMED = 2  # classes that a message names; it counts the rest


@dataclass(frozen=True)
class PublishedSplit:
    """The counts and digests of a published split.

    images: how many in all. counts: images of each class. identity: as `Identity.text`. classes: the first digits of
    each class's digest. bytes: about the size of all image files, which is the official archives less what tar adds.
    per_class: the fewest and the most images of a class, if counts are not known. None: not known.
    """

    images: int
    counts: tuple[int, ...] | None
    identity: str | None
    classes: tuple[str, ...] | None
    bytes: int | None
    per_class: tuple[int, int] | None = None

    def has_counts(self, counts: Sequence[int]) -> bool:
        """Return whether a split with these counts has as many images, in all and of each class, where known."""
        if self.counts is not None:
            return tuple(counts) == self.counts
        least, most = self.per_class or (1, self.images)
        return sum(counts) == self.images and least <= min(counts) and max(counts) <= most


@dataclass(frozen=True)
class Published:
    """A data set as published. title: its usual name. shape: of an image; for ImageNet, as a network sees it.
    class_names: by label.
    """

    title: str
    shape: tuple[int, int, int]
    classes: int
    class_names: tuple[str, ...]
    train: PublishedSplit
    val: PublishedSplit

    @property
    def per_class(self) -> int:
        """The mean number of training images of a class."""
        return self.train.images // self.classes

    @property
    def images(self) -> int:
        """The number of images of both splits."""
        return self.train.images + self.val.images


@cache
def table() -> dict[str, Published]:
    """Return the published data sets, by their name in the key `dataset`."""
    content = json.loads(resources.files("fastil.data").joinpath("published.json").read_text("utf-8"))
    return {name: parsed(found) for name, found in content.items()}


def parsed(found: Mapping[str, Any]) -> Published:
    """Return an entry of published.json as a Published."""

    def split(part: Mapping[str, Any]) -> PublishedSplit:
        counts, classes = part["counts"], part["classes"]
        return PublishedSplit(
            part["images"],
            None if counts is None else tuple(counts),
            part["identity"],
            None if classes is None else tuple(classes),
            part.get("bytes"),
            tuple(part["per_class"]) if "per_class" in part else None,
        )

    height, width, channels = found["shape"]
    return Published(
        found["title"], (height, width, channels), found["classes"], tuple(found["class_names"]),
        split(found["train"]), split(found["val"]),
    )  # fmt: skip


def entry(title: str, class_names: Sequence[str], train: Identity, val: Identity) -> dict[str, Any]:
    """Return the entry of published.json for a data set in memory that has its official names and labels."""

    def split(part: Identity) -> dict[str, Any]:
        return {
            "images": sum(part.counts),
            "counts": list(part.counts),
            "identity": part.text,
            "classes": [digest[:DIGITS] for digest in part.classes],
        }

    return {
        "title": title, "shape": list(train.shape), "classes": len(class_names), "class_names": list(class_names),
        "train": split(train), "val": split(val),
    }  # fmt: skip


def official_labels(expected: Published, names: Sequence[str]) -> list[int] | None:
    """Return the published label of each class of a source, by its name (letters and digits, ignoring case) or by its
    number if all names are numbers. None if the names do not tell.
    """
    ours = [_plain(name) for name in names]
    theirs = [_plain(name) for name in expected.class_names]
    if len(ours) == len(theirs) and set(ours) == set(theirs):
        places = {name: label for label, name in reversed([*enumerate(theirs)])}
        return [places[name] for name in ours]
    if all(name.isdecimal() for name in names) and sorted(map(int, names)) == list(range(expected.classes)):
        return [int(name) for name in names]
    return None


def _plain(name: str) -> str:
    """Return a name without what containers change in it: HF writes "T - shirt / top" where Fashion-MNIST's authors
    write T-shirt/top, which cannot be the name of a folder.
    """
    plain = "".join(character for character in name.casefold() if character.isalnum())
    return "tshirt" if plain == "tshirttop" else plain


def differences(expected: Published, names: Sequence[str], train: Identity, val: Identity) -> list[str]:
    """Return what sets a data set apart from the published one, as parts of a sentence; empty if nothing does, as far
    as the table tells. names: by label, in the published order if `official_labels` knows one.
    """
    official = expected.class_names
    ours, theirs = ({_plain(name) for name in some} for some in (names, official))
    odd = [name for name in names if _plain(name) not in theirs]
    missing = [name for name in official if _plain(name) not in ours]
    if len(names) != expected.classes:
        hint = f" ({_listed(missing)} missing)" if len(odd) < len(names) and missing else ""
        return [f"it has {len(names)} classes instead of {expected.classes}{hint}"]
    found = []
    if official_labels(expected, names) != list(range(len(names))):
        renamed = f"classes are renamed ({_listed(odd)} instead of {_listed(missing)})"
        found.append(renamed if odd else "its classes have other labels")
    labels = _matched(expected, names, train, val)
    order = sorted(range(len(names)), key=labels.__getitem__)
    named = [names[label] for label in order]
    for split, part, known_part in (("train", train, expected.train), ("val", val, expected.val)):
        counts, classes = tuple(part.counts[i] for i in order), tuple(part.classes[i] for i in order)
        found += _of_split(split, replace(part, counts=counts, classes=classes), known_part, named, expected.shape)
    return found


def _matched(expected: Published, names: Sequence[str], train: Identity, val: Identity) -> list[int]:
    """Return the published label that each class is compared with: by its name, else by its images, else the ones left
    over, in order. Needs as many classes as published.
    """
    known_labels = official_labels(expected, names)
    if known_labels is not None:
        return known_labels
    found: dict[int, int] = {}
    taken: set[int] = set()

    def match(label: int, candidates: Iterable[int]) -> None:
        free = next((one for one in candidates if one not in taken), None)
        if label not in found and free is not None:
            found[label] = free
            taken.add(free)

    plain = [_plain(name) for name in expected.class_names]
    for label, name in enumerate(map(_plain, names)):
        match(label, (i for i, other in enumerate(plain) if other == name))
    for ours, theirs in ((train, expected.train), (val, expected.val)):
        for label, digest in enumerate(ours.classes):
            match(label, (i for i, known in enumerate(theirs.classes or ()) if digest.startswith(known)))
    for label in range(len(names)):
        match(label, range(expected.classes))
    return [found[label] for label in range(len(names))]


def _of_split(
    split: str, ours: Identity, theirs: PublishedSplit, names: Sequence[str], shape: tuple[int, ...]
) -> list[str]:
    if ours.shape and ours.shape != shape:
        return [f"images of {split} have {ours.shape[1]}x{ours.shape[0]} pixels instead of {shape[1]}x{shape[0]}"]
    found = []
    if theirs.counts is None and sum(ours.counts) != theirs.images:
        found.append(f"{split} has {sum(ours.counts):,} images instead of {theirs.images:,}")
    expected = theirs.counts or ours.counts
    odd = [label for label in range(len(names)) if ours.counts[label] != expected[label]]
    sides = []
    for sign, word in ((1, "less"), (-1, "more")):
        side = [label for label in odd if sign * (expected[label] - ours.counts[label]) > 0]
        if side:
            first, gap = side[0], abs(expected[side[0]] - ours.counts[side[0]])
            others = f" and {word} of {len(side) - 1} more class{'es' if len(side) > 2 else ''}"
            sides.append(
                f"{gap:,} image{'s' if gap > 1 else ''} {word} of class {names[first]} "
                f"({ours.counts[first]:,} instead of {expected[first]:,}){others if len(side) > 1 else ''}"
            )
    if sides:
        found.append(f"{split} has {', and '.join(sides)}")
    digests = theirs.classes if ours.kind == "pixels" else None
    changed = [
        names[label]
        for label in range(len(names))
        if digests is not None and label not in odd and not ours.classes[label].startswith(digests[label])
    ]
    if changed:
        every = ", as after JPEG or a resize" if len(changed) == len(names) else ""
        found.append(f"pixels of {split} differ in {_listed(changed)}{every}")
    return found


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more classes" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def same_images(expected: Published, train: Identity, val: Identity) -> bool:
    """Return whether the classes hold the published images, whatever their names and order."""
    return all(
        theirs.classes is not None
        and ours.shape == expected.shape
        and sorted(digest[:DIGITS] for digest in ours.classes) == sorted(theirs.classes)
        for ours, theirs in ((train, expected.train), (val, expected.val))
    )


def recognised(train: Identity, val: Identity) -> Published | None:
    """Return the published data set that has these images, or None."""
    return next((expected for expected in table().values() if same_images(expected, train, val)), None)
