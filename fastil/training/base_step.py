"""Taking the base step from another run, if both would train the very same network in it: bit for bit on the same kind
of device, in the same precision, with the same number of threads, both compiled or both not.

Methods that differ only in later steps share hours of base training this way, and their differences are paired.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastil import files, ranks
from fastil.data import Dataset
from fastil.errors import UserError
from fastil.models import Network
from fastil.protocol import Protocol
from fastil.recipe import Recipe, values_of
from fastil.recipe_file import read_effective
from fastil.reporting.checkpoints import read_weights
from fastil.reporting.run_files import read_metrics, read_protocol
from fastil.training.run_directory import described

# Keys that the base step never reads: it has no old class and no memory, and all classification losses are the plain
# cross-entropy, bit for bit, where every class has the same number of images.
LATER = {
    "base_epochs", "epochs", "increment", "exemplars_per_class", "memory_budget", "exemplar_selection", "temperature",
    "loss", "alpha", "sampler", "predictor", "method",
}  # fmt: skip
LATER_PARTS = ("meta_", "finetune_", "correction")
INSTEAD = "give another --base, or leave it out"  # where a file of the other run cannot be used


SAME_WITHOUT_OLD = {
    "softmax": "softmax", "separated": "softmax", "balanced": "balanced", "meta_balanced": "balanced",
    "rescaled": "rescaled", "nca": "nca",
}  # fmt: skip


def base_identity(recipe: Recipe) -> dict[str, Any]:
    """Return the settings that decide the network after the base step, if the base classes have equally many images."""
    own = {key for config in recipe.of_methods.values() for key in values_of(config)} | {"code of method", "bn"}
    keys = {k: v for k, v in recipe.identity().items() if k not in LATER | own and not k.startswith(LATER_PARTS)}
    of_method = recipe.procedure.base_step_settings(recipe.keys())
    if recipe.model.weight_transfer:  # methods train other parts of the network with it
        of_method |= {"training": recipe.method.method}
    if of_method.get("training") == recipe.method.method:  # no other method shares it
        of_method |= {"code": recipe.sources.get("method")}
    return keys | {
        "epochs of the base step": recipe.train.epochs_of(0),
        "loss of the base step": "nca" if recipe.loss.loss == "nca" else "cross-entropy",
        **{f"{what} of the base step": value for what, value in of_method.items()},
    }


def check(
    base_run: Path, recipe: Recipe, protocol: Protocol, dataset: Dataset, train_counts: NDArray[np.int64]
) -> None:
    """Raise UserError, naming the difference, unless the base step of base_run is this run's, bit for bit."""
    other = read_effective(base_run / "recipe.yaml", recipe.code)
    there = read_protocol(base_run, INSTEAD)
    ours = base_identity(recipe) | {"bn": _statistics(recipe.train.bn, [ranks.count()])}
    theirs = base_identity(other) | {"bn": _statistics(there.bn, there.all_ranks)}
    other_keys = [key for key in ours | theirs if ours.get(key) != theirs.get(key)]
    changed = [f"{key} is {theirs.get(key)} there and {ours.get(key)} here" for key in other_keys]
    if changed:
        raise UserError(f"--base {base_run}: its base step is another one ({'; '.join(changed)})")
    here = described(dataset.train)
    if there.dataset.train.same_in_another_order(here):
        raise UserError(
            f"--base {base_run}: was trained on the same images in another order; give --data in the same kind of file"
        )
    if there.dataset.train.sha256 != here.sha256 or there.steps[0] != protocol.steps[0].tolist():
        raise UserError(
            f"--base {base_run}: was trained on other images or base classes; give a run on the same --data"
        )
    unequal = len(set(train_counts[protocol.steps[0]].tolist())) > 1
    if unequal and SAME_WITHOUT_OLD[recipe.loss.loss] != SAME_WITHOUT_OLD[other.loss.loss]:
        raise UserError(
            f"--base {base_run}: the base classes have unequal numbers of images, so its loss={other.loss.loss} "
            f"trained another network than loss={recipe.loss.loss} would; leave --base out"
        )
    weights = base_run / "checkpoints/step_0.pt"
    if not weights.exists():
        raise UserError(f"{weights}: missing, the base step of --base is not finished; let it run on, or leave it out")


def _statistics(bn: str | None, processes: Sequence[int]) -> str:
    """What batch normalisation goes by in a run that so many processes trained, one after the other."""
    if bn != "local" or max(processes) == 1:
        return "by whole batches"
    return f"{bn} in {' and '.join(map(str, processes))} processes"


@dataclass(frozen=True)
class BaseStep:
    """What a run takes from another one. Read before anything is written: a damaged file must leave nothing behind."""

    source: str
    weights: dict[str, Tensor]
    metrics: list[dict[str, Any]]  # the lines of metrics.jsonl about it
    read_by: list[str]  # the loaders that read its images


def read(base_run: Path, network: Network, device: torch.device) -> BaseStep:
    """Return the base step of a run. network: one of this run's, into which the weights are put to see that they fit.
    Raises UserError if a file is missing, damaged or of another network."""
    path = base_run / "checkpoints/step_0.pt"
    weights = read_weights(path, device, INSTEAD)
    files.load_weights(network, weights, path, INSTEAD)
    lines = [line.model_dump(exclude_unset=True) for line in read_metrics(base_run, INSTEAD) if line.step == 0]
    read_by = read_protocol(base_run, INSTEAD).dataset.read_by
    return BaseStep(str(base_run), weights, lines, read_by)
