"""The classification loss of a step: a part that goes with any method.

All but NCA are the cross-entropy of eq. 3, eq. 4 and eq. 5 with another prior, other weights per image or another block
of classes. So one kernel (`fastil.kernels.incremental_loss`) computes them all; they differ only in data on the device.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import PositiveFloat
from torch import Tensor

from fastil.errors import UserError
from fastil.losses import log_prior, nca
from fastil.methods.context import StepContext
from fastil.models import Output


@dataclass(frozen=True)
class LossConfig:
    """The choice of the classification loss.

    softmax: the plain cross-entropy. balanced: Balanced Softmax (eq. 3 to 5). meta_balanced: the same, with alpha
    learned in every step (Algorithm 1). separated: Separated Softmax, a softmax for the old classes and one for the new
    (SS-IL; section 4.3.3, Table 4). rescaled: softmax, with each image weighted "in inverse proportion to the number of
    samples" of its class (section 4.3.3). nca: PODNet's, over similarities.
    """

    loss: Literal["softmax", "balanced", "meta_balanced", "separated", "rescaled", "nca"] = "balanced"
    alpha: PositiveFloat = 1.0  # balanced: weight of the old classes (eq. 5); 1 is eq. 3 (4.1.3); varied in 4.3.2
    nca_variant: Literal["released", "paper"] = "released"  # nca: PODNet's code, in which its margin cancels, or eq. 8
    nca_margin: float = 0.6  # nca: of the paper's variant

    def __post_init__(self) -> None:
        if self.alpha != 1 and self.loss != "balanced":
            raise UserError(
                f"alpha={self.alpha}: only loss=balanced reads it"
                + ("; loss=meta_balanced learns its own" if self.loss == "meta_balanced" else "")
            )

    @property
    def balanced(self) -> bool:
        """Whether the loss is a Balanced Softmax."""
        return self.loss in ("balanced", "meta_balanced")


class ClassificationLoss:
    """The prior and the image weights of a step, on the device: a step changes values, never shapes or code.

    log_prior: [W], added to the logits. log_alpha: [W], its part log alpha (eq. 5), 0 on new classes.
    """

    def __init__(self, config: LossConfig, width: int, device: torch.device) -> None:
        self.config = config
        self.log_prior = torch.zeros(width, device=device)
        self.log_alpha = torch.zeros(width, device=device)
        self.prior_without_alpha = torch.zeros(width, device=device)
        self.is_old = torch.zeros(width, dtype=torch.bool, device=device)
        self.class_weight = torch.ones(width, device=device)
        self.num_old, self.num_seen = (torch.zeros((), dtype=torch.int64, device=device) for _ in range(2))

    def begin_step(self, context: StepContext) -> None:
        """Set prior and weights for the classes and counts of this step; alpha becomes the recipe's."""
        counts = torch.from_numpy(context.counts)
        self.num_old.fill_(context.num_old)
        self.num_seen.fill_(context.num_seen)
        self.is_old.copy_(torch.arange(len(counts)) < context.num_old)
        seen = torch.arange(len(counts)) < context.num_seen  # including old classes without exemplars
        self.prior_without_alpha.copy_(log_prior(counts if self.config.balanced else seen.long()))
        self.set_log_alpha(torch.full_like(self.log_alpha, math.log(self.config.alpha)))
        if self.config.loss == "rescaled":
            # N / (K n_y), so that the weights of the training images have mean 1. Equal counts give exactly 1.
            inverse = 1 / counts.double().clamp(min=1)
            self.class_weight.copy_(inverse * (counts.sum() / (counts > 0).sum()))

    def set_log_alpha(self, log_alpha: Tensor) -> None:
        """Set log alpha, [W] or 0-d, on the old classes (eq. 5); nothing waits for the device."""
        self.log_alpha.copy_(torch.where(self.is_old, log_alpha, 0.0))
        self.log_prior.copy_(self.prior_without_alpha + self.log_alpha)

    def unfused(self, out: Output, target: Tensor) -> Tensor | None:
        """Return the loss, 0-d, if the kernel does not compute it, else None. target: int64 [B], incremental
        positions.
        """
        if self.config.loss != "nca":
            return None
        scale = 1.0 if out.scale is None else out.scale
        return nca(out.logits, target, self.num_seen, scale, self.config.nca_margin, self.config.nca_variant)

    def kernel_arguments(self, target: Tensor) -> dict[str, Any]:
        """Return its arguments of `fastil.kernels.incremental_loss`. target: int64 [B], incremental positions."""
        rescaled = self.config.loss == "rescaled"
        return {
            "log_prior": self.log_prior,
            "sample_weight": self.class_weight[target] if rescaled else None,
            "separated": self.config.loss == "separated",
            "num_old": self.num_old,
            "num_seen": self.num_seen,
        }
