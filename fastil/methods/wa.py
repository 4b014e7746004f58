"""Weight aligning (WA; Zhao et al., CVPR 2020): new rows of the head are scaled to the mean length of the old ones.

Distillation is weighted by lambda = N_old / N_all, without T^2. The paper's restriction to positive weights is left
out, as in other code bases that compare against it.
"""

import torch
from torch import Tensor

from fastil.methods.context import FeatureExtractor, StepContext
from fastil.methods.method import CROSS_ENTROPY, Method
from fastil.methods.registry import register
from fastil.models import Network
from fastil.protocol import Ids


@register
class WA(Method):
    """Distillation, then eq. 6 to 8 of the WA paper."""

    name = "wa"
    base_training = CROSS_ENTROPY
    heads = ("linear",)

    def loss_weights(self, context: StepContext) -> tuple[float, float]:
        """Return 1 - lambda and lambda / T^2, lambda = N_old / N_all."""
        return 1 - context.rho, context.rho / self.method_config.temperature**2

    @torch.no_grad()
    def after_training(self, network: Network, extractor: FeatureExtractor, held_out: Ids, positions: Tensor) -> None:
        """Scale the head's new rows to the mean length of the old ones."""
        old, seen = self.context.num_old, self.context.num_seen
        rows = network.head.weight
        rows[old:seen] *= rows[:old].norm(dim=1).mean() / rows[old:seen].norm(dim=1).mean()
