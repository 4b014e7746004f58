"""iCaRL's released herding loop on Gram matrices: all picks of all classes in one launch, one class per program."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastil.kernels.jit.launching import launch, power_of_two


@triton.jit(do_not_specialize=["n", "m"])
def herd_classes(
    GRAM,  # [G, n, n] float64 (or float32)
    COUNTS,  # [G] int64
    PICKS,  # [G, m] int64
    n, m, tie,
    MAX_TURNS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Pick the exemplars of a class per program. The scores of all its images stay in registers; a turn reads one row
    of the Gram matrix.
    """
    group = tl.program_id(0).to(tl.int64)
    count = tl.minimum(tl.load(COUNTS + group).to(tl.int32), n)
    image = tl.arange(0, BLOCK)
    valid = image < count
    gram = GRAM + group * n * n
    mean = tl.zeros([BLOCK], GRAM.dtype.element_ty)
    for row in range(0, count):
        mean += tl.load(gram + row * n + image, mask=valid, other=0.0)
    mean = mean / tl.maximum(count, 1).to(GRAM.dtype.element_ty)
    score = tl.where(valid, mean, float("-inf"))
    picked = image < 0
    wanted = tl.minimum(count, m)
    found = 0
    turn = 0
    while (found < wanted) & (turn < MAX_TURNS + m):
        candidates = tl.where(picked & (turn >= MAX_TURNS), float("-inf"), score)
        best = tl.max(candidates, 0)
        # Scores this close are equal except for rounding; the lowest position is taken. (If all are NaN, the last one.)
        choice = tl.minimum(tl.min(tl.where(candidates >= best - tie, image, BLOCK), 0), count - 1)
        repeat = tl.max(tl.where((image == choice) & picked, 1, 0), 0)
        tl.store(PICKS + group * m + found, choice.to(tl.int64), mask=repeat == 0)
        picked = picked | (image == choice)
        found += 1 - repeat
        score += mean - tl.load(gram + choice * n + image, mask=valid, other=0.0)
        turn += 1
    rank = tl.arange(0, BLOCK_M)
    tl.store(PICKS + group * m + rank, tl.full([BLOCK_M], -1, tl.int64), mask=(rank >= found) & (rank < m))


def herd(gram: Tensor, counts: Tensor, m: int, max_turns: int, tie: float) -> Tensor:
    """Launch the kernel. Arguments and result as those of `fastil.kernels.herd.plain`."""
    groups, n, _ = gram.shape
    picks = torch.empty(groups, m, dtype=torch.int64, device=gram.device)
    block = power_of_two(max(n, 32))
    if m:
        launch(
            herd_classes,
            (groups,),
            gram.contiguous(),
            counts.contiguous(),
            picks,
            n,
            m,
            tie,
            num_warps=(warps := max(1, min(16, block // 128))),
            maxnreg=min(255, 2048 // warps),  # otherwise the assembler spills to make room for a second program
            MAX_TURNS=max_turns,
            BLOCK=block,
            BLOCK_M=power_of_two(m),
        )
    return picks
