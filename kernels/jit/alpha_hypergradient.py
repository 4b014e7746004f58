"""The contraction of Meta BalancedS-CE: rows of q (u - <q, u>), summed over the batch."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastil.kernels.jit.launching import LOG2E, launch, power_of_two, scalar, value_of
from fastil.kernels.jit.loss_parts import NONE, if_class, label_of

PROGRAMS = 64  # partial sums per class; each program adds up its rows in order, so the result is reproducible


@triton.jit(do_not_specialize=["NUM_OLD", "NUM_SEEN", "CE_WEIGHT", "batch"])
def alpha_hypergradient_rows(
    LOGITS,  # [B, W] float
    TANGENT,  # [B, W] float
    TARGET,  # [B] int
    LOG_PRIOR,  # [W] float
    NUM_OLD, NUM_SEEN, CE_WEIGHT,  # numbers, or pointers to []
    PARTIAL,  # [programs, W] float32
    batch, W: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program p adds up rows p, p + programs, ... of the batch."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    col = tl.arange(0, BLOCK)
    inside = col < W
    prior = tl.load(LOG_PRIOR + col, mask=inside, other=NONE).to(tl.float32)
    num_seen = value_of(NUM_SEEN, tl.int32)
    seen = (col < num_seen) & (prior != NONE)
    old = col < value_of(NUM_OLD, tl.int32)
    total = tl.zeros([BLOCK], tl.float32)
    for row in range(program, batch, programs):
        at = tl.cast(row, tl.int64) * W + col
        z = tl.load(LOGITS + at, mask=inside, other=0.0).to(tl.float32)
        u = tl.where(seen, tl.load(TANGENT + at, mask=inside, other=0.0).to(tl.float32), 0.0)
        top = tl.max(tl.where(seen, z + prior, NONE), 0)
        e = tl.where(seen, tl.exp2(((z - top) + prior) * LOG2E), 0.0)
        q = e / tl.sum(e, 0)
        h = q * (u - tl.sum(q * u, 0))
        total += if_class(label_of(TARGET, row, num_seen, W), h)
    total *= value_of(CE_WEIGHT, tl.float32) / batch
    tl.store(PARTIAL + program * W + col, tl.where(old, total, 0.0), mask=inside)


def alpha_hypergradient(
    logits: Tensor,
    tangent: Tensor,
    target: Tensor,
    log_prior: Tensor,
    num_old: float | Tensor,
    num_seen: float | Tensor,
    ce_weight: float | Tensor,
) -> Tensor:
    """Launch the kernel and one reduction. Arguments and result as those of
    `fastil.kernels.alpha_hypergradient.plain`.
    """
    batch, width = logits.shape
    block = power_of_two(max(width, 32))
    partial = torch.empty(min(batch, PROGRAMS), width, dtype=torch.float32, device=logits.device)
    launch(
        alpha_hypergradient_rows,
        (len(partial),),
        logits.contiguous(),
        tangent.contiguous(),
        target.contiguous(),
        log_prior.contiguous(),
        *(scalar(value, logits) for value in (num_old, num_seen, ce_weight)),
        partial,
        batch,
        num_warps=max(1, min(16, block // 256)),
        W=width,
        BLOCK=block,
    )
    return partial.sum(0)
