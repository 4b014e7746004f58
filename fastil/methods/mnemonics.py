"""Mnemonics (Liu et al., CVPR 2020): exemplars whose pixels are learned. Both variants are approximations.

`released` follows the public training code, which is not the paper's method. Its README calls it "LwF with mnemonics",
with 54.21 and 52.72, and says that its LUCIR form, the row with 63.34, has known bugs. After the base step the
convolutions are frozen except for a factor per filter (`weight_transfer`). The loss is softmax cross-entropy + KL
distillation on LUCIR's head, without LUCIR's other terms. After herding, the new exemplars' pixels are trained by one
epoch of SGD on the cross-entropy of the step's images under the exemplars' class means. (The code casts the result to
bytes without clipping, so bright pixels wrap around; here it is rounded and clipped.)

`bilevel` follows the paper's description, with LUCIR's losses. A temporary classifier takes an SGD step on exemplars,
and the pixels move against that classifier's loss on the step's images. The exemplars of old classes are halved, and
each half validates the step taken on the other. The inner step moves the head alone, over frozen features.

The public code is mnemonics=released weight_transfer=true mnemonics_epochs=1 mnemonics_lr=1e-5 mnemonics_decay=5e-4
exemplars_per_class=null memory_budget=2000 (there rounded up for each class, here down). It changes new exemplars only.

Measured: at a rate of 1e-5 pixels move by 0.0006 grey levels. In the public code exemplars change because it truncates
floats to bytes (38 % of the values drop by one); here they are rounded and do not change. At 0.01 nearly all of the
movement is weight decay, towards the mean colour; `bilevel` at 0.01 moves them by at most 0.028 levels.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn

from fastil.data import Batch
from fastil.errors import UserError
from fastil.methods.context import MemoryContext, StepContext
from fastil.methods.lucir import Lucir
from fastil.methods.method import Keys
from fastil.methods.registry import register
from fastil.models import Network, Output
from fastil.models.heads import CosineHead


@dataclass(frozen=True)
class MnemonicsConfig:
    """method=mnemonics."""

    mnemonics: Literal["released", "bilevel"] = "bilevel"
    mnemonics_epochs: PositiveInt = 1  # over the step's training set
    # Chosen here so that the loss on the step's images falls. The paper's rate for the pixels is 0.01, as far as is
    # known. With a step on the head alone it moves them by less than a grey level, which rounding removes.
    mnemonics_lr: PositiveFloat = 1.0  # of the normalised pixels
    mnemonics_inner_lr: PositiveFloat = 1.0  # bilevel: of the temporary classifier
    # Of the normalised pixels. released: 5e-4, which fades them towards the mean colour.
    mnemonics_decay: NonNegativeFloat = 0.0
    mnemonics_halving: PositiveInt = 10  # epochs after which mnemonics_lr is halved


@register
class Mnemonics(Lucir):
    """LUCIR, or LwF on its head, with exemplars whose pixels are learned after each step."""

    name = "mnemonics"
    needs_exemplars = True
    Config = MnemonicsConfig
    config: MnemonicsConfig

    @classmethod
    def reads(cls, keys: Keys) -> set[str]:
        """Return its own keys and, by variant, those of LUCIR or of iCaRL's distillation."""
        own = super().reads(keys)
        if keys["mnemonics"] == "released":
            return own - {"mnemonics_inner_lr"} | {"temperature", "icarl_beta"}
        return own | Lucir.reads(keys)

    @classmethod
    def to_read(cls, key: str) -> str:
        """Return the settings that make a recipe read a key."""
        return super().to_read(key) + (" mnemonics=bilevel" if key == "mnemonics_inner_lr" else "")

    @classmethod
    def exemplar_epochs(cls, keys: Keys) -> int:
        """Return `mnemonics_epochs`."""
        return int(keys["mnemonics_epochs"])

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.released = self.config.mnemonics == "released"
        self.distils_logits = self.released

    def loss_weights(self, context: StepContext) -> tuple[float, float]:
        """Return LUCIR's weights, or 1 and iCaRL's beta in the released variant."""
        if not self.released:
            return super().loss_weights(context)
        return 1.0, self.configs["icarl"].icarl_beta if context.num_old else 0.0

    @property
    def ranking_weight(self) -> float:
        """LUCIR's; 0 in the released variant."""
        return 0.0 if self.released else super().ranking_weight

    def ranking_arguments(self, batch: Batch) -> dict[str, Any]:
        """Return LUCIR's; nothing in the released variant."""
        return {} if self.released else super().ranking_arguments(batch)

    def extra_loss(self, batch: Batch, out: Output, teacher_out: Output | None, ops: Any) -> Tensor | None:
        """Return LUCIR's less-forget term; nothing in the released variant."""
        return None if self.released else super().extra_loss(batch, out, teacher_out, ops)

    def parameters(self, network: Network, step: int) -> list[nn.Parameter]:
        """Return all parameters; with a factor per filter, not the factors in the base step, then not the filters."""
        frozen = "parametrizations.weight.original" if step else "parametrizations.weight.0.factor"
        return [p for name, p in network.named_parameters() if not name.endswith(frozen)]

    def after_memory(self, network: Network, memory: MemoryContext) -> dict[str, Tensor]:
        """Learn the exemplars' pixels. Returns their ids and new images."""
        exemplars = Exemplars(network, memory, self.context.num_old)
        learn = exemplars.class_mean_loss if self.released else exemplars.bilevel_loss
        for epoch in range(self.config.mnemonics_epochs):
            lr = self.config.mnemonics_lr * 0.5 ** (epoch // self.config.mnemonics_halving)
            for batch in memory.training(epoch):
                with torch.enable_grad():
                    (gradient,) = torch.autograd.grad(learn(batch, self.config.mnemonics_inner_lr), exemplars.pixels)
                exemplars.move(gradient, lr, self.config.mnemonics_decay)
        return {"ids": exemplars.ids, "images": exemplars.as_bytes()}


class Exemplars:
    """The pixels of exemplars while they are learned, [m, 3, h, w], normalised. In the released variant only those of
    new classes enter the loss and move; in the other all do.
    """

    def __init__(self, network: Network, memory: MemoryContext, num_old: int) -> None:
        self.network, self.loader, self.num_old = network.eval(), memory.loader, num_old
        self.ids = torch.from_numpy(memory.ids).to(memory.loader.device)
        self.positions = torch.from_numpy(memory.positions).to(memory.loader.device)
        self.pixels = memory.loader.whole(memory.ids).requires_grad_()
        self.momentum = torch.zeros_like(self.pixels)
        self.first_new = int((self.positions < num_old).sum())  # the memory holds old classes first
        # Turns take equal shares of all classes: the first exemplar of each class, the second of each, ...
        rank = np.arange(len(memory.ids)) - np.searchsorted(memory.positions, memory.positions)
        self.rank = torch.from_numpy(rank).to(self.ids.device)
        self.turns = torch.from_numpy(np.argsort(rank, kind="stable")).to(self.ids.device)
        self.seen = int(memory.positions.max()) + 1
        self.turn = 0
        with torch.no_grad():
            self.old_means = self.pixels.new_zeros(0, network.head.weight.shape[-1])
            if num_old:  # like those of the nearest-mean classifier
                old = memory.ids[: self.first_new]
                upright, mirrored = (
                    F.normalize(memory.extractor.extract(old, side).features) for side in (False, True)
                )
                self.old_means = F.normalize(sum_by_class(upright + mirrored, self.positions[: self.first_new]))

    def features(self, chosen: Any) -> Tensor:
        """Return the features [k, d] of the exemplars at rows `chosen` [k], differentiable in their pixels."""
        chosen = torch.as_tensor(chosen, dtype=torch.int64, device=self.pixels.device)
        out: Output = self.network(self.pixels[chosen])
        return out.features

    def class_mean_loss(self, batch: Batch, _: float) -> Tensor:
        """Return the released loss: cross-entropy of the images' cosines with the class means of the exemplars, without
        a scale. Means of new classes are taken over features that are not normalised.
        """
        with torch.no_grad():
            images = F.normalize(self.network(batch.images).features)
        new = torch.arange(self.first_new, len(self.ids), device=images.device)
        means = F.normalize(sum_by_class(self.features(new), self.positions[new] - self.num_old))
        return F.cross_entropy(images @ torch.cat((self.old_means, means)).T, batch.labels)

    def bilevel_loss(self, batch: Batch, inner_lr: float) -> Tensor:
        """Return the loss of classifiers that have taken a step on some exemplars. A step on new ones is validated on
        images of new classes, a step on one half of the old ones on the other half. Each call uses the next batch of
        exemplars.
        """
        count = min(len(batch.labels), len(self.ids))
        chosen = self.turns[(self.turn + torch.arange(count, device=self.ids.device)) % len(self.ids)]
        self.turn += count
        features, positions = self.features(chosen), self.positions[chosen]
        with torch.no_grad():
            images = self.network(batch.images).features
        of_new, new = batch.labels >= self.num_old, positions >= self.num_old
        even = self.rank[chosen] % 2 == 0
        a, b = ~new & even, ~new & ~even
        pairs = [
            (features[new], positions[new], images[of_new], batch.labels[of_new]),
            (features[a], positions[a], features[b].detach(), positions[b]),
            (features[b], positions[b], features[a].detach(), positions[a]),
        ]
        losses = [self.after_a_step(*pair, inner_lr) for pair in pairs if len(pair[1]) and len(pair[3])]
        return torch.stack(losses).sum() if losses else 0 * self.pixels.sum()

    def after_a_step(self, train: Tensor, targets: Tensor, images: Tensor, labels: Tensor, inner_lr: float) -> Tensor:
        """Return the head's cross-entropy on features `images` after an SGD step on features `train`, 0-d."""
        head = self.network.head
        assert isinstance(head, CosineHead)
        scale, before = head.scale.detach(), head.weight.detach()[: self.seen].requires_grad_()

        def loss(features: Tensor, weight: Tensor, target: Tensor) -> Tensor:
            return F.cross_entropy(scale * F.normalize(features) @ F.normalize(weight).T, target)

        (gradient,) = torch.autograd.grad(loss(train, before, targets), before, create_graph=True)
        return loss(images, before - inner_lr * gradient, labels)

    @torch.no_grad()
    def move(self, gradient: Tensor, lr: float, decay: float) -> None:
        """Take an SGD step as in the released code, momentum 0.9, on the pixels of exemplars that had their turn."""
        moving = (gradient != 0).flatten(1).any(1)[:, None, None, None]  # only exemplars that had their turn
        velocity = 0.9 * self.momentum + gradient + decay * self.pixels
        self.momentum.copy_(torch.where(moving, velocity, self.momentum))
        self.pixels.sub_(torch.where(moving, lr * velocity, 0.0))

    def as_bytes(self) -> Tensor:
        """Return the pixels as uint8 [m, h, w, 3], rounded and clipped. Raises UserError if they are not finite."""
        if not bool(self.pixels.isfinite().all()):
            raise UserError("the exemplars' pixels became infinite; lower mnemonics_lr and choose another --out")
        mean, std = (v[:, None, None] for v in (self.loader.mean, self.loader.std))
        return (255 * (self.pixels.detach() * std + mean)).round().clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous()


def sum_by_class(features: Tensor, positions: Tensor) -> Tensor:
    """Return the sum of each class's rows of features [n, d]: [classes, d]."""
    sums = features.new_zeros(int(positions.max()) + 1, features.shape[1])
    return sums.index_add(0, positions, features)
