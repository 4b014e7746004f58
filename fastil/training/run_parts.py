"""What a checkpoint holds of a run, and how it is taken up again."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastil import ranks
from fastil.evaluation import StepResult
from fastil.files import Damaged
from fastil.methods import MetaAlpha, Method
from fastil.reporting.checkpoints import Checkpoint, Position, weights_of
from fastil.training.clock import Clock, versions
from fastil.training.run_directory import RunDirectory
from fastil.training.run_loaders import RunLoaders
from fastil.training.trainer import Trainer
from fastil.training.training_set import Rehearsal


@dataclass
class RunParts:
    """The parts of a run that change while it lasts. ran_before: the conditions before a resume."""

    num_steps: int
    trainer: Trainer
    meta: MetaAlpha | None
    method: Method
    rehearsal: Rehearsal
    loaders: RunLoaders
    clock: Clock
    results: list[StepResult] = field(default_factory=list)
    base_step_of: str | None = None
    ran_before: dict[str, Any] = field(default_factory=dict)

    def state_dict(self, position: Position) -> dict[str, Any]:
        """The content of last.pt, with which a run goes on at this position."""
        return {
            "position": list(position),
            "trainer": self.trainer.state_dict(),
            "meta": {} if self.meta is None else self.meta.state_dict(),
            "method": self.method.state_dict(),
            "overlay": self.loaders.pixels,
            **self.rehearsal.state_dict(),
            "base_step_of": self.base_step_of,
            "ran": self.conditions(),
            "results": [dataclasses.asdict(result) for result in self.results],
            "seconds": self.clock.state_dict(),
        }

    def conditions(self) -> dict[str, Any]:
        """What is no setting and can change the last digits of what a run computes."""
        device = self.trainer.device
        ran = versions(device)
        found = {"loader": self.loaders.train.name, "compiled": self.trainer.compiled, "ranks": ranks.count()}
        found |= {"device": ran["machine"]["device"], "torch": str(torch.__version__)}
        if device.type == "cpu":
            found |= {"threads": torch.get_num_threads(), "processor": ran["machine"]["processor"]}
        return found

    def resumed(self, directory: RunDirectory, device: torch.device, say: Callable[[str], None]) -> Checkpoint | None:
        """Take up the latest checkpoint that can be used, and return it; None where there is none. Raises Damaged where
        none can be used, and UserError where one cannot be read, which the user can mend."""
        problems: list[Damaged] = []
        for path in directory.checkpoints():
            try:
                state = directory.read(path, device)
                self.take_up(state, directory, path)
            except Damaged as error:
                problems.append(error)
                continue
            if path != directory.last:
                why = problems[0].found if problems else f"{directory.last}: missing"
                kept, step = directory.put_aside(), state.position.step
                again = "" if step == self.num_steps else ", and what came after it is trained again"
                say(f"{why}; going on from the end of step {step - 1}{again}{kept}")
            if not directory.metrics.exists():
                say(f"{directory.metrics}: missing; going on without the lines of earlier epochs")
            return state
        if problems:
            raise problems[0]
        return None

    def take_up(self, state: Checkpoint, directory: RunDirectory, path: Path) -> None:
        """Take up a checkpoint. Raises Damaged where it is of another run."""
        assert state.trainer is not None
        weights, fix = path if path == directory.last else weights_of(path), directory.advice()
        try:
            if state.position.step > self.num_steps:
                raise ValueError(f"it is at step {state.position.step} of {self.num_steps}")
            self.trainer.load_state_dict(state.trainer, weights, fix)
            if self.meta is not None:
                self.meta.load_state_dict(state.meta)
            self.method.load_state_dict(state.method)
            self.rehearsal.load_state_dict(state.memory, state.finetuning)
            self.loaders.overlay(state.overlay)
        except (Damaged, torch.OutOfMemoryError):
            raise
        except (KeyError, ValueError, TypeError, RuntimeError) as error:  # what a method makes of another one's state
            raise Damaged(path, f"of another run ({error})", fix) from error
        self.base_step_of, self.ran_before, self.results = state.base_step_of, state.ran, list(state.results)
        self.clock.load_state_dict(state.seconds)
