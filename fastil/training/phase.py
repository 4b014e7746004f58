"""What the trainer is asked to do at a time."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from fastil.methods import Method
from fastil.methods.meta import UpdateContext
from fastil.plan import EpochPlan


class BeforeUpdate(NamedTuple):
    """A hook before every `every`-th update of a step, counted over its epochs (Meta BalancedS-CE)."""

    every: int
    plan: Callable[[int, int], EpochPlan]  # of held-out images: (first, count) of these calls, a batch for each
    run: Callable[[UpdateContext], None]


@dataclass(frozen=True)
class Phase:
    """One call of `fit`: what is trained, on what, how long, with which loss."""

    name: str  # "train" or "correct"; one optimiser state per name
    step: int
    parameters: list[nn.Parameter]
    plan: Callable[[int], EpochPlan]  # of an epoch
    epochs: int
    schedule: Callable[[int], float]  # learning rate of an epoch
    method: Method  # its loss
    trainable: dict[nn.Parameter, Tensor] = field(default_factory=dict)  # masks of parameters that move in part
    clamp: float | None = None  # the largest magnitude of an element of a gradient
    weight_decay: float | None = None  # default: the run's
    bn_mode: Literal["train", "frozen"] = "train"
    teacher: bool = True  # whether the loss needs the previous step's network
    before_update: BeforeUpdate | None = None
    observed: Callable[[], dict[str, Any]] = dict  # what else an epoch's line of metrics.jsonl holds
