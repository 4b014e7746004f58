"""Whether a published number may stand next to a run: on the published images, with the recipe as it comes with fastil.

This is decided here alone. A run directory's recipe.yaml, the first and last lines of `fastil run`, `fastil plan`,
reports and pages all show the recipe that `labelled` returns; tables, whose rows have settings of their own, ask for
the images only.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fastil.data import Dataset
from fastil.data.published import Published, differences, official_labels, table
from fastil.plan import share_of
from fastil.recipe import LOCAL_BN, Recipe
from fastil.recipe_file import differences as differences_of
from fastil.recipe_file import load, published_elsewhere, shipped
from fastil.reporting.run_files import ProtocolFile

MODIFIED = "modified: "
SOURCES = "docs/protocols.md"
OTHER_PIXELS = ("ffcv", "dali")  # loaders of streamed images that decode or resize otherwise than Pillow does, visibly
SIZE_TOLERANCE = 1e-3  # what tar adds to the files of ImageNet is 0.6 % and known to a tenth of it


def labelled(recipe: Recipe, protocol: ProtocolFile | None) -> Recipe:
    """The recipe of a run as it is shown: with what fastil's own says of the paper where nothing was changed, otherwise
    without a published number and with a `fidelity` that tells the changes. protocol: None where the images are not
    here, so that settings alone are compared."""
    changes = modifications(recipe, protocol)
    if changes:
        return replace(recipe, published=None, fidelity=MODIFIED + ", ".join(changes))
    own = load(recipe.name)
    return replace(recipe, published=own.published, fidelity=own.fidelity)


def opening(recipe: Recipe, dataset: Dataset | None, protocol: ProtocolFile | None) -> list[str]:
    """What is said before anything is trained: whether the images are the published ones, and the remark on the
    number. None: the images are not here."""
    remark = remark_of(labelled(recipe, protocol))
    images = None if dataset is None or protocol is None else _images_line(_dataset_of(recipe), dataset, protocol)
    return [line for line in (images, remark) if line is not None]


def remark_of(shown: Recipe) -> str | None:
    """A line on the published number of a recipe that `labelled` has returned, or on why there is none, or on one that
    stands for orientation only. None: nothing was published, and nothing was modified."""
    if shown.published is not None:
        return f"published: average incremental accuracy {shown.published:.2f}"
    if had_published(shown):
        return f"{shown.fidelity}; the paper's number is of another experiment"
    if shown.fidelity.startswith(MODIFIED):
        return shown.fidelity
    elsewhere = published_elsewhere(shown.name)
    return None if elsewhere is None else f"published elsewhere: {elsewhere}, another network and schedule ({SOURCES})"


def _images_line(name: str, dataset: Dataset, protocol: ProtocolFile) -> str | None:
    """Whether the images are those published under a name. None: nothing is known of that."""
    expected = table().get(name)
    if expected is None:
        return None
    title, odd = expected.title, _differences(expected, protocol)
    if not odd:
        how = "content" if expected.train.identity else "wnids, counts and bytes of its files, not by their content"
        return f"images: the published {title} (verified by {how})"
    if dataset.proven and dataset.name == name:
        return f"images: the published {title} (verified by the md5 sums of its files)"
    train, val = dataset.train.identity, dataset.val.identity
    if train is None or val is None:
        return f"UNIDENTIFIED DATA: {'; '.join(odd)}"
    told = differences(expected, dataset.class_names, train, val)  # in more detail
    if not told and train.kind == val.kind == "pixels" and expected.train.identity is None:
        same = f"images: classes and counts are those of {title}"
        return f"{same}; its pixels are not compared, for no sum of them is known"
    return f"OTHER DATA: not {title} as published: {'; '.join(told or odd)}"


def modifications(recipe: Recipe, protocol: ProtocolFile | None) -> Sequence[str]:
    """What sets a run apart from what was published under the name of its recipe, such as "epochs=6", "other data"."""
    differences = differences_of(recipe)
    if differences is None:
        return ["a recipe that does not come with fastil"]
    changes = [f"{key}={_shown(value)}" for key, value in sorted(differences.items())]
    if protocol is None:
        return changes
    changes += [f"loader={name}" for name in other_pixels(protocol)]
    batch, most = recipe.train.batch_size, max(1, *protocol.all_ranks)
    share = share_of(batch, most - 1, most)
    if protocol.bn == "local" and share < min(batch, LOCAL_BN):  # which bn=auto does not choose
        changes.append(f"bn=local of {share} images")
    expected = _dataset_of(recipe)
    if expected in table() and not on_published_data(expected, protocol):
        known = protocol.dataset.train.identity and protocol.dataset.val.identity
        changes.append("other data" if known else "unidentified data")
    return changes


def other_pixels(protocol: ProtocolFile) -> list[str]:
    """The loaders among those that read a run's images whose pixels are not Pillow's."""
    return [name for name in protocol.dataset.read_by if name in OTHER_PIXELS]


def _dataset_of(recipe: Recipe) -> str:
    """The data set that a recipe is about, whatever it was told to train on: a name of the key `dataset`."""
    return (shipped(recipe.name) or recipe).data.dataset


def on_published_data(dataset: str, protocol: ProtocolFile) -> bool:
    """Whether the images of a run are those published under the name that the key `dataset` has for them."""
    expected = table().get(dataset)
    return expected is not None and not _differences(expected, protocol)


def _differences(expected: Published, protocol: ProtocolFile) -> list[str]:
    """What sets the images of a run apart from published ones, as far as its files tell; pieces of a sentence."""
    found, parts = [], protocol.dataset
    for split, ours, theirs in (("train", parts.train, expected.train), ("val", parts.val, expected.val)):
        identity, size = ours.identity or "", ours.bytes or 0
        if not identity:
            found.append(f"nothing tells what the images of {split} were made of")
        elif theirs.identity is not None:
            if identity != theirs.identity:
                found.append(f"the images of {split} are others")
        # ImageNet: image files as they are in the source, so many of each class and so large in all.
        elif not identity.startswith("stored:"):
            found.append(f"the images of {split} were resized, encoded or left out by fastil convert")
        elif not theirs.has_counts(ours.counts or [0]):
            found.append(
                f"{split} has {ours.images:,} images of {len(ours.counts or ()):,} classes, or not as many each"
            )
        elif theirs.bytes is None or abs(size / theirs.bytes - 1) > SIZE_TOLERANCE:
            known = "" if theirs.bytes is None else f" instead of about {theirs.bytes:,}, as after a resize"
            found.append(f"the image files of {split} have {size:,} bytes{known}")
    if official_labels(expected, protocol.class_names) != list(range(expected.classes)):
        found.append("its classes have other names or labels")
    return found


def had_published(recipe: Recipe) -> bool:
    """Whether the recipe has a published number as it comes with fastil, so that its absence wants a reason."""
    before = shipped(recipe.name)
    return before is not None and before.published is not None


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
