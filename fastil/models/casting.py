"""A network under bfloat16 autocast that casts the weights of all convolutions together.

Autocast casts each weight by itself, and each gradient back: 66 launches of a ResNet-32's training step. Here it takes
two or three. The numbers are the same.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from fastil.models.network import Network, Output


class CastWeights(nn.Module):
    """`network` under bfloat16 autocast, equal to the bit, as a function of its cast weights and the images.

    The weights stay the network's own, and so do their gradients: `cast` hands them over, and takes the gradients back.
    """

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network
        self.names = [
            f"{name}.weight"
            for name, part in network.named_modules()
            if isinstance(part, nn.Conv2d) and "weight" in part._parameters  # not computed, as Mnemonics' are
        ]

    def forward(self, weights: list[Tensor], images: Tensor) -> Output:
        """Return what the network returns for images [B, 3, H, W], computed with weights from `cast`."""
        found: Output = functional_call(self.network, dict(zip(self.names, weights, strict=True)), (images,))
        return found

    def cast(self) -> list[Tensor]:
        """Return the weights in bfloat16, differentiable."""
        parameters = dict(self.network.named_parameters())
        return list(_Cast.apply(*(parameters[name] for name in self.names)))  # type: ignore[no-untyped-call]


class _Cast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *weights: Tensor) -> tuple[Tensor, ...]:
        return tuple(_copied(weights, torch.bfloat16))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return tuple(_copied(gradients, torch.float32))


def _copied(tensors: tuple[Tensor, ...], dtype: torch.dtype) -> list[Tensor]:
    new = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    if new:
        torch._foreach_copy_(new, list(tensors))
    return new
