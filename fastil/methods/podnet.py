"""PODNet (Douillard et al., ECCV 2020): pooled outputs distillation under a classifier with several proxies per class.

"L = L_LSC + L_POD-final + L_POD-spatial" with the weights lambda_f and lambda_c times sqrt(N_all / N_new), N_all being
all classes seen (LUCIR: N_old / N_new). In the released code the margin of the classification loss cancels (its issue
59). `nca_variant=released` is that loss, `nca_variant=paper` is PODNet's eq. 8. Old proxies are frozen in training and
move in the balanced finetuning after it. Gradients are clamped to [-5, 5] in both.

The released cosine schedule is an epoch late: its rate for epoch e is the one for e - 1 here, and the first one comes
twice.

The released ImageNet options add colour jitter; the paper reproduced here says "with no further augmentation".
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import NonNegativeFloat
from torch import Tensor

from fastil.data import Batch
from fastil.methods.context import FeatureExtractor, StepContext
from fastil.methods.method import Method
from fastil.methods.registry import register
from fastil.models import Network, Output
from fastil.models.heads import CosineHead


@dataclass(frozen=True)
class PodnetConfig:
    """method=podnet."""

    pod_flat: NonNegativeFloat = 1.0  # lambda_f; CIFAR-100, its ImageNet options: 10
    pod_spatial: NonNegativeFloat = 3.0  # lambda_c; CIFAR-100, its ImageNet options: 8


@register
class Podnet(Method):
    """POD distillation of features and maps, on a head with several proxies per class."""

    name = "podnet"
    Config = PodnetConfig
    config: PodnetConfig
    heads = ("proxies",)
    base_training = "podnet"
    freezes_old_rows = True  # "old_weights: 0." in the released options
    distils_logits = False
    reads_maps = True
    clamp = 5.0

    def loss_weights(self, context: StepContext) -> tuple[float, float]:
        """Return 1 and 0: logits are not distilled."""
        return 1.0, 0.0

    def extra_loss(self, batch: Batch, out: Output, teacher_out: Output | None, ops: Any) -> Tensor | None:
        """Return POD-flat on the features plus POD-spatial on the outputs of the stages, weighted, 0-d."""
        if teacher_out is None:
            return None
        flat: Tensor = self.config.pod_flat * ops.less_forget(out.features, teacher_out.features)
        spatial: Tensor = self.config.pod_spatial * ops.pod_spatial(out.maps, teacher_out.maps)
        return math.sqrt(self.context.num_seen / self.context.num_new) * (flat + spatial)

    def open_classes(
        self, network: Network, start: int, stop: int, generator: torch.Generator, extractor: FeatureExtractor
    ) -> None:
        """Imprint the new proxies: the centres of k-means on their class's normalised features, times the mean length
        of the old proxies. In the base step they are random.
        """
        if start == 0:
            super().open_classes(network, start, stop, generator, extractor)
            return
        head = network.head
        assert isinstance(head, CosineHead)
        seed = int(torch.randint(2**31, (), generator=generator))
        features = [extractor.extract(extractor.ids_of_class(p), False).features for p in range(start, stop)]
        head.imprint(start, torch.stack([class_proxies(f, head.weight.shape[1], seed) for f in features]))


def class_proxies(features: Tensor, proxies: int, seed: int) -> Tensor:
    """Return the centres of k-means, [proxies, d], on the normalised rows of features [n, d]. A class with fewer images
    than proxies uses its images repeatedly.
    """
    from sklearn.cluster import KMeans

    rows = F.normalize(features).cpu()
    rows = rows.repeat(-(-proxies // len(rows)), 1)[: max(proxies, len(rows))]
    found = KMeans(proxies, n_init=10, random_state=seed).fit(rows.double().numpy())
    return torch.from_numpy(found.cluster_centers_).to(features)
