"""What a report, a figure or a table reads of run directories."""

import os
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fastil.device import Precision
from fastil.errors import UserError
from fastil.files import Damaged
from fastil.methods import BUILT_IN, Method, find
from fastil.models import MODELS, find_factory
from fastil.recipe import Recipe
from fastil.recipe_file import differences, read_effective, shipped
from fastil.reporting.fidelity import MODIFIED, had_published, labelled, other_pixels
from fastil.reporting.measures import Measures, measures_of
from fastil.reporting.run_files import (
    AGAIN,
    confusion_of,
    read_confusion,
    read_metrics,
    read_predictions,
    read_protocol,
    read_results,
)
from fastil.text import one_line

if TYPE_CHECKING:
    from fastil.reporting.classifier import Classifier


ROUNDED = 1e-6  # percent
IN_FRONT = ("method", "loss")  # of every label
ALWAYS_NAMED = ("model",)  # in a label, where it is not the recipe's
PathLike = str | os.PathLike[str]


class Run:
    """A run directory with at least one finished step: what it says, and its network.

    recipe: with a published number only if that may stand next to the run (`fidelity.labelled`). results, protocol: the
    content of results.json and protocol.json. Raises UserError for what is missing or damaged. Nothing that the
    directory names as code is imported: method (a class) and model (a function that returns a backbone) are what it
    names, or `fastil.run`'s strings for them; `network` and `predict` need them.
    """

    def __init__(
        self,
        path: PathLike,
        *,
        method: type[Method] | str | None = None,
        model: Callable[[], Any] | str | None = None,
    ) -> None:
        self.path = path = Path(path)
        if not path.is_dir():
            raise UserError(f"{path}: no such run directory")
        recipe = read_effective(path / "recipe.yaml")
        code: dict[str, Any] = {}
        if method is not None:
            code[recipe.method.method] = find(method)
        if model is not None:
            code[recipe.model.model] = model if callable(model) else find_factory(model)[1]
        for name in code:
            if name in (*BUILT_IN, *MODELS):
                raise UserError(f"{path}: was run with {name}, which comes with fastil; leave method or model out")
        if code:
            recipe = read_effective(path / "recipe.yaml", code)  # with the keys of the method
        if not os.path.lexists(path / "results.json"):
            raise UserError(f"{path}: no results yet; let the run go on until a step is finished")
        self.results, self.protocol = read_results(path), read_protocol(path)
        seen = list(accumulate(len(classes) for classes in self.protocol.steps))
        if [step.classes_seen for step in self.results.steps] != seen[: len(self.results.steps)]:
            raise UserError(f"{path}: results.json has other steps than protocol.json; let the run go on")
        self.recipe: Recipe = labelled(recipe, self.protocol)

    def __repr__(self) -> str:
        average = self.results.average_incremental_accuracy
        what = f"{self.recipe.name}, {self.recipe.method.method}, {len(self.curve)} of {self.total_steps} steps"
        return one_line(f"Run({str(self.path)!r}): {what}, average {average:.2f}")

    @property
    def finished(self) -> bool:
        """Whether all steps are done."""
        return len(self.curve) == self.total_steps

    @property
    def curve(self) -> list[float]:
        """Top-1 over all classes seen after each finished step, percent."""
        return [step.top1 for step in self.results.steps]

    @property
    def total_steps(self) -> int:
        return len(self.protocol.steps)

    @property
    def dataset_name(self) -> str:
        return self.protocol.dataset.name

    @property
    def image_hashes(self) -> tuple[str, str]:
        """Hashes of the training and the test images."""
        return self.protocol.dataset.train.sha256, self.protocol.dataset.val.sha256

    def confusion(self, step: int = -1) -> NDArray[np.int64]:
        """The confusion matrix of a step, -1 for the last one: int64 [seen, seen], rows are true classes in incremental
        order."""
        step = self._step(step)
        classes = self.results.steps[step].classes_seen
        if not (self.path / f"confusion/step_{step}.npy").exists():  # left out, perhaps, of what was kept of the run
            return confusion_of(self.predictions(step), classes)
        return read_confusion(self.path, step, classes)

    def predictions(self, step: int) -> NDArray[np.int16]:
        """True and predicted incremental position of each test image of the classes seen after a step, int16 [n, 2]."""
        result = self.results.steps[self._step(step)]
        found = read_predictions(self.path, result.step, result.classes_seen)
        top1 = 100 * float((found[:, 0] == found[:, 1]).mean())
        if abs(top1 - result.top1) > ROUNDED:
            path = self.path / f"predictions/step_{result.step}.npy"
            raise Damaged(path, f"of another run (top-1 {top1:.2f}, in results.json {result.top1:.2f})", AGAIN)
        return found

    @cached_property
    def measures(self) -> Measures:
        """Accuracy of each group of classes, forgetting and backward transfer, computed from the predictions."""
        steps = self.results.steps
        predictions = [self.predictions(step.step) for step in steps]
        try:
            return measures_of(predictions, [step.classes_seen for step in steps])
        except ValueError as error:
            raise Damaged(self.path / "predictions", f"damaged ({error})", AGAIN) from None

    def network(self, step: int = -1) -> "Classifier":
        """The network after a step as a `Classifier` in eval mode, on the CPU: images to probabilities over its
        `class_names`."""
        from fastil.reporting.classifier import load_classifier

        return load_classifier(self.path, self.recipe, self.protocol, self._step(step))

    def predict(self, paths: PathLike | Iterable[PathLike], step: int = -1) -> list[dict[str, float]]:
        """For each image file the probability of each class seen, the likeliest first."""
        from fastil.reporting.prediction import predictions

        given = [paths] if isinstance(paths, str | os.PathLike) else paths
        found = []
        for one in predictions(self.network(step), map(Path, given)):
            if one.problem is not None:
                raise one.problem
            found.append(one.probabilities)
        return found

    def _step(self, step: int) -> int:
        """A finished step by its number; negative ones count from the last."""
        finished = len(self.results.steps)
        if not -finished <= step < finished:
            raise UserError(f"{self.path}: step {step}: has finished steps 0 to {finished - 1}")
        return step % finished


def alpha_paths(run: Run) -> dict[int, NDArray[np.float64]]:
    """Alpha (eq. 5) of the incremental steps of a run that learned it, by step: [epochs, 1], or [epochs, old classes]
    with an alpha per class. Empty for other runs, and where metrics.jsonl was not kept."""
    path = run.path / "metrics.jsonl"
    found: dict[int, list[NDArray[np.float64]]] = {}
    for line in read_metrics(run.path) if path.exists() else ():
        if line.alpha is not None and line.phase == "train":
            alphas = found.setdefault(line.step, [])
            alphas.append(np.atleast_1d(line.alpha))
            if len(alphas[-1]) != len(alphas[0]):
                raise Damaged(path, f"damaged (the alphas of step {line.step} are of other classes)", AGAIN)
    return {step: np.stack(alphas) for step, alphas in sorted(found.items())}


def geometric_mean(alphas: NDArray[np.float64]) -> NDArray[np.float64]:
    """Over the classes: [epochs, classes] to [epochs]."""
    mean: NDArray[np.float64] = np.exp(np.log(alphas).mean(axis=1))
    return mean


def one_precision(found: Iterable[tuple[Path, Precision]], fix: str) -> Precision | None:
    """The precision that all these run directories have in common; None where there is none. UserError, which names
    them all by precision, where they have several: no table may mix them. fix: what to do."""
    paths: dict[Precision, list[str]] = {}
    for path, precision in found:
        paths.setdefault(precision, []).append(str(path))
    if len(paths) > 1:
        which = " and ".join(f"{precision} by {', '.join(there)}" for precision, there in paths.items())
        raise UserError(f"runs of several precisions, which one table cannot hold: {which}; {fix}")
    return next(iter(paths), None)


def reference_lines(groups: dict[str, list[Run]]) -> dict[str, str]:
    """The groups drawn as lines between which the others lie, by label: "joint" or "finetune". Each is the only
    one of its kind, and finetuning one only without a memory."""
    recipes = {label: runs[0].recipe for label, runs in groups.items()}
    methods = {label: recipe.method.method for label, recipe in recipes.items()}
    lines = {
        label: method
        for label, method in methods.items()
        if method == "joint" or (method == "finetune" and recipes[label].memory.exemplars_per_class == 0)
    }
    if len(lines) == len(groups):
        return {}
    return {label: kind for label, kind in lines.items() if list(lines.values()).count(kind) == 1}


def group_runs(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs that differ in nothing but the seed, under a label: method, loss, the recipe where there are several, and
    what sets the group apart. That is all that was modified, if a number was published for the recipe, and otherwise
    the model and the keys in which runs of a recipe differ, where they are not as the recipe has them. UserError for a
    run that is there twice, and where runs of several precisions would stand side by side."""
    one_precision([(run.path, run.recipe.precision) for run in runs], "report them apart")
    groups: dict[str, list[Run]] = {}
    recipes = {run.recipe.name for run in runs}
    identities = [
        run.recipe.identity(seed=False)
        | {"images": f"{run.dataset_name} (sha256 {run.image_hashes[0][:6]})"}
        | {"loader": " and ".join(other_pixels(run.protocol)) or None}
        | {"processes": " and ".join(map(str, run.protocol.all_ranks))}  # another computation, or at least rounding
        | {"bn": "local" if run.protocol.bn == "local" and max(run.protocol.all_ranks) > 1 else None}
        for run in runs
    ]
    for run, identity in zip(runs, identities, strict=True):
        same_recipe = [i for i, other in zip(identities, runs, strict=True) if other.recipe.name == run.recipe.name]
        own = shipped(run.recipe.name)
        usual = {} if own is None else own.keys()
        differing = [
            key
            for key, value in identity.items()
            if key not in IN_FRONT
            and value is not None
            and (key in ALWAYS_NAMED or any(i.get(key) != value for i in same_recipe))
            and (key not in usual or usual[key] != value)
        ]
        parts = [run.recipe.method.method, run.results.loss]
        if len(recipes) > 1:
            parts.append(run.recipe.name)
        if run.recipe.fidelity.startswith(MODIFIED) and had_published(run.recipe):
            parts.append(run.recipe.fidelity)
            differing = [key for key in differing if key not in {*(differences(run.recipe) or ()), "loader"}]
        label = one_line(", ".join([*parts, *(f"{key}={identity[key]}" for key in differing)]))
        group = groups.setdefault(label, [])
        twin = next((other for other in group if other.results.seed == run.results.seed), None)
        if twin is not None:
            raise UserError(
                f"{run.path}: the same run as {twin.path} (same settings, images and seed); give one of them"
            )
        group.append(run)
    return groups


def by_images(groups: dict[str, list[Run]]) -> dict[str, dict[str, list[Run]]]:
    """The groups apart by what they were run on, by the name of the data set: accuracies on other images have no place
    in one chart."""
    found: dict[tuple[str, ...], dict[str, list[Run]]] = {}
    for label, runs in groups.items():
        found.setdefault(runs[0].image_hashes, {})[label] = runs
    names = [next(iter(part.values()))[0].dataset_name for part in found.values()]
    return {
        name if names.count(name) == 1 else f"{name} (sha256 of its images {images[0][:6]}, {images[1][:6]})": part
        for name, (images, part) in zip(names, found.items(), strict=True)
    }
