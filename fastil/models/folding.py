"""A frozen network with its batch normalisation folded into the convolutions: for the teacher and for evaluation.

In eval mode batch normalisation is a factor and an offset per channel, so `conv` and `bn` are one convolution with a
bias. That is computed in float32, once per step instead of once per batch, and cast once to the network's dtype. The
network itself is unchanged, and checkpoints hold it.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import fusion

from fastil.models.network import ExternalBackbone, Network, Output


class Folded:
    """A network in eval mode, as it was at the last `refresh`, up to rounding and without gradients. A backbone from
    outside cannot be folded safely, so it is not copied; it runs itself, with its current weights.

    network: the one to follow. dtype: that of the folded convolutions, the head and the images. `fast` is called with
    batches of `full` images, `plain` with all others; both are the same module, `fast` may be compiled.
    """

    def __init__(self, network: Network, dtype: torch.dtype, full: int) -> None:
        self.network, self.dtype, self.full = network, dtype, full
        self.plain = _without_normalisation(network, dtype)
        self.fast: Callable[[Tensor], Output] = self.plain
        self.refresh()

    def __call__(self, images: Tensor) -> Output:
        """Return features and logits of a batch. images: [B, 3, H, W] in `dtype`, which the output has too."""
        with torch.no_grad(), _in_eval_mode(self.plain):
            return (self.fast if len(images) == self.full else self.plain)(images)

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over the network's current weights and statistics, in place, so that a compiled copy stays valid."""
        done = set()
        for (_, convolution, normalisation), (name, twin, _) in zip(
            _pairs(self.network), _pairs(self.plain), strict=True
        ):
            mean, variance = normalisation.running_mean, normalisation.running_var
            assert mean is not None
            assert variance is not None
            weight, bias = fusion.fuse_conv_bn_weights(
                convolution.weight, None, mean, variance, normalisation.eps, normalisation.weight, normalisation.bias
            )
            twin.weight.copy_(weight)
            twin.bias.copy_(bias)
            done |= {f"{name}.weight", f"{name}.bias"}
        own = dict(self.network.named_parameters()) | dict(self.network.named_buffers())
        for tensors in (self.plain.named_parameters(), self.plain.named_buffers()):
            for name, tensor in tensors:
                if name not in done and tensor is not own[name]:
                    tensor.copy_(own[name])


def _pairs(network: nn.Module) -> Iterator[tuple[str, Any, Any]]:
    """Yield every convolution that only a batch normalisation reads: its name, itself, and the batch normalisation."""
    for prefix, part in network.named_modules():
        for convolution, normalisation in getattr(part, "normalised", {}).items():
            yield f"{prefix}.{convolution}", part.get_submodule(convolution), part.get_submodule(normalisation)


@contextlib.contextmanager
def _in_eval_mode(twin: Network) -> Iterator[None]:
    """Keep the student's own backbone in eval mode inside the block."""
    if not twin.backbone.training:
        yield
        return
    twin.backbone.eval()
    try:
        yield
    finally:
        twin.backbone.train()


def _without_normalisation(network: Network, dtype: torch.dtype) -> Network:
    """Return a copy whose folded convolutions have a bias, with identities in place of their normalisation."""
    if isinstance(network.backbone, ExternalBackbone):  # it casts for itself
        twin = copy.deepcopy(network, {id(network.backbone): network.backbone})
        copied: nn.Module = twin.head
    else:
        twin = copy.deepcopy(network)
        copied = twin
    for part in copied.modules():
        for name, normalisation in getattr(part, "normalised", {}).items():
            setattr(part, name, _with_bias(part.get_submodule(name)))
            setattr(part, normalisation, nn.Identity())
    for parameter in copied.parameters():
        if parameter.ndim:  # a cosine head's scale stays in float32
            parameter.data = parameter.data.to(dtype)
    copied.eval().requires_grad_(False)
    return twin


def _with_bias(old: Any) -> nn.Conv2d:
    """Return a convolution of this shape with a bias, without a factor per filter: `refresh` multiplies that in."""
    new = nn.Conv2d(
        old.in_channels, old.out_channels, old.kernel_size, old.stride, old.padding, old.dilation, old.groups,
        padding_mode=old.padding_mode, device="meta",  # nothing is initialised there, so no generator advances
    )  # fmt: skip
    weight = old.weight.detach()
    new.weight, new.bias = nn.Parameter(torch.empty_like(weight)), nn.Parameter(weight.new_empty(old.out_channels))
    return new
