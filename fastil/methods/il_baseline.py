"""IL-Baseline and BalancedS-CE: rehearsal and distillation under the softmax or the Balanced Softmax (3.1, 3.2).

"L = rho L_d + (1 - rho) L_c" (eq. 1), "where rho is defined as N_t / N_{t+1} [...] the total number of classes". The
released BiC code weighs the two by the step number and leaves T^2 out; here both are the paper's.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastil.data import Batch
from fastil.errors import UserError
from fastil.kernels import incremental_loss
from fastil.losses import log_prior
from fastil.models import Output


@dataclass(frozen=True)
class ILBaselineConfig:
    """Loss of an incremental step."""

    method: Literal["il_baseline"] = "il_baseline"
    loss: Literal["softmax", "balanced"] = "balanced"  # classification loss: plain or Balanced Softmax cross-entropy
    alpha: float = 1.0  # balanced: weight of the old classes (eq. 5); section 4.1.3: 1, which is eq. 3
    temperature: float = 2.0  # of the distillation; section 4.1.3: "equal to 2"

    def __post_init__(self) -> None:
        for key in ("alpha", "temperature"):
            if not 0 < getattr(self, key) < float("inf"):
                raise UserError(f"{key}={getattr(self, key)}: must be above 0 and finite")


@dataclass(frozen=True)
class StepContext:
    """What a method may know when a step begins."""

    step: int
    num_old: int  # classes of earlier steps
    num_seen: int  # with those of this one
    counts: NDArray[np.int64]  # [W] training images per incremental position, exemplars included


class ILBaseline:
    """Holds the step's constants on the device, so that a step changes values and never shapes or code."""

    def __init__(self, config: ILBaselineConfig, width: int, device: torch.device) -> None:
        self.config = config
        self.log_prior = torch.zeros(width, device=device)
        self.num_old, self.num_seen = (torch.zeros((), dtype=torch.int64, device=device) for _ in range(2))
        self.ce_weight = torch.ones((), device=device)
        self.kd_weight = torch.zeros((), device=device)

    def begin_step(self, context: StepContext) -> None:
        """Set eq. 1's weights and eq. 3's prior for the classes and counts of this step."""
        counts = torch.from_numpy(context.counts)
        if self.config.loss == "softmax":
            self.log_prior.copy_(log_prior((counts > 0).long()))
        else:
            self.log_prior.copy_(log_prior(counts, context.num_old, self.config.alpha))
        rho = context.num_old / context.num_seen
        self.num_old.fill_(context.num_old)
        self.num_seen.fill_(context.num_seen)
        self.kd_weight.fill_(rho)
        self.ce_weight.fill_(1 - rho)

    def loss(self, batch: Batch, out: Output, teacher_out: Output | None) -> Tensor:
        """Eq. 1 on a batch whose labels are incremental positions. Returns a scalar."""
        return incremental_loss(
            out.logits,
            batch.labels,
            self.log_prior,
            None if teacher_out is None else teacher_out.logits,
            num_old=self.num_old,
            num_seen=self.num_seen,
            ce_weight=self.ce_weight,
            kd_weight=self.kd_weight,
            temperature=self.config.temperature,
        )
