"""A run directory: what is in it, and whose it is.

recipe.yaml, protocol.json, results.json, measures.json, timings.json, metrics.jsonl, memory/, confusion/,
predictions/, checkpoints/, figures/, and what trackers write (docs/tracking.md).
"""

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastil import files, ranks
from fastil.data import Dataset, Split
from fastil.data.formats.beton import Beton
from fastil.errors import UserError
from fastil.evaluation import StepResult
from fastil.files import Damaged
from fastil.protocol import Protocol
from fastil.recipe import Recipe, values_of
from fastil.recipe_file import read_effective
from fastil.reporting import figures
from fastil.reporting.checkpoints import FORMAT, Checkpoint, read_checkpoint, sha256_of
from fastil.reporting.fidelity import labelled
from fastil.reporting.measures import measures_of
from fastil.reporting.run_files import (
    DescribedDataset,
    DescribedSplit,
    ProtocolFile,
    Results,
    confusion_of,
    read_confusion,
    read_predictions,
    read_protocol,
)
from fastil.training.step_plan import StepPlan, names_by_step
from fastil.training.trainer import Stopped

FILES = (
    "recipe.yaml", "protocol.json", "metrics.jsonl", "timings.json", "results.json", "measures.json", "lock",
    "epochs.csv", "steps.csv",
)  # fmt: skip
FOLDERS = ("checkpoints", "memory", "confusion", "predictions", "figures")
SHOWN = 3  # differences between two recipes in a message
OF_TRACKERS = ("tensorboard", "wandb")


class RunDirectory:
    """Paths and files of one run. Nothing is made before `held` is entered."""

    def __init__(self, path: Path, resume: bool, launchers: Sequence[str] = (), recipe: Recipe | None = None) -> None:
        """launchers: of this run, which goes on without `resume` where one of them has begun it. recipe: what is to be
        trained, so that nobody is told to resume the run of another one."""
        self.launchers = launchers
        self.resume = resume = resume or not set(files.holder_of(path).splitlines()).isdisjoint(launchers)
        empty = path.is_dir() and not any(path.iterdir())
        if path.exists() and not resume and not empty:
            changed = [] if recipe is None else self._changed(path, recipe)
            if changed:
                more = f"; {len(changed) - SHOWN} more" if len(changed) > SHOWN else ""
                raise UserError(
                    f"{path}: holds a run of another recipe ({'; '.join(changed[:SHOWN])}{more}); choose another --out"
                )
            raise UserError(f"{path}: exists already; go on with --resume, or choose another --out")
        # A run that was killed before it wrote anything has at least its lock.
        ours = any((path / name).exists() for name in ("recipe.yaml", "lock"))
        if path.exists() and not ours and not empty:
            raise UserError(f"{path}: not a run directory, so nothing to resume; choose another --out")
        self.path = path
        self.last = path / "checkpoints/last.pt"
        self.metrics = path / "metrics.jsonl"

    @staticmethod
    def _changed(path: Path, recipe: Recipe) -> list[str]:
        """How a recipe that is not settled yet differs from the run that is here; nothing where none can be read."""
        try:
            before = read_effective(path / "recipe.yaml", recipe.code)
            settled = recipe.settled(torch.device("cpu"), before.precision).shared_by(ranks.count(), before)
            return sorted(_differences(before, settled), key=lambda change: " None" in change)
        except UserError:
            return []

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Make the directory, and keep other processes out of it. What fails before the first checkpoint leaves nothing
        behind of what was made here."""
        fresh = not self.path.exists() or not any(self.path.iterdir())
        made = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        with contextlib.ExitStack() as stack:
            ranks.from_first(lambda: self._take(stack, made, fresh))
            try:
                yield
            except Stopped:
                raise
            except BaseException:
                if fresh and not self.last.exists():
                    for name in (*FOLDERS, *OF_TRACKERS):
                        shutil.rmtree(self.path / name, ignore_errors=True)
                    for name in FILES:
                        (self.path / name).unlink(missing_ok=True)
                raise

    def _take(self, until: contextlib.ExitStack, made: Sequence[Path], fresh: bool) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be made ({error.strerror}); choose another --out") from None
        until.callback(_remove_empty, made)  # which they are not where another process is at work
        self._lock = until.enter_context(files.locked(self.path))
        if fresh:  # another's is ours once its recipe has been compared
            self._name_launchers()

    def _name_launchers(self) -> None:
        """Write into the lock file who goes on with this run without being told to."""
        with files.written(self.path / "lock"):
            self._lock.seek(0)
            self._lock.truncate()
            self._lock.write("".join(f"{launcher}\n" for launcher in self.launchers).encode())

    def begun(self) -> Recipe | None:
        """The recipe of a run that is here already; None before its recipe.yaml is written."""
        path = self.path / "recipe.yaml"
        return read_effective(path) if path.exists() else None

    def trained_as_before(self, protocol: ProtocolFile) -> ProtocolFile:
        """Return what protocol.json is to say where no process of now has trained anything."""
        before = read_protocol(self.path)
        return protocol.model_copy(update={"ranks": before.ranks, "ranks_so_far": before.all_ranks})

    def check(self, recipe: Recipe, protocol: ProtocolFile) -> ProtocolFile:
        """Raise UserError for the directory of another recipe, or of other images. Returns what its protocol.json is to
        say from now on."""
        recipe_path, checkpoints = self.path / "recipe.yaml", self.checkpoints()
        if recipe_path.exists():
            changed = _differences(read_effective(recipe_path, recipe.code), recipe)
            if any(setting.startswith("code of ") for setting in changed):
                raise UserError(
                    f"{self.path}: its code was edited since ({'; '.join(changed)}); undo that, or choose another --out"
                )
            if changed:
                raise UserError(
                    f"{self.path}: a run of another recipe ({'; '.join(changed)}); repeat its settings or choose "
                    f"another --out"
                )
        elif checkpoints:
            raise UserError(f"{recipe_path}: missing, so the run cannot be told; choose another --out")
        if not checkpoints:
            return protocol
        before = read_protocol(self.path)
        _check_images(self.path, before, protocol)
        so_far = list(dict.fromkeys([*before.all_ranks, protocol.ranks]))
        protocol = protocol.model_copy(update={"ranks_so_far": so_far})
        if not before.dataset.read_by:
            return protocol
        read_by = sorted({*before.dataset.read_by, *protocol.dataset.read_by})
        return protocol.model_copy(update={"dataset": protocol.dataset.model_copy(update={"read_by": read_by})})

    def checkpoints(self) -> list[Path]:
        """Where a resume can go on, the latest first: last.pt, and the state_K.pt of finished steps."""
        steps = {
            int(path.stem.removeprefix("state_")): path
            for path in self.last.parent.glob("state_*.pt")
            if path.stem.removeprefix("state_").isdecimal()
        }
        return [path for path in (self.last, *(steps[step] for step in sorted(steps, reverse=True))) if path.exists()]

    def read(self, path: Path, device: torch.device) -> Checkpoint:
        """One of them. Raises Damaged where it cannot be used, so that the one before it is needed."""
        state = read_checkpoint(path, device, self.advice())
        if not self.metrics.exists():  # nothing reads it to train
            return state.model_copy(update={"metrics_bytes": 0})
        if self._metrics_bytes() < state.metrics_bytes:
            raise Damaged(self.metrics, f"shorter than {path.name} says", self.advice())
        return state

    def put_aside(self) -> str:
        """Keep a last.pt that could not be used, which the next checkpoint would replace. Returns where, for a line."""
        if not self.last.exists():
            return ""
        aside = self.last.with_name("last.pt.damaged")
        with files.written(aside):
            os.replace(self.last, aside)
        return f"; {self.last.name} is kept as {aside.name}"

    def advice(self) -> str:
        """What to do where no checkpoint can be used."""
        if (self.path / "checkpoints/step_0.pt").exists():
            return f"choose another --out, where --base {self.path} takes over the base step"
        return f"remove {self.last} to train from the beginning, or choose another --out"

    def begin(self, recipe: Recipe, protocol: ProtocolFile, state: Checkpoint | None) -> None:
        """Write recipe.yaml and protocol.json, and cut metrics.jsonl back to where the run goes on."""
        self._name_launchers()
        try:
            for name in FOLDERS:
                (self.path / name).mkdir(exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be made ({error.strerror}); choose another --out") from None
        files.write_text(self.path / "recipe.yaml", labelled(recipe, protocol).dump())
        files.write_json(self.path / "protocol.json", protocol.model_dump(exclude_unset=True))
        with files.written(self.metrics), open(self.metrics, "ab") as file:
            file.truncate(0 if state is None else state.metrics_bytes)

    def save(self, state: dict[str, Any]) -> None:
        """Replace the checkpoint; it remembers how long metrics.jsonl was, once that much of it is on the disk."""
        files.save(self.last, self._dated(state))

    def save_step(self, step: int, weights: dict[str, Any], state: dict[str, Any]) -> None:
        """Write the network after a step, and next to it what a resume would need if last.pt were damaged."""
        path = self.last.with_name(f"step_{step}.pt")
        files.save(path, weights)
        state = {key: value for key, value in state.items() if key != "trainer"} | {"weights_sha256": sha256_of(path)}
        files.save(path.with_name(f"state_{step}.pt"), self._dated(state))
        # Learned exemplars are in it, as pixels. The one before stays, in case this one is damaged.
        path.with_name(f"state_{step - 2}.pt").unlink(missing_ok=True)

    def _dated(self, state: dict[str, Any]) -> dict[str, Any]:
        with files.written(self.metrics), open(self.metrics, "ab") as file:
            os.fsync(file.fileno())
        return state | {"format": FORMAT, "metrics_bytes": self._metrics_bytes()}

    def _metrics_bytes(self) -> int:
        return self.metrics.stat().st_size if self.metrics.exists() else 0

    def mend(self, results: Sequence[StepResult]) -> list[str]:
        """Write a confusion matrix that is missing or damaged again. Returns the files of finished steps that are
        missing and cannot be written again."""
        missing = []
        for step, classes in ((result.step, result.classes_seen) for result in results):
            try:
                read_confusion(self.path, step, classes)
            except UserError:
                with contextlib.suppress(UserError):
                    predictions = read_predictions(self.path, step, classes)
                    self.write_confusion(step, confusion_of(predictions, classes))
            names = (f"memory/step_{step}.json", f"confusion/step_{step}.npy", f"predictions/step_{step}.npy")
            missing += [n for n in (*names, f"checkpoints/step_{step}.pt") if not (self.path / n).exists()]
        return missing

    def append_metrics(self, line: dict[str, Any]) -> None:
        """Append a line to metrics.jsonl."""
        with files.written(self.metrics), open(self.metrics, "a") as file:
            file.write(json.dumps(line) + "\n")

    def write_exemplars(self, step: int, exemplars: dict[int, NDArray[np.int64]]) -> None:
        """Write memory/step_K.json: the ids of the exemplars of each class id."""
        content = {str(class_id): ids.tolist() for class_id, ids in exemplars.items()}
        files.write_json(self.path / f"memory/step_{step}.json", content)

    def write_predictor(self, step: int, state: dict[str, Any]) -> None:
        """Write what a step predicts with besides the network: class means, or the state of the method's correction."""
        files.save(self.path / f"checkpoints/predictor_{step}.pt", state)

    def write_confusion(self, step: int, matrix: NDArray[np.int64]) -> None:
        """Write confusion/step_K.npy: int64 [seen, seen], rows are true classes."""
        files.write_atomically(self.path / f"confusion/step_{step}.npy", lambda file: np.save(file, matrix))

    def write_predictions(self, step: int, true: NDArray[np.int64], predicted: NDArray[np.int64]) -> None:
        """int16 [n, 2]: true and predicted incremental position of each test image of the classes seen, in data set
        order; what a paired comparison of two runs needs."""
        content = np.stack((true, predicted), axis=1).astype(np.int16)
        files.write_atomically(self.path / f"predictions/step_{step}.npy", lambda file: np.save(file, content))

    def write_timings(self, content: dict[str, Any]) -> None:
        """Write timings.json."""
        files.write_json(self.path / "timings.json", content)

    def write_results(self, recipe: Recipe, steps: Sequence[StepResult]) -> None:
        """Write results.json, and measures.json where the predictions of all steps are there."""
        files.write_json(self.path / "results.json", results_of(recipe, steps).model_dump())
        seen = [step.classes_seen for step in steps]
        try:
            predictions = [read_predictions(self.path, step, classes) for step, classes in enumerate(seen)]
        except UserError:  # `mend` names what is missing, a report what is damaged
            (self.path / "measures.json").unlink(missing_ok=True)
            return
        files.write_json(self.path / "measures.json", measures_of(predictions, seen).dump())

    def draw(self) -> None:
        """Write the figures."""
        figures.draw_run(self.path)


def results_of(recipe: Recipe, steps: Sequence[StepResult]) -> Results:
    """The content of results.json: only what is reproducible."""
    accuracies = [result.top1 for result in steps]
    return Results(
        recipe=recipe.name,
        method=recipe.method.method,
        loss=recipe.loss.loss,
        seed=recipe.train.seed,
        steps=list(steps),
        average_incremental_accuracy=sum(accuracies) / len(accuracies),
        final_top1=accuracies[-1],
    )


class FollowedDirectory(RunDirectory):
    """The run directory in the processes of a run but the first, which hands over what it reads: nothing is written."""

    def __init__(self, path: Path, resume: bool) -> None:
        self.path, self.last, self.metrics = path, path / "checkpoints/last.pt", path / "metrics.jsonl"
        self.resume = resume

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Wait for the first process to hold it."""
        ranks.from_first(lambda: None)
        yield

    def save(self, state: dict[str, Any]) -> None: ...
    def save_step(self, step: int, weights: dict[str, Any], state: dict[str, Any]) -> None: ...
    def append_metrics(self, line: dict[str, Any]) -> None: ...
    def write_exemplars(self, step: int, exemplars: dict[int, NDArray[np.int64]]) -> None: ...
    def write_predictor(self, step: int, state: dict[str, Any]) -> None: ...
    def write_confusion(self, step: int, matrix: NDArray[np.int64]) -> None: ...
    def write_predictions(self, step: int, true: NDArray[np.int64], predicted: NDArray[np.int64]) -> None: ...
    def write_timings(self, content: dict[str, Any]) -> None: ...
    def write_results(self, recipe: Recipe, steps: Sequence[StepResult]) -> None: ...
    def draw(self) -> None: ...


def opened(path: Path, resume: bool, recipe: Recipe) -> RunDirectory:
    """The run directory of this process, among others or alone."""
    launchers = ranks.launchers()
    directory = ranks.from_first(lambda: RunDirectory(path, resume, launchers, recipe))
    return directory if ranks.first() else FollowedDirectory(path, directory.resume)


def _remove_empty(folders: Iterable[Path]) -> None:
    """The innermost first, up to one that is not empty."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


def _differences(before: Recipe, now: Recipe) -> list[str]:
    """The settings that decide what is trained and differ, in words."""
    old, new = before.identity(), now.identity()
    if old["method"] != new["method"]:  # which keys of methods are read differs by that alone
        of_methods = {key for part in now.of_methods.values() for key in values_of(part)}
        new = {key: value for key, value in new.items() if key not in of_methods}
    return [f"{key} was {old.get(key)}, now {new[key]}" for key in new if old.get(key, new[key]) != new[key]]


def _check_images(run: Path, before: ProtocolFile, now: ProtocolFile) -> None:
    """Raise UserError where a resume would see other images, another order of them, or other classes."""
    pairs = [(before.dataset.train, now.dataset.train), (before.dataset.val, now.dataset.val)]
    if any(old.same_in_another_order(new) for old, new in pairs):
        raise UserError(
            f"{run}: was run on the same images in another order, so their ids differ; give --data as it was then, in "
            "the same kind of file"
        )
    same = all((old.sha256, old.images) == (new.sha256, new.images) for old, new in pairs)
    if not same or (before.class_order, before.class_names) != (now.class_order, now.class_names):
        raise UserError(f"{run}: was run on other images than those of --data; give the same ones")


def protocol_file(
    recipe: Recipe,
    dataset: Dataset,
    protocol: Protocol,
    steps: Sequence[StepPlan],
    size: tuple[int, int],
    read_by: Iterable[str],
) -> ProtocolFile:
    """The content of protocol.json. size: height and width of what the network is shown. read_by: the loaders."""
    train, val = described(dataset.train), described(dataset.val)
    whole = DescribedDataset(name=dataset.name, size=size, train=train, val=val)
    if isinstance(dataset.train, Beton):
        whole = whole.model_copy(update={"read_by": sorted(set(read_by))})
    return ProtocolFile(
        class_order=protocol.order.tolist(),
        class_names=dataset.class_names,
        class_list_hash=protocol.class_hash(dataset.class_names),
        steps=[classes.tolist() for classes in protocol.steps],
        class_names_by_step=names_by_step(protocol, dataset.class_names),
        dataset=whole,
        effective=[dataclasses.asdict(plan) for plan in steps],
        precision=recipe.precision,
        bn=recipe.train.bn,
        ranks=ranks.count(),
        ranks_so_far=[ranks.count()],
    )


def described(split: Split | Beton) -> DescribedSplit:
    """What protocol.json says of a split."""
    identity = None if split.identity is None else split.identity.text
    described = DescribedSplit(sha256=split.sha256, images=len(split.labels), identity=identity)
    if isinstance(split, Split):
        return described
    return described.model_copy(update={"bytes": split.source_bytes, "counts": np.bincount(split.labels).tolist()})
