"""A backbone of your own: any module that takes images to features and says how wide they are.

fastil run digits model=examples/your_own_network.py:backbone
"""

from itertools import pairwise

from torch import Tensor, nn


class Small(nn.Module):
    """Three convolutions; a network of timm with num_classes=0 will do as well."""

    feature_dim = 64

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 16, 32, self.feature_dim)
        self.layers = nn.Sequential(
            *(
                layer
                for before, after in pairwise(widths)
                for layer in (nn.Conv2d(before, after, 3, 1, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU())
            ),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )

    def forward(self, images: Tensor) -> Tensor:
        """images: [B, 3, H, W]. Returns [B, 64]."""
        features: Tensor = self.layers(images)
        return features


def backbone() -> nn.Module:
    """Return the backbone: what `model=` names."""
    return Small()
