"""What a report, a figure or a table reads of run directories."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastil.errors import UserError
from fastil.fidelity import MODIFIED, had_published, labelled
from fastil.recipe import Recipe, read_effective, shipped


@dataclass(frozen=True)
class Run:
    """A run directory with at least one finished step."""

    path: Path
    recipe: Recipe  # with a published number only if that may stand beside the run: see fastil.fidelity
    results: dict[str, Any]  # results.json
    protocol: dict[str, Any]  # protocol.json

    @property
    def curve(self) -> list[float]:
        """Top-1 over all classes seen after each finished step, percent."""
        return [step["top1"] for step in self.results["steps"]]

    @property
    def total_steps(self) -> int:
        return len(self.protocol["steps"])

    @property
    def dataset(self) -> str:
        return str(self.protocol["dataset"]["name"])

    @property
    def images(self) -> tuple[str, ...]:
        """Hashes of the training and the test images."""
        return tuple(self.protocol["dataset"][split]["sha256"] for split in ("train", "val"))


def read_run(path: Path) -> Run:
    """A run directory; an error says what is missing."""
    if not path.is_dir():
        raise UserError(f"{path}: no such run directory")
    recipe = read_effective(path / "recipe.yaml")
    try:
        results = json.loads((path / "results.json").read_text())
        protocol = json.loads((path / "protocol.json").read_text())
        run = Run(path, labelled(recipe, protocol), results, protocol)
        # Everything that a report reads without looking.
        _ = run.curve[0], run.images[0][:6], run.dataset, results["seed"], results["loss"]
        _ = f"{results['average_incremental_accuracy']:.2f}"
        for step in results["steps"]:
            _ = [f"{step[key] or 0:.2f}" for key in ("step", "classes_seen", "top1", "top1_old", "top1_new")]
        _ = [run.protocol["class_names"][c] for classes in run.protocol["steps"] for c in classes]
        _ = [first for first, *_ in map(dict.values, run.protocol.get("effective", []))]
    except FileNotFoundError:
        raise UserError(f"{path}: no results yet; let the run finish a step (--resume goes on)") from None
    except OSError as error:
        raise UserError(
            f"{error.filename}: cannot be read ({error.strerror}); mend that or leave the run out"
        ) from None
    except (ValueError, LookupError, TypeError, AttributeError):
        raise UserError(f"{path}: results.json or protocol.json is damaged; run again with --resume") from None
    return run


def read_confusion(run: Run, step: int) -> NDArray[np.int64]:
    """The matrix of one step of a run: int64 [seen, seen], rows are true classes in incremental order."""
    path = run.path / f"confusion/step_{step}.npy"
    try:
        matrix: NDArray[np.int64] = np.load(path)
        whole = matrix.shape == (run.results["steps"][step]["classes_seen"],) * 2 and matrix.dtype == np.int64
    except (OSError, EOFError, ValueError):
        whole = False
    if not whole:
        raise UserError(f"{path}: missing or damaged; run again in a new --out")
    return matrix


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl but for a last one that is half written. Raises UserError for a damaged file."""
    path = run / "metrics.jsonl"
    try:
        return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    except (OSError, ValueError):
        raise UserError(f"{path}: missing or damaged; train this run again in a new --out") from None


def alpha_paths(run: Run) -> dict[int, NDArray[np.float64]]:
    """Alpha (eq. 5) of the incremental steps of a run that learned it, by step: [epochs, 1], or [epochs, old classes]
    with an alpha per class. Empty for other runs. A last line that is being written is left out."""
    path = run.path / "metrics.jsonl"
    found: dict[int, list[NDArray[np.float64]]] = {}
    try:
        for line in path.read_text().splitlines(keepends=True):
            record = json.loads(line) if line.endswith("\n") else {}
            if "alpha" in record and record["phase"] == "train":
                found.setdefault(int(record["step"]), []).append(np.atleast_1d(np.array(record["alpha"], dtype=float)))
        steps = {step: np.stack(alphas) for step, alphas in sorted(found.items())}
        if not all(
            alphas.ndim == 2 and alphas.size and (alphas > 0).all() and np.isfinite(alphas).all()
            for alphas in steps.values()
        ):
            raise ValueError
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, LookupError, TypeError):
        raise UserError(f"{path}: damaged; repeat the run in a new --out, or leave it out of the report") from None
    return steps


def geometric_mean(alphas: NDArray[np.float64]) -> NDArray[np.float64]:
    """Over the classes: [epochs, classes] to [epochs]."""
    mean: NDArray[np.float64] = np.exp(np.log(alphas).mean(axis=1))
    return mean


def group_runs(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs that differ in nothing but the seed, under a label that says what sets the group apart: all that was
    modified, if a number was published for the recipe, and otherwise, of the keys in which runs of a recipe differ,
    those that are not as the recipe has them."""
    groups: dict[str, list[Run]] = {}
    identities = [run.recipe.identity(seed=False) | {"images": f"{run.dataset} {run.images[0][:6]}"} for run in runs]
    for run, identity in zip(runs, identities, strict=True):
        same_recipe = [i for i, other in zip(identities, runs, strict=True) if other.recipe.name == run.recipe.name]
        own = shipped(run.recipe.name)
        usual = {} if own is None else own.keys()
        differing = [
            key
            for key, value in identity.items()
            if key != "loss"
            and value is not None
            and any(i.get(key) != value for i in same_recipe)
            and (key not in usual or usual[key] != value)
        ]
        parts = [run.recipe.name, run.results["loss"]]
        if run.recipe.fidelity.startswith(MODIFIED) and had_published(run.recipe):
            parts.append(run.recipe.fidelity)
            differing = [key for key in differing if key not in (run.recipe.differences() or {})]
        label = ", ".join([*parts, *(f"{key}={identity[key]}" for key in differing)])
        group = groups.setdefault(label, [])
        twin = next((other for other in group if other.results["seed"] == run.results["seed"]), None)
        if twin is not None:
            raise UserError(
                f"{run.path}: the same run as {twin.path} (same settings, images and seed); give one of them"
            )
        group.append(run)
    return groups
