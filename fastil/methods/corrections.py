"""Corrections of the bias after a step: balanced finetuning (Table 4).

"IL-Baseline being finetuned after each incremental step on a small balanced training set for few epochs similar to the
procedure used by PODNet and LUCIR" (section 4.3.3). Both finetune on the exemplars of all classes seen, with the
method's own loss. The new classes are herded for it and again afterwards, as in PODNet's code.
"""

from dataclasses import dataclass, field
from typing import Literal

from pydantic import PositiveFloat, PositiveInt
from torch import nn

from fastil.models import Network
from fastil.optimiser import check_milestones, drops
from fastil.settings import Moment


@dataclass(frozen=True)
class CorrectionConfig:
    """The correction that follows the training of an incremental step."""

    correction: Literal["none", "balanced_finetuning"] = "none"
    finetune_epochs: PositiveInt = 20  # PODNet and LUCIR; the paper: "few"
    finetune_lr: PositiveFloat = 0.05  # PODNet on CIFAR-100 (its ImageNet runs: 0.01)
    finetune_milestones: list[Moment] = field(default_factory=list)  # lr / 10, as parts of finetuning; LUCIR: [0.5]
    # Open in the paper. weights: of the classifier, without its learned scale, as both codes do.
    finetune_parameters: Literal["classifier", "weights", "all"] = "classifier"
    finetune_bn: Literal["frozen", "train"] = "frozen"  # batch normalisation; PODNet: train

    def __post_init__(self) -> None:
        check_milestones("finetune_milestones", self.finetune_milestones)

    def epochs_of(self, step: int) -> int:
        """Return the epochs of finetuning after a step, 0 after the base step."""
        return self.finetune_epochs if step > 0 and self.correction == "balanced_finetuning" else 0

    def parameters(self, network: Network) -> list[nn.Parameter]:
        """Return the parameters that finetuning trains."""
        if self.finetune_parameters == "weights":
            return [network.head.weight]
        return list((network.head if self.finetune_parameters == "classifier" else network).parameters())

    def learning_rate(self, epoch: int) -> float:
        """Return the learning rate of an epoch of finetuning, counted from 0."""
        return self.finetune_lr * 0.1 ** drops(self.finetune_milestones, epoch, self.finetune_epochs)
