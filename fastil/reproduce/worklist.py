"""The runs behind a table: which there are, which are missing, whose base step each may take, and its command."""

import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

import numpy as np
import pydantic
import torch
from numpy.typing import NDArray

from fastil import files
from fastil.data import Dataset, load_dataset
from fastil.data.published import table
from fastil.data.sources import image_size
from fastil.device import Precision, fastest_precision, pick_device
from fastil.errors import UserError
from fastil.protocol import Protocol
from fastil.recipe import Recipe
from fastil.recipe_file import read_effective
from fastil.reporting.checkpoints import Position
from fastil.reporting.run_files import AGAIN, MetricsLine, read_metrics
from fastil.reporting.runs import Run
from fastil.reproduce import tables
from fastil.reproduce.tables import Entry, Table
from fastil.training import base_step, step_plan
from fastil.training.step_plan import StepWork


@dataclass
class Job:
    """One run of the work list."""

    entry: Entry
    seed: int
    folder: Path
    recipe: Recipe
    finished: bool
    had_base: bool  # before anything was started
    size: tuple[int, int] = (0, 0)  # of the images
    base_group: str = ""  # equal where the base steps are the same
    visits: list[int] = field(default_factory=list)  # images seen in training and finetuning, of each step
    steps: list[StepWork] = field(default_factory=list)
    begun: Position | None = None  # where its checkpoint is, before anything was started
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)
    gpu: str | None = None  # that it was started on, see gpus.choice
    started: float = 0.0  # when, by time.monotonic
    work: float = 0.0  # that was left then, see WorkList.work_left
    seconds: float = 0.0  # that its process took, once it has ended
    failure: str = ""  # why, where it failed

    @property
    def name(self) -> str:
        return f"{self.folder.parent.name}/{self.folder.name}"

    @property
    def network(self) -> str:
        """Equal where a training step is of the same network and size."""
        return f"{self.recipe.model}{self.recipe.train.batch_size}{self.size}"

    @property
    def log(self) -> Path:
        return self.folder.with_name(self.folder.name + ".log")

    @property
    def has_base(self) -> bool:
        return (self.folder / "checkpoints/step_0.pt").exists()

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def lines(self) -> list[MetricsLine]:
        """The lines of metrics.jsonl; the last one may be half written."""
        try:
            return read_metrics(self.folder)
        except UserError:
            return []

    def place(self) -> tuple[int, int]:
        """The step that it is in and the images of that step that it need not see again: what it says, and before it is
        started what its checkpoint holds."""
        lines, of_epoch = self.lines(), 0
        step = lines[-1].step if lines else 0
        if self.process is None:
            if self.begun is None:
                return 0, 0
            step, of_epoch = self.begun.step, self.begun.batch * self.recipe.train.batch_size
            lines = [line for line in lines if _holds(self.begun, line)]
        return step, sum(line.images for line in lines if line.step == step) + of_epoch

    def done_visits(self) -> int:
        """Images that it need not see again."""
        step, images = self.place()
        return sum(self.visits[:step]) + images

    def done_work(self) -> float:
        """The work that is behind it; of a step's exemplars and evaluation only when the next step is trained."""
        step, images = self.place()
        return sum(work.total for work in self.steps[:step]) + sum(
            images * w.visit for w in self.steps[step : step + 1]
        )

    def state(self) -> str:
        if self.finished:
            return "finished"
        return "missing" if self.begun is None else f"begun (step {self.begun.step})"


class WorkList:
    """The runs behind some entries of a table, each once, and the command that trains each.

    preview: take the published shape of a data set whose files are not here, instead of raising UserError. table: what
    these entries are compared in; its runs in `out` decide the precision. wanted: the precision that is asked for;
    UserError where those runs have another one.
    """

    def __init__(
        self,
        entries: Sequence[Entry],
        seeds: Sequence[int],
        out: Path,
        data: str | None,
        preview: bool = False,
        table: Table | None = None,
        wanted: str = "auto",
    ) -> None:
        self.data = data
        self.jobs: list[Job] = []
        self.bases: dict[str, Path] = {}  # by base group, a run of this scale that had the base step before
        asked = _asked(wanted) or _in_settings(entries, seeds[0])
        before = tables.precision_of(entries if table is None else table.entries, out)
        if asked is not None and before not in (None, asked):
            raise UserError(
                f"precision {asked}: the runs of this table that are in {out} are in {before}, and no table mixes "
                f"precisions; leave it out to go on in {before}, or choose another --out"
            )
        for seed in seeds:
            for entry in entries:
                folder = entry.folder(out, seed)
                if all(job.folder != folder for job in self.jobs):
                    loaded = entry.load(seed, data)
                    loaded = loaded if asked is None else loaded.in_precision(asked)
                    loaded = loaded.settled(pick_device(loaded.train.device), before)
                    job = Job(entry, seed, folder, loaded, finished=False, had_base=False)
                    job.finished = tables.finished_run(folder, loaded) is not None
                    job.begun = None if job.finished else _position(folder)
                    self.jobs.append(job)
        self.device = pick_device(self.jobs[0].recipe.train.device)
        self.precision = self.jobs[0].recipe.precision
        option = "precision=" if table is None else "--precision"
        self.why = _why(self.precision, before, asked, self.device, out, option)  # that one
        if not self.missing and data is None:  # then the table can be written again without its images
            return
        datasets: dict[str, Dataset | None] = {}
        for job in self.jobs:
            key = str(job.recipe.data)
            if key not in datasets:
                datasets[key] = _dataset(job.recipe, preview, table is None or table.scale is None)
            dataset = datasets[key]
            first = datasets[str(self.jobs[0].recipe.data)]
            if dataset is not None and first is not None and hashes(dataset) != hashes(first):
                raise UserError(
                    f"{job.name} would be trained on other images than {self.jobs[0].name}, and no table holds both; "
                    f"train them apart"
                )
            if job.finished and dataset is not None and Run(job.folder).image_hashes != hashes(dataset):
                raise UserError(f"{job.folder}: was trained on other images than those of --data; choose another --out")
            self._measure(job, dataset)

    def _measure(self, job: Job, dataset: Dataset | None) -> None:
        """Fill in what depends on the images."""
        counts, job.size = _shape(job.recipe, dataset)
        names = None if dataset is None else dataset.class_names
        protocol = job.recipe.build_protocol(len(counts), names)
        steps = step_plan.effective_steps(job.recipe, protocol, counts)
        job.visits = [step.visits + step.finetune_visits + step.memory_visits for step in steps]
        if dataset is not None:
            test_counts = np.bincount(dataset.val.labels, minlength=len(counts))[protocol.order]
            job.steps = step_plan.run_work(job.recipe, steps, test_counts)
        of_base = counts[protocol.steps[0]]
        own_loss = "" if len(set(of_base.tolist())) == 1 else base_step.SAME_WITHOUT_OLD[job.recipe.loss.loss]
        job.base_group = f"{base_step.base_identity(job.recipe)}{protocol.steps[0].tolist()}{own_loss}"
        job.had_base = job.has_base
        if job.base_group not in self.bases and job.entry.place:
            of_scale = job.folder.parent.parent
            for found in sorted(of_scale.glob(f"*/*-s{job.seed}/checkpoints/step_0.pt")):
                if _same_base(found.parent.parent, job.recipe, protocol, dataset, counts):
                    self.bases[job.base_group] = found.parent.parent
                    break

    @property
    def missing(self) -> list[Job]:
        return [job for job in self.jobs if not job.finished]

    def donor(self, job: Job) -> Path | None:
        """A run whose base step this one can take."""
        # What stood there before may be a run of other settings, so only _same_base says whether it will do.
        fresh = (j.folder for j in self._group(job) if j is not job and j.has_base and not j.had_base)
        return self.bases.get(job.base_group) or next(fresh, None)

    def trains_base(self, job: Job) -> bool:
        """Whether it has a base step to train: one that has begun it, or the first of a group in which none has."""
        if job.has_base or job.finished:
            return False
        if job.begun is not None:  # goes on from its checkpoint and takes no other base step
            return True
        to_train = [j for j in self._group(job) if not j.finished and not j.failure and not j.has_base]
        begun = any(j.begun is not None for j in to_train)
        return not begun and job is next(iter(to_train), None) and self.donor(job) is None

    def waits(self, job: Job) -> bool:
        """Whether it cannot start before another run of its group has trained the base step."""
        return not job.has_base and self.donor(job) is None and not self.trains_base(job)

    def left(self, job: Job) -> int:
        """Image visits that this run still trains."""
        if job.finished:
            return 0
        shared = 0 if job.has_base or self.trains_base(job) else job.visits[0]
        return max(0, sum(job.visits) - max(shared, job.done_visits()))

    def work_left(self, job: Job) -> float:
        """What this run still computes, in forward passes of an image."""
        if job.finished:
            return 0.0
        base = job.steps[0].phases
        shared = 0.0 if job.has_base or self.trains_base(job) else base["train"] + base["correct"]
        return max(0.0, sum(work.total for work in job.steps) - max(shared, job.done_work()))

    def command(self, job: Job) -> list[str]:
        command = [sys.executable, "-m", "fastil.cli", "run", job.entry.recipe, *job.entry.overrides]
        command += [f"seed={job.seed}", f"precision={job.recipe.precision}", "--out", str(job.folder)]
        command += ["--data", self.data] if self.data is not None else []
        donor = self.donor(job)
        command += ["--resume"] if job.folder.exists() else []
        command += ["--base", str(donor)] if donor is not None and not job.has_base else []
        return command

    def ready(self, job: Job) -> bool:
        return job.process is None and not job.finished and not self.waits(job)

    def _group(self, job: Job) -> list[Job]:
        return [j for j in self.jobs if j.base_group == job.base_group]


def _asked(wanted: str) -> Precision | None:
    """What --precision asks for; None for "auto"."""
    known: tuple[Precision, ...] = get_args(Precision)
    if wanted not in ("auto", *known):
        raise UserError(f"--precision {wanted}: use one of auto, {', '.join(known)}")
    return next((precision for precision in known if precision == wanted), None)


def _in_settings(entries: Sequence[Entry], seed: int) -> Precision | None:
    """The precision that the recipes themselves ask for; None where one leaves it open, or they differ."""
    found = {entry.load(seed).train.precision for entry in entries}
    only = found.pop()
    return None if found or only == "auto" else only


def _why(
    precision: Precision,
    before: Precision | None,
    asked: Precision | None,
    device: torch.device,
    out: Path,
    option: str,
) -> str:
    """What decided the precision. option: that chooses another one."""
    if before is not None:
        usual = fastest_precision(device)
        return f"as the runs in {out} have it" + (f"; this machine would take {usual}" if usual != precision else "")
    return f"auto: what this machine is fast in; {option} chooses another" if asked is None else "as asked for"


def _position(folder: Path) -> Position | None:
    """Where the checkpoint of a run that was stopped is; None where there is none, or none that can be read, which the
    run itself will say."""
    path = folder / "checkpoints/last.pt"
    try:
        if not path.exists():
            return None
        content = files.load(path, torch.device("cpu"), AGAIN)
        return pydantic.TypeAdapter(Position).validate_python(content["position"])
    except (UserError, KeyError, pydantic.ValidationError):
        return None


def _holds(checkpoint: Position, line: MetricsLine) -> bool:
    """Whether an epoch of metrics.jsonl was over when the checkpoint was written."""
    rank = {"train": 0, "correct": 1, "memory": 2}
    place = checkpoint.step, rank.get(checkpoint.phase, 0), checkpoint.epoch
    return (line.step, rank.get(line.phase, 0), line.epoch) <= place


def hashes(dataset: Dataset) -> tuple[str, str]:
    """The hashes of its splits, as `Run.image_hashes` has them."""
    return dataset.train.sha256, dataset.val.sha256


def _dataset(loaded: Recipe, preview: bool, takes_settings: bool) -> Dataset | None:
    """None where only its published shape is known, and needed. takes_settings: the command takes KEY=VALUE, which
    `load_dataset` advises."""
    if loaded.data.dataset == "folder" and loaded.data.data is None and not takes_settings:
        classes = f" of {loaded.protocol.classes} classes" if loaded.protocol.classes else ""
        raise UserError(
            f"{loaded.name} trains on your own images: give --data DIR with train/CLASS and val/CLASS{classes}, as "
            f"Tiny ImageNet has; or --scale short, which trains on CIFAR-100 (fastil download cifar100 DIR)"
        )
    try:
        return load_dataset(loaded.data)
    except UserError as error:
        if preview and loaded.data.dataset in table() and loaded.data.data is None:
            return None
        fixes = [fix for fix in ("on_corrupt=skip", "verify=false") if fix in str(error)]
        if fixes and not takes_settings:
            command = shlex.join(["fastil", "run", loaded.name, "--data", str(loaded.data.data), *fixes])
            raise UserError(f"{error}, which a table does not take; train on these apart from it: {command}") from None
        raise


def _shape(loaded: Recipe, dataset: Dataset | None) -> tuple[NDArray[np.int64], tuple[int, int]]:
    """Training images per class, and their height and width."""
    if dataset is not None:
        counts = np.bincount(dataset.train.labels, minlength=len(dataset.class_names))
        return counts, image_size(loaded.data, dataset)
    known = table()[loaded.data.dataset]
    return np.full(known.classes, known.per_class), known.shape[:2]


def _same_base(
    folder: Path, loaded: Recipe, protocol: Protocol, dataset: Dataset | None, counts: NDArray[np.int64]
) -> bool:
    """Whether `fastil run --base FOLDER` would take the base step of that directory."""
    try:
        if dataset is not None:
            base_step.check(folder, loaded, protocol, dataset, counts)
            return True
        return base_step.base_identity(read_effective(folder / "recipe.yaml")) == base_step.base_identity(loaded)
    except UserError:
        return False
