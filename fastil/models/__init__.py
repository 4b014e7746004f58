"""Networks: a backbone and a head, with features, maps and logits from one forward."""

from fastil.models.casting import CastWeights
from fastil.models.folding import Folded
from fastil.models.network import (
    MODELS,
    ExternalBackbone,
    Factory,
    ModelConfig,
    Network,
    Output,
    build_network,
    check_backbone,
    find_factory,
)

__all__ = [
    "MODELS",
    "CastWeights",
    "ExternalBackbone",
    "Factory",
    "Folded",
    "ModelConfig",
    "Network",
    "Output",
    "build_network",
    "check_backbone",
    "find_factory",
]
