"""A training step on a GPU: eager, compiled and captured, what it launches, how long the GPU is idle, and the ceiling.

The part of bench.train_step that needs a GPU. Rates are taken from the trainer's own loop, after the steps that compile
and capture. The ceiling is the captured step's kernels back to back: its graph replayed, and no loop around it.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from bench.gpu_timing import launches
from fastil.data import Inputs
from fastil.device import choosing_kernels
from fastil.plan import EpochPlan
from fastil.training.captured import WARM_UP, CapturedStep
from fastil.training.phases import Phase
from fastil.training.trainer import Trainer

MODES = ("eager", "eager, captured", "compiled", "compiled, captured")
SKIPPED = 2 * WARM_UP + 2  # steps of a turn before its clock starts: both capture and the queue have settled
STEPS = 200  # of a turn, timed
PROFILED = 20


class Kept(CapturedStep):
    """A captured step that can be got at afterwards."""

    last: "Kept | None" = None

    def __init__(self, step: Callable[[Inputs, int], None], *, capture: bool, failed: Callable[[str], None]) -> None:
        super().__init__(step, capture=capture and Kept.wanted, failed=failed)
        Kept.last = self

    wanted = True  # whether to capture


def idle_share(busy: Sequence[tuple[float, float]]) -> float:
    """Return the share of the time from the first start to the last end in which nothing runs, from the start and the
    end of everything that runs; these may overlap."""
    ordered = sorted(busy)
    covered, until = 0.0, ordered[0][0]
    for start, end in ordered:
        covered += max(0.0, end - max(start, until))
        until = max(until, end)
    whole = until - ordered[0][0]
    return 1 - covered / whole if whole else 0.0


class Steps:
    """The training steps of one trainer and phase, in each of MODES."""

    def __init__(self, trainer: Trainer, phase: Phase, batch_size: int) -> None:
        self.trainer, self.phase, self.batch_size = trainer, phase, batch_size
        self.compiled = trainer.fast_student, trainer.folded_teacher.fast
        self.clock, self.ticks = 0.0, 0
        trainer.tick = self.tick

    def tick(self, count: int) -> None:
        """Start the clock once the steps that prepare are over."""
        self.ticks += 1
        if self.ticks == SKIPPED:
            torch.cuda.synchronize()
            self.clock = time.perf_counter()

    def fit(self, mode: str, steps: int) -> None:
        """Train an epoch of so many steps."""
        plan = self.phase.plan(0)
        rows = np.arange(steps * self.batch_size) % len(plan.ids)
        longer: EpochPlan = dataclasses.replace(
            plan, ids=plan.ids[rows], boxes=plan.boxes[rows], flips=plan.flips[rows]
        )
        student, teacher = self.compiled
        eager = mode.startswith("eager")
        self.trainer.fast_student = self.trainer.student if eager else student
        self.trainer.folded_teacher.fast = self.trainer.folded_teacher.plain if eager else teacher
        Kept.wanted, self.ticks = mode.endswith("captured"), 0
        self.trainer.captures = True  # whatever became of another mode
        self.trainer.fit(dataclasses.replace(self.phase, plan=lambda epoch: longer))

    def rate(self, mode: str) -> float:
        """Return the images per second of the loop."""
        self.fit(mode, SKIPPED + STEPS)  # ends with the epoch's read, and so with the queue
        return self.batch_size * STEPS / (time.perf_counter() - self.clock)

    def ceiling(self) -> float | None:
        """Return the images per second of the captured step replayed, with nothing else; None where none could be
        captured. The network moves on."""
        self.fit("compiled, captured", SKIPPED)
        assert Kept.last is not None
        if self.batch_size not in Kept.last.graphs:
            return None
        graph = Kept.last.graphs[self.batch_size]
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(STEPS):
            graph.replay()
        torch.cuda.synchronize()
        return self.batch_size * STEPS / (time.perf_counter() - began)

    def launched(self, mode: str) -> float | None:
        """Return what the GPU runs in a step: kernels, copies and fills."""
        some, more = (launches(partial(self.fit, mode, SKIPPED + steps)) for steps in (0, PROFILED))
        return None if some is None or more is None else (more - some) / PROFILED

    def idle(self, mode: str) -> float | None:
        """Return the share of a step's time in which the GPU runs nothing, under the profiler, which slows the host."""
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            self.fit(mode, SKIPPED + 2 * PROFILED)
        ran = [
            (event.time_range.start, event.time_range.end)
            for event in profile.events()
            if event.device_type.name == "CUDA" and not event.is_user_annotation
        ]
        if not ran:
            return None
        end = max(stop for _, stop in ran)
        start = min(begin for begin, _ in ran)
        # The last of the steps: before them the host compiles and captures.
        late = [(a, b) for a, b in ran if a >= end - (end - start) * 0.25]
        return idle_share(late) if late else None


def measure(trainer: Trainer, phase: Phase, batch_size: int, rounds: int) -> dict[str, Any]:
    """Return rates, launches and idle share of each mode, and the ceiling. What fails says why in its place."""
    found: dict[str, Any] = {}
    with patch("fastil.training.trainer.CapturedStep", Kept), choosing_kernels(False, trainer.device):  # as in a run
        steps = Steps(trainer, phase, batch_size)
        for mode in MODES:
            try:
                rates = sorted(steps.rate(mode) for _ in range(rounds))
                figures: dict[str, Any] = {"images_per_second": rates, "median": rates[len(rates) // 2]}
                figures |= {"captured": bool(Kept.last and Kept.last.graphs)}
                figures |= {"launches_a_step": steps.launched(mode), "idle_share": steps.idle(mode)}
            except Exception as error:  # the other modes are measured all the same
                figures = {"failed": str(error).splitlines()[0] if str(error) else type(error).__name__}
            found[mode] = figures
            print(f"  {mode:<20}{describe(figures)}", flush=True)
        try:
            found["ceiling, images per second"] = steps.ceiling()
            print(f"  {'ceiling':<20}{found['ceiling, images per second'] or 0:10,.0f} img/s", flush=True)
        except Exception as error:
            found["ceiling, images per second"] = str(error)
    return found


def describe(figures: dict[str, Any]) -> str:
    """Return a line of figures."""
    if "failed" in figures:
        return f"failed: {figures['failed']}"
    launched, idle = figures["launches_a_step"], figures["idle_share"]
    parts = [f"{figures['median']:10,.0f} img/s"]
    parts += [] if launched is None else [f"{launched:.1f} launches a step"]
    parts += [] if idle is None else [f"GPU idle for {100 * idle:.0f} % (profiled)"]
    return ", ".join(parts)
