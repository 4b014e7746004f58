"""`fastil reproduce`: train what a table lacks, run by run, each in a process of its own, and write the table.

Every run is `fastil run` with the row's overrides: killed and started again it goes on where its checkpoint is. Rows
that train the same base step take it from the first run of their group (fastil.base).
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from fastil import base, planning, recipe, summary, tables
from fastil.data import Dataset, load_dataset
from fastil.data.sources import PUBLISHED
from fastil.device import pick_device
from fastil.errors import UserError
from fastil.interrupt import Interrupt
from fastil.protocol import Protocol, build_protocol
from fastil.report import read_run
from fastil.tables import Entry, Table

POLL = 1.0  # seconds
LINE_EVERY = 60.0  # seconds between lines of progress where there is no terminal


@dataclass
class Job:
    """One run of the work list."""

    entry: Entry
    seed: int
    folder: Path
    recipe: recipe.Recipe
    finished: bool
    had_base: bool  # before anything was started
    size: tuple[int, int] = (0, 0)  # of the images
    base_group: str = ""  # equal where the base steps are the same
    visits: list[int] = field(default_factory=list)  # images seen in training and finetuning, of each step
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)
    failure: str = ""  # why, where it failed

    @property
    def name(self) -> str:
        return f"{self.folder.parent.name}/{self.folder.name}"

    @property
    def log(self) -> Path:
        return self.folder.with_name(self.folder.name + ".log")

    @property
    def has_base(self) -> bool:
        return (self.folder / "checkpoints/step_0.pt").exists()

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def lines(self) -> list[dict[str, Any]]:
        """Of metrics.jsonl; the last one may be half written."""
        try:
            lines = (self.folder / "metrics.jsonl").read_text().splitlines(keepends=True)
            return [json.loads(line) for line in lines if line.endswith("\n")]
        except (OSError, ValueError):
            return []

    def done_visits(self) -> int:
        return sum(line["images"] for line in self.lines())

    def state(self) -> str:
        if self.finished:
            return "finished"
        lines = self.lines()
        return f"at step {lines[-1]['step']}" if lines else "missing"


class WorkList:
    """The runs behind some entries of a table, each once, and the command that trains each.

    preview: take the published shape of a data set whose files are not here, instead of raising UserError.
    """

    def __init__(
        self, entries: Sequence[Entry], seeds: Sequence[int], out: Path, data: str | None, preview: bool = False
    ) -> None:
        self.data = data
        self.jobs: list[Job] = []
        self.bases: dict[str, Path] = {}  # by base group, a run in `out` that had the base step before
        for seed in seeds:
            for entry in entries:
                folder = entry.folder(out, seed)
                if all(job.folder != folder for job in self.jobs):
                    loaded = entry.load(seed, data)
                    finished = tables.finished_run(folder, loaded) is not None
                    self.jobs.append(Job(entry, seed, folder, loaded, finished, had_base=False))
        if not self.missing:  # then the table can be written again without its images
            return
        datasets: dict[str, Dataset | None] = {}
        for job in self.jobs:
            key = str(job.recipe.data)
            if key not in datasets:
                datasets[key] = _dataset(job.recipe, preview)
            self._measure(job, datasets[key], out)

    def _measure(self, job: Job, dataset: Dataset | None, out: Path) -> None:
        """Fill in what depends on the images."""
        counts, job.size = _shape(job.recipe, dataset)
        protocol = build_protocol(job.recipe.protocol, len(counts))
        steps = summary.effective_steps(job.recipe, protocol, counts)
        job.visits = [step.visits + step.finetune_visits for step in steps]
        of_base = counts[protocol.steps[0]]
        own_loss = "" if len(set(of_base.tolist())) == 1 else base.SAME_WITHOUT_OLD[job.recipe.loss.loss]
        job.base_group = f"{base.base_identity(job.recipe)}{protocol.steps[0].tolist()}{own_loss}"
        job.had_base = job.has_base
        if job.base_group not in self.bases:
            for found in sorted(out.glob(f"*/*-s{job.seed}/checkpoints/step_0.pt")):
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
        """Whether it has a base step to train: the first of its group, unless one has it already."""
        first = next((j for j in self._group(job) if not j.finished and not j.failure), None)
        return job is first and not job.has_base and self.donor(job) is None

    def left(self, job: Job) -> int:
        """Image visits that this run still trains."""
        if job.finished:
            return 0
        shared = 0 if job.has_base or self.trains_base(job) else job.visits[0]
        return max(0, sum(job.visits) - shared - job.done_visits())

    def command(self, job: Job) -> list[str]:
        command = [sys.executable, "-m", "fastil.cli", "run", job.entry.recipe, *job.entry.overrides]
        command += [f"seed={job.seed}", "--out", str(job.folder)]
        command += ["--data", self.data] if self.data is not None else []
        donor = self.donor(job)
        command += ["--resume"] if job.folder.exists() else []
        command += ["--base", str(donor)] if donor is not None and not job.has_base else []
        return command

    def ready(self, job: Job) -> bool:
        """Not started, and not waiting for the base step of another run."""
        if job.process is not None or job.finished:
            return False
        waiting = not job.has_base and self.donor(job) is None
        return not (waiting and any(j.running for j in self._group(job)))

    def _group(self, job: Job) -> list[Job]:
        return [j for j in self.jobs if j.base_group == job.base_group]


def _dataset(loaded: recipe.Recipe, preview: bool) -> Dataset | None:
    """None where only its published shape is known, and needed."""
    try:
        return load_dataset(loaded.data)
    except UserError:
        if not preview or loaded.data.dataset not in PUBLISHED or loaded.data.data is not None:
            raise
        return None


def _shape(loaded: recipe.Recipe, dataset: Dataset | None) -> tuple[NDArray[np.int64], tuple[int, int]]:
    """Training images per class, and their height and width."""
    if dataset is not None:
        height, width = dataset.train.images.shape[1:3]
        return np.bincount(dataset.train.labels, minlength=len(dataset.class_names)), (height, width)
    shape = PUBLISHED[loaded.data.dataset]
    return np.full(shape.classes, shape.train_per_class), (shape.size, shape.size)


def _same_base(
    folder: Path, loaded: recipe.Recipe, protocol: Protocol, dataset: Dataset | None, counts: NDArray[np.int64]
) -> bool:
    """Whether `fastil run --base FOLDER` would take the base step of that directory."""
    try:
        if dataset is not None:
            base.check(folder, loaded, protocol, dataset, counts)
            return True
        return base.base_identity(recipe.read_effective(folder / "recipe.yaml")) == base.base_identity(loaded)
    except UserError:
        return False


class Scheduler:
    """Runs a work list, as many runs at once as there are cores (on a GPU one), and shows how far it is."""

    def __init__(self, work: WorkList, at_once: int) -> None:
        self.work, self.at_once = work, at_once
        self.interrupt = Interrupt()
        self.began = self.last_line = time.monotonic()
        self.total = sum(work.left(job) for job in work.jobs)
        self.bar = tqdm(total=self.total, unit="img", dynamic_ncols=True) if sys.stderr.isatty() else None

    def run(self) -> None:
        """Until nothing is left or a signal came; a run that fails does not stop the others."""
        with self.interrupt:
            try:
                while not self.interrupt.requested():
                    for job in self.work.jobs:
                        if self.running() < self.at_once and self.work.ready(job):
                            self.start(job)
                    self.collect()
                    if not self.running() and not any(self.work.ready(job) for job in self.work.jobs):
                        break
                    self.show()
                    time.sleep(POLL)
            finally:
                self.stop()
                if self.bar is not None:
                    self.bar.close()

    def running(self) -> int:
        return sum(job.running for job in self.work.jobs)

    def start(self, job: Job) -> None:
        environment = os.environ | ({"OMP_NUM_THREADS": "1"} if self.at_once > 1 else {})
        command = self.work.command(job)
        try:
            job.folder.parent.mkdir(parents=True, exist_ok=True)
            log = open(job.log, "ab")  # noqa: SIM115  (closed below)
        except OSError as error:
            raise UserError(f"{job.log}: cannot be written ({error.strerror}); choose another --out") from None
        with log:
            # A session of its own: Ctrl-C reaches this process, which passes it on once.
            job.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        self.say(f"{job.name}: {'goes on' if '--resume' in command else 'started'}")

    def collect(self) -> None:
        for job in self.work.missing:
            if job.process is None or job.failure or job.running:
                continue
            status = job.process.returncode
            job.finished = status == 0
            if job.finished:
                average = read_run(job.folder).results["average_incremental_accuracy"]
                self.say(f"{job.name}: average incremental accuracy {average:.2f}")
            elif not self.interrupt.requested():
                job.failure = f"killed by {signal.Signals(-status).name}" if status < 0 else last_line(job.log)
                self.say(f"{job.name}: failed: {job.failure}")

    def stop(self) -> None:
        """Let every run write its checkpoint."""
        running = [job.process for job in self.work.jobs if job.process is not None and job.running]
        for process in running:
            process.terminate()
        for process in running:
            process.wait()
        self.collect()

    def show(self) -> None:
        if self.bar is None and time.monotonic() - self.last_line < LINE_EVERY:
            return
        # A run that failed is neither done nor to be done.
        total = self.total - sum(self.work.left(job) for job in self.work.jobs if job.failure)
        left = sum(self.work.left(job) for job in self.work.jobs if not job.failure)
        done = max(0, total - left)
        finished = len(self.work.jobs) - len(self.work.missing)
        if self.bar is not None:
            self.bar.set_description(f"{finished} of {len(self.work.jobs)} runs")
            self.bar.total = total
            self.bar.update(done - self.bar.n)
        else:
            self.last_line = time.monotonic()
            rate = done / (time.monotonic() - self.began)
            hours = f", about {left / rate / 3600:.1f} h left" if done else ""
            self.say(
                f"{finished} of {len(self.work.jobs)} runs, {self.running()} running, "
                f"{100 * done / max(1, total):.0f} % of what was missing, {rate:,.0f} img/s{hours}"
            )

    def say(self, line: str) -> None:
        if self.bar is not None:
            self.bar.clear()
        print(line, flush=True)


def last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "no output"


def preview(work: WorkList) -> str:
    """The work list and what it costs, timed on this machine; trains nothing."""
    rows, hours = [], 0.0
    speeds: dict[str, tuple[float, float]] = {}
    at_once, threads = runs_at_once(work), torch.get_num_threads()
    torch.set_num_threads(1 if at_once > 1 else threads)  # as the runs will
    for job in work.jobs:
        cost, shared = 0.0, ""
        if not job.finished:
            key = f"{job.recipe.model}{job.recipe.train.batch_size}{job.size}"
            if key not in speeds:
                speeds[key] = planning.speeds(job.recipe, job.size)
            cost = _hours(work, job, *speeds[key])
            shared = "trains its own" if work.trains_base(job) else "" if job.has_base else "shared"
        hours += cost
        rows.append((job.name, job.state(), shared, f"{work.left(job):,}", f"{cost:.2f}"))
    torch.set_num_threads(threads)
    text = summary.format_table(("run", "state", "base step", "image visits left", "hours"), rows)
    total = sum(work.left(job) for job in work.jobs)
    at_once = max(1, min(at_once, len(work.missing)))
    return (
        f"{text}\n\n{len(work.missing)} of {len(work.jobs)} runs to train, {total:,} image visits: about "
        f"{hours / at_once:.2f} hours with {at_once} at once, {hours:.2f} one by one, timed now over a few steps"
    )


def _hours(work: WorkList, job: Job, plain: float, distilled: float) -> float:
    """What is left of a run, at so many images per second without and with a teacher."""
    left = work.left(job)
    of_base = min(left, max(0, job.visits[0] - job.done_visits())) if work.trains_base(job) else 0
    meta = planning.META_COST / job.recipe.meta.meta_every if job.recipe.loss.loss == "meta_balanced" else 0.0
    return (of_base / plain + (left - of_base) * (1 + meta) / distilled) / 3600


def runs_at_once(work: WorkList) -> int:
    """On a CPU a run per core, each with one thread: small networks gain less from a second thread than from that."""
    if any(pick_device(job.recipe.train.device).type == "cuda" for job in work.jobs):
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def reproduce(table: Table, entries: Sequence[Entry], seeds: int, out: Path, data: str | None) -> tuple[str, int]:
    """Train what is missing and write the table. Returns its text and an exit status."""
    work = WorkList(entries, range(seeds), out, data)
    scheduler = Scheduler(work, runs_at_once(work))
    if work.missing:
        scheduler.say(f"{len(work.missing)} of {len(work.jobs)} runs to train, {scheduler.at_once} at once, into {out}")
        scheduler.run()
    text = tables.write(table, out)
    failed = [job for job in work.jobs if job.failure]
    if failed:
        text += "\n" + "\n".join(f"failed: {job.folder} ({job.failure}; all of it: {job.log})" for job in failed)
    if scheduler.interrupt.number is not None:
        return text + "\n\nstopped; the same command goes on", 128 + scheduler.interrupt.number
    return text, 1 if failed else 0
