"""PODNet (Douillard et al., ECCV 2020): pooled outputs distillation under a classifier with several proxies per class.

"L = L_LSC + L_POD-final + L_POD-spatial" with the weights lambda_f and lambda_c times sqrt(N_all / N_new), N_all with
the new classes (LUCIR: N_old / N_new). In the released code the margin of the classification loss cancels (its issue
59): `nca_variant=released` is that, `nca_variant=paper` is eq. 8. Old proxies stay as they are in training and
move in the balanced finetuning after it, gradients are clamped to [-5, 5] in both.

The code's cosine schedule lags an epoch: its rate of epoch e is that of e - 1 here, and the first one comes twice.

The released ImageNet options add colour jitter; the paper reproduced here "with no further augmentation".
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import NonNegativeFloat
from torch import Tensor

from fastil.data import Batch
from fastil.methods.classification_loss import StepContext
from fastil.methods.method import Images, Method
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
    name = "podnet"
    Config = PodnetConfig
    heads = ("proxies",)
    base = "podnet"
    freezes_old_rows = True  # "old_weights: 0." in the released options
    distils_logits = False
    reads_maps = True
    clamp = 5.0

    def weigh(self, context: StepContext) -> tuple[float, float]:
        return 1.0, 0.0

    def further(self, batch: Batch, out: Output, teacher_out: Output | None, forms: Any) -> Tensor | None:
        """POD-flat on the features and POD-spatial on the outputs of the stages."""
        if teacher_out is None:
            return None
        config: PodnetConfig = self.parts["podnet"]
        flat: Tensor = config.pod_flat * forms.less_forget(out.features, teacher_out.features)
        spatial: Tensor = config.pod_spatial * forms.pod_spatial(out.maps, teacher_out.maps)
        return math.sqrt(self.context.num_seen / self.context.num_new) * (flat + spatial)

    def open_classes(self, network: Network, start: int, stop: int, generator: torch.Generator, images: Images) -> None:
        """New proxies are the centres of k-means on the normalised features of their class, times the mean length of
        the old proxies; in the base step they are random."""
        if start == 0:
            network.head.open_rows(start, stop, generator)
            return
        head = network.head
        assert isinstance(head, CosineHead)
        seed = int(torch.randint(2**31, (), generator=generator))
        features = [images.output(images.of_position(p), False).features for p in range(start, stop)]
        head.imprint(start, torch.stack([class_proxies(f, head.weight.shape[1], seed) for f in features]))


def class_proxies(features: Tensor, proxies: int, seed: int) -> Tensor:
    """Centres of k-means, [proxies, d], on the normalised rows of features [n, d]. A class with fewer images than
    proxies repeats its images."""
    from sklearn.cluster import KMeans

    rows = F.normalize(features).cpu()
    rows = rows.repeat(-(-proxies // len(rows)), 1)[: max(proxies, len(rows))]
    found = KMeans(proxies, n_init=10, random_state=seed).fit(rows.double().numpy())
    return torch.from_numpy(found.cluster_centers_).to(features)
