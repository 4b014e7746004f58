"""Herding from Gram matrices: all picks of many classes at once, on CUDA in one launch."""

from typing import Any

import torch
from torch import Tensor

from fastil.kernels.registration import jitted, register
from fastil.losses import check_integer, differentiable_in

TIE = 1e-9  # scores this close are equal: far above float64's rounding, far below the difference of two images
MAX_TURNS = 1000  # iCaRL's released loop then gives up on repeats
LARGEST = 4_096  # images of a class that a Triton program holds in registers; for more, the plain form runs on CUDA too


@differentiable_in()
def herd(gram: Tensor, counts: Tensor, m: int) -> Tensor:
    """Return the exemplars of G classes in the order that iCaRL's released loop picks them, int64 [G, m].

    gram: [G, n, n] inner products of the L2-normalised features of each class, padded to n. counts: int64 [G], images
    of each class. The result holds positions within the class, -1 beyond the class's count. Positions have no
    derivative: a gram that requires a gradient raises RuntimeError.

    The released loop starts with w = mu; each turn takes i = argmax w.D over all images, then w += mu - D_i; i counts
    as picked if it is new. With the Gram matrix, w.D_j = (t + 1) mu.D_j - sum of D_i.D_j over the turns so far, so a
    turn costs one row of the matrix. After 1000 turns the rest follow greedily among the images not yet picked. Ties go
    to the lowest position, and a smaller m is a prefix.
    """
    if gram.ndim != 3 or gram.shape[1] != gram.shape[2] or counts.shape != gram.shape[:1]:
        raise ValueError(f"gram must be [G, n, n] and counts [G], not {[*gram.shape]} and {[*counts.shape]}")
    if not gram.is_floating_point() or counts.is_floating_point():
        raise ValueError(f"gram must hold floats and counts integers, not {gram.dtype} and {counts.dtype}")
    check_integer("m", m)
    picks: Tensor = torch.ops.fastil.herd(gram, counts.to(gram.device), m, MAX_TURNS, TIE)
    return picks


def plain(gram: Tensor, counts: Tensor, m: int, max_turns: int, tie: float) -> Tensor:
    """Return the operator in plain torch, int64 [G, m]."""
    groups, n, _ = gram.shape
    device = gram.device
    valid = torch.arange(n, device=device) < counts[:, None]
    if not bool(valid.all()):
        gram = gram.masked_fill(~(valid[:, :, None] & valid[:, None, :]), 0)
    mean = gram.sum(dim=1) / counts.clamp(min=1)[:, None]  # mu.D_j
    wanted = counts.clamp(max=m)
    group = torch.arange(groups, device=device)
    score = mean.masked_fill(~valid, -torch.inf)
    picked = torch.zeros(groups, n, dtype=torch.bool, device=device)
    ranks = torch.full(
        (groups, m + 1), -1, dtype=torch.int64, device=device
    )  # the last column collects picks that are not kept
    found = torch.zeros(groups, dtype=torch.int64, device=device)
    for turn in range(max_turns + m):
        if bool((found >= wanted).all()):
            break
        candidates = score if turn < max_turns else score.masked_fill(picked, -torch.inf)
        # Equal images tie in exact arithmetic; rounding must not decide between them.
        best = candidates.amax(dim=1, keepdim=True)
        choice = (candidates >= best - tie).to(torch.uint8).argmax(dim=1)
        keep = ~picked[group, choice] & (found < wanted)
        ranks[group, torch.where(keep, found, m)] = choice
        picked[group, choice] |= keep
        found += keep
        score = score + mean - gram[group, choice]
    return ranks[:, :m].contiguous()


def _cuda(gram: Tensor, *rest: Any) -> Tensor:
    picks: Tensor = (jitted("herd", "herd") if gram.shape[1] <= LARGEST else plain)(gram, *rest)
    return picks


register(
    "herd(Tensor gram, Tensor counts, int m, int max_turns, float tie) -> Tensor",
    plain=plain,
    cuda=_cuda,
    fake=lambda gram, counts, m, *_: counts.new_empty(len(gram), m, dtype=torch.int64),
)
