"""Cross-entropy and distillation of an incremental step as one weighted sum (eq. 1)."""

import torch
from torch import Tensor

from fastil.losses import balanced_cross_entropy, distillation


def incremental_loss(
    logits: Tensor,
    target: Tensor,
    log_prior: Tensor,
    teacher_logits: Tensor | None = None,
    *,
    num_old: int | Tensor,
    num_seen: int | Tensor,
    ce_weight: float | Tensor,
    kd_weight: float | Tensor,
    temperature: float | Tensor,
) -> Tensor:
    """ce_weight * balanced cross-entropy + kd_weight * distillation (T^2 inside), means over the batch.

    logits, teacher_logits [B, W], target int64 [B] (-1 contributes no cross-entropy), log_prior [W], -inf on classes
    without images; columns from num_seen on are ignored whatever it says. The counts and both weights may be 0-d
    tensors on the device: a step then changes values, never shapes. Returns a scalar.
    """
    seen = torch.arange(logits.shape[1], device=logits.device) < num_seen
    loss = ce_weight * balanced_cross_entropy(logits, target, torch.where(seen, log_prior, -torch.inf))
    if teacher_logits is not None:
        loss = loss + kd_weight * distillation(logits, teacher_logits, num_old, temperature)
    return loss
