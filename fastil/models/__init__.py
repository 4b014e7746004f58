"""Networks: a backbone and a head, with features, maps and logits from one forward."""

from fastil.models.folding import Folded
from fastil.models.network import (
    MODELS,
    Factory,
    ModelConfig,
    Network,
    Output,
    Outside,
    build_network,
    check_backbone,
    find_factory,
)

__all__ = [
    "MODELS",
    "Factory",
    "Folded",
    "ModelConfig",
    "Network",
    "Output",
    "Outside",
    "build_network",
    "check_backbone",
    "find_factory",
]
