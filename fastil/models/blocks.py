"""The residual block and the initialisation that all backbones share."""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fastil import ranks


def conv3x3(channels_in: int, channels_out: int, stride: int = 1) -> nn.Conv2d:
    """Return a 3x3 convolution with padding 1 and no bias."""
    return nn.Conv2d(channels_in, channels_out, kernel_size=3, stride=stride, padding=1, bias=False)


class BatchNorm(nn.BatchNorm2d):
    """Batch normalisation with a fixed momentum and without torch's counter of batches. Nothing reads the counter, and
    it costs a launch per layer and step. Older weights that have it still load.

    copies: if several processes share a batch, train on its statistics, and this many processes hold the same images of
    it. 0: train on the statistics of this process's images.
    """

    copies = 0

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.num_batches_tracked = None

    def forward(self, x: Tensor) -> Tensor:
        """Return x [B, C, H, W], normalised."""
        if self.copies and self.training and ranks.count() > 1:
            return self._together(x)
        return super().forward(x)

    def _together(self, x: Tensor) -> Tensor:
        """Return x normalised by the mean and the variance over the batches of all processes, [B, C, H, W]. It is plain
        torch, so that Meta can differentiate it twice and in forward mode; torch's own function runs on GPUs only.
        """
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.momentum is not None
        values = x.to(torch.promote_types(x.dtype, self.weight.dtype))  # float32 if x is bfloat16
        size = values.new_tensor(x.numel() / x.shape[1])
        sums = ranks.summed(torch.cat((values.sum((0, 2, 3)), size[None])))
        n, mean = sums[-1], sums[:-1] / sums[-1]
        centred = values - mean[:, None, None]
        variance = ranks.summed(centred.square().sum((0, 2, 3))) / n
        with torch.no_grad():
            self.running_mean.lerp_(mean.detach(), self.momentum)
            self.running_var.lerp_(variance.detach() * (n / (n - self.copies)), self.momentum)
        factor = self.weight * (variance + self.eps).rsqrt()
        return (centred * factor[:, None, None] + self.bias[:, None, None]).to(x.dtype)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        state_dict.pop(f"{prefix}num_batches_tracked", None)  # load_state_dict hands over a copy
        nn.Module._load_from_state_dict(self, state_dict, prefix, *others)  # torch's own would demand the counter


class SliceShortcut(nn.Module):
    """ResNet's option A: every second pixel, the new channels filled with zeros."""

    def __init__(self, new_channels: int) -> None:
        super().__init__()
        self.new_channels = new_channels

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, C + new channels, H / 2, W / 2] from x [B, C, H, W]."""
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, self.new_channels))


class ProjectionShortcut(nn.Sequential):
    """ResNet's option B: a strided 1x1 convolution and batch normalisation."""

    normalised: ClassVar = {"0": "1"}

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        convolution = nn.Conv2d(channels_in, channels_out, kernel_size=1, stride=stride, bias=False)
        super().__init__(convolution, BatchNorm(channels_out))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut. `relu` is the activation after the addition.

    normalised, here and in the backbones: pairs of a convolution and the batch normalisation that alone reads it, so
    that `folding` can multiply the second into the first.
    """

    normalised: ClassVar = {"conv1": "bn1", "conv2": "bn2"}

    def __init__(
        self, channels_in: int, channels_out: int, stride: int = 1, *, relu: bool, project: bool = True
    ) -> None:
        super().__init__()
        self.conv1 = conv3x3(channels_in, channels_out, stride)
        self.bn1 = BatchNorm(channels_out)
        self.conv2 = conv3x3(channels_out, channels_out)
        self.bn2 = BatchNorm(channels_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels_out:
            if project:
                self.shortcut = ProjectionShortcut(channels_in, channels_out, stride)
            else:
                self.shortcut = SliceShortcut(channels_out - channels_in)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, channels_out, H / stride, W / stride] from x [B, channels_in, H, W]."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y)) + self.shortcut(x)
        return F.relu(y) if self.relu else y


def stage(
    channels_in: int, channels_out: int, stride: int, relus: list[bool], *, project: bool = True
) -> nn.Sequential:
    """Return as many blocks as relus has entries; the first one strides and widens."""
    blocks = [BasicBlock(channels_in, channels_out, stride, relu=relus[0], project=project)]
    blocks += [BasicBlock(channels_out, channels_out, relu=relu) for relu in relus[1:]]
    return nn.Sequential(*blocks)


def initialise(module: nn.Module, generator: torch.Generator, *, zero_last_bn: bool) -> None:
    """Initialise every convolution as He does (fan out) and batch normalisation as the identity; with zero_last_bn the
    last one of each block starts at 0, so a block starts as its shortcut.
    """
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu", generator=generator)
        elif isinstance(part, BasicBlock) and zero_last_bn:
            nn.init.zeros_(part.bn2.weight)


class FilterScale(nn.Module):
    """A learned factor for each pair of an output and an input channel of a convolution, 1 at first."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(*weight.shape[:2], 1, 1))

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight [out, in, h, w] times its factors."""
        return weight * self.factor


def scale_filters(module: nn.Module) -> None:
    """Put a FilterScale on every convolution, as the released code of Mnemonics does (there "mtl_weight")."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            parametrize.register_parametrization(part, "weight", FilterScale(part.weight))
