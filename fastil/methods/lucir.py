"""LUCIR (Hou et al., CVPR 2019): cosine head, less-forget constraint, margin ranking; its loss takes any prior.

"L = L_ce + lambda L_dis^G + L_mr" (LUCIR's eq. 9), lambda = lambda_base sqrt(N_old / N_new) (its eq. 7). Logits are not
distilled. Old rows of the head are frozen, new ones imprinted. PODNet's code has a LUCIR with other numbers: it ranks
against max(2, task size) classes instead of 2, weights by N_all / N_new, and trains the old rows.

Class-balanced finetuning is in LUCIR's ImageNet-1000 script only: `correction` in that recipe.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeFloat
from torch import Tensor

from fastil import ranks
from fastil.data import Batch
from fastil.methods.context import FeatureExtractor, StepContext
from fastil.methods.method import CROSS_ENTROPY, Method
from fastil.methods.registry import register
from fastil.models import Network, Output
from fastil.models.heads import CosineHead


@dataclass(frozen=True)
class LucirConfig:
    """method=lucir, and the parts of it that mnemonics and tpcil take."""

    lucir_lambda: NonNegativeFloat = 5.0  # lambda_base; CIFAR-100, its ImageNet scripts: 10
    lucir_margin: NonNegativeFloat = 0.5  # m of eq. 8
    lucir_rivals: Annotated[int, Field(ge=1, le=100)] = 2  # K of eq. 8
    lucir_ranking: NonNegativeFloat = 1.0  # weight of the margin ranking
    lucir_ranking_mean: Literal["old_images", "batch"] = "old_images"  # what it is averaged over; code: old_images


@register
class Lucir(Method):
    """Less-forget constraint and margin ranking on a cosine head with imprinted new rows."""

    name = "lucir"
    base_training = CROSS_ENTROPY
    Config: ClassVar[type | None] = LucirConfig
    heads = ("cosine",)
    freezes_old_rows = True  # "fix the old class embeddings": neither gradient nor decay moves them
    distils_logits = False

    def loss_weights(self, context: StepContext) -> tuple[float, float]:
        """Return 1 and 0: logits are not distilled."""
        return 1.0, 0.0

    @property
    def adaptive_lambda(self) -> float:
        """lambda of LUCIR's eq. 7, a float."""
        config: LucirConfig = self.configs["lucir"]
        return config.lucir_lambda * math.sqrt(self.context.num_old / self.context.num_new)

    @property
    def ranking_weight(self) -> float:
        """`lucir_ranking`."""
        config: LucirConfig = self.configs["lucir"]
        return config.lucir_ranking

    def ranking_arguments(self, batch: Batch) -> dict[str, Any]:
        """Return the arguments of LUCIR's eq. 8. The kernel takes the mean over the batch, the released code over the
        images of old classes in it."""
        config: LucirConfig = self.configs["lucir"]
        weight: float | Tensor = config.lucir_ranking
        if config.lucir_ranking_mean == "old_images":
            old = ranks.summed((batch.labels < self.classification.num_old).sum())
            weight = config.lucir_ranking * len(batch.labels) / batch.share / old.clamp(min=1)
        return {"margin_weight": weight, "margin": config.lucir_margin, "hardest": config.lucir_rivals}

    def extra_loss(self, batch: Batch, out: Output, teacher_out: Output | None, ops: Any) -> Tensor | None:
        """Return lambda times the less-forget constraint (LUCIR's eq. 6), 0-d."""
        if teacher_out is None:
            return None
        distance: Tensor = ops.less_forget(out.features, teacher_out.features)
        return self.adaptive_lambda * distance

    def open_classes(
        self, network: Network, start: int, stop: int, generator: torch.Generator, extractor: FeatureExtractor
    ) -> None:
        """Imprint the new rows: each gets the mean direction of its class under the network of the step before, at the
        mean length of the old rows. In the base step they are random.
        """
        if start == 0:
            super().open_classes(network, start, stop, generator, extractor)
            return
        means = [
            mean_direction(extractor.extract(extractor.ids_of_class(p), False).features) for p in range(start, stop)
        ]
        assert isinstance(network.head, CosineHead)
        network.head.imprint(start, torch.stack(means))


def mean_direction(features: Tensor) -> Tensor:
    """Return the mean of the normalised rows of features [n, d], normalised: [d]."""
    return F.normalize(F.normalize(features).mean(0), dim=0)
