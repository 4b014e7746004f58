"""Whether a published number may stand beside a run: on the published images, with the recipe as it comes with fastil.

This is decided here alone. A run directory's recipe.yaml, the end of `fastil run`, reports and pages all show the
recipe that `labelled` returns; tables, whose rows have settings of their own, ask for the images only.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fastil.data.published import official_labels, table
from fastil.recipe import Recipe, load, shipped
from fastil.reporting.run_files import ProtocolFile

MODIFIED = "modified: "
OTHER_PIXELS = ("ffcv", "dali")  # loaders of streamed images that decode or resize otherwise than Pillow does, visibly
SIZE_TOLERANCE = 1e-3  # what tar adds to the files of ImageNet is 0.6 % and known to a tenth of it


def labelled(recipe: Recipe, protocol: ProtocolFile) -> Recipe:
    """The recipe of a run as it is shown: with what fastil's own says of the paper where nothing was changed, otherwise
    without a published number and with a `fidelity` that tells the changes."""
    changes = modifications(recipe, protocol)
    if changes:
        return replace(recipe, published=None, fidelity=MODIFIED + ", ".join(changes))
    own = load(recipe.name)
    return replace(recipe, published=own.published, fidelity=own.fidelity)


def modifications(recipe: Recipe, protocol: ProtocolFile) -> Sequence[str]:
    """What sets a run apart from what was published under the name of its recipe, such as "epochs=6", "other data"."""
    differences = recipe.differences()
    if differences is None:
        return ["a recipe that does not come with fastil"]
    changes = [f"{key}={_shown(value)}" for key, value in sorted(differences.items())]
    changes += [f"loader={name}" for name in protocol.dataset.read_by if name in OTHER_PIXELS]
    expected = load(recipe.name).data.dataset
    if expected in table() and not on_published_data(expected, protocol):
        known = protocol.dataset.train.identity and protocol.dataset.val.identity
        changes.append("other data" if known else "unidentified data")
    return changes


def on_published_data(dataset: str, protocol: ProtocolFile) -> bool:
    """Whether the images of a run are those published under the name that the key `dataset` has for them."""
    expected = table().get(dataset)
    if expected is None:
        return False
    for ours, theirs in ((protocol.dataset.train, expected.train), (protocol.dataset.val, expected.val)):
        if theirs.identity is not None:
            if ours.identity != theirs.identity:
                return False
        # ImageNet: image files as they are in the source, so many of each class and so large in all.
        elif not (ours.identity or "").startswith("stored:") or not theirs.has_counts(ours.counts or [0]):
            return False
        elif theirs.bytes is None or abs((ours.bytes or 0) / theirs.bytes - 1) > SIZE_TOLERANCE:
            return False  # resized or re-encoded before it was converted
    return official_labels(expected, protocol.class_names) == list(range(expected.classes))


def had_published(recipe: Recipe) -> bool:
    """Whether the recipe has a published number as it comes with fastil, so that its absence wants a reason."""
    before = shipped(recipe.name)
    return before is not None and before.published is not None


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
