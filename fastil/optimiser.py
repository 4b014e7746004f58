"""How gradients move the parameters: SGD with momentum and decay, elements clamped, rows frozen.

Written down once, because Meta BalancedS-CE differentiates through it: it needs the update itself (a step that is taken
back), what the update lets through, and, for the unrolled reference, the update as a formula.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn


class Update:
    """SGD (no dampening, no Nesterov) on some parameters.

    lr: 0-d tensor, read anew at each step, so that a captured step stays valid. trainable: for a parameter that moves
    in part, a bool tensor of its shape; where False neither gradient, momentum nor decay moves it. clamp: largest
    magnitude of an element of a gradient.
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
        self.optimizer.param_groups[0]["lr"] = lr  # set afterwards, for the constructor would read its value
        self.buffers = [torch.zeros_like(p) for p in self.parameters]
        for parameter, buffer in zip(self.parameters, self.buffers, strict=True):
            # Allocated now, so that a step only ever overwrites.
            self.optimizer.state[parameter]["momentum_buffer"] = buffer

    def set_weight_decay(self, weight_decay: float) -> None:
        self.weight_decay = weight_decay
        self.optimizer.param_groups[0]["weight_decay"] = weight_decay

    def reset(self) -> None:
        """Forget the momentum, in place."""
        torch._foreach_zero_(self.buffers)

    @torch.no_grad()
    def apply(self) -> None:
        """One step along the gradients that lie in the parameters."""
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
        """Parameters, momentum and `others` are afterwards what they were; gradients are gone."""
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
        """Which elements of each parameter the gradients that lie there will move, as bool tensors; None: all."""
        masks = [self.trainable.get(p) for p in self.parameters]
        if self.clamp is None:
            return masks
        free = [p.grad.abs() <= self.clamp for p in self.parameters if p.grad is not None]
        return [f if mask is None else f & mask for f, mask in zip(free, masks, strict=True)]

    def passed_through(self, moving: Sequence[Tensor | None], vectors: Sequence[Tensor | None]) -> list[Tensor]:
        """J^T v for each parameter, J the derivative of the update in the gradients: -lr v, and 0 on elements that do
        not move. Momentum and decay add to the update and not to its derivative."""
        scaled = [-self.lr * v for v in vectors if v is not None]
        return [v if mask is None else torch.where(mask, v, 0.0) for v, mask in zip(scaled, moving, strict=True)]

    def formula(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """The parameters after `apply`, differentiable in the gradients."""
        moved = []
        for parameter, buffer, gradient in zip(self.parameters, self.buffers, gradients, strict=True):
            clamped = gradient if self.clamp is None else gradient.clamp(-self.clamp, self.clamp)
            velocity = self.momentum * buffer + clamped + self.weight_decay * parameter.detach()
            new = parameter.detach() - self.lr * velocity
            moves = self.trainable.get(parameter)
            moved.append(new if moves is None else torch.where(moves, new, parameter.detach()))
        return moved
