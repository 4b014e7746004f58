"""The .pt files of a run directory: what they hold, and the one place that reads them.

step_K.pt: the network after a step. predictor_K.pt: what the step predicts with besides. last.pt: where `--resume` goes
on. state_K.pt: what of that a finished step needs besides step_K.pt, so that both together take the place of a last.pt
that is damaged.
"""

import hashlib
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import pydantic
import torch
from pydantic import JsonValue
from torch import Tensor

from fastil import files
from fastil.errors import UserError
from fastil.evaluation import Count, StepResult
from fastil.files import Damaged
from fastil.reporting.run_files import AGAIN, first_problem

FORMAT = 2  # of last.pt
Weights = dict[str, Tensor]


class Position(NamedTuple):
    """Where a checkpoint resumes: phase "train" or "correct", before that batch; "memory", with all that follows."""

    step: Count = 0
    phase: Literal["train", "correct", "memory"] = "train"
    epoch: Count = 0
    batch: Count = 0


class _State(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(frozen=True, arbitrary_types_allowed=True)


class Network(_State):
    """step_K.pt, whose content is the weights alone."""

    weights: Weights


class Predictor(_State):
    """predictor_K.pt: class means, or the state of the method's correction and the context that it was fitted in."""

    means: Tensor | None = None
    method: dict[str, Any] | None = None
    counts: Tensor | None = None  # older versions did not keep the context
    num_old: Count = 0
    num_seen: Count = 0

    @pydantic.model_validator(mode="after")
    def something(self) -> "Predictor":
        """Raise ValueError if it holds nothing."""
        if self.means is None and self.method is None:
            raise ValueError("neither means nor method")
        return self


class TrainerState(_State):
    """What the training loop goes on with. meter: empty between two epochs of a step."""

    student: Weights
    teacher: Weights
    meter: list[Tensor]
    clock: tuple[Count, float, float]
    momentum: dict[str, list[Tensor]]


class Checkpoint(_State):
    """last.pt, and without the trainer state_K.pt. ran: what of the machine can change the last digits of a result."""

    format: int
    metrics_bytes: Count
    position: Position
    weights_sha256: str | None = None  # of step_K.pt, in state_K.pt
    trainer: TrainerState | None = None
    meta: dict[str, Any]
    method: dict[str, Any]
    overlay: dict[str, Tensor]
    memory: dict[int, list[Count]]
    finetuning: list[Count]
    base_step_of: str | None
    ran: dict[str, JsonValue] = {}  # older versions did not keep it
    results: list[StepResult]
    seconds: dict[str, dict[str, float]]

    @pydantic.model_validator(mode="after")
    def counted(self) -> "Checkpoint":
        """Raise ValueError unless the results are those of the finished steps."""
        if [result.step for result in self.results] != list(range(self.position.step)):
            raise ValueError("results: not those of the steps before position")
        return self


State = TypeVar("State", bound=_State)


def read_weights(path: Path, device: torch.device, fix: str = AGAIN) -> Weights:
    """Return the weights in a step_K.pt. Raises UserError and Damaged as `files.load` does."""
    return _checked(path, Network, {"weights": files.load(path, device, fix)}, fix).weights


def read_predictor(path: Path, device: torch.device, fix: str = AGAIN) -> Predictor:
    """Return what is in a predictor_K.pt. Raises UserError and Damaged as `files.load` does."""
    return _checked(path, Predictor, files.load(path, device, fix), fix)


def read_checkpoint(path: Path, device: torch.device, fix: str) -> Checkpoint:
    """last.pt, or a state_K.pt with its step_K.pt."""
    content = files.load(path, device, fix)
    if content.get("format", FORMAT if "trainer" not in content else None) != FORMAT:
        raise UserError(f"{path}: written by another version of fastil; resume with that one, or choose another --out")
    state = _checked(path, Checkpoint, content, fix)
    if state.trainer is not None:
        return state
    weights = read_weights(weights_of(path), device, fix)
    if sha256_of(weights_of(path)) != state.weights_sha256 or path.stem != f"state_{state.position.step - 1}":
        raise Damaged(path, f"does not go with {weights_of(path).name}", fix)
    # A step begins with the network as its teacher.
    trainer = TrainerState(student=weights, teacher=weights, meter=[], clock=(0, 0.0, 0.0), momentum={})
    return state.model_copy(update={"trainer": trainer})


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, hex."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def weights_of(state: Path) -> Path:
    """The step_K.pt that a state_K.pt goes with."""
    return state.with_name(state.name.replace("state", "step"))


def _checked(path: Path, model: type[State], content: dict[Any, Any], fix: str) -> State:
    try:
        return model.model_validate(content)
    except pydantic.ValidationError as error:
        raise Damaged(path, f"damaged ({first_problem(error)})", fix) from None
