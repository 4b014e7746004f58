"""Networks: a backbone and a head, with features, maps and logits from one forward."""

from fastil.models.folding import Folded
from fastil.models.network import (
    FACTORIES,
    MODELS,
    ModelConfig,
    Network,
    Output,
    Outside,
    add_factory,
    build_network,
    find_factory,
)

__all__ = [
    "FACTORIES",
    "MODELS",
    "Folded",
    "ModelConfig",
    "Network",
    "Output",
    "Outside",
    "add_factory",
    "build_network",
    "find_factory",
]
