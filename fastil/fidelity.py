"""Whether a published number may stand beside a run: on the published images, with the recipe as it comes with fastil.

This is decided here alone. A run directory's recipe.yaml, the end of `fastil run`, reports and pages all show the
recipe that `labelled` returns; tables, whose rows have settings of their own, ask for the images only.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from fastil.data.published import is_published, table
from fastil.recipe import Recipe, load, shipped

MODIFIED = "modified: "


def labelled(recipe: Recipe, protocol: Mapping[str, Any]) -> Recipe:
    """The recipe of a run as it is shown: with what fastil's own says of the paper where nothing was changed, otherwise
    without a published number and with a `fidelity` that tells the changes. protocol: the run's protocol.json."""
    changes = modifications(recipe, protocol)
    if changes:
        return replace(recipe, published=None, fidelity=MODIFIED + ", ".join(changes))
    own = load(recipe.name)
    return replace(recipe, published=own.published, fidelity=own.fidelity)


def modifications(recipe: Recipe, protocol: Mapping[str, Any]) -> Sequence[str]:
    """What sets a run apart from what was published under the name of its recipe, such as "epochs=6", "other data"."""
    differences = recipe.differences()
    if differences is None:
        return ["a recipe that does not come with fastil"]
    changes = [f"{key}={_shown(value)}" for key, value in sorted(differences.items())]
    expected = load(recipe.name).data.dataset
    if expected in table() and not on_published_data(expected, protocol):
        known = all(protocol["dataset"][split].get("identity") for split in ("train", "val"))
        changes.append("other data" if known else "unidentified data")
    return changes


def on_published_data(dataset: str, protocol: Mapping[str, Any]) -> bool:
    """Whether the images of a run are those published under the name that the key `dataset` has for them."""
    return is_published(dataset, protocol["dataset"], protocol.get("class_names", ()))


def had_published(recipe: Recipe) -> bool:
    """Whether the recipe has a published number as it comes with fastil, so that its absence wants a reason."""
    before = shipped(recipe.name)
    return before is not None and before.published is not None


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
