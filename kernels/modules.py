"""The losses as modules for your own training loop, in place of nn.CrossEntropyLoss."""

import torch
from torch import Tensor, nn

from fastil.kernels.incremental_loss import incremental_loss
from fastil.losses import log_prior


class BalancedSoftmaxLoss(nn.Module):
    """Balanced Softmax cross-entropy, eq. 3 to 5: the mean over a batch of -log softmax(z + log lambda)_y.

    counts: [W], training images of each class, 0 for a class not seen yet. num_old, alpha: the weight of the first
    num_old classes is multiplied by alpha (eq. 5); 1 is eq. 3. On a GPU one Triton kernel computes value and gradient.

    >>> criterion = BalancedSoftmaxLoss(torch.bincount(labels))
    >>> criterion(network(images), targets).backward()
    """

    log_prior: Tensor

    def __init__(self, counts: Tensor, alpha: float = 1.0, num_old: int = 0) -> None:
        super().__init__()
        counts = torch.as_tensor(counts)
        if counts.ndim != 1 or not bool((counts >= 0).all()) or not bool(counts.sum() > 0):
            raise ValueError("counts: give the number of training images of each class, [W], not all of them 0")
        if not 0 <= num_old <= len(counts) or not 0 < alpha < float("inf"):
            raise ValueError(f"num_old={num_old}, alpha={alpha}: num_old must be a number of classes, alpha above 0")
        self.num_old = num_old
        self.register_buffer("log_prior", log_prior(counts.detach(), num_old, alpha))

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return a float32 scalar, divided by B. logits: [B, W]; target: int64 [B], -1 for a row that adds nothing.
        Differentiable once, in logits."""
        return incremental_loss(
            logits, target, self.log_prior, num_old=self.num_old, num_seen=len(self.log_prior), ce_weight=1.0,
            kd_weight=0.0, temperature=1.0,
        )  # fmt: skip


class IncrementalLoss(BalancedSoftmaxLoss):
    """The loss of an incremental step, eq. 1: (1 - rho) cross-entropy + rho distillation of the old classes (eq. 2).

    rho: by default num_old over the classes seen, as in the paper. balanced: the Balanced Softmax of `counts`, or the
    plain softmax over the classes that have images.
    """

    def __init__(
        self,
        counts: Tensor,
        num_old: int,
        *,
        balanced: bool = True,
        alpha: float = 1.0,
        temperature: float = 2.0,
        rho: float | None = None,
    ) -> None:
        counts = torch.as_tensor(counts)
        if alpha != 1 and not balanced:
            raise ValueError(f"alpha={alpha}: the plain softmax has no weight of the old classes; leave balanced=True")
        super().__init__(counts if balanced else (counts > 0).long(), alpha, num_old)
        self.rho = num_old / int((counts > 0).sum()) if rho is None else rho
        if not 0 <= self.rho <= 1 or not 0 < temperature < float("inf"):
            raise ValueError(f"rho={self.rho}, temperature={temperature}: rho must lie in [0, 1], temperature above 0")
        self.temperature = temperature

    def forward(self, logits: Tensor, target: Tensor, teacher_logits: Tensor | None = None) -> Tensor:
        """Return a float32 scalar. teacher_logits: [B, W], of the network of the step before; None in the base step.
        Raises RuntimeError if they require a gradient, which they would not get."""
        if teacher_logits is not None and teacher_logits.requires_grad:
            raise RuntimeError("teacher_logits require a gradient: compute them under torch.no_grad()")
        rho = self.rho if teacher_logits is not None else 0.0
        return incremental_loss(
            logits, target, self.log_prior, teacher_logits, num_old=self.num_old, num_seen=len(self.log_prior),
            ce_weight=1 - rho, kd_weight=rho, temperature=self.temperature,
        )  # fmt: skip
