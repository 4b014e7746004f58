"""Optimisation: milestones and learning rates of a step, and SGD with momentum, decay, clamping and frozen rows.

The update is written once, here, because Meta BalancedS-CE differentiates through it. It needs the update itself (a
step that is taken back), its derivative and, for the unrolled reference, the update as a formula.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
from pydantic import BeforeValidator, Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn

from fastil import ranks
from fastil.errors import UserError
from fastil.settings import Moment, listed, shown


@dataclass(frozen=True)
class TrainConfig:
    """Optimisation of a step (section 4.1.3) and how the machine is used for it."""

    epochs: PositiveInt = 250  # of each incremental step
    base_epochs: PositiveInt | None = None  # of the base step; default: the same
    # Batch normalisation cannot train on one image.
    batch_size: Annotated[int, Field(ge=2)] = 128
    lr: PositiveFloat = 0.1
    schedule: Literal["multistep", "cosine"] = "multistep"
    milestones: list[Moment] = field(default_factory=lambda: [0.4, 0.6, 0.8])  # multistep: drops, in parts of a step
    lr_drop: Annotated[float, Field(gt=0, le=1)] = 0.1  # multistep: factor of a drop
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: NonNegativeFloat = 2e-4
    # Decides initialisation, shuffling, crops and flips; `order` sets the class order.
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    device: str = "auto"  # auto | cpu | cuda | cuda:N
    precision: Literal["auto", "fp32", "tf32", "bf16"] = "auto"  # auto: bf16 if the device is faster in it
    # Batch normalisation if several processes share a batch: by the statistics of each process's images, or by those
    # of the whole batch, as in one process. auto: local if each has at least 32 images.
    bn: Literal["auto", "local", "sync"] = "auto"
    deterministic: bool = False  # CUDA: reruns and resumes end in the same bits, at some cost; a CPU always does
    compile: Literal["auto", True, False] = "auto"  # auto: if there is a C++ compiler and enough work to repay it
    checkpoint_every: PositiveInt = 10  # epochs between checkpoints within a step, ...
    checkpoint_minutes: PositiveFloat = 10.0  # ... and the longest time between them, within an epoch too
    track: Annotated[  # trackers that receive every epoch and step
        list[Literal["csv", "tensorboard", "wandb"]],
        BeforeValidator(listed),
        Field(description="'csv', 'tensorboard' or 'wandb', several of them with commas, or []"),
    ] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_milestones("milestones", self.milestones)

    def epochs_of(self, step: int) -> int:
        """Return the epochs of a step."""
        return self.base_epochs if step == 0 and self.base_epochs else self.epochs

    def learning_rate(self, epoch: int, epochs: int) -> float:
        """Return the learning rate of an epoch, counted from 0, among `epochs`."""
        if self.schedule == "cosine":
            return self.lr * 0.5 * (1 + math.cos(math.pi * epoch / epochs))
        return self.lr * self.lr_drop ** drops(self.milestones, epoch, epochs)


def check_milestones(key: str, milestones: list[float]) -> None:
    """Raise UserError unless these milestones, as fractions of training, rise."""
    if sorted(milestones) != milestones:
        raise UserError(f"{key}={shown(milestones)}: must rise, such as [0.4, 0.6, 0.8]")


def drops(milestones: list[float], epoch: int, epochs: int) -> int:
    """Return how often the learning rate has dropped by an epoch (from 0) among `epochs`. A drop takes effect at the
    start of epoch round(milestone * epochs), but never in the first."""
    return sum(epoch >= max(1, round(m * epochs)) for m in milestones)


class Update:
    """SGD with momentum (no dampening, no Nesterov) on some parameters.

    lr: 0-d tensor, read at each step, so that a captured step stays valid. trainable: bool tensors of the shape of
    those parameters that move in part; elements that are False are moved by neither gradient, momentum nor decay.
    clamp: the largest magnitude of an element of a gradient.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        lr: Tensor,
        momentum: float,
        weight_decay: float,
        trainable: Mapping[nn.Parameter, Tensor] | None = None,
        clamp: float | None = None,
    ) -> None:
        self.parameters = list(parameters)
        self.lr, self.momentum, self.weight_decay = lr, momentum, weight_decay
        self.trainable, self.clamp = dict(trainable or {}), clamp
        self.optimizer = torch.optim.SGD(
            self.parameters, lr=0.0, momentum=momentum, weight_decay=weight_decay, fused=True
        )
        self.optimizer.param_groups[0]["lr"] = lr  # set afterwards, because the constructor would read its value
        self.buffers = [torch.zeros_like(p) for p in self.parameters]
        for parameter, buffer in zip(self.parameters, self.buffers, strict=True):
            # Allocated now, so that a step only overwrites.
            self.optimizer.state[parameter]["momentum_buffer"] = buffer

    def set_weight_decay(self, weight_decay: float) -> None:
        """Set the weight decay of the coming updates."""
        self.weight_decay = weight_decay
        self.optimizer.param_groups[0]["weight_decay"] = weight_decay

    def reset(self) -> None:
        """Forget the momentum, in place."""
        torch._foreach_zero_(self.buffers)

    def add_up(self, others: Sequence[Tensor] = (), alike: bool = True) -> None:
        """Add up the gradients over all processes, and some other tensors with them, in one exchange.

        alike: whether the same parameters have gradients in all processes. Code from outside may leave out different
        layers in each. Then all gradients are exchanged, and also which of them exist, and the host waits for that.
        """
        if alike:
            ranks.add_up([*(p.grad for p in self.parameters if p.grad is not None), *others])
            return
        there = self.lr.new_tensor([p.grad is not None for p in self.parameters])
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        ranks.add_up([there, *(p.grad for p in self.parameters if p.grad is not None), *others])
        for parameter, processes in zip(self.parameters, there.tolist(), strict=True):
            if not processes:
                parameter.grad = None

    @torch.no_grad()
    def apply(self) -> None:
        """Make one step along the gradients of the parameters."""
        if self.clamp is not None:  # PODNet
            gradients = [p.grad for p in self.parameters if p.grad is not None]
            torch._foreach_clamp_min_(gradients, -self.clamp)
            torch._foreach_clamp_max_(gradients, self.clamp)
        before = {p: p.clone() for p in self.trainable}
        self.optimizer.step()
        for parameter, old in before.items():
            parameter.copy_(torch.where(self.trainable[parameter], parameter, old))

    @contextlib.contextmanager
    def taken_back(self, *others: Tensor) -> Iterator[None]:
        """Restore parameters, momentum and `others` when the block ends; gradients are dropped."""
        tensors = [*self.parameters, *self.buffers, *others]
        before = [t.detach().clone() for t in tensors]
        try:
            yield
        finally:
            with torch.no_grad():
                for tensor, old in zip(tensors, before, strict=True):
                    tensor.copy_(old)
            for parameter in self.parameters:
                parameter.grad = None

    def moving(self) -> list[Tensor | None]:
        """Return a bool mask for each parameter of the elements that the present gradients will move; None: all."""
        masks = []
        for parameter in self.parameters:
            mask = self.trainable.get(parameter)
            if parameter.grad is None:  # the loss does not depend on it
                mask = torch.zeros_like(parameter, dtype=torch.bool)
            elif self.clamp is not None:
                free = parameter.grad.abs() <= self.clamp
                mask = free if mask is None else free & mask
            masks.append(mask)
        return masks

    def passed_through(self, moving: Sequence[Tensor | None], vectors: Sequence[Tensor | None]) -> list[Tensor]:
        """Return J^T v for each parameter, where J is the derivative of the update in the gradients: -lr v, and 0 on
        elements that do not move. Momentum and decay add to the update but not to its derivative. A vector that is None
        counts as 0.
        """
        pairs = zip(self.parameters, vectors, strict=True)
        moved = [torch.zeros_like(p) if v is None else -self.lr * v for p, v in pairs]
        return [v if mask is None else torch.where(mask, v, 0.0) for v, mask in zip(moved, moving, strict=True)]

    def formula(self, gradients: Sequence[Tensor | None]) -> list[Tensor]:
        """Return the parameters after `apply`, differentiable in the gradients; one without a gradient is unchanged."""
        moved = []
        for parameter, buffer, gradient in zip(self.parameters, self.buffers, gradients, strict=True):
            if gradient is None:
                moved.append(parameter.detach())
                continue
            clamped = gradient if self.clamp is None else gradient.clamp(-self.clamp, self.clamp)
            velocity = self.momentum * buffer + clamped + self.weight_decay * parameter.detach()
            new = parameter.detach() - self.lr * velocity
            moves = self.trainable.get(parameter)
            moved.append(new if moves is None else torch.where(moves, new, parameter.detach()))
        return moved
