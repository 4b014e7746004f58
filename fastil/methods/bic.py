"""BiC (Wu et al., CVPR 2019): distillation, then two numbers that correct the logits of the newest classes.

Stage 1 weights distillation by lambda = N_old / N_all, without T^2. The teacher's logits are corrected with the values
of its own step, on the classes that were new then. Stage 2 learns beta and gamma on held-out images of every class,
with the network frozen: z <- beta z + gamma on the new classes. At test only the newest group is corrected. (Some other
code bases call something else BiC: one pair per group, all used in training and at test. That is `bic_groups=all`.)

`bic_validation=reserved` is the code's: the held-out images of a class are drawn before its first step and never
trained on. With `each_step` they are drawn from the memory in each step, as for Meta, and were trained on before.

Differences from the code: weight decay includes batch normalisation here. Exemplars are herded once, on normalised
features; the code herds again in each step, on raw features. Here each epoch of stage 2 ends with a short batch of its
own; in the code batches run on into the next epoch, so with few images there are half as many updates.

Known mistakes in other code bases: PODNet's BiC predicts with uncorrected logits, PyCIL's stage 2 takes the softmax
twice, mammoth weights distillation by 1 / step. The original code's stage 2 uses batch statistics; here they are
frozen.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from fastil.methods.context import FeatureExtractor, StepContext
from fastil.methods.method import CROSS_ENTROPY, Keys, Method
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
    bic_share: Share = 0.1  # of the memory, held out; the same number of each new class
    bic_validation: Literal["each_step", "reserved"] = "each_step"  # when held-out images are drawn; code: reserved
    bic_decay: Literal["constant", "falling"] = "constant"  # falling: weight decay times steps / (step + 1), as in code


@register
class BiC(Method):
    """Distillation, then a bias correction. beta, gamma: [W], 1 and 0 where nothing is corrected."""

    name = "bic"
    needs_exemplars = True
    base_training = CROSS_ENTROPY
    Config = BiCConfig
    config: BiCConfig
    holds_out = True

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.beta = torch.ones(self.classification.log_prior.shape, device=self.device)
        self.gamma = torch.zeros_like(self.beta)

    @classmethod
    def base_step_settings(cls, keys: Keys) -> dict[str, Any]:
        """Return what else the base step depends on: reserved images are held out of it too, and a falling decay
        depends on the number of steps.
        """
        settings = super().base_step_settings(keys)
        if cls.reserves(keys):
            names = ("bic_share", "exemplars_per_class", "memory_budget", "exemplar_selection")
            settings["held-out images"] = {name: keys[name] for name in names}
        if keys["bic_decay"] == "falling":
            settings["weight decay"] = f"falling, increment={keys['increment']}"
        return settings

    @classmethod
    def held_out_share(cls, keys: Keys) -> float:
        """Return `bic_share`."""
        return float(keys["bic_share"])

    @classmethod
    def reserves(cls, keys: Keys) -> bool:
        """Return whether `bic_validation` is reserved."""
        return bool(keys["bic_validation"] == "reserved")

    def loss_weights(self, context: StepContext) -> tuple[float, float]:
        """Return 1 - lambda and lambda / T^2, lambda = N_old / N_all."""
        return 1 - context.rho, context.rho / self.method_config.temperature**2

    def corrected(self, logits: Tensor) -> Tensor:
        """Return beta z + gamma for logits z, [n, W]."""
        return logits * self.beta + self.gamma

    def teacher_logits(self, teacher_out: Output) -> Tensor:
        """Return the teacher's corrected logits [B, W]."""
        return self.corrected(teacher_out.scaled_logits)

    def student_output(self, out: Output) -> Output:
        """Return the student's output, with corrected logits if all groups are corrected."""
        if self.config.bic_groups == "newest":
            return out
        return out._replace(logits=self.corrected(out.scaled_logits), scale=None)

    def weight_decay(self, decay: float, step: int, steps: int) -> float:
        """Return the weight decay of a step, smaller in later steps if `bic_decay` is falling."""
        return decay * steps / (step + 1) if self.config.bic_decay == "falling" else decay

    def after_training(self, network: Network, extractor: FeatureExtractor, held_out: Ids, positions: Tensor) -> None:
        """Stage 2: fit beta and gamma of the new classes on the held-out images."""
        old, seen = self.context.num_old, self.context.num_seen
        out = extractor.extract(held_out, False)
        keep = self.config.bic_groups == "all"
        logits = self.corrected(out.scaled_logits) if keep else out.scaled_logits
        beta, gamma = fit_bias(logits[:, :seen], positions, old, self.config)
        if not keep:
            self.beta.fill_(1.0)
            self.gamma.fill_(0.0)
        self.beta[old:seen], self.gamma[old:seen] = beta, gamma

    def predict(self, logits: Tensor) -> Tensor:
        """Return the corrected logits [n, W]."""
        return self.corrected(logits)

    def state_dict(self) -> dict[str, Any]:
        """Return beta and gamma."""
        return {"beta": self.beta, "gamma": self.gamma}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up beta and gamma."""
        self.beta.copy_(state["beta"])
        self.gamma.copy_(state["gamma"])


@torch.enable_grad()
def fit_bias(logits: Tensor, targets: Tensor, num_old: int, config: BiCConfig) -> tuple[Tensor, Tensor]:
    """Return beta and gamma, 0-d, that minimise the cross-entropy of the corrected logits plus penalty gamma^2 / 2.

    logits: [n, seen], of held-out images. targets: int64 [n], incremental positions. num_old: columns from there on are
    corrected.
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
