"""A backbone under a head."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from fastil.models.heads import LinearHead, padded_width
from fastil.models.resnet_cifar import ResNetCifar, ResNetRebuffi
from fastil.models.resnet_imagenet import ResNet18

ModelName = Literal["resnet8", "resnet14", "resnet20", "resnet32", "resnet32_rebuffi", "resnet18", "resnet18_pod"]
MODELS: tuple[str, ...] = ModelName.__args__  # type: ignore[attr-defined]


@dataclass(frozen=True)
class ModelConfig:
    """The network. The paper says "32-layer ResNet" (CIFAR) and "18-layer" (ImageNet) and leaves the variant open."""

    model: ModelName = "resnet32"
    last_relu: bool = True  # ReLU after the very last block; no effect on resnet32_rebuffi and resnet18_pod


class Output(NamedTuple):
    """What one forward yields."""

    features: Tensor  # [B, d], pooled, as the head sees them
    maps: list[Tensor]  # stage outputs, [B, C, H, W] each
    logits: Tensor  # [B, W]


class Network(nn.Module):
    """Backbone and head; W is the padded number of classes of the whole run."""

    def __init__(self, backbone: nn.Module, num_classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.width = padded_width(num_classes)
        self.head = LinearHead(int(backbone.feature_dim), self.width)  # type: ignore[arg-type]

    def forward(self, images: Tensor) -> Output:
        features, maps = self.backbone(images)
        return Output(features, maps, self.head(features))


def build_network(config: ModelConfig, num_classes: int, seed: int) -> Network:
    """The network of a recipe, initialised from the seed, channels-last, on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    name = config.model
    backbone: nn.Module
    with torch.random.fork_rng(devices=[]):  # torch's layers draw from the global generator before `initialise`
        if name == "resnet32_rebuffi":
            backbone = ResNetRebuffi(generator)
        elif name.startswith("resnet18"):
            backbone = ResNet18(config.last_relu, name == "resnet18_pod", generator)
        else:
            backbone = ResNetCifar(int(name.removeprefix("resnet")), config.last_relu, generator)
    return Network(backbone, num_classes).to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]
