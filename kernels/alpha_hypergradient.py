"""The gradient of the meta objective of Meta BalancedS-CE in alpha (Algorithm 1), without an unrolled graph.

With theta* = theta - lr dL/dtheta and v = dL_val/dtheta* the chain rule gives dL_val/dalpha as -lr <v, d(dL/dtheta)/
dalpha>. Since alpha enters the loss only together with the logits, that is -lr times the contraction below of u = J v,
the derivative of the training batch's logits along v. It takes one forward-mode pass, is exact, and needs the memory of
an ordinary step.
"""

import torch
from torch import Tensor

from fastil.kernels.incremental_loss import check_loss_arguments
from fastil.kernels.registration import jitted, register, scalar_tensor
from fastil.losses import MASKED, check_scalar, differentiable_in, labels, wide

WIDEST = 8_192  # columns a Triton program holds in registers; wider rows take the plain form on CUDA too


@differentiable_in()
def alpha_hypergradient(
    logits: Tensor,
    tangent: Tensor,
    target: Tensor,
    log_prior: Tensor,
    *,
    num_old: int | Tensor,
    num_seen: int | Tensor,
    ce_weight: float | Tensor,
) -> Tensor:
    """Return the derivative of <tangent, dL/dlogits> in log alpha, float32 [W], where L is the weighted balanced
    cross-entropy.

    logits: [B, W] of the training batch at theta; tangent: [B, W], their derivative along v (float32, bfloat16 or
    float16; computed in float32). target: int [B], -1 or -100 for rows without cross-entropy; any other label that is
    not one of the num_seen classes makes the result NaN. log_prior: [W], with log alpha in it (eq. 5). Counts and
    ce_weight (1 - rho in eq. 1) are numbers or 0-d tensors.

    The result is ce_weight / B * sum over rows of q_k (u_k - <q, u>), q = softmax(z + log prior), for old classes, and
    0 for the others. With one alpha for all old classes dL_val/dalpha = -lr * result.sum() / alpha, with one per class
    -lr * result / alpha. Momentum does not enter (theta* is a plain step). It has no derivative: an argument that
    requires a gradient raises RuntimeError.
    """
    check_loss_arguments(logits, target, log_prior, tangent, num_old, num_seen, second="tangent")
    check_scalar("ce_weight", ce_weight)
    scalars = [scalar_tensor(v) for v in (num_old, num_seen, ce_weight)]
    result: Tensor = torch.ops.fastil.alpha_hypergradient(logits, tangent, target, log_prior, *scalars)
    return result


def plain(
    logits: Tensor,
    tangent: Tensor,
    target: Tensor,
    log_prior: Tensor,
    num_old: Tensor,
    num_seen: Tensor,
    ce_weight: Tensor,
) -> Tensor:
    """Return the operator in plain torch, float32 [W]."""
    column = torch.arange(logits.shape[1], device=logits.device)
    seen = (column < num_seen) & (log_prior != -torch.inf)
    q = torch.softmax(torch.where(seen, wide(logits) + log_prior, MASKED), 1)
    u = torch.where(seen, wide(tangent), 0)
    rows = q * (u - (q * u).sum(1, keepdim=True)) * labels(target, num_seen)[1][:, None]
    return torch.where(column < num_old, rows.sum(0), 0) * (ce_weight / max(1, logits.shape[0]))


def _cuda(logits: Tensor, *rest: Tensor) -> Tensor:
    narrow = logits.shape[1] <= WIDEST
    result: Tensor = (jitted("alpha_hypergradient", "alpha_hypergradient") if narrow else plain)(logits, *rest)
    return result


register(
    "alpha_hypergradient(Tensor logits, Tensor tangent, Tensor target, Tensor log_prior, Tensor num_old,"
    " Tensor num_seen, Tensor ce_weight) -> Tensor",
    plain=plain,
    cuda=_cuda,
    fake=lambda logits, *_: logits.new_empty(logits.shape[1], dtype=torch.float32),
)
