"""`fastil reproduce` and `fastil sweep`: train what a table lacks, run by run, each in a process of its own, and write
the table.

Every run is `fastil run` with the row's overrides: killed and started again it goes on where its checkpoint is. Rows
that train the same base step take it from the first run of their group (fastil.training.base_step).
"""

import re
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from fastil import files, machine
from fastil.device import pick_device, precision_note
from fastil.errors import UserError
from fastil.reporting.runs import Run
from fastil.reproduce import gpus
from fastil.reproduce.table_text import write
from fastil.reproduce.tables import Entry, Table
from fastil.reproduce.worklist import Job, WorkList
from fastil.text import Bar, estimate
from fastil.training.interrupt import Interrupt

POLL = 1.0  # seconds
LINE_EVERY = 60.0  # seconds between lines of progress where there is no terminal
MOST_SEEDS = 1000  # of a row; a larger number is a seed that was meant


class Scheduler(Bar):
    """Runs a work list, several runs at once, and shows how far it is."""

    def __init__(self, work: WorkList, at_once: int) -> None:
        super().__init__()
        self.work, self.at_once = work, at_once
        self.elsewhere: set[Path] = set()  # runs that processes of an earlier command go on with
        self.interrupt = Interrupt()
        self.last_line = time.monotonic()
        self.total = sum(work.work_left(job) for job in work.jobs)

    def run(self) -> None:
        """Until nothing is left or a signal came; a run that fails does not stop the others."""
        with self.interrupt:
            self.begin(self.of_runs(), self.total, remark=self.left)
            try:
                while not self.interrupt.requested():
                    for job in self.work.jobs:
                        free = job.log in self.elsewhere or self.running() < self.at_once
                        if free and self.work.ready(job):
                            self.start(job)
                    self.collect()
                    if not self.running() and not any(self.work.ready(job) for job in self.work.jobs):
                        break
                    self.show()
                    time.sleep(POLL)
            finally:
                self.stop()
                self.end()

    def running(self) -> int:
        return sum(job.running for job in self.work.jobs) + len(self.elsewhere)

    def runs_on(self, gpu: str) -> int:
        return sum(job.gpu == gpu and job.running for job in self.work.jobs)

    def start(self, job: Job) -> None:
        device = pick_device(job.recipe.train.device)
        job.gpu = min(gpus.choice(device), key=self.runs_on, default=None)
        environment = gpus.environment() | ({"OMP_NUM_THREADS": "1"} if self.at_once > 1 else {})
        if job.gpu is not None and device.index is None:
            environment["CUDA_VISIBLE_DEVICES"] = job.gpu
        command = self.work.command(job)
        try:
            job.folder.parent.mkdir(parents=True, exist_ok=True)
            log = open(job.log, "ab")  # noqa: SIM115  (closed below)
        except OSError as error:
            raise UserError(f"{job.log}: cannot be written ({error.strerror}); choose another --out") from None
        with log:
            if not _claimed(log):
                if job.log not in self.elsewhere:
                    self.say(f"{job.name}: a process of an earlier command goes on with it; waiting for that")
                self.elsewhere.add(job.log)
                return
            self.elsewhere.discard(job.log)
            # A session of its own: Ctrl-C reaches this process, which passes it on once.
            job.started, job.work = time.monotonic(), self.work.work_left(job)
            job.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        where = "" if job.gpu is None else f" on {gpus.title(job.gpu)}"
        self.say(f"{job.name}: {'goes on' if '--resume' in command else 'started'}{where}")

    def collect(self) -> None:
        for job in self.work.missing:
            if job.process is None or job.failure or job.running:
                continue
            status = job.process.returncode
            job.seconds = time.monotonic() - job.started
            job.finished = status == 0
            if job.finished:
                try:
                    average = Run(job.folder).results.average_incremental_accuracy
                except UserError as error:  # the others go on
                    job.finished, job.failure = False, str(error)
                else:
                    self.say(f"{job.name}: average incremental accuracy {average:.2f}")
            elif not self.interrupt.requested():
                job.failure = f"killed by {signal.Signals(-status).name}" if status < 0 else last_line(job.log)
            if job.failure:
                self.say(f"{job.name}: failed: {job.failure}")

    def stop(self) -> None:
        """Let every run write its checkpoint."""
        running = [job.process for job in self.work.jobs if job.process is not None and job.running]
        for process in running:
            process.terminate()
        for process in running:
            process.wait()
        self.collect()

    def of_runs(self) -> str:
        """How many runs are finished."""
        return f"{len(self.work.jobs) - len(self.work.missing)} of {len(self.work.jobs)} runs"

    def show(self) -> None:
        """Bring the bar up to date, or say from time to time how far it is."""
        if self.bar is None and time.monotonic() - self.last_line < LINE_EVERY:
            return
        # A run that failed is neither done nor to be done.
        total = self.total - sum(self.work.work_left(job) for job in self.work.jobs if job.failure)
        left = sum(self.work.work_left(job) for job in self.work.jobs if not job.failure)
        done = max(0.0, total - left)
        if self.bar is not None:
            self.bar.set_description_str(self.of_runs(), refresh=False)
            self.bar.total, self.bar.n = total, done
            self.bar.refresh()
        else:
            self.last_line = time.monotonic()
            on = [f"{job.name} on {gpus.title(job.gpu)}" for job in self.work.jobs if job.running and job.gpu]
            where = f" ({', '.join(on)})" if on else ""
            percent, remaining = int(100 * done // max(1.0, total)), self.left()
            self.say(
                f"{self.of_runs()}, {self.running()} running{where}, {percent} % of what was missing"
                + (f", {remaining}" if remaining else "")
            )

    def left(self) -> str:
        """Return the time until all runs are done, as text; nothing before it can be known.

        The pace is that of whole runs, with what a process takes to start and to draw its figures, once one is done.
        """
        ended = [job for job in self.work.jobs if job.finished and job.seconds]
        begun = [job for job in self.work.jobs if job.running]
        work = sum(job.work for job in ended) or sum(job.work - self.work.work_left(job) for job in begun)
        if work <= 0:
            return ""
        seconds = sum(job.seconds for job in ended) or sum(time.monotonic() - job.started for job in begun)
        to_do = [self.work.work_left(job) * seconds / work for job in self.work.missing if not job.failure]
        if not to_do:
            return ""
        return f"{estimate(max(*to_do, sum(to_do) / min(self.at_once, len(to_do))))} left"


def _claimed(log: IO[bytes]) -> bool:
    """Hold the log of a run for its process, which inherits the lock with its output: where this command is killed, the
    run keeps it until it ends itself. False: the process of an earlier command has it."""
    try:
        return files.lock(log.fileno())
    except OSError:  # a file system without locks; the run directory has one of its own
        return True


def last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "no output"


def seeds_of(text: str) -> list[int]:
    """The seeds that --seeds names: "3" is 0, 1, 2; "0,2" these two; "2," seed 2 alone."""
    parts = text.removesuffix(",").split(",")
    if not all(re.fullmatch("[0-9]{1,10}", part) for part in parts):
        raise UserError(f"--seeds {text}: give a number of runs, such as 3, or the seeds with commas, such as 0,2")
    numbers = [int(part) for part in parts]
    if len(set(numbers)) < len(numbers):
        raise UserError(f"--seeds {text}: a seed stands there twice")
    if "," in text:
        return numbers
    if not 1 <= numbers[0] <= MOST_SEEDS:
        raise UserError(
            f"--seeds {text}: a number of runs must be at least 1 and at most {MOST_SEEDS}; one seed alone is "
            f'written "{numbers[0]},"'
        )
    return list(range(numbers[0]))


def usual_jobs(work: WorkList) -> int:
    """On a CPU a run per core, each with one thread: small networks gain less from a second thread than from that. On
    each GPU one run, or several that are launch-bound, as long as each has a core to launch from."""
    count = len(gpus.choice(work.device))
    if not count:
        return machine.cores()
    together = min(gpus.TOGETHER, machine.cores() // count)
    networks = {job.network: job for job in work.missing}
    if together > 1 and all(gpus.launch_bound(job.recipe, job.size) for job in networks.values()):
        return count * together
    return count


def precision_line(work: WorkList) -> str:
    """In what its runs compute, and why."""
    slow = precision_note(work.precision, work.device) if work.missing else None
    return f"precision: {work.precision} ({work.why})" + ("" if slow is None else f"\n{slow}")


def crowd(work: WorkList, at_once: int, usual: int) -> str:
    """The number of runs at once as text, with the GPUs, and with the usual number where it is smaller."""
    count = len(gpus.choice(work.device))
    where = f"{count} GPU{'s' if count > 1 else ''}"
    on_each = f"{usual // max(1, count)} run{'s' if usual > count else ''} on {'each' if count > 1 else 'it'}"
    if count and at_once == usual:
        return f"{where}, {on_each} at once"
    usually = f" ({usual} by default: {on_each if count else 'one per core'})"
    return f"{at_once} at once" + (f" on {where}" if count else "") + (usually if at_once > usual else "")


def reproduce(
    table: Table,
    entries: Sequence[Entry],
    seeds: Sequence[int],
    out: Path,
    data: str | None,
    jobs: int | None = None,
    precision: str = "auto",
) -> tuple[str, int]:
    """Train what is missing of some entries and write the table. jobs: runs at once. Returns its text and an exit
    status."""
    work = WorkList(entries, seeds, out, data, table=table, wanted=precision)
    remarks, status = complete(work, out, jobs)
    if status and len(work.missing) == len(work.jobs):  # a table without a number in it
        return remarks.strip(), status
    return write(table, out, entries) + remarks, status


def complete(work: WorkList, out: Path, jobs: int | None = None) -> tuple[str, int]:
    """Train what is missing of a work list into `out`, so many runs at once. Returns what to say of runs that failed or
    were stopped, for the end of a text, and an exit status."""
    usual = usual_jobs(work)
    scheduler = Scheduler(work, jobs or usual)
    if work.missing:
        missing = f"{len(work.missing)} of {len(work.jobs)} runs to train"
        scheduler.say(f"{missing}, {crowd(work, scheduler.at_once, usual)}, into {out}")
        scheduler.say(precision_line(work))
        scheduler.run()
    failed = [job for job in work.jobs if job.failure]
    remarks = "".join(f"\nfailed: {job.folder} ({job.failure}; all of it: {job.log})" for job in failed)
    if scheduler.interrupt.number is not None:
        finished = len(work.jobs) - len(work.missing)
        kept = f"{out}: {finished} of {len(work.jobs)} runs finished, the others are checkpointed"
        return f"{remarks}\n\n{kept}\nstopped; run the same command to go on", 128 + scheduler.interrupt.number
    return remarks, 1 if failed else 0
