"""Label smoothing as a method of your own: the term that a paper adds to the loss goes into `extra_loss`.

fastil run digits method=examples/label_smoothing.py:Smoothed smoothing=0.1
"""

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from fastil.data import Batch
from fastil.methods import StepContext
from fastil.methods.il_baseline import ILBaseline
from fastil.models import Output
from fastil.settings import Share


@dataclass(frozen=True)
class Config:
    """The keys of a recipe that are this method's own."""

    smoothing: Share = 0.1  # of each target, spread evenly over the classes seen


class Smoothed(ILBaseline):
    """IL-Baseline with smoothed labels: (1 - smoothing) cross-entropy + smoothing x mean of -log p over the classes."""

    Config = Config
    losses = ("softmax", "balanced")  # the others have another softmax
    base_training = None  # it changes the base step too, so no other method may share that step

    def loss_weights(self, context: StepContext) -> tuple[float, float]:
        """Return the weights of cross-entropy and of distillation."""
        ce, kd = super().loss_weights(context)
        self.even_weight = self.config.smoothing * ce
        return ce - self.even_weight, kd

    def extra_loss(self, batch: Batch, out: Output, teacher_out: Output | None, ops: Any) -> Tensor:
        """Return the share of the targets that is spread evenly, 0-d."""
        seen = self.context.num_seen
        scores = (out.scaled_logits + self.classification.log_prior)[:, :seen].float()
        return -self.even_weight * F.log_softmax(scores, dim=1).mean()
