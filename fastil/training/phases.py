"""What the trainer is asked to do in a step: training, then maybe balanced finetuning."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from fastil.data import Loader
from fastil.methods import MetaAlpha, Method
from fastil.methods.meta import UpdateContext
from fastil.models import Network
from fastil.plan import EpochPlan, Key, cycled_plan, draw, training_plan
from fastil.protocol import Ids
from fastil.recipe import Recipe


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


class Phases:
    """Builds the phases of a run from its recipe. meta: given if the classification loss is meta_balanced. loader: of
    training images. steps: their number in the run."""

    def __init__(
        self, recipe: Recipe, network: Network, method: Method, meta: MetaAlpha | None, loader: Loader, steps: int
    ) -> None:
        self.steps = steps
        self.recipe, self.network, self.method, self.meta, self.loader = recipe, network, method, meta, loader

    def training(self, step: int, ids: Ids, probabilities: NDArray[np.float64] | None, held_out: Ids) -> Phase:
        """Return the training phase of a step. ids: images to train on, exemplars included. probabilities: of the
        sampler, or None. held_out: B_t, maybe empty."""
        config = self.recipe.train
        epochs = config.epochs_of(step)
        extra: dict[str, Any] = {}
        if self.meta is not None and step > 0:
            key = Key(config.seed, step, "meta")
            held_out_plan = partial(
                cycled_plan, held_out, key, self.loader.transform, config.batch_size, sizes=self.loader.sizes
            )
            extra["before_update"] = BeforeUpdate(self.recipe.meta.meta_every, held_out_plan, self.meta.before_update)
        return Phase(
            name="train",
            step=step,
            parameters=self.method.parameters(self.network, step),
            trainable=self.method.trainable(self.network),
            clamp=self.method.clamp,
            weight_decay=self.method.weight_decay(config.weight_decay, step, self.steps),
            plan=partial(self.training_epoch, step, ids, probabilities),
            epochs=epochs,
            schedule=lambda epoch: config.learning_rate(epoch, epochs),
            method=self.method,
            teacher=step > 0 and self.method.uses_teacher,
            observed=partial(self.observed, step),
            **extra,
        )

    def observed(self, step: int) -> dict[str, Any]:
        """Return the method's part of an epoch's line of metrics.jsonl: the scale of a cosine head, Meta's alpha."""
        scale = getattr(self.network.head, "scale", None)
        shown = {} if scale is None else {"scale": float(scale.detach())}
        return shown if self.meta is None or step == 0 else shown | self.meta.observed()

    def training_epoch(self, step: int, ids: Ids, probabilities: NDArray[np.float64] | None, epoch: int) -> EpochPlan:
        """Return the plan of a training epoch."""
        key = Key(self.recipe.train.seed, step, "train", epoch)
        visited = ids if probabilities is None else draw(ids, probabilities, key)
        return self.plan(visited, key)

    def plan(self, ids: Ids, key: Key) -> EpochPlan:
        """Return a plan of augmented visits of `ids`, shuffled by the counter."""
        return training_plan(ids, key, self.loader.transform, self.recipe.train.batch_size, self.loader.sizes)

    def finetuning(self, step: int, ids: Ids) -> Phase:
        """Return the phase of balanced finetuning after a step. ids: the same number of images of every class seen. No
        row of the head is frozen."""
        config, correction = self.recipe.train, self.recipe.correction
        return Phase(
            name="correct",
            step=step,
            parameters=correction.parameters(self.network),
            clamp=self.method.clamp,
            weight_decay=config.weight_decay,
            plan=lambda epoch: self.plan(ids, Key(config.seed, step, "correct", epoch)),
            epochs=correction.finetune_epochs,
            schedule=correction.learning_rate,
            method=self.method,
            bn_mode=correction.finetune_bn,
            teacher=self.method.uses_teacher,
        )
