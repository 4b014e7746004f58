"""Weight aligning (WA; Zhao et al., CVPR 2020): new rows of the head are scaled to the mean length of the old ones.

The loss is that of distillation weighed by lambda = N_old / N_all, without T^2. The paper's restriction to positive
weights is left out, as in other code bases that compare against it.
"""

import torch
from torch import Tensor

from fastil.methods.classification_loss import StepContext
from fastil.methods.method import CROSS_ENTROPY, Images, Method
from fastil.methods.registry import register
from fastil.models import Network
from fastil.protocol import Ids


@register
class WA(Method):
    """Eq. 6 to 8 of its paper."""

    name = "wa"
    base = CROSS_ENTROPY
    heads = ("linear",)

    def weigh(self, context: StepContext) -> tuple[float, float]:
        share = context.num_old / context.num_seen
        return 1 - share, share / self.config.temperature**2

    @torch.no_grad()
    def after_training(self, network: Network, images: Images, held_out: Ids, positions: Tensor) -> None:
        old, seen = self.context.num_old, self.context.num_seen
        rows = network.head.weight
        rows[old:seen] *= rows[:old].norm(dim=1).mean() / rows[old:seen].norm(dim=1).mean()
