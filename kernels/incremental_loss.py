"""Cross-entropy and distillation of an incremental step as one weighted sum (eq. 1)."""

from torch import Tensor

from fastil.losses import balanced_cross_entropy, distillation


def incremental_loss(
    logits: Tensor,
    target: Tensor,
    log_prior: Tensor,
    teacher_logits: Tensor | None = None,
    *,
    num_old: int | Tensor,
    ce_weight: float | Tensor,
    kd_weight: float | Tensor,
    temperature: float | Tensor,
) -> Tensor:
    """ce_weight * balanced cross-entropy + kd_weight * distillation (T^2 inside), means over the batch.

    logits, teacher_logits [B, W], target int64 [B] (-1 contributes no cross-entropy), log_prior [W] with -inf on classes
    not seen. num_old and both weights may be 0-d tensors on the device: a step then changes values, never shapes.
    Returns a scalar.
    """
    loss = ce_weight * balanced_cross_entropy(logits, target, log_prior)
    if teacher_logits is not None:
        loss = loss + kd_weight * distillation(logits, teacher_logits, num_old, temperature)
    return loss
