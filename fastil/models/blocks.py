"""The residual block and the initialisation that all backbones share."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize


def conv3x3(channels_in: int, channels_out: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, kernel_size=3, stride=stride, padding=1, bias=False)


class SliceShortcut(nn.Module):
    """ResNet's option A: every second pixel, the new channels filled with zeros."""

    def __init__(self, new_channels: int) -> None:
        super().__init__()
        self.new_channels = new_channels

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, self.new_channels))


def projection_shortcut(channels_in: int, channels_out: int, stride: int) -> nn.Module:
    """ResNet's option B: a strided 1x1 convolution and batch normalisation."""
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, kernel_size=1, stride=stride, bias=False), nn.BatchNorm2d(channels_out)
    )


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut. `relu` is the activation after the addition."""

    def __init__(
        self, channels_in: int, channels_out: int, stride: int = 1, *, relu: bool, project: bool = True
    ) -> None:
        super().__init__()
        self.conv1 = conv3x3(channels_in, channels_out, stride)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.conv2 = conv3x3(channels_out, channels_out)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels_out:
            if project:
                self.shortcut = projection_shortcut(channels_in, channels_out, stride)
            else:
                self.shortcut = SliceShortcut(channels_out - channels_in)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y)) + self.shortcut(x)
        return F.relu(y) if self.relu else y


def stage(
    channels_in: int, channels_out: int, stride: int, relus: list[bool], *, project: bool = True
) -> nn.Sequential:
    """As many blocks as there are entries in relus; the first one strides and widens."""
    blocks = [BasicBlock(channels_in, channels_out, stride, relu=relus[0], project=project)]
    blocks += [BasicBlock(channels_out, channels_out, relu=relu) for relu in relus[1:]]
    return nn.Sequential(*blocks)


def initialise(module: nn.Module, generator: torch.Generator, *, zero_last_bn: bool) -> None:
    """He initialisation (fan out) of every convolution; batch normalisation starts as the identity, or, with
    zero_last_bn, the last one of each block at 0, so that a block starts as its shortcut."""
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
        return weight * self.factor


def scale_filters(module: nn.Module) -> None:
    """Put a FilterScale on every convolution, as the released code of Mnemonics does (there "mtl_weight")."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            parametrize.register_parametrization(part, "weight", FilterScale(part.weight))
