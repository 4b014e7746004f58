"""`fastil reproduce --dry-run`: what a work list costs on this machine."""

import torch

from fastil.reproduce.scheduler import crowd, precision_line, usual_jobs
from fastil.reproduce.worklist import Job, WorkList
from fastil.text import duration, format_table
from fastil.training import speed
from fastil.training.estimate import meta_cost

Cost = tuple[float, float]  # seconds of the base step and of the rest of a run, by itself


def preview(work: WorkList, jobs: int | None = None) -> str:
    """The work list and what it costs, timed on this machine; trains nothing. jobs: runs at once."""
    usual = usual_jobs(work)
    at_once = jobs or usual
    timed = _timed(work, at_once)
    now = [_cost(work, job, timed[job.network].now) for job in work.missing]
    left = iter(map(sum, now))
    rows = [
        (job.name, job.state(), _base(work, job), f"{work.left(job):,}", "-" if job.finished else duration(next(left)))
        for job in work.jobs
    ]
    text = format_table(("run", "state", "base step", "image visits left", "time"), rows)
    lines = [f"{text}\n", f"{len(work.missing)} of {len(work.jobs)} runs to train", precision_line(work)]
    if work.missing:
        total, parallel = sum(work.left(job) for job in work.jobs), max(1, min(at_once, len(work.missing)))
        lines[1] += (
            f", {total:,} image visits: about {duration(makespan(work, now, parallel, usual))} with "
            f"{crowd(work, parallel, usual)}, {duration(sum(map(sum, now)))} one by one, timed now over a few steps"
        )
        slowed = [speeds.others for speeds in timed.values() if speeds.quiet is not None]
        if slowed:
            quiet = [_cost(work, job, timed[job.network].quiet or timed[job.network].now) for job in work.missing]
            lines.insert(2, speed.busy(max(slowed), duration(makespan(work, quiet, parallel, usual))))
    return "\n".join(lines)


def makespan(work: WorkList, costs: list[Cost], at_once: int, usual: int) -> float:
    """Seconds until all missing runs are trained, by going through them as the scheduler does: in their order, so many
    at once, those whose base step another run trains not before it is there. costs: of each of work.missing. More at
    once than usual are no faster together."""
    jobs = work.missing
    left = [[base, rest] if base else [rest] for base, rest in costs]
    waiting, running = list(range(len(jobs))), list[int]()
    clock, trained = 0.0, set[str]()
    while waiting or running:
        for i in list(waiting):
            if len(running) < at_once and (not work.waits(jobs[i]) or jobs[i].base_group in trained):
                waiting.remove(i)
                running.append(i)
        if not running:
            break
        passed = min(left[i][0] for i in running)  # until the next part of a run is done
        clock += passed * max(1.0, len(running) / usual)
        for i in list(running):
            left[i][0] -= passed
            if left[i][0] <= 1e-9:
                left[i].pop(0)
                trained.add(jobs[i].base_group)
            if not left[i]:
                running.remove(i)
    return clock


def _timed(work: WorkList, at_once: int) -> dict[str, speed.Speeds]:
    """Each network that is missing, timed with as many threads as a run will have."""
    threads = torch.get_num_threads()
    found: dict[str, speed.Speeds] = {}
    try:
        torch.set_num_threads(1 if at_once > 1 else threads)
        for job in work.missing:
            if job.network not in found:
                found[job.network] = speed.speeds(job.recipe, job.size)
    finally:
        torch.set_num_threads(threads)
    return found


def _base(work: WorkList, job: Job) -> str:
    """Where its base step comes from."""
    return "" if job.finished or job.has_base else "trains its own" if work.trains_base(job) else "shared"


def _cost(work: WorkList, job: Job, rates: speed.Rates) -> Cost:
    """What is left of a run, at so many images per second without and with a teacher."""
    left = work.left(job)
    of_base = min(left, max(0, job.visits[0] - job.done_visits())) if work.trains_base(job) else 0
    return of_base / rates.plain, (left - of_base) * (1 + meta_cost(job.recipe)) / rates.later(job.recipe)
