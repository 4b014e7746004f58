"""`fastil reproduce`: train what a table lacks, run by run, each in a process of its own, and write the table.

Every run is `fastil run` with the row's overrides: killed and started again it goes on where its checkpoint is. Rows
that train the same base step take it from the first run of their group (fastil.base).
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from fastil import planning, recipe, summary, tables
from fastil.base import SAME_WITHOUT_OLD, base_identity
from fastil.data import Dataset, load_dataset
from fastil.data.sources import PUBLISHED
from fastil.device import pick_device
from fastil.errors import UserError
from fastil.protocol import build_protocol
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
    base_group: str  # equal where the base steps are the same
    visits: list[int]  # images seen in training and finetuning, of each step
    finished: bool
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)
    failed: bool = False

    @property
    def log(self) -> Path:
        return self.folder.with_name(self.folder.name + ".log")

    @property
    def has_base(self) -> bool:
        return (self.folder / "checkpoints/step_0.pt").exists()

    def done_visits(self) -> int:
        """Images of the epochs in metrics.jsonl."""
        try:
            lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        except OSError:
            return 0
        return sum(int(line.split('"images": ')[1].split(",")[0].rstrip("}")) for line in lines if '"images": ' in line)


class WorkList:
    """The runs behind some entries of a table, each once, and the command that trains each."""

    def __init__(self, entries: Sequence[Entry], seeds: Sequence[int], out: Path, data: str | None) -> None:
        self.data = data
        self.jobs: list[Job] = []
        self.recipes: dict[Path, recipe.Recipe] = {}
        self.sizes: dict[Path, tuple[int, int]] = {}  # of the images
        datasets: dict[str, Dataset | None] = {}
        for seed in seeds:
            for entry in entries:
                folder = entry.folder(out, seed)
                if any(job.folder == folder for job in self.jobs):
                    continue
                loaded = recipe.load(entry.recipe, [*entry.overrides, f"seed={seed}"], data=data)
                key = str(loaded.data)
                if key not in datasets:
                    datasets[key] = _dataset(loaded)
                counts, size = _shape(loaded, datasets[key])
                protocol = build_protocol(loaded.protocol, len(counts))
                steps = summary.effective_steps(loaded, protocol, counts)
                base = counts[protocol.steps[0]]
                own_loss = "" if len(set(base.tolist())) == 1 else SAME_WITHOUT_OLD[loaded.loss.loss]
                group = f"{base_identity(loaded)}{protocol.steps[0].tolist()}{own_loss}"
                visits = [step.visits + step.finetune_visits for step in steps]
                self.jobs.append(Job(entry, seed, folder, group, visits, tables.is_finished(folder)))
                self.recipes[folder] = loaded
                self.sizes[folder] = size

    @property
    def missing(self) -> list[Job]:
        return [job for job in self.jobs if not job.finished]

    def donor(self, job: Job) -> Job | None:
        """A run whose base step this one can take."""
        return next((j for j in self.jobs if j is not job and j.base_group == job.base_group and j.has_base), None)

    def trains_base(self, job: Job) -> bool:
        """Whether it has a base step to train: the first of its group, unless one has it already."""
        first = next((j for j in self._group(job) if not j.finished), None)
        return job is first and not job.has_base and self.donor(job) is None

    def left(self, job: Job) -> int:
        """Image visits that this run still trains."""
        shared = 0 if job.has_base or self.trains_base(job) else job.visits[0]
        return max(0, sum(job.visits) - shared - job.done_visits())

    def command(self, job: Job) -> list[str]:
        command = [sys.executable, "-m", "fastil.cli", "run", job.entry.recipe, *job.entry.overrides]
        command += [f"seed={job.seed}", "--out", str(job.folder)]
        command += ["--data", self.data] if self.data is not None else []
        donor = self.donor(job)
        command += ["--resume"] if job.folder.exists() else []
        command += ["--base", str(donor.folder)] if donor is not None and not job.has_base else []
        return command

    def ready(self, job: Job) -> bool:
        """Not started, and not waiting for the base step of another run."""
        if job.process is not None or job.finished:
            return False
        waiting = not job.has_base and self.donor(job) is None
        busy = any(j.process is not None and j.process.poll() is None for j in self._group(job))
        return not (waiting and busy)

    def _group(self, job: Job) -> list[Job]:
        return [j for j in self.jobs if j.base_group == job.base_group]


def _dataset(loaded: recipe.Recipe) -> Dataset | None:
    """None where only its published shape is known."""
    try:
        return load_dataset(loaded.data)
    except UserError:
        if loaded.data.dataset not in PUBLISHED or loaded.data.data is not None:
            raise
        return None


def _shape(loaded: recipe.Recipe, dataset: Dataset | None) -> tuple[NDArray[np.int64], tuple[int, int]]:
    """Training images per class, and their height and width."""
    if dataset is not None:
        height, width = dataset.train.images.shape[1:3]
        return np.bincount(dataset.train.labels, minlength=len(dataset.class_names)), (height, width)
    shape = PUBLISHED[loaded.data.dataset]
    return np.full(shape.classes, shape.train_per_class), (shape.size, shape.size)


class Scheduler:
    """Runs a work list, as many runs at once as there are cores (on a GPU one), and shows how far it is."""

    def __init__(self, work: WorkList, at_once: int) -> None:
        self.work, self.at_once = work, at_once
        self.signal = 0
        self.began = time.monotonic()
        self.total = sum(work.left(job) for job in work.missing)
        self.bar = tqdm(total=self.total, unit="img", dynamic_ncols=True) if sys.stderr.isatty() else None
        self.last_line = -LINE_EVERY

    def run(self) -> None:
        """Until nothing is left or a signal came; a run that fails does not stop the others."""
        handlers = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            while not self.signal:
                running = [j for j in self.work.jobs if j.process is not None and j.process.poll() is None]
                for job in self.work.jobs:
                    if len(running) < self.at_once and self.work.ready(job):
                        self.start(job)
                        running.append(job)
                self.collect()
                if not running:
                    break
                self.show(len(running))
                time.sleep(POLL)
            self.stop()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            if self.bar is not None:
                self.bar.close()

    def start(self, job: Job) -> None:
        job.folder.parent.mkdir(parents=True, exist_ok=True)
        environment = os.environ | ({"OMP_NUM_THREADS": "1"} if self.at_once > 1 else {})
        command = self.work.command(job)
        with open(job.log, "ab") as log:
            # A session of its own: Ctrl-C reaches this process, which passes it on once.
            job.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        self.say(f"{job.folder.parent.name}/{job.folder.name}: {'goes on' if '--resume' in command else 'started'}")

    def collect(self) -> None:
        for job in self.work.missing:
            if job.process is None or job.failed or job.process.poll() is None:
                continue
            job.finished = job.process.returncode == 0
            job.failed = not job.finished and not self.signal
            name = f"{job.folder.parent.name}/{job.folder.name}"
            if job.finished:
                average = read_run(job.folder).results["average_incremental_accuracy"]
                self.say(f"{name}: average incremental accuracy {average:.2f}")
            elif job.failed:
                self.say(f"{name}: failed: {last_line(job.log)}")

    def stop(self) -> None:
        """Let every run write its checkpoint."""
        running = [j.process for j in self.work.jobs if j.process is not None and j.process.poll() is None]
        for process in running:
            process.terminate()
        for process in running:
            process.wait()
        self.collect()

    def show(self, running: int) -> None:
        left = sum(self.work.left(job) for job in self.work.missing if not job.failed)
        done = max(0, self.total - left)
        finished = len(self.work.jobs) - len(self.work.missing)
        if self.bar is not None:
            self.bar.set_description(f"{finished} of {len(self.work.jobs)} runs")
            self.bar.update(done - self.bar.n)
        elif time.monotonic() - self.last_line > LINE_EVERY:
            self.last_line = time.monotonic()
            rate = done / (time.monotonic() - self.began)
            hours = f", about {left / rate / 3600:.1f} h left" if done else ""
            percent = 100 * done / max(1, self.total)
            self.say(
                f"{finished} of {len(self.work.jobs)} runs, {running} running, {percent:.0f} % of what was missing, "
                f"{rate:,.0f} img/s{hours}"
            )

    def say(self, line: str) -> None:
        if self.bar is not None:
            self.bar.clear()
        print(line, flush=True)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number


def last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "no output"


def preview(work: WorkList) -> str:
    """The work list and what it costs, timed on this machine; trains nothing."""
    rows, hours = [], 0.0
    speeds: dict[str, tuple[float, float]] = {}
    at_once = runs_at_once(work)
    for job in work.jobs:
        loaded, left = work.recipes[job.folder], work.left(job)
        key = f"{loaded.model}{loaded.train.batch_size}"
        if key not in speeds and not job.finished:
            speeds[key] = planning.speeds(loaded, work.sizes[job.folder])
        cost = 0.0 if job.finished else left / speeds[key][1] / 3600
        hours += cost
        state = "finished" if job.finished else "missing"
        if not job.finished and job.folder.exists():
            state = "begun"
        base = "trains its own" if work.trains_base(job) else "" if job.finished or job.has_base else "shared"
        name = f"{job.folder.parent.name}/{job.folder.name}"
        rows.append((name, state, base, f"{0 if job.finished else left:,}", f"{cost:.2f}"))
    text = summary.format_table(("run", "state", "base step", "image visits left", "hours"), rows)
    return (
        f"{text}\n\n{len(work.missing)} of {len(work.jobs)} runs to train: about {hours:.1f} hours one by one, "
        f"timed now over a few steps; here {at_once} run at once"
    )


def runs_at_once(work: WorkList) -> int:
    """On a CPU a run per core, each with one thread: small networks gain less from a second thread than from that."""
    devices = {pick_device(loaded.train.device).type for loaded in work.recipes.values()}
    return 1 if "cuda" in devices else max(1, len(os.sched_getaffinity(0)))


def reproduce(table: Table, entries: Sequence[Entry], seeds: int, out: Path, data: str | None) -> tuple[str, int]:
    """Train what is missing and write the table. Returns its text and an exit status."""
    work = WorkList(entries, range(seeds), out, data)
    scheduler = Scheduler(work, runs_at_once(work))
    if work.missing:
        print(
            f"{len(work.missing)} of {len(work.jobs)} runs to train, {scheduler.at_once} at once, into {out}",
            flush=True,
        )
        scheduler.run()
    text = tables.write(table, out)
    failed = [job for job in work.jobs if job.failed]
    if failed:
        text += "\n" + "\n".join(f"failed: {job.folder} ({last_line(job.log)}; all of it: {job.log})" for job in failed)
    if scheduler.signal:
        return text + "\n\nstopped; the same command goes on", 128 + scheduler.signal
    return text, 1 if failed else 0
