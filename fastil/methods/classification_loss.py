"""The classification loss of a step: one part that any method takes.

Each of them is the cross-entropy of eq. 3 to 5 with another prior, weight per image or block of classes, so the kernel
of `fastil.kernels.incremental_loss` computes them all: what differs is data on the device.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import PositiveFloat
from torch import Tensor

from fastil.errors import UserError
from fastil.losses import log_prior, nca
from fastil.models import Output


@dataclass(frozen=True)
class StepContext:
    """What a method may know when a step, or a correction after it, begins."""

    step: int
    num_old: int  # classes of earlier steps
    num_seen: int  # with those of this one
    counts: NDArray[np.int64]  # [W] training images per incremental position, exemplars included

    @property
    def num_new(self) -> int:
        return self.num_seen - self.num_old


@dataclass(frozen=True)
class LossConfig:
    """Which cross-entropy.

    softmax: the plain one. balanced: Balanced Softmax (eq. 3 to 5). meta_balanced: the same, its alpha learned in every
    step (Algorithm 1). separated: old and new classes each in a softmax of their own (SS-IL; Table 4). rescaled:
    softmax, each image weighed "in inverse proportion to the number of samples" of its class (section 4.3.3). nca:
    PODNet's, over similarities.
    """

    loss: Literal["softmax", "balanced", "meta_balanced", "separated", "rescaled", "nca"] = "balanced"
    alpha: PositiveFloat = 1.0  # balanced: weight of the old classes (eq. 5); 4.1.3: 1, which is eq. 3; varied in 4.3.2
    nca_variant: Literal["released", "paper"] = "released"  # nca: PODNet's code, in which its margin cancels, or eq. 8
    nca_margin: float = 0.6  # nca: of the paper's variant

    def __post_init__(self) -> None:
        if self.alpha != 1 and self.loss != "balanced":
            raise UserError(
                f"alpha={self.alpha}: only loss=balanced reads it"
                + (", for loss=meta_balanced learns its own" if self.loss == "meta_balanced" else "")
            )

    @property
    def balanced(self) -> bool:
        return self.loss in ("balanced", "meta_balanced")


class ClassificationLoss:
    """Prior and image weights of the step, on the device: a step changes values, never shapes or code.

    log_prior: [W], as the loss wants it now. log_alpha: [W], weight of each class within it (eq. 5), 0 on new classes.
    """

    def __init__(self, config: LossConfig, width: int, device: torch.device) -> None:
        self.config = config
        self.log_prior = torch.zeros(width, device=device)
        self.log_alpha = torch.zeros(width, device=device)
        self.of_counts = torch.zeros(width, device=device)  # the prior without alpha
        self.is_old = torch.zeros(width, dtype=torch.bool, device=device)
        self.class_weight = torch.ones(width, device=device)
        self.num_old, self.num_seen = (torch.zeros((), dtype=torch.int64, device=device) for _ in range(2))

    def begin_step(self, context: StepContext) -> None:
        """Set prior and weights for the classes and counts of this step; alpha starts anew."""
        counts = torch.from_numpy(context.counts)
        self.num_old.fill_(context.num_old)
        self.num_seen.fill_(context.num_seen)
        self.is_old.copy_(torch.arange(len(counts)) < context.num_old)
        self.of_counts.copy_(log_prior(counts if self.config.balanced else (counts > 0).long()))
        self.set_log_alpha(torch.full_like(self.log_alpha, math.log(self.config.alpha)))
        if self.config.loss == "rescaled":
            # N / (K n_y): the weights of the training images have mean 1. Equal counts give exactly 1.
            inverse = 1 / counts.double().clamp(min=1)
            self.class_weight.copy_(inverse * (counts.sum() / (counts > 0).sum()))

    def set_log_alpha(self, log_alpha: Tensor) -> None:
        """Take log alpha, [W] or a scalar, on the old classes; nothing waits for the device."""
        self.log_alpha.copy_(torch.where(self.is_old, log_alpha, 0.0))
        self.log_prior.copy_(self.of_counts + self.log_alpha)

    def outside(self, out: Output, target: Tensor) -> Tensor | None:
        """The loss itself where the kernel does not have it, a scalar."""
        if self.config.loss != "nca":
            return None
        scale = 1.0 if out.scale is None else out.scale
        return nca(out.logits, target, self.num_seen, scale, self.config.nca_margin, self.config.nca_variant)

    def arguments(self, target: Tensor) -> dict[str, Any]:
        """Of `fastil.kernels.incremental_loss`, for a batch of incremental positions int64 [B]."""
        rescaled = self.config.loss == "rescaled"
        return {
            "log_prior": self.log_prior,
            "sample_weight": self.class_weight[target] if rescaled else None,
            "separated": self.config.loss == "separated",
            "num_old": self.num_old,
            "num_seen": self.num_seen,
        }
