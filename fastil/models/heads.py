"""Classifiers on top of the features, allocated once for all classes of the run."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def padded_width(num_classes: int) -> int:
    """W: the classes of the whole run, rounded up to a multiple of 8 so that rows of logits load wide."""
    return -(-num_classes // 8) * 8


class LinearHead(nn.Module):
    """weight [W, d] and bias [W]. Rows of classes not seen yet are 0: the masked loss gives them no gradient and decay
    leaves 0 at 0, so they stay so until `open_rows`."""

    def __init__(self, feature_dim: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width, feature_dim))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, features: Tensor) -> Tensor:
        return F.linear(features, self.weight, self.bias)

    @torch.no_grad()
    def open_rows(self, start: int, stop: int, generator: torch.Generator) -> None:
        """Initialise the rows of the classes at positions start to stop, uniform in +-1/sqrt(d) as nn.Linear does."""
        bound = 1 / math.sqrt(self.weight.shape[1])
        rows = stop - start
        self.weight[start:stop] = torch.empty(rows, self.weight.shape[1]).uniform_(-bound, bound, generator=generator)
        self.bias[start:stop] = torch.empty(rows).uniform_(-bound, bound, generator=generator)
