"""Networks: a backbone and a head, with features, maps and logits from one forward."""

from fastil.models.folding import Folded
from fastil.models.network import MODELS, ModelConfig, Network, Output, build_network

__all__ = ["MODELS", "Folded", "ModelConfig", "Network", "Output", "build_network"]
