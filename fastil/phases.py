"""What the trainer is asked to do in a step: training, then maybe balanced finetuning."""

from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastil.methods import MetaAlpha, Method
from fastil.models import Network
from fastil.plan import EpochPlan, Key, Transform, cycled_plan, draw, training_plan
from fastil.recipe import Recipe
from fastil.trainer import BeforeUpdate, Phase

Ids = NDArray[np.int64]


class Phases:
    """Builds the phases of a run from its recipe. meta: where the classification loss is meta_balanced."""

    def __init__(
        self, recipe: Recipe, network: Network, method: Method, meta: MetaAlpha | None, transform: Transform, steps: int
    ) -> None:
        self.steps = steps
        self.recipe, self.network, self.method, self.meta, self.transform = recipe, network, method, meta, transform

    def training(self, step: int, ids: Ids, probabilities: NDArray[np.float64] | None, held_out: Ids) -> Phase:
        """ids: images to train on, exemplars included. probabilities: of the sampler. held_out: B_t, maybe empty."""
        config = self.recipe.train
        epochs = config.epochs_of(step)
        extra: dict[str, Any] = {}
        if self.meta is not None and step > 0:
            key = Key(config.seed, step, "meta")
            stream = partial(cycled_plan, held_out, key, self.transform, config.batch_size)
            extra["before_update"] = BeforeUpdate(self.recipe.meta.meta_every, stream, self.meta.before_update)
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
            backward=self.method.backward,
            weights=self.method.weights,
            teacher=step > 0,
            observed=partial(self.observed, step),
            **extra,
        )

    def observed(self, step: int) -> dict[str, Any]:
        """Beside the loss, for metrics.jsonl, once per epoch: the learned scale of a cosine head, Meta's alpha."""
        scale = getattr(self.network.head, "scale", None)
        shown = {} if scale is None else {"scale": float(scale.detach())}
        return shown if self.meta is None or step == 0 else shown | self.meta.observed()

    def training_epoch(self, step: int, ids: Ids, probabilities: NDArray[np.float64] | None, epoch: int) -> EpochPlan:
        key = Key(self.recipe.train.seed, step, "train", epoch)
        visited = ids if probabilities is None else draw(ids, probabilities, key)
        return training_plan(visited, key, self.transform, self.recipe.train.batch_size)

    def finetuning(self, step: int, ids: Ids) -> Phase:
        """ids: the same number of images of every class seen. No row of the head is frozen."""
        config, correction = self.recipe.train, self.recipe.correction

        def plan(epoch: int) -> EpochPlan:
            key = Key(config.seed, step, "correct", epoch)
            return training_plan(ids, key, self.transform, config.batch_size)

        return Phase(
            name="correct",
            step=step,
            parameters=correction.parameters(self.network),
            clamp=self.method.clamp,
            weight_decay=config.weight_decay,
            plan=plan,
            epochs=correction.finetune_epochs,
            schedule=correction.learning_rate,
            backward=self.method.backward,
            weights=self.method.weights,
            bn_mode=correction.finetune_bn,
        )

    def all(self, step: int) -> list[Phase]:
        """Of a step, without images: what a checkpoint needs to find its momentum."""
        nothing = np.empty(0, dtype=np.int64)
        phases = [self.training(step, nothing, None, nothing)]
        if self.recipe.correction.correction != "none":
            phases.append(self.finetuning(step, nothing))
        return phases
