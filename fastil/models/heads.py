"""Classifiers on top of the features, allocated once for all classes of the run."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastil.kernels import cosine_head


def padded_width(num_classes: int) -> int:
    """Return W: the classes of the whole run, rounded up to a multiple of 8 so that rows of logits load wide."""
    return -(-num_classes // 8) * 8


class LinearHead(nn.Module):
    """A linear classifier: weight [W, d] and bias [W]. Rows of classes not seen yet are 0 until `open_rows`: the masked
    loss gives them no gradient, and decay leaves 0 at 0."""

    def __init__(self, feature_dim: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width, feature_dim))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return logits [B, W], and no scale."""
        return F.linear(features, self.weight, self.bias), None

    @torch.no_grad()
    def open_rows(self, start: int, stop: int, generator: torch.Generator) -> None:
        """Initialise the rows of the classes at positions start to stop, uniform in +-1/sqrt(d) as nn.Linear does."""
        bound = 1 / math.sqrt(self.weight.shape[1])
        rows = stop - start
        self.weight[start:stop] = torch.empty(rows, self.weight.shape[1]).uniform_(-bound, bound, generator=generator)
        self.bias[start:stop] = torch.empty(rows).uniform_(-bound, bound, generator=generator)


class CosineHead(nn.Module):
    """Cosine similarity of features and proxies under a learned scale; no bias.

    proxies=None: LUCIR's head, one proxy per class, weight [W, d], logits are cosines. Otherwise PODNet's Local
    Similarity Classifier (arXiv 2004.13513, its eq. 6 and 7), weight [W, P, d]. Its code takes s' = 2 cos - 2 as the
    similarity, in the softmax over the proxies and after it; the -2 is the same for every class and is left out here.

    formula: compute with torch's differentiable functions, to allow a second or a forward-mode derivative.
    """

    formula = False
    factor: Tensor

    def __init__(self, feature_dim: int, width: int, proxies: int | None = None) -> None:
        super().__init__()
        shape = (width, feature_dim) if proxies is None else (width, proxies, feature_dim)
        self.weight = nn.Parameter(torch.zeros(shape))
        self.scale = nn.Parameter(torch.ones(()))  # sigma of LUCIR, eta of PODNet
        self.cosine_factor = 1.0 if proxies is None else 2.0
        self.register_buffer(
            "factor", torch.tensor(self.cosine_factor), persistent=False
        )  # created on the device, so nothing is sent

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return similarities [B, W], before the scale, and the scale, 0-d."""
        if not self.formula:
            return cosine_head(features, self.weight, self.factor, self.cosine_factor), self.scale
        cosines = F.normalize(features, dim=-1) @ F.normalize(self.weight, dim=-1).flatten(0, -2).T
        # Not len(features): it would fix their number in an export.
        s = cosines.reshape(features.shape[0], len(self.weight), cosines.shape[1] // len(self.weight))
        return self.cosine_factor * (torch.softmax(self.cosine_factor * s, 2) * s).sum(2), self.scale

    @torch.no_grad()
    def open_rows(self, start: int, stop: int, generator: torch.Generator) -> None:
        """Initialise the rows of the classes at positions start to stop: uniform in +-1/sqrt(d) (LUCIR), or, with
        several proxies, normal with the same spread of 1/sqrt(d) (PODNet)."""
        rows = torch.empty(stop - start, *self.weight.shape[1:])
        bound = 1 / math.sqrt(self.weight.shape[-1])
        if self.weight.ndim == 2:
            rows.uniform_(-bound, bound, generator=generator)
        else:
            rows.normal_(0, bound, generator=generator)
        self.weight[start:stop] = rows

    @torch.no_grad()
    def imprint(self, start: int, proxies: Tensor) -> None:
        """Set the rows from position `start` on to proxies, [n, d] or [n, P, d], times the mean length of the rows
        before them, as LUCIR's and PODNet's code do.
        """
        length = self.weight[:start].flatten(0, -2).norm(dim=1).mean()
        self.weight[start : start + len(proxies)] = proxies.to(self.weight) * length


Head = LinearHead | CosineHead
