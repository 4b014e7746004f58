"""What every method shares: the terms of its loss, how they are differentiated, and the hooks of a step.

A method says how it weighs cross-entropy against distillation (`loss_weights`), adds its own terms (`extra_loss`), and
fills in the hooks it needs. The classification loss, the sampler, Meta, the correction after a step and the predictor
are separate parts that go with any method.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, TypeVar, get_args

import numpy as np
import torch
from pydantic import PositiveFloat
from torch import Tensor, nn

from fastil import kernels, losses
from fastil.data import Batch
from fastil.errors import UserError
from fastil.kernels import incremental_loss, incremental_loss_grad
from fastil.methods.classification_loss import ClassificationLoss, LossConfig
from fastil.methods.context import FeatureExtractor, MemoryContext, Meter, StepContext
from fastil.models import Network, Output
from fastil.protocol import Ids

Keys = Mapping[str, Any]  # every key of a recipe with its value
Number = TypeVar("Number", float, Tensor)


@dataclass(frozen=True)
class MethodConfig:
    """The keys that all methods share."""

    method: str = "il_baseline"  # a name that `register` knows, module:Class or path/to/file.py:Class
    temperature: PositiveFloat = 2.0  # of the distillation of logits; section 4.1.3: "equal to 2"

    def __post_init__(self) -> None:
        if not 1e-9 <= self.temperature <= 1e9:  # otherwise its square becomes infinite in float32
            raise UserError(f"temperature={self.temperature}: must lie between 1e-9 and 1e9; the paper's is 2")


CROSS_ENTROPY = "cross-entropy"  # `base_training` of methods whose base step has the classification loss alone


class Method:
    """A method of class-incremental learning. It holds the step's constants on the device, so a step changes values,
    never shapes or code.

    method_config: the keys that all methods share. width: W, the padded number of classes. configs: the validated
    `Config` of each method, by its name; `config` is the one of this class. num_classes: the classes of the whole run.
    """

    # What a method declares.

    name: ClassVar[str] = ""  # as in method=NAME; default: the class's name in lower case
    Config: ClassVar[type | None] = None  # a dataclass: the keys of a recipe that are the method's own
    heads: ClassVar[tuple[str, ...]] = ("linear", "cosine", "proxies")  # the heads that it can train
    losses: ClassVar[tuple[str, ...]] = get_args(LossConfig.__annotations__["loss"])  # its classification losses
    base_training: ClassVar[str | None] = None  # what trains the base step; methods with the same value may share it
    freezes_old_rows: ClassVar[bool] = False  # whether the head's rows of old classes stay as they are in training
    holds_out: ClassVar[bool] = False  # whether images of every class are held out for a stage after training
    clamp: ClassVar[float | None] = None  # the largest magnitude of an element of a gradient
    uses_teacher: ClassVar[bool] = True  # whether the loss compares with the network of the step before
    needs_exemplars: ClassVar[bool] = False  # whether it cannot do without a rehearsal memory
    is_joint: ClassVar[bool] = False  # whether each step trains a new network, on all images of the classes seen
    distils_logits: bool = True
    reads_maps: ClassVar[bool] = False  # whether the loss reads the outputs of the backbone's stages

    def __init__(
        self,
        method_config: MethodConfig,
        loss: LossConfig,
        width: int,
        device: torch.device,
        configs: Mapping[str, Any] | None = None,
        num_classes: int | None = None,
    ) -> None:
        self.method_config, self.configs, self.num_classes = method_config, configs or {}, num_classes or width
        self.config: Any = next((config for config in self.configs.values() if type(config) is self.Config), None)
        self.classification = ClassificationLoss(loss, width, device)
        self.ce_weight = torch.ones((), device=device)
        self.kd_weight = torch.zeros((), device=device)
        self.zero = torch.zeros((), device=device)
        self.temperature = torch.full((), method_config.temperature, device=device)
        self.device = device
        self.context = StepContext(0, 0, 0, np.zeros(width, dtype=np.int64))
        self.meter_weights = (1.0, 0.0, 0.0)  # of cross-entropy, distillation, margin ranking in the loss shown
        self.trainable_rows: Tensor | None = None

    @classmethod
    def reads(cls, keys: Keys) -> set[str]:
        """Return the keys of methods that this one reads, given all keys of a recipe: by default its own, and
        `temperature` if it distils logits.
        """
        own = {field.name for field in fields(cls.Config)} if cls.Config else set()
        return own | ({"temperature"} if cls.distils_logits else set())

    @classmethod
    def to_read(cls, key: str) -> str:
        """Return the settings that make a recipe read a key of `Config`, for a message."""
        return f"method={cls.name}"

    @classmethod
    def base_step_settings(cls, keys: Keys) -> dict[str, Any]:
        """Return the settings of the method that decide the network after the base step. Runs that agree in them may
        share that step (`--base`). By default `base_training`, or the method and all of its keys where that is None."""
        if cls.base_training is not None:
            return {"training": cls.base_training}
        own = {field.name: keys[field.name] for field in fields(cls.Config)} if cls.Config else {}
        return {"training": keys["method"]} | own

    @classmethod
    def held_out_share(cls, keys: Keys) -> float:
        """Return the share of each class's exemplars that is held out of training, if the method `holds_out`."""
        return 0.0

    @classmethod
    def reserves(cls, keys: Keys) -> bool:
        """Return whether the held-out images are the same ones in every step, never trained on."""
        return False

    @classmethod
    def exemplar_epochs(cls, keys: Keys) -> int:
        """Return how many epochs over a step's training set `after_memory` takes."""
        return 0

    # What a method fills in.

    def loss_weights(self, context: StepContext) -> tuple[float, float]:
        """Return the weights of cross-entropy and of distillation (eq. 2, which has T^2 in it) in a step's loss."""
        raise NotImplementedError

    def extra_loss(self, batch: Batch, out: Output, teacher_out: Output | None, ops: Any) -> Tensor | None:
        """Return the sum of the method's further terms, weighted, 0-d, or None. batch: its labels are incremental
        positions. teacher_out: None in the base step. ops: the module to take losses from, fastil.kernels, or
        fastil.losses where a second derivative is needed.

        If several processes share a batch, everything here is about this process's part of it, and the results are
        added up, each times `batch.share`. So a mean over images is right as it is. Any other term, such as TPCIL's
        correlation, needs its sums over the whole batch, and takes them by `fastil.ranks.total` in every process alike.
        """
        return None

    def ranking_arguments(self, batch: Batch) -> dict[str, Any]:
        """Return `margin_weight`, `margin` and `hardest` of LUCIR's margin ranking for the loss kernel, or nothing."""
        return {}

    def student_output(self, out: Output) -> Output:
        """Return the student's output with the logits that the loss is computed from."""
        return out

    def teacher_logits(self, teacher_out: Output) -> Tensor:
        """Return the teacher's logits [B, W] to distil."""
        return teacher_out.scaled_logits

    def open_classes(
        self, network: Network, start: int, stop: int, generator: torch.Generator, extractor: FeatureExtractor
    ) -> None:
        """Initialise the head's rows at positions start to stop. extractor: the network of the step before."""
        network.head.open_rows(start, stop, generator)

    def parameters(self, network: Network, step: int) -> list[nn.Parameter]:
        """Return the parameters that training moves."""
        return list(network.parameters())

    def weight_decay(self, decay: float, step: int, steps: int) -> float:
        """Return the weight decay of a step (from 0) among `steps`. decay: the recipe's."""
        return decay

    def after_training(self, network: Network, extractor: FeatureExtractor, held_out: Ids, positions: Tensor) -> None:
        """Run after the training of an incremental step, before exemplars are selected. held_out: ids of the images
        that were held out of training, if any; positions: int64 [n], their classes.
        """

    def after_memory(self, network: Network, memory: MemoryContext) -> dict[str, Tensor]:
        """Run after the selection of exemplars. May return new pixels for them: "ids" int64 [n] and "images" uint8 [n,
        h, w, 3].
        """
        return {}

    def predict(self, logits: Tensor) -> Tensor:
        """Return the scores of the classes [n, W] from the (scaled) logits [n, W]."""
        return logits

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint must hold of the method: tensors and plain values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` returned."""

    # What all methods share.

    def begin_step(self, context: StepContext) -> None:
        """Set weights, frozen rows and classification loss for the classes and counts of this step."""
        self.context = context
        self.classification.begin_step(context)
        self.freeze_old_rows()
        returned = self.loss_weights(context)
        try:
            ce, kd = map(float, returned)
        except (TypeError, ValueError):
            raise UserError(
                f"method={self.method_config.method}: loss_weights returns {returned!r}; return two numbers, the "
                "weights of cross-entropy and of distillation"
            ) from None
        self.ce_weight.fill_(ce)
        self.kd_weight.fill_(kd)
        fused = 0.0 if self.classification.config.loss == "nca" else ce
        self.meter_weights = (fused, kd, self.ranking_weight if context.num_old else 0.0)

    @property
    def ranking_weight(self) -> float:
        """The weight of LUCIR's margin ranking in the loss that is shown, a float."""
        return 0.0

    def trainable(self, network: Network) -> dict[nn.Parameter, Tensor]:
        """Return bool masks, True where an element moves, for the parameters that training moves in part."""
        if not self.freezes_old_rows:
            return {}
        if self.trainable_rows is None:
            self.trainable_rows = torch.ones_like(network.head.weight, dtype=torch.bool)
            self.freeze_old_rows()
        return {network.head.weight: self.trainable_rows}

    def freeze_old_rows(self) -> None:
        """Set the mask of the head's rows that move: those of the new classes."""
        if self.trainable_rows is not None:
            self.trainable_rows.fill_(True)
            self.trainable_rows[: self.context.num_old] = False

    def loss(self, batch: Batch, out: Output, teacher_out: Output | None) -> Tensor:
        """Return the loss of a batch, 0-d; of a part of one, its share. Labels are incremental positions."""
        loss = incremental_loss(**self.kernel_arguments(batch, out, teacher_out))
        unfused = self.unfused_loss(batch, out, teacher_out)
        return loss if unfused is None else loss + part(unfused, batch)

    def backward(self, batch: Batch, out: Output, teacher_out: Output | None, meter: Meter) -> None:
        """Run the backward pass of `loss`, and add its terms to the meter; nothing waits for them."""
        arguments = self.kernel_arguments(batch, out, teacher_out)
        unfused = self.unfused_loss(batch, out, teacher_out)
        if unfused is not None:
            meter.unfused.add_(unfused.detach(), alpha=len(batch.labels))
            unfused = part(unfused, batch)
        if "logit_scale" in arguments:
            loss = incremental_loss(**arguments, meter=meter.rows)
            (loss if unfused is None else loss + unfused).backward()  # type: ignore[no-untyped-call]
            return
        # The kernel returns the gradient in the logits, and the backward pass begins with it. The value is not needed.
        gradient = incremental_loss_grad(**arguments, meter=meter.rows)
        if unfused is None:
            arguments["logits"].backward(gradient)
        else:
            torch.autograd.backward([arguments["logits"], unfused], [gradient, None])

    def formula(self, batch: Batch, out: Output, teacher_out: Output | None, log_prior: Tensor) -> Tensor:
        """Return `loss` as a plain formula, 0-d, which can be differentiated twice, and in the prior. Only for a
        balanced classification loss. log_prior: [W].
        """
        classification, out = self.classification, self.student_output(out)
        num_old, num_seen, z = classification.num_old, classification.num_seen, out.scaled_logits
        loss = self.ce_weight * losses.balanced_cross_entropy(z, batch.labels, log_prior)
        if teacher_out is not None and self.distils_logits:
            teacher = self.teacher_logits(teacher_out)
            loss = loss + self.kd_weight * losses.distillation(z, teacher, num_old, self.temperature)
        ranking = {} if teacher_out is None else self.ranking_arguments(batch)
        if ranking:
            k, margin = ranking["hardest"], ranking["margin"]
            term = losses.margin_ranking(out.logits, batch.labels, num_old, num_seen, k, margin)
            loss = loss + ranking["margin_weight"] * term
        extra = self.extra_loss(batch, out, teacher_out, losses)
        return part(loss if extra is None else loss + extra, batch)

    def kernel_arguments(self, batch: Batch, out: Output, teacher_out: Output | None) -> dict[str, Any]:
        """Return the arguments of the loss kernel, by name."""
        out = self.student_output(out)
        teacher = self.teacher_logits(teacher_out) if teacher_out is not None and self.distils_logits else None
        hits_only = self.classification.config.loss == "nca"  # the kernel does not compute that cross-entropy
        arguments = {
            "logits": out.logits,
            "target": batch.labels,
            "teacher_logits": teacher,
            "ce_weight": self.zero if hits_only else part(self.ce_weight, batch),
            "kd_weight": part(self.kd_weight, batch),
            "temperature": self.temperature,
        }
        if out.scale is not None:
            arguments["logit_scale"] = out.scale
        if teacher_out is not None:
            ranking = self.ranking_arguments(batch)
            arguments |= ranking and ranking | {"margin_weight": part(ranking["margin_weight"], batch)}
        return arguments | self.classification.kernel_arguments(batch.labels)

    def unfused_loss(self, batch: Batch, out: Output, teacher_out: Output | None) -> Tensor | None:
        """Return the sum of the weighted terms that the loss kernel does not compute, 0-d, or None."""
        cross_entropy = self.classification.unfused(out, batch.labels)
        extra = self.extra_loss(batch, out, teacher_out, kernels)
        if cross_entropy is None:
            return extra
        cross_entropy = self.ce_weight * cross_entropy
        return cross_entropy if extra is None else cross_entropy + extra


def part(weight: Number, batch: Batch) -> Number:
    """Return a weight, or a term of the loss, times the batch's share of the update, so that the sum over all processes
    is the mean over all their images.
    """
    return weight if batch.share == 1 else batch.share * weight
