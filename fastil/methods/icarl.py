"""iCaRL (Rebuffi et al., CVPR 2017), in the two forms that have this name.

`icarl`: the paper's row is "reported from" LUCIR. LUCIR's code trains softmax cross-entropy + KL distillation and
classifies by the nearest mean of exemplars. Its weight of T^2 beta N_old on a mean over all elements equals T^2 beta on
the mean over the batch. Most numbers called iCaRL since then come from this form.

`icarl_bce`: as published in 2017: a sigmoid for each class and binary cross-entropy, whose targets for old classes are
the teacher's outputs.

LUCIR's code mirrors exemplars for the class means along the colour channels instead of the width; here it is the width.
"""

from dataclasses import dataclass
from typing import Any

from pydantic import NonNegativeFloat
from torch import Tensor

from fastil.data import Batch
from fastil.losses import icarl_cross_entropy
from fastil.methods.context import StepContext
from fastil.methods.method import CROSS_ENTROPY, Method
from fastil.methods.registry import register
from fastil.models import Output


@dataclass(frozen=True)
class ICarlConfig:
    """method=icarl and method=mnemonics with the released loss."""

    icarl_beta: NonNegativeFloat = 0.25  # of the distillation, on top of T^2; LUCIR's script


@register
class ICarl(Method):
    """LUCIR's iCaRL: L = L_c + T^2 beta KL."""

    name = "icarl"
    base_training = CROSS_ENTROPY
    Config = ICarlConfig

    def loss_weights(self, context: StepContext) -> tuple[float, float]:
        """Return 1 and beta; the base step distils nothing."""
        return 1.0, self.configs["icarl"].icarl_beta if context.num_old else 0.0


@register
class ICarlBCE(Method):
    """iCaRL as published (its Algorithm 3); the classification loss is part of it."""

    name = "icarl_bce"
    losses = ("softmax",)
    base_training = "icarl_bce"
    distils_logits = False

    def loss_weights(self, context: StepContext) -> tuple[float, float]:
        """Return zeros: the kernel only counts hits."""
        return 0.0, 0.0

    def extra_loss(self, batch: Batch, out: Output, teacher_out: Output | None, ops: Any) -> Tensor:
        """Return the whole loss, 0-d."""
        teacher = None if teacher_out is None else teacher_out.logits
        num_old, num_seen = self.classification.num_old, self.classification.num_seen
        return icarl_cross_entropy(out.logits, batch.labels, teacher, num_old, num_seen, self.num_classes)
