"""Meta BalancedS-CE (section 3.3, Algorithm 1): alpha, the weight of the old classes in eq. 5, is learned in each step.

"The unbalanced training set [...] is split into a training set D_t and a validation set B_t [...] containing the same
number of samples for every classes". At every tenth update, theta* is what the coming update would make of theta. alpha
moves against the gradient of theta*'s plain cross-entropy on B_t. Then the update is made, with the new alpha.

The paper differentiates through the update with a graph and pays for it in memory. But alpha reaches theta* only
through the gradient g of the training batch, and within g it only meets the logits z, so with v = dL_val/dtheta*

    dL_val/dalpha = <v, dtheta*/dg dg/dalpha> = d/dalpha <u, dL/dz>,   u = J_z (dtheta*/dg)^T v,

where u is the derivative of the training batch's logits along one direction. That takes one forward-mode pass, or the
difference of two forward passes, and no graph. `unrolled` is the paper's way, kept as the reference.

The paper leaves the rate and the bounds of alpha open: they are keys. theta* is made by the optimiser's own update,
learning rate, momentum and decay included (Algorithm 1 prints a unit step).
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor
from torch.func import functional_call, jvp

from fastil import ranks
from fastil.data import Batch
from fastil.errors import UserError
from fastil.kernels import alpha_hypergradient, incremental_loss_grad
from fastil.losses import balanced_cross_entropy
from fastil.methods.context import Meter
from fastil.methods.method import Method, part
from fastil.models import Network, Output
from fastil.optimiser import Update
from fastil.settings import Share

DIFFERENCE = 1e-2  # length of the step to each side in parameter space, for float32


@dataclass(frozen=True)
class MetaConfig:
    """How alpha is learned (loss=meta_balanced)."""

    meta_lr: PositiveFloat = 1.0  # of alpha; Algorithm 1 has a unit step
    meta_every: PositiveInt = 10  # updates of the network per update of alpha; 4.1.3: "every 10 optimization steps"
    meta_share: Share = 0.1  # of the memory, held out for B_t; section 4.1.3: "10% of the memory size"
    meta_alpha: Literal["shared", "per_class"] = "shared"  # one alpha for all old classes, or one each
    meta_bounds: tuple[float, float] = (0.01, 2.0)  # of alpha; "usually between 0 and 1"
    meta_gradient: Literal["jvp", "difference", "unrolled"] = "jvp"  # how alpha's gradient is computed

    def __post_init__(self) -> None:
        low, high = self.meta_bounds
        if not 0 < low <= 1 <= high:
            raise UserError(f"meta_bounds={list(self.meta_bounds)}: give bounds above 0 around 1, such as [0.01, 2]")


class UpdateContext(NamedTuple):
    """What a training step has just before its update."""

    batch: Batch  # (X, Y) of D_t; labels are incremental positions
    teacher_out: Output | None  # of the batch
    held_out: Batch  # of B_t
    student: Callable[[Tensor], Output]  # in training mode, may be compiled
    network: Network  # the same, never compiled
    update: Update
    autocast: Callable[[], AbstractContextManager[Any]]


class MetaAlpha:
    """alpha (eq. 5) for a method with a balanced classification loss, and its updates (Algorithm 1)."""

    def __init__(self, config: MetaConfig, method: Method, batch_size: int) -> None:
        self.config, self.method = config, method
        self.classification = method.classification
        width, device = len(self.classification.log_prior), self.classification.log_prior.device
        self.alpha = torch.ones(width, device=device)  # all equal if it is shared
        # A meter that nobody reads.
        self.scratch = Meter(torch.zeros(batch_size + 1, 4, device=device), torch.zeros((), device=device))
        self.one, self.zero = torch.ones((), device=device), torch.zeros((), device=device)

    def begin_step(self) -> None:
        """Set alpha to 1 (Algorithm 1, "alpha = 1.0")."""
        self.alpha.fill_(1.0)
        self.refresh()

    def refresh(self) -> None:
        """Put alpha into the prior of the classification loss."""
        self.classification.set_log_alpha(self.alpha.log())

    @torch.no_grad()
    def before_update(self, context: UpdateContext) -> None:
        """Set alpha to alpha - meta_lr dL_val/dalpha, within its bounds. Nothing waits for the device."""
        gradient = self.gradient(context)  # in log alpha
        if self.config.meta_alpha == "shared":
            gradient = gradient.sum().expand_as(gradient)
        moved = (self.alpha - self.config.meta_lr * gradient / self.alpha).clamp(*self.config.meta_bounds)
        self.alpha.copy_(torch.where(self.classification.is_old, moved, 1.0))
        self.refresh()

    @torch.no_grad()
    def gradient(self, context: UpdateContext) -> Tensor:
        """Return dL_val/dlog alpha, class by class: float32 [W], 0 where a class is not old. Changes nothing."""
        if self.config.meta_gradient == "unrolled":
            return self.unrolled(context)
        network, update = context.network, context.update
        with update.taken_back(*network.buffers()):  # batch normalisation must not count these forward passes
            with torch.enable_grad():
                with context.autocast():
                    out = context.student(context.batch.images)
                self.method.backward(context.batch, out, context.teacher_out, self.scratch)
                logits = self.method.student_output(out).scaled_logits.detach().clone()
                del out  # frees the graph before the next one is built
                update.add_up()
                moving = update.moving()
                update.apply()
                network.zero_grad()
                with context.autocast():
                    held_out = context.student(context.held_out.images)
                scores = held_out.scaled_logits
                scores.backward(self.validation_gradient(scores, context.held_out))  # type: ignore[no-untyped-call]
                update.add_up()
            direction = update.passed_through(moving, [p.grad for p in update.parameters])
        network.zero_grad()
        along = self.forward_mode if self.config.meta_gradient == "jvp" else self.difference
        hypergradient = alpha_hypergradient(
            logits,
            along(context, direction),
            context.batch.labels,
            self.classification.log_prior,
            num_old=self.classification.num_old,
            num_seen=self.classification.num_seen,
            ce_weight=part(self.method.ce_weight, context.batch),
        )
        return ranks.summed(hypergradient)

    def validation_gradient(self, logits: Tensor, batch: Batch) -> Tensor:
        """Return the gradient in the logits [B, W] of Algorithm 1's "softmax_CE(F(X, theta*), Y)" over the classes
        seen.
        """
        return incremental_loss_grad(
            logits,
            batch.labels,
            torch.zeros_like(self.classification.log_prior),
            num_old=self.classification.num_old,
            num_seen=self.classification.num_seen,
            ce_weight=part(self.one, batch),
            kd_weight=self.zero,
            temperature=self.one,
            meter=self.scratch.rows,
        )

    def forward_mode(self, context: UpdateContext, direction: list[Tensor]) -> Tensor:
        """Return the derivative of the training batch's logits along the direction, [B, W], by a forward-mode pass.

        It is in float32 in every precision of training: under autocast batch normalisation gives a bfloat16 output a
        float32 tangent, which the next convolution refuses.
        """
        network, images = context.network, as_wide(context.batch.images, context.network)
        parameters = {name: p.detach() for name, p in network.named_parameters()}
        moves = dict(zip(context.update.parameters, direction, strict=True))
        tangents = {name: moves.get(p, torch.zeros_like(p)) for name, p in network.named_parameters()}

        def logits(values: dict[str, Tensor]) -> Tensor:
            buffers = {name: b.clone() for name, b in network.named_buffers()}
            with network.as_formula():
                out: Output = functional_call(network, (values, buffers), (images,))
            return self.method.student_output(out).scaled_logits

        tangent: Tensor = jvp(logits, (parameters,), (tangents,))[1]
        return tangent.float()

    def difference(self, context: UpdateContext, direction: list[Tensor]) -> Tensor:
        """Return the same (except at kinks of the ReLUs) from a step to each side. It is in float32, because bfloat16
        rounds the step away.
        """
        images, parameters = as_wide(context.batch.images, context.network), context.update.parameters
        length = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(direction)))
        step = DIFFERENCE / length.clamp(min=torch.finfo(length.dtype).tiny ** 0.5)
        sides: list[Tensor] = []
        with context.update.taken_back(*context.network.buffers()):
            for shift in (step, -2 * step):
                for parameter, along in zip(parameters, direction, strict=True):
                    parameter.add_(along * shift)
                sides.append(self.method.student_output(context.network(images)).scaled_logits)
        derivative: Tensor = (sides[0] - sides[1]) / (2 * step)
        return derivative

    def unrolled(self, context: UpdateContext) -> Tensor:
        """Return `gradient` computed with a graph through the update, as in the paper: exact, slow and large."""
        network, update = context.network, context.update
        parameters: dict[str, Tensor] = dict(network.named_parameters())
        names = {p: name for name, p in parameters.items()}
        buffers = {name: b.clone() for name, b in network.named_buffers()}
        with torch.enable_grad(), network.as_formula():
            log_alpha = self.classification.log_alpha.clone().requires_grad_()
            images, held_images = (as_wide(b.images, network) for b in (context.batch, context.held_out))
            out = functional_call(network, (parameters, buffers), (images,))
            prior = self.classification.prior_without_alpha + log_alpha
            loss = self.method.formula(context.batch, out, context.teacher_out, prior)
            found = torch.autograd.grad(loss, update.parameters, create_graph=True, allow_unused=True)
            gradients = [None if g is None else ranks.summed(g) for g in found]
            moved = {names[p]: new for p, new in zip(update.parameters, update.formula(gradients), strict=True)}
            held_out = functional_call(network, (parameters | moved, buffers), (held_images,))
            seen = torch.where(prior > -math.inf, 0.0, -math.inf).detach()
            validation = balanced_cross_entropy(held_out.scaled_logits, context.held_out.labels, seen)
            (gradient,) = torch.autograd.grad(part(validation, context.held_out), log_alpha)
        return torch.where(self.classification.is_old, ranks.summed(gradient), 0.0)

    def observed(self) -> dict[str, Any]:
        """Return alpha for metrics.jsonl, one number or one per old class. Waits for the device."""
        old = self.alpha[self.classification.is_old].tolist()
        return {"alpha": old[0] if self.config.meta_alpha == "shared" else old}

    def state_dict(self) -> dict[str, Any]:
        """Return alpha [W]."""
        return {"alpha": self.alpha}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up alpha; `refresh` puts it into the prior."""
        self.alpha.copy_(state["alpha"])


def as_wide(images: Tensor, network: Network) -> Tensor:
    """Return the images in the dtype of the weights, which autocast does not change."""
    return images.to(next(network.parameters()).dtype)
