"""The losses as modules for your own training loop, in place of nn.CrossEntropyLoss."""

import torch
from torch import Tensor, nn

from fastil.kernels.incremental_loss import incremental_loss
from fastil.losses import check_classes, check_counts, check_scalar, differentiable_in, log_prior


class BalancedSoftmaxLoss(nn.Module):
    """Balanced Softmax cross-entropy, eq. 3 to 5: the mean over a batch of -log softmax(z + log lambda)_y.

    counts: [W], training images of each class, 0 for a class not seen yet. num_old, alpha: the weights of the first
    num_old classes are multiplied by alpha (eq. 5); alpha = 1 is eq. 3. On a GPU one Triton kernel computes value and
    gradient.

    A row labelled -1 or -100 adds nothing, and still counts in the mean, which divides by B. (nn.CrossEntropyLoss
    divides by the rows that have a class.) A label that is no class makes the loss NaN; a class with count 0 makes it
    infinite.

    Counts that are negative, not finite, all 0, bool or not [W], an alpha that is not above 0 and a num_old beyond W
    raise ValueError.

    >>> criterion = BalancedSoftmaxLoss(torch.bincount(labels))
    >>> criterion(network(images), targets).backward()
    """

    log_prior: Tensor

    @differentiable_in()
    def __init__(self, counts: Tensor, alpha: float = 1.0, num_old: int = 0) -> None:
        super().__init__()
        counts = _checked(counts, num_old)
        check_scalar("alpha", float(alpha), positive=True)
        self.num_old = num_old
        self.register_buffer("log_prior", log_prior(counts, num_old, alpha))

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return a float32 scalar. logits: [B, W]; target: int [B]. Differentiable once, in logits."""
        return self._loss(logits, target, None, 0.0, 1.0)

    def _loss(self, logits: Tensor, target: Tensor, teacher: Tensor | None, rho: float, temperature: float) -> Tensor:
        width = len(self.log_prior)
        if logits.shape[-1:] != (width,):
            raise ValueError(f"counts has {width} classes, logits are {[*logits.shape]}: both need the same W")
        return incremental_loss(
            logits, target, self.log_prior, teacher, num_old=self.num_old, num_seen=width, ce_weight=1 - rho,
            kd_weight=rho, temperature=temperature,
        )  # fmt: skip


class IncrementalLoss(BalancedSoftmaxLoss):
    """The loss of an incremental step, eq. 1: (1 - rho) cross-entropy + rho distillation of the old classes (eq. 2).

    rho: by default num_old over the classes seen, as in the paper. balanced: use the Balanced Softmax of `counts`, else
    the plain softmax over the classes that have images. Labels, means and errors are those of `BalancedSoftmaxLoss`.
    """

    @differentiable_in()
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
        counts = _checked(counts, num_old)
        if alpha != 1 and not balanced:
            raise ValueError(f"alpha={alpha}: the plain softmax has no weight of the old classes; leave balanced=True")
        super().__init__(counts if balanced else (counts > 0).long(), alpha, num_old)
        self.rho = num_old / int((counts > 0).sum()) if rho is None else rho
        if not 0 <= self.rho <= 1:
            raise ValueError(f"rho={self.rho}: must lie in [0, 1]")
        check_scalar("temperature", temperature, positive=True)
        self.temperature = temperature

    def forward(self, logits: Tensor, target: Tensor, teacher_logits: Tensor | None = None) -> Tensor:
        """Return a float32 scalar. teacher_logits: [B, W], from the network of the step before; None in the base step,
        which has no distillation. Raises RuntimeError if they require a gradient, because they would not get one.
        """
        rho = self.rho if teacher_logits is not None else 0.0
        return self._loss(logits, target, teacher_logits, rho, self.temperature)


def _checked(counts: Tensor, num_old: int) -> Tensor:
    """Return the counts as a tensor. Their values are checked here, once, on any device."""
    try:
        counts = torch.as_tensor(counts)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"counts must be [W], numbers of images of each class, not {counts!r}") from error
    check_counts(counts.cpu())
    check_classes(num_old, len(counts), len(counts))
    return counts
