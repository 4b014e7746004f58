"""IL-Baseline and BalancedS-CE: rehearsal and distillation under the softmax or the Balanced Softmax (3.1, 3.2).

"L = rho L_d + (1 - rho) L_c" (eq. 1), "where rho is defined as N_t / N_{t+1} [...] the total number of classes". The
released BiC code weighs the two by the step number and leaves T^2 out; here both are the paper's.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastil.data import Batch
from fastil.errors import UserError
from fastil.kernels import incremental_loss, incremental_loss_grad
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
        self.scalars = {
            "num_old": torch.zeros((), dtype=torch.int64, device=device),
            "num_seen": torch.zeros((), dtype=torch.int64, device=device),
            "ce_weight": torch.ones((), device=device),
            "kd_weight": torch.zeros((), device=device),
            "temperature": torch.full((), config.temperature, device=device),
        }
        self.weights = (1.0, 0.0, 0.0)

    def begin_step(self, context: StepContext) -> None:
        """Set eq. 1's weights and eq. 3's prior for the classes and counts of this step."""
        counts = torch.from_numpy(context.counts)
        if self.config.loss == "softmax":
            self.log_prior.copy_(log_prior((counts > 0).long()))
        else:
            self.log_prior.copy_(log_prior(counts, context.num_old, self.config.alpha))
        rho = context.num_old / context.num_seen
        self.weights = (1 - rho, rho, 0.0)
        for name, value in zip(self.scalars, (context.num_old, context.num_seen, 1 - rho, rho), strict=False):
            self.scalars[name].fill_(value)

    def loss(self, batch: Batch, out: Output, teacher_out: Output | None) -> Tensor:
        """Eq. 1 on a batch whose labels are incremental positions. Returns a scalar."""
        return incremental_loss(**self.arguments(batch, out, teacher_out))

    def backward(self, batch: Batch, out: Output, teacher_out: Output | None, meter: Tensor) -> None:
        """The backward pass of `loss`, begun with its gradient in the logits; no value is needed. meter: [R, 4]."""
        gradient = incremental_loss_grad(**self.arguments(batch, out, teacher_out), meter=meter)
        out.logits.backward(gradient)  # type: ignore[no-untyped-call]

    def arguments(self, batch: Batch, out: Output, teacher_out: Output | None) -> dict[str, Any]:
        """Of the loss kernel."""
        teacher = None if teacher_out is None else teacher_out.logits
        tensors = {"logits": out.logits, "target": batch.labels, "log_prior": self.log_prior, "teacher_logits": teacher}
        return tensors | self.scalars
