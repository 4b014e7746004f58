"""The trackers that come with fastil, each a function of one record (docs/tracking.md says what is in it)."""

import csv
import secrets
import shutil
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastil import files
from fastil.errors import UserError

Record = dict[str, Any]
Callback = Callable[[Record], object]
AXES = {"train": "run_epoch", "correct": "run_epoch", "test": "classes_seen"}  # by phase
PLACES = {"step", "epoch", "epochs", "images"}  # scalars that say where a record stands; as curves they show nothing


class Csv:
    """Writes epochs.csv and steps.csv in the run directory, a row for each record."""

    def __call__(self, record: Record) -> None:
        kind = record["kind"]
        if kind == "begin":
            self.paths = {kind: Path(record["run"]) / f"{kind}s.csv" for kind in ("epoch", "step")}
            self.rows: dict[str, list[dict[str, Any]]] = {kind: [] for kind in self.paths}
            self.columns: dict[str, list[str]] = {kind: [] for kind in self.paths}
            for path in self.paths.values():
                path.unlink(missing_ok=True)
        elif kind in self.paths:
            self._add(kind, {"phase": record["phase"]} | record["scalars"])

    def _add(self, kind: str, row: dict[str, Any]) -> None:
        """Add a row. One that has columns which those before it lack is a reason to write the file again."""
        rows, columns = self.rows[kind], self.columns[kind]
        rows.append(row)
        new = [name for name in row if name not in columns]
        columns += new
        with open(self.paths[kind], "w" if new else "a", newline="") as file:
            writer = csv.DictWriter(file, columns)
            if new:
                writer.writeheader()
            writer.writerows(rows if new else [row])


class TensorBoard:
    """Writes an event file in RUN/tensorboard, which is emptied first."""

    def __call__(self, record: Record) -> None:
        kind = record["kind"]
        if kind == "begin":
            from torch.utils.tensorboard import SummaryWriter

            folder = Path(record["run"]) / "tensorboard"
            if folder.exists():
                shutil.rmtree(folder)
            # purge_step: a TensorBoard that is open forgets what it has read in the file that was there.
            self.writer = SummaryWriter(folder, purge_step=0)
            settings = "\n".join(f"{key}: {value}" for key, value in record["settings"].items())
            for name, text in (("settings", settings), ("protocol", record["protocol"])):
                self.writer.add_text(name, "\n".join(f"    {line}" for line in text.splitlines()), 0)
        elif kind == "end":
            for name, path in record["figures"].items():
                self.writer.add_image(f"figures/{name}", _pixels(path), 0, dataformats="HWC")
            self.writer.close()
        else:
            axis = f"{record['phase']}/{AXES[record['phase']]}"  # which is the writer's step
            for name, value in _curves(record).items():
                if name != axis:
                    self.writer.add_scalar(name, value, record["x"])


class WeightsAndBiases:
    """Makes one run of W&B, whose files are in RUN/wandb and whose id stays the same.

    Offline the files are written again from the beginning. Online W&B keeps what it has, by the record's index.
    """

    def __call__(self, record: Record) -> None:
        import wandb

        kind, index = record["kind"], record["index"]
        if kind == "begin":
            self._begin(record)
            return
        content = _curves(record) if kind != "end" else {
            f"figures/{name}": wandb.Image(path) for name, path in record["figures"].items()
        }  # fmt: skip
        if content and index >= self.run.starting_step:
            self.run.log(content, step=index, commit=True)
        if kind == "end":
            self.run.finish(exit_code=0 if record["finished"] else 1)

    def _begin(self, record: Record) -> None:
        import wandb

        run = Path(record["run"])
        usual = wandb.setup().settings
        offline = usual.mode in ("offline", "dryrun")
        for folder in (run / "wandb").glob("offline-run-*") if offline else ():
            for file in folder.glob("*.wandb"):
                file.unlink()
            shutil.rmtree(folder, ignore_errors=True)  # W&B's own process may outlive a run that was killed
        self.run = wandb.init(
            project=usual.project or "fastil", id=_run_id(run), name=run.name, dir=run, reinit="create_new",
            config=record["settings"] | {"protocol": record["protocol"]}, resume=None if offline else "allow",
        )  # fmt: skip
        for phase, axis in AXES.items():
            self.run.define_metric(f"{phase}/{axis}")
            self.run.define_metric(f"{phase}/*", step_metric=f"{phase}/{axis}")


# By the package that each needs.
TRACKERS: dict[str, Callable[[], Callback]] = {"csv": Csv, "tensorboard": TensorBoard, "wandb": WeightsAndBiases}


def built(names: Iterable[str]) -> dict[str, Callback]:
    """Return the trackers of these names, by what a message calls them. Raises UserError where a package is missing."""
    made: dict[str, Callback] = {}
    for name in names:
        found = find_spec(name)
        if name != "csv" and (found is None or found.origin is None):  # a folder of that name is no package
            raise UserError(f"track={name}: needs {name}; pip install 'fastil[track]', or leave it out")
        made[f"track={name}"] = TRACKERS[name]()
    return made


def _curves(record: Record) -> dict[str, float]:
    """The scalars of an epoch or a step that are worth a curve, each under its phase: train/loss, test/top1."""
    return {f"{record['phase']}/{name}": value for name, value in record["scalars"].items() if name not in PLACES}


def _pixels(path: str) -> NDArray[np.uint8]:
    """An image file as uint8 [h, w, 3]."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def _run_id(run: Path) -> str:
    """The id of this run at W&B, drawn when it is first tracked."""
    path = run / "wandb/fastil_run_id"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        files.write_text(path, secrets.token_hex(8))
    return path.read_text("utf-8")
