"""The contestants of `bench.kernels`: the incremental loss of one training call, and its gradient in the logits.

Balanced Softmax cross-entropy over all columns plus distillation on the old ones, eq. 1 of arXiv 2103.12532. The seed
of the backward pass is ready for all of them, and the weights and numbers of classes are 0-d tensors on the device, as
in training: a step changes their values and no code.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.cases import DTYPES, Case
from fastil.kernels import incremental_loss, incremental_loss_grad
from fastil.losses import balanced_cross_entropy, distillation, log_prior

TEMPERATURE = 2.0


@dataclass
class Call:
    """The tensors of one call. logits, teacher [B, W]; target [B]; prior [W]; meter [B, 4]; the rest 0-d, since an
    incremental step changes their values and must change no code."""

    logits: Tensor
    teacher: Tensor
    target: Tensor
    prior: Tensor
    num_old: Tensor
    num_seen: Tensor
    ce_weight: Tensor
    kd_weight: Tensor
    meter: Tensor
    seed: Tensor
    old: int


def make_call(case: Case, device: torch.device, seed: int) -> Call:
    """Return random inputs of a case."""
    random = torch.Generator(device).manual_seed(seed)
    options: dict[str, Any] = {"device": device, "generator": random}
    shape = (case.batch, case.width)
    logits, teacher = (torch.randn(shape, **options).mul_(3).to(DTYPES[case.dtype]) for _ in range(2))
    counts = torch.zeros(case.width, dtype=torch.int64)
    counts[: case.classes], counts[: case.num_old] = 500, 20
    rho = case.num_old / case.classes

    def scalar(value: float) -> Tensor:
        return torch.tensor(value, device=device)

    return Call(
        logits.requires_grad_(),
        teacher,
        torch.randint(0, case.classes, (case.batch,), **options),
        log_prior(counts, case.num_old).to(device),
        num_old=scalar(case.num_old),
        num_seen=scalar(case.classes),
        ce_weight=scalar(1 - rho),
        kd_weight=scalar(rho),
        meter=torch.zeros(case.batch, 4, device=device),
        seed=scalar(1.0),
        old=case.num_old,
    )


def gradient_in_float64(call: Call) -> Tensor:
    """Return eq. 1's gradient by its formula, [B, W]."""
    z, d, rows = call.logits.detach().double(), call.teacher.double(), len(call.target)
    gradient = torch.softmax(z + call.prior.double(), 1)
    gradient[torch.arange(rows, device=z.device), call.target] -= 1
    gradient *= call.ce_weight / rows
    p, p_teacher = (torch.softmax(v[:, : call.old] / TEMPERATURE, 1) for v in (z, d))
    gradient[:, : call.old] += (p - p_teacher) * (call.kd_weight * TEMPERATURE / rows)
    return gradient


def scalars_of(call: Call) -> dict[str, Any]:
    """Return the named scalars of a call."""
    names = ("num_old", "num_seen", "ce_weight", "kd_weight")
    return {name: getattr(call, name) for name in names} | {"temperature": TEMPERATURE}


def fused_gradient(call: Call) -> Tensor:
    """Return the gradient in the logits by `incremental_loss_grad`, [B, W]."""
    z, keys = call.logits, scalars_of(call)
    return incremental_loss_grad(z, call.target, call.prior, call.teacher, meter=call.meter, **keys)


def fused_autograd(call: Call) -> Tensor:
    """Return the gradient in the logits by `incremental_loss`, [B, W]."""
    loss = incremental_loss(call.logits, call.target, call.prior, call.teacher, **scalars_of(call))
    return torch.autograd.grad(loss, call.logits, call.seed)[0]


def formulas(
    logits: Tensor,
    teacher: Tensor,
    target: Tensor,
    prior: Tensor,
    num_old: Tensor,
    ce_weight: Tensor,
    kd_weight: Tensor,
) -> Tensor:
    """Return the loss by the plain formulas, 0-d."""
    ce = balanced_cross_entropy(logits, target, prior)
    return ce_weight * ce + kd_weight * distillation(logits, teacher, num_old, TEMPERATURE)


def backward_of(loss: Callable[..., Tensor]) -> Callable[[Call], Tensor]:
    """Return a contestant that takes the gradient of a loss in the logits."""

    def run(c: Call) -> Tensor:
        value = loss(c.logits, c.teacher, c.target, c.prior, c.num_old, c.ce_weight, c.kd_weight)
        return torch.autograd.grad(value, c.logits, c.seed)[0]

    return run


def liger() -> Callable[[Call], Tensor]:
    """Return a contestant of Liger-Kernel's modules, combined as a user would; KL has the gradient of eq. 2."""
    from liger_kernel.transformers import LigerCrossEntropyLoss, LigerKLDIVLoss

    cross_entropy, kl = LigerCrossEntropyLoss(ignore_index=-1), LigerKLDIVLoss(reduction="batchmean")

    def run(call: Call) -> Tensor:
        ce = cross_entropy(call.logits + call.prior, call.target)
        student = torch.log_softmax(call.logits[:, : call.old].float() / TEMPERATURE, 1)
        teacher = torch.softmax(call.teacher[:, : call.old].float() / TEMPERATURE, 1)
        loss = call.ce_weight * ce + call.kd_weight * TEMPERATURE**2 * kl(student, teacher)
        return torch.autograd.grad(loss, call.logits, call.seed)[0]

    return run
