"""ResNets for small images: the layout of LUCIR's code, and iCaRL's as PODNet's code rebuilt it."""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastil.models.blocks import BatchNorm, conv3x3, initialise, stage


class ResNetCifar(nn.Module):
    """LUCIR's ResNet-(6n+2): three stages of n blocks with 16, 32 and 64 channels, projection shortcuts.

    last_relu: whether the last block ends in a ReLU (LUCIR's linear-head network) or not (its cosine network). Maps are
    the outputs of the three stages.
    """

    feature_dim = 64
    normalised: ClassVar = {"conv1": "bn1"}

    def __init__(self, depth: int, last_relu: bool, generator: torch.Generator) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 2, 6)
        if rest or blocks < 1:
            raise ValueError(f"depth {depth} is not 6n + 2")
        self.conv1 = conv3x3(3, 16)
        self.bn1 = BatchNorm(16)
        self.stage1 = stage(16, 16, 1, [True] * blocks)
        self.stage2 = stage(16, 32, 2, [True] * blocks)
        self.stage3 = stage(32, 64, 2, [True] * (blocks - 1) + [last_relu])
        initialise(self, generator, zero_last_bn=False)

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return features [B, 64] and the three maps, from images [B, 3, H, W]."""
        x = F.relu(self.bn1(self.conv1(images)))
        x1 = self.stage1(x)
        x2 = self.stage2(x1)
        x3 = self.stage3(x2)
        return x3.mean(dim=(2, 3)), [x1, x2, x3]


class ResNetRebuffi(nn.Module):
    """PODNet's ResNet-32: stages of 5, 5, 4 and 1 blocks, slicing shortcuts, no ReLU after any addition, and the last
    batch normalisation of each block starting at 0.

    Maps are the four stage outputs before their ReLU. With last_relu, features are pooled after it, as in PODNet's
    iCaRL. Without it they are what the code calls raw features, which its classifier reads.
    """

    feature_dim = 64
    normalised: ClassVar = {"conv1": "bn1"}

    def __init__(self, last_relu: bool, generator: torch.Generator) -> None:
        super().__init__()
        self.last_relu = last_relu
        self.conv1 = conv3x3(3, 16)
        self.bn1 = BatchNorm(16)
        self.stage1 = stage(16, 16, 1, [False] * 5)
        self.stage2 = stage(16, 32, 2, [False] * 5, project=False)
        self.stage3 = stage(32, 64, 2, [False] * 4, project=False)
        self.stage4 = stage(64, 64, 1, [False])
        initialise(self, generator, zero_last_bn=True)

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return features [B, 64] and the four maps, from images [B, 3, H, W]."""
        x = F.relu(self.bn1(self.conv1(images)))
        x1 = self.stage1(x)
        x2 = self.stage2(x1)
        x3 = self.stage3(x2)
        x4 = self.stage4(x3)
        return (F.relu(x4) if self.last_relu else x4).mean(dim=(2, 3)), [x1, x2, x3, x4]
