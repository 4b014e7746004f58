"""What every training procedure shares: the terms of its loss, how they are differentiated, and the hooks of a step.

A procedure says how it weighs cross-entropy against distillation (`weigh`), adds the terms it is known for (`further`),
and fills in the hooks it needs. The classification loss, the sampler, Meta, the correction after a step and the
predictor are parts of their own, which go with any of them.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, NamedTuple, get_args

import numpy as np
import torch
from pydantic import PositiveFloat
from torch import Tensor, nn

from fastil import kernels, losses
from fastil.data import Batch, Loader
from fastil.errors import UserError
from fastil.kernels import incremental_loss, incremental_loss_grad
from fastil.methods.classification_loss import ClassificationLoss, LossConfig, StepContext
from fastil.models import Network, Output
from fastil.protocol import Ids

Keys = Mapping[str, Any]  # every key of a recipe with its value


@dataclass(frozen=True)
class MethodConfig:
    """The training procedure of an incremental step."""

    method: str = "il_baseline"  # a name that `register` knows, module:Class or path/to/file.py:Class
    temperature: PositiveFloat = 2.0  # of the distillation of logits; section 4.1.3: "equal to 2"

    def __post_init__(self) -> None:
        if not 1e-9 <= self.temperature <= 1e9:  # beyond, its square makes infinities in float32
            raise UserError(f"temperature={self.temperature}: must lie between 1e-9 and 1e9; the paper's is 2")


CROSS_ENTROPY = "cross-entropy"  # the base step of methods that train it by the classification loss alone


class Meter(NamedTuple):
    """What an epoch adds up on the device. rows: [R, 4], by the kernel: cross-entropy, distillation, hits and margin
    ranking of each row of a batch. further: 0-d, the terms beside them, weighed, times the images."""

    rows: Tensor
    further: Tensor


class Images(NamedTuple):
    """Training images as the frozen network sees them, by the test-time transform. ids: int64 [n]."""

    # (ids, whether mirrored): features [n, d] and logits [n, W], on the device
    output: Callable[[Ids, bool], Output]
    of_position: Callable[[int], Ids]  # ids of the class at an incremental position


class Memory(NamedTuple):
    """The rehearsal memory after a step, for methods that work on it."""

    ids: Ids  # every exemplar, class after class
    positions: Ids  # their classes
    images: Images
    loader: Loader
    training: Callable[[int], Iterator[Batch]]  # augmented batches of the step's training set, of an epoch


class Method:
    """A training procedure. It holds the step's constants on the device, so that a step changes values and never shapes
    or code.

    width: W. parts: the validated `Config` of each method, by its name; `own` is that of this one. num_classes: of the
    whole run.
    """

    # What a method declares.

    name: ClassVar[str] = ""  # as in method=NAME; without one, the class's in lower case
    Config: ClassVar[type | None] = None  # a dataclass: the keys of a recipe that are the method's own
    heads: ClassVar[tuple[str, ...]] = ("linear", "cosine", "proxies")  # that it can train
    losses: ClassVar[tuple[str, ...]] = get_args(LossConfig.__annotations__["loss"])  # and classification losses
    base: ClassVar[str | None] = None  # what trains the base step; methods with the same value may share it
    freezes_old_rows: ClassVar[bool] = False  # of the head
    holds_out: ClassVar[bool] = False  # images of every class, for a stage of its own after training
    clamp: ClassVar[float | None] = None  # of each element of a gradient
    distils_logits: bool = True
    reads_maps: ClassVar[bool] = False  # the outputs of the stages

    def __init__(
        self,
        config: MethodConfig,
        loss: LossConfig,
        width: int,
        device: torch.device,
        parts: Mapping[str, Any] | None = None,
        num_classes: int | None = None,
    ) -> None:
        self.config, self.parts, self.num_classes = config, parts or {}, num_classes or width
        self.own: Any = next((part for part in self.parts.values() if type(part) is self.Config), None)
        self.classification = ClassificationLoss(loss, width, device)
        self.ce_weight = torch.ones((), device=device)
        self.kd_weight = torch.zeros((), device=device)
        self.nothing = torch.zeros((), device=device)
        self.temperature = torch.full((), config.temperature, device=device)
        self.device = device
        self.context = StepContext(0, 0, 0, np.zeros(width, dtype=np.int64))
        self.weights = (1.0, 0.0, 0.0)
        self.moving_rows: Tensor | None = None

    @classmethod
    def reads(cls, keys: Keys) -> set[str]:
        """The keys of methods that it reads, given all keys of a recipe: by default its own, and `temperature` if
        it distils logits."""
        own = {field.name for field in fields(cls.Config)} if cls.Config else set()
        return own | ({"temperature"} if cls.distils_logits else set())

    @classmethod
    def to_read(cls, key: str) -> str:
        """Settings that make a recipe read a key of `Config`, for a message."""
        return f"method={cls.name}"

    @classmethod
    def base_step(cls, keys: Keys) -> dict[str, Any]:
        """The settings of the method that decide the network after the base step. Runs that agree in them may share
        that step (`--base`). By default `base`, or the method and all of its keys where it has none."""
        if cls.base is not None:
            return {"training": cls.base}
        own = {field.name: keys[field.name] for field in fields(cls.Config)} if cls.Config else {}
        return {"training": keys["method"]} | own

    @classmethod
    def held_out_share(cls, keys: Keys) -> float:
        """The share of each class's exemplars that `holds_out` keeps from training."""
        return 0.0

    @classmethod
    def reserves(cls, keys: Keys) -> bool:
        """Whether the held-out images are the same ones in every step, never trained on."""
        return False

    @classmethod
    def exemplar_epochs(cls, keys: Keys) -> int:
        """Epochs over a step's training set that `after_memory` takes."""
        return 0

    # What a method fills in.

    def weigh(self, context: StepContext) -> tuple[float, float]:
        """Of cross-entropy and of distillation (T^2 is in it)."""
        raise NotImplementedError

    def further(self, batch: Batch, out: Output, teacher_out: Output | None, forms: Any) -> Tensor | None:
        """Terms of the loss beside the cross-entropy and the distillation of logits, weighed: a scalar. forms:
        fastil.kernels, or fastil.losses for a second derivative."""
        return None

    def ranking(self, batch: Batch) -> dict[str, Any]:
        """Arguments `margin_weight`, `margin` and `hardest` of LUCIR's margin ranking."""
        return {}

    def seen_by_loss(self, out: Output) -> Output:
        """The student's output with the logits that the loss is taken of."""
        return out

    def teacher_logits(self, teacher_out: Output) -> Tensor:
        return teacher_out.scaled

    def open_classes(self, network: Network, start: int, stop: int, generator: torch.Generator, images: Images) -> None:
        """Initialise the head's rows of the new classes."""
        network.head.open_rows(start, stop, generator)

    def parameters(self, network: Network, step: int) -> list[nn.Parameter]:
        """What training moves."""
        return list(network.parameters())

    def weight_decay(self, decay: float, step: int, steps: int) -> float:
        """Of a step, from 0, among `steps`."""
        return decay

    def after_training(self, network: Network, images: Images, held_out: Ids, positions: Tensor) -> None:
        """What follows the training of an incremental step, before exemplars are selected. held_out: images that were
        kept from training, if there are any; positions: int64 [n], their classes."""

    def after_memory(self, network: Network, memory: Memory) -> dict[str, Tensor]:
        """Once exemplars are selected. May return new pixels for them: "ids" int64 [n], "images" uint8 [n, h, w, 3]."""
        return {}

    def predict(self, logits: Tensor) -> Tensor:
        """Scores of the classes [n, W], from what a softmax is taken of."""
        return logits

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass

    # What all share.

    def begin_step(self, context: StepContext) -> None:
        """Set weights, frozen rows and classification loss for the classes and counts of this step."""
        self.context = context
        self.classification.begin_step(context)
        self.freeze()
        found = self.weigh(context)
        try:
            ce, kd = map(float, found)
        except (TypeError, ValueError):
            raise UserError(
                f"method={self.config.method}: weigh returns {found!r}; return two numbers, the weights of "
                "cross-entropy and of distillation"
            ) from None
        self.ce_weight.fill_(ce)
        self.kd_weight.fill_(kd)
        in_kernel = 0.0 if self.classification.config.loss == "nca" else ce
        self.weights = (in_kernel, kd, self.ranking_weight if context.num_old else 0.0)

    @property
    def ranking_weight(self) -> float:
        """The weight of LUCIR's margin ranking in the loss that is shown."""
        return 0.0

    def trainable(self, network: Network) -> dict[nn.Parameter, Tensor]:
        """Masks of the parameters that move in part in training."""
        if not self.freezes_old_rows:
            return {}
        if self.moving_rows is None:
            self.moving_rows = torch.ones_like(network.head.weight, dtype=torch.bool)
            self.freeze()
        return {network.head.weight: self.moving_rows}

    def freeze(self) -> None:
        if self.moving_rows is not None:
            self.moving_rows.fill_(True)
            self.moving_rows[: self.context.num_old] = False

    def loss(self, batch: Batch, out: Output, teacher_out: Output | None) -> Tensor:
        """The loss of a batch whose labels are incremental positions. Returns a scalar."""
        loss = incremental_loss(**self.arguments(batch, out, teacher_out))
        further = self.beside(batch, out, teacher_out)
        return loss if further is None else loss + further

    def backward(self, batch: Batch, out: Output, teacher_out: Output | None, meter: Meter) -> None:
        """The backward pass of `loss`; its terms are added to the meter, and nothing waits for them."""
        arguments = self.arguments(batch, out, teacher_out)
        further = self.beside(batch, out, teacher_out)
        if further is not None:
            meter.further.add_(further.detach(), alpha=len(batch.labels))
        if "logit_scale" in arguments:
            loss = incremental_loss(**arguments, meter=meter.rows)
            (loss if further is None else loss + further).backward()  # type: ignore[no-untyped-call]
            return
        # The kernel yields the gradient in the logits, and with it the whole pass begins: no value is needed.
        gradient = incremental_loss_grad(**arguments, meter=meter.rows)
        if further is None:
            arguments["logits"].backward(gradient)
        else:
            torch.autograd.backward([arguments["logits"], further], [gradient, None])

    def formula(self, batch: Batch, out: Output, teacher_out: Output | None, log_prior: Tensor) -> Tensor:
        """`loss` of a balanced classification loss with this prior [W], as a plain formula: it can be differentiated
        twice, and in the prior."""
        part, out = self.classification, self.seen_by_loss(out)
        loss = self.ce_weight * losses.balanced_cross_entropy(out.scaled, batch.labels, log_prior)
        if teacher_out is not None and self.distils_logits:
            teacher = self.teacher_logits(teacher_out)
            loss = loss + self.kd_weight * losses.distillation(out.scaled, teacher, part.num_old, self.temperature)
        ranking = {} if teacher_out is None else self.ranking(batch)
        if ranking:
            k, margin = ranking["hardest"], ranking["margin"]
            term = losses.margin_ranking(out.logits, batch.labels, part.num_old, part.num_seen, k, margin)
            loss = loss + ranking["margin_weight"] * term
        further = self.further(batch, out, teacher_out, losses)
        return loss if further is None else loss + further

    def arguments(self, batch: Batch, out: Output, teacher_out: Output | None) -> dict[str, Any]:
        """Of the loss kernel."""
        out = self.seen_by_loss(out)
        outside = self.classification.config.loss == "nca"  # then it only counts hits
        own = {
            "logits": out.logits,
            "target": batch.labels,
            "teacher_logits": self.teacher_logits(teacher_out)
            if teacher_out is not None and self.distils_logits
            else None,
            "ce_weight": self.nothing if outside else self.ce_weight,
            "kd_weight": self.kd_weight,
            "temperature": self.temperature,
        }
        if out.scale is not None:
            own["logit_scale"] = out.scale
        if teacher_out is not None:
            own |= self.ranking(batch)
        return own | self.classification.arguments(batch.labels)

    def beside(self, batch: Batch, out: Output, teacher_out: Output | None) -> Tensor | None:
        """Every term that the loss kernel does not have, weighed."""
        own = self.classification.outside(out, batch.labels)
        further = self.further(batch, out, teacher_out, kernels)
        if own is None:
            return further
        return self.ce_weight * own if further is None else self.ce_weight * own + further
