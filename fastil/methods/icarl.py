"""iCaRL (Rebuffi et al., CVPR 2017), in the two forms that are called so.

`icarl`: the paper's row is "reported from" LUCIR, whose code trains softmax cross-entropy + KL distillation with a
weight of T^2 beta N_old on an elementwise mean, which is T^2 beta on the mean over the batch, and classifies by the
nearest mean of exemplars. Numbers called iCaRL since then are mostly this.

`icarl_bce`: as published: a sigmoid for each class, binary cross-entropy, the teacher's outputs the aims of old ones.

LUCIR's code mirrors exemplars for the class means along the colour channels instead of the width; here it is the width.
"""

from dataclasses import dataclass
from typing import Any

from pydantic import NonNegativeFloat
from torch import Tensor

from fastil.data import Batch
from fastil.losses import icarl_cross_entropy
from fastil.methods.classification_loss import StepContext
from fastil.methods.method import CROSS_ENTROPY, Method
from fastil.methods.registry import register
from fastil.models import Output


@dataclass(frozen=True)
class ICarlConfig:
    """method=icarl and method=mnemonics with the released loss."""

    icarl_beta: NonNegativeFloat = 0.25  # of the distillation, on top of T^2; LUCIR's script


@register
class ICarl(Method):
    """L = L_c + T^2 beta KL."""

    name = "icarl"
    base = CROSS_ENTROPY
    Config = ICarlConfig

    def weigh(self, context: StepContext) -> tuple[float, float]:
        return 1.0, self.parts["icarl"].icarl_beta if context.num_old else 0.0


@register
class ICarlBCE(Method):
    """Algorithm 3; the classification loss is part of it."""

    name = "icarl_bce"
    losses = ("softmax",)
    base = "icarl_bce"
    distils_logits = False

    def weigh(self, context: StepContext) -> tuple[float, float]:
        return 0.0, 0.0  # the kernel only counts hits

    def further(self, batch: Batch, out: Output, teacher_out: Output | None, forms: Any) -> Tensor:
        teacher = None if teacher_out is None else teacher_out.logits
        part = self.classification
        return icarl_cross_entropy(out.logits, batch.labels, teacher, part.num_old, part.num_seen, self.num_classes)
