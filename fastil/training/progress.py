"""What a run shows while it trains: a bar on a terminal, plain lines elsewhere."""

import time
from collections.abc import Sequence

from fastil.text import Bar, estimate
from fastil.training.step_plan import StepWork

LINE_EVERY = {True: 10.0, False: 60.0}  # seconds between the lines of epochs, by whether there is a terminal
FEW = 10  # epochs of a phase that all stay on a terminal
RECENT = 10.0  # seconds of earlier steps that the speed is taken from, besides those of the step itself
LABELS = {"train": "", "correct": "finetuning, ", "memory": "exemplars", "evaluate": "evaluation"}  # by phase


class StepBar(Bar):
    """Shows how far a step and the run are, and the epochs.

    It counts work, in forward passes of an image (`StepWork`), so that the time left covers all phases.
    """

    def __init__(self) -> None:
        super().__init__()
        self.work: Sequence[StepWork] = ()  # of all steps, once it is known what they train
        self.step, self.phase = -1, ""
        self.at = self.first = 0.0  # work of the step that is done, and that was done when this process took it up
        self.began, self.before = 0.0, (0.0, 0.0)  # when that was, and work and seconds of earlier steps
        self.last_line = time.monotonic()

    def begin_phase(self, step: int, phase: str, epoch: int = 1, epochs: int = 0, done: int = 0) -> None:
        """A phase of a step begins, or goes on with an epoch after `done` images."""
        work = self.work[step]
        names = list(work.phases)
        before = sum(work.phases[name] for name in names[: names.index(phase)])
        earlier = self._recent() if step != self.step else self.before
        self.at = before + done * work.visit
        self.phase = f"step {step}, {LABELS[phase]}"
        label = self.phase + (f"epoch {epoch}/{epochs}" if epochs else "")
        if step != self.step:
            self.before, self.first, self.began, self.step = earlier, self.at, time.monotonic(), step
            self.begin(label, work.total, self.at, remark=self.left)
        elif self.bar is not None:
            self.bar.n = self.at
            self.bar.set_description_str(label)

    def advance(self, count: float) -> None:
        """So many images have been trained on."""
        work = count * self.work[self.step].visit
        self.at += work
        super().advance(work)

    def left(self) -> str:
        """Return the time that is left, of the step and of the run, as text; nothing before it can be known."""
        done, seconds = self._spent()
        if not done:
            return ""
        of_step = max(0.0, self.work[self.step].total - self.at) * seconds / done
        later = sum(work.total for work in self.work[self.step + 1 :]) * seconds / done
        run = f", run {estimate(of_step + later)}" if later else ""
        return f"step {estimate(of_step)}{run} left"

    def _spent(self) -> tuple[float, float]:
        """The work that the speed is taken from, and its seconds."""
        return self.before[0] + self.at - self.first, self.before[1] + time.monotonic() - self.began

    def _recent(self) -> tuple[float, float]:
        """The same as the next step takes it over, when this one is over."""
        if self.step >= 0:
            self.at = self.work[self.step].total
        done, seconds = self._spent()
        share = min(1.0, RECENT / max(seconds, RECENT)) if done else 0.0
        return done * share, seconds * share

    def epoch(self, line: str, epoch: int, epochs: int) -> None:
        """Show a finished epoch, as a line of its own now and then and for the last one of a phase."""
        last, terminal = epoch == epochs, self.bar is not None
        if last or (terminal and epochs <= FEW) or time.monotonic() - self.last_line > LINE_EVERY[terminal]:
            self.last_line = time.monotonic()
            self.say(f"  {line}" if terminal or last else f"  {line}  ({self.left()})")
        if self.bar is not None and not last:
            self.bar.set_description_str(f"{self.phase}epoch {epoch + 1}/{epochs}")


class NoBar(StepBar):
    """Shows nothing: in the processes of a run but the first."""

    def begin(self, *job: object, **more: object) -> None:
        """Begin nothing."""

    def say(self, line: str) -> None:
        """Say nothing."""
