"""Networks: a backbone and a head, with features, maps and logits from one forward."""

from fastil.models.network import MODELS, ModelConfig, Network, Output, build_network

__all__ = ["MODELS", "ModelConfig", "Network", "Output", "build_network"]
