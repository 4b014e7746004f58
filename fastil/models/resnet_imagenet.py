"""ResNet-18 for ImageNet, with the usual stem and with PODNet's."""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastil.models.blocks import BatchNorm, initialise, stage


class ResNet18(nn.Module):
    """Four stages of two blocks with 64 to 512 channels, projection shortcuts. Maps are the four stage outputs.

    pod=False: 7x7 stem with stride 2, ReLU after every addition; last_relu=False drops the very last one (LUCIR's
    cosine network). pod=True: PODNet's code, a 3x3 stem with stride 1 (3.8 times the work), no ReLU after the second
    block of a stage, and the last batch normalisation of each block starting at 0; features are pooled after a ReLU
    with last_relu, and without one under PODNet's classifier. small_stem: whether the stem is the 3x3 one; by default
    if pod.
    """

    feature_dim = 512
    normalised: ClassVar = {"conv1": "bn1"}

    def __init__(self, last_relu: bool, pod: bool, generator: torch.Generator, small_stem: bool | None = None) -> None:
        super().__init__()
        self.relu_features = pod and last_relu
        self.conv1 = (
            nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
            if (pod if small_stem is None else small_stem)
            else nn.Conv2d(3, 64, kernel_size=7, stride=2, padding=3, bias=False)
        )
        self.bn1 = BatchNorm(64)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        relus = [True, not pod]
        self.stage1 = stage(64, 64, 1, relus)
        self.stage2 = stage(64, 128, 2, relus)
        self.stage3 = stage(128, 256, 2, relus)
        self.stage4 = stage(256, 512, 2, [True, last_relu and not pod])
        initialise(self, generator, zero_last_bn=pod)

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return features [B, 512] and the four maps, from images [B, 3, H, W]."""
        x = self.maxpool(F.relu(self.bn1(self.conv1(images))))
        x1 = self.stage1(x)
        x2 = self.stage2(x1)
        x3 = self.stage3(x2)
        x4 = self.stage4(x3)
        return (F.relu(x4) if self.relu_features else x4).mean(dim=(2, 3)), [x1, x2, x3, x4]
