"""LUCIR (Hou et al., CVPR 2019): cosine head, less-forget constraint, margin ranking; its loss takes any prior.

"L = L_ce + lambda L_dis^G + L_mr" (eq. 9), lambda = lambda_base sqrt(N_old / N_new) (eq. 7). Logits are not distilled.
Old rows of the head are frozen, new ones imprinted. Rebuilt elsewhere with other numbers: PODNet's code ranks
against max(2, task size) classes instead of 2, weighs by N_all / N_new, and trains the old rows.

The class-balanced finetuning of LUCIR's code belongs to its ImageNet-1000 script alone: `correction` in that recipe.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeFloat
from torch import Tensor

from fastil.data import Batch
from fastil.methods.classification_loss import StepContext
from fastil.methods.method import CROSS_ENTROPY, Images, Method
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
    lucir_ranking_mean: Literal["old_images", "batch"] = "old_images"  # over what it is averaged; code: old_images


@register
class Lucir(Method):
    name = "lucir"
    base = CROSS_ENTROPY
    Config: ClassVar[type | None] = LucirConfig
    heads = ("cosine",)
    freezes_old_rows = True  # "fix the old class embeddings": neither gradient nor decay moves them
    distils_logits = False

    def weigh(self, context: StepContext) -> tuple[float, float]:
        return 1.0, 0.0

    @property
    def adaptive_lambda(self) -> float:
        """lambda of eq. 7."""
        config: LucirConfig = self.parts["lucir"]
        return config.lucir_lambda * math.sqrt(self.context.num_old / self.context.num_new)

    @property
    def ranking_weight(self) -> float:
        config: LucirConfig = self.parts["lucir"]
        return config.lucir_ranking

    def ranking(self, batch: Batch) -> dict[str, Any]:
        """Eq. 8. The kernel's mean is over the batch, the released code's over the images of old classes in it."""
        config: LucirConfig = self.parts["lucir"]
        weight: float | Tensor = config.lucir_ranking
        if config.lucir_ranking_mean == "old_images":
            old = (batch.labels < self.classification.num_old).sum()
            weight = config.lucir_ranking * len(batch.labels) / old.clamp(min=1)
        return {"margin_weight": weight, "margin": config.lucir_margin, "hardest": config.lucir_rivals}

    def further(self, batch: Batch, out: Output, teacher_out: Output | None, forms: Any) -> Tensor | None:
        """Eq. 6."""
        if teacher_out is None:
            return None
        distance: Tensor = forms.less_forget(out.features, teacher_out.features)
        return self.adaptive_lambda * distance

    def open_classes(self, network: Network, start: int, stop: int, generator: torch.Generator, images: Images) -> None:
        """New rows are the mean direction of their class under the network of the step before, as long as the old rows
        are on average; in the base step they are random."""
        if start == 0:
            network.head.open_rows(start, stop, generator)
            return
        means = [mean_direction(images.output(images.of_position(p), False).features) for p in range(start, stop)]
        assert isinstance(network.head, CosineHead)
        network.head.imprint(start, torch.stack(means))


def mean_direction(features: Tensor) -> Tensor:
    """[d], of length 1: the mean of the normalised rows of features [n, d], normalised."""
    return F.normalize(F.normalize(features).mean(0), dim=0)
