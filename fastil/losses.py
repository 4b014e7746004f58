"""Every loss as a plain formula in float32: the meaning of the kernels, and the path taken on the CPU.

Shapes: B images, W columns. W is the padded width of the whole run; columns of classes not seen yet are masked with
`where`, so whatever they hold (NaN included) never reaches a result or a gradient. Every mean divides by B.
Equations are those of "Balanced Softmax Cross-Entropy for Incremental Learning" (arXiv 2103.12532).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# A finite stand-in for -inf: exp(MASKED - max) is exactly 0 beside any real logit, and a row in which every column is
# masked (no old class yet) still has a finite logarithm, so that 0 * log p is 0 and not NaN.
MASKED = -1e30


def log_prior(counts: Tensor, num_old: int | Tensor = 0, alpha: float | Tensor = 1.0) -> Tensor:
    """Logarithm of the class weights lambda of eq. 5, up to a constant that no softmax sees.

    counts: [W], training images per class of this step, 0 for a class not seen. num_old: classes of earlier steps.
    alpha: scalar or [W], the weight of the old classes; 1 gives eq. 3. Returns float32 [W]: log(n / max n), plus log
    alpha on old columns, -inf where n = 0. Equal counts and alpha = 1 give exactly 0, which is the plain softmax.
    """
    counts = counts.to(torch.float32)
    prior = torch.log(counts / counts.max())
    is_old = torch.arange(counts.numel(), device=counts.device) < num_old
    log_alpha = torch.log(torch.as_tensor(alpha, dtype=torch.float32, device=counts.device))
    return torch.where(is_old & (counts > 0), prior + log_alpha, prior)


def balanced_cross_entropy(logits: Tensor, target: Tensor, log_prior: Tensor) -> Tensor:
    """Balanced Softmax cross-entropy, eq. 3 to 5: the mean over the batch of -log q_y, q = softmax(z + log lambda).

    logits [B, W], target int64 [B] (-1: the row contributes nothing), log_prior [W] as `log_prior` makes it. Returns a
    scalar.
    """
    seen = log_prior > -math.inf
    shifted = torch.where(seen, logits.float() + log_prior, MASKED)
    return F.cross_entropy(shifted, target, ignore_index=-1, reduction="sum") / logits.shape[0]


def distillation(logits: Tensor, teacher_logits: Tensor, num_old: int | Tensor, temperature: float | Tensor) -> Tensor:
    """Distillation over the old classes, eq. 2 with the mean over the batch: -T^2 sum_k p_teacher log p_student.

    logits, teacher_logits [B, W]; only the first num_old columns are read. num_old = 0 gives 0. The teacher gets no
    gradient. Returns a scalar.
    """
    old = torch.arange(logits.shape[1], device=logits.device) < num_old
    student = torch.log_softmax(torch.where(old, logits.float() / temperature, MASKED), dim=1)
    teacher = torch.softmax(torch.where(old, teacher_logits.detach().float() / temperature, MASKED), dim=1)
    terms = torch.where(old, teacher * student, 0.0)
    return -(temperature**2) * terms.sum() / logits.shape[0]
