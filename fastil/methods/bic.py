"""BiC (Wu et al., CVPR 2019): distillation, then two numbers that correct the logits of the newest classes.

Stage 1 weighs distillation by lambda = N_old / N_all and leaves T^2 out; the teacher's logits are corrected by what its
own step found, for its newest classes. Stage 2 learns beta and gamma on held-out images of every class, z <- beta z +
gamma on the new classes, with the network frozen; at test only the newest group is corrected. (`bic_groups=all`, one
pair per group, all of them used in training and at test, is what some other codes call BiC.)

`bic_validation=reserved` is the code's: the held-out images of a class are drawn before its first step and never
trained on. With `each_step` they are drawn anew from the memory in each step, as for Meta, and were trained on before.

Different from the code: batch normalisation is decayed, too; exemplars are herded once, on normalised features (there
anew in each step, on features as they are); each epoch of stage 2 has its own last batch (there batches run on from one
epoch into the next, so that few images get half as many updates).

Known slips of other codes: PODNet's BiC predicts with the uncorrected logits, PyCIL's stage 2 takes the softmax twice,
mammoth weighs distillation by 1 / step. The original code's stage 2 runs with batch statistics; here it is frozen.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from fastil.methods.classification_loss import StepContext
from fastil.methods.method import CROSS_ENTROPY, Images, Keys, Method
from fastil.methods.registry import register
from fastil.models import Network, Output
from fastil.protocol import Ids
from fastil.settings import Share

BATCH = 256  # of stage 2, in a fixed order
MILESTONES = (0.3, 0.6, 0.8, 0.9)  # lr / 10: epochs 60, 120, 160 and 180 of 200


@dataclass(frozen=True)
class BiCConfig:
    """method=bic."""

    bic_groups: Literal["newest", "all"] = "newest"  # whose logits are corrected
    bic_epochs: PositiveInt = 200  # of stage 2
    bic_lr: PositiveFloat = 0.1  # of stage 2, momentum 0.9
    bic_penalty: NonNegativeFloat = 0.1  # times gamma^2 / 2
    bic_share: Share = 0.1  # of the memory, held out; as many of each new class
    bic_validation: Literal["each_step", "reserved"] = "each_step"  # when held-out images are drawn; code: reserved
    bic_decay: Literal["constant", "falling"] = "constant"  # falling: weight decay times steps / (step + 1), as in code


@register
class BiC(Method):
    """beta, gamma: [W], 1 and 0 where nothing is corrected."""

    name = "bic"
    base = CROSS_ENTROPY
    Config = BiCConfig
    own: BiCConfig
    holds_out = True

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.beta = torch.ones(self.classification.log_prior.shape, device=self.device)
        self.gamma = torch.zeros_like(self.beta)

    @classmethod
    def base_step(cls, keys: Keys) -> dict[str, Any]:
        """Reserved images are kept from the base step too, and a falling decay depends on the number of steps."""
        own = super().base_step(keys)
        if cls.reserves(keys):
            names = ("bic_share", "exemplars_per_class", "memory_budget", "exemplar_selection")
            own["held-out images"] = {name: keys[name] for name in names}
        if keys["bic_decay"] == "falling":
            own["weight decay"] = f"falling, increment={keys['increment']}"
        return own

    @classmethod
    def held_out_share(cls, keys: Keys) -> float:
        return float(keys["bic_share"])

    @classmethod
    def reserves(cls, keys: Keys) -> bool:
        return bool(keys["bic_validation"] == "reserved")

    def weigh(self, context: StepContext) -> tuple[float, float]:
        share = context.num_old / context.num_seen
        return 1 - share, share / self.config.temperature**2

    def corrected(self, logits: Tensor) -> Tensor:
        return logits * self.beta + self.gamma

    def teacher_logits(self, teacher_out: Output) -> Tensor:
        return self.corrected(teacher_out.scaled)

    def seen_by_loss(self, out: Output) -> Output:
        if self.own.bic_groups == "newest":
            return out
        return out._replace(logits=self.corrected(out.scaled), scale=None)

    def weight_decay(self, decay: float, step: int, steps: int) -> float:
        return decay * steps / (step + 1) if self.own.bic_decay == "falling" else decay

    def after_training(self, network: Network, images: Images, held_out: Ids, positions: Tensor) -> None:
        """Stage 2."""
        old, seen = self.context.num_old, self.context.num_seen
        out = images.output(held_out, False)
        keep = self.own.bic_groups == "all"
        logits = self.corrected(out.scaled) if keep else out.scaled
        beta, gamma = fit_bias(logits[:, :seen], positions, old, self.own)
        if not keep:
            self.beta.fill_(1.0)
            self.gamma.fill_(0.0)
        self.beta[old:seen], self.gamma[old:seen] = beta, gamma

    def predict(self, logits: Tensor) -> Tensor:
        return self.corrected(logits)

    def state_dict(self) -> dict[str, Any]:
        return {"beta": self.beta, "gamma": self.gamma}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.beta.copy_(state["beta"])
        self.gamma.copy_(state["gamma"])


@torch.enable_grad()
def fit_bias(logits: Tensor, targets: Tensor, num_old: int, config: BiCConfig) -> tuple[Tensor, Tensor]:
    """beta and gamma, 0-d, that minimise the cross-entropy of the corrected logits plus penalty gamma^2 / 2.

    logits: [n, seen], of held-out images; targets: int64 [n]; columns from num_old on are corrected.
    """
    new = torch.arange(logits.shape[1], device=logits.device) >= num_old
    beta = torch.ones((), device=logits.device, requires_grad=True)
    gamma = torch.zeros((), device=logits.device, requires_grad=True)
    optimizer = torch.optim.SGD([beta, gamma], lr=config.bic_lr, momentum=0.9)
    drops = [max(1, round(m * config.bic_epochs)) for m in MILESTONES]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, drops, gamma=0.1)
    for _ in range(config.bic_epochs):
        for z, y in zip(torch.split(logits.detach(), BATCH), torch.split(targets, BATCH), strict=True):
            corrected = torch.where(new, beta * z + gamma, z)
            loss = F.cross_entropy(corrected, y) + config.bic_penalty * gamma.square() / 2
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        schedule.step()
    return beta.detach(), gamma.detach()
