"""IL-Baseline and BalancedS-CE: rehearsal and distillation under the softmax or the Balanced Softmax (3.1, 3.2).

"L = rho L_d + (1 - rho) L_c" (eq. 1), "where rho is defined as N_t / N_{t+1} [...] the total number of classes". The
released BiC code weighs the two by the step number and leaves T^2 out; here both are the paper's.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fastil.data import Batch
from fastil.errors import UserError
from fastil.kernels import incremental_loss, incremental_loss_grad
from fastil.losses import balanced_cross_entropy, distillation
from fastil.methods.classification import ClassificationLoss, LossConfig, StepContext
from fastil.models import Output


@dataclass(frozen=True)
class MethodConfig:
    """The training procedure of an incremental step."""

    method: Literal["il_baseline"] = "il_baseline"
    temperature: float = 2.0  # of the distillation; section 4.1.3: "equal to 2"

    def __post_init__(self) -> None:
        if not 0 < self.temperature < float("inf"):
            raise UserError(f"temperature={self.temperature}: must be above 0 and finite")


class ILBaseline:
    """Holds the step's constants on the device, so that a step changes values and never shapes or code."""

    def __init__(self, config: MethodConfig, loss: LossConfig, width: int, device: torch.device) -> None:
        self.classification = ClassificationLoss(loss, width, device)
        self.ce_weight = torch.ones((), device=device)
        self.kd_weight = torch.zeros((), device=device)
        self.temperature = torch.full((), config.temperature, device=device)
        self.weights = (1.0, 0.0, 0.0)

    def begin_step(self, context: StepContext) -> None:
        """Set eq. 1's weights and the classification loss for the classes and counts of this step."""
        self.classification.begin_step(context)
        rho = context.num_old / context.num_seen
        self.weights = (1 - rho, rho, 0.0)
        self.ce_weight.fill_(1 - rho)
        self.kd_weight.fill_(rho)

    def loss(self, batch: Batch, out: Output, teacher_out: Output | None) -> Tensor:
        """Eq. 1 on a batch whose labels are incremental positions. Returns a scalar."""
        return incremental_loss(**self.arguments(batch, out, teacher_out))

    def backward(self, batch: Batch, out: Output, teacher_out: Output | None, meter: Tensor) -> None:
        """The backward pass of `loss`, begun with its gradient in the logits; no value is needed. meter: [R, 4]."""
        gradient = incremental_loss_grad(**self.arguments(batch, out, teacher_out), meter=meter)
        out.logits.backward(gradient)  # type: ignore[no-untyped-call]

    def formula(self, batch: Batch, out: Output, teacher_out: Output | None, log_prior: Tensor) -> Tensor:
        """`loss` of a balanced classification loss with this prior [W], as a plain formula: it can be differentiated
        twice, and in the prior."""
        loss = self.ce_weight * balanced_cross_entropy(out.logits, batch.labels, log_prior)
        if teacher_out is None:
            return loss
        num_old = self.classification.num_old
        return loss + self.kd_weight * distillation(out.logits, teacher_out.logits, num_old, self.temperature)

    def arguments(self, batch: Batch, out: Output, teacher_out: Output | None) -> dict[str, Any]:
        """Of the loss kernel."""
        own = {
            "logits": out.logits,
            "target": batch.labels,
            "teacher_logits": None if teacher_out is None else teacher_out.logits,
            "ce_weight": self.ce_weight,
            "kd_weight": self.kd_weight,
            "temperature": self.temperature,
        }
        return own | self.classification.arguments(batch.labels)
