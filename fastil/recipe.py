"""The effective configuration of a run: each part's own dataclass, gathered under flat keys.

`recipe_file` reads recipes, which are files of these keys.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from fastil import outside, settings
from fastil.data import DataConfig
from fastil.device import Precision, settle_precision
from fastil.errors import UserError
from fastil.evaluation import EvaluationConfig
from fastil.memory import MemoryConfig
from fastil.methods import METHODS, CorrectionConfig, LossConfig, MetaConfig, Method, MethodConfig
from fastil.models import ModelConfig, Network, build_network
from fastil.optimiser import TrainConfig
from fastil.plan import SamplerConfig
from fastil.protocol import Protocol, ProtocolConfig, build_protocol

PARTS: dict[str, type] = {
    "data": DataConfig,
    "protocol": ProtocolConfig,
    "memory": MemoryConfig,
    "model": ModelConfig,
    "method": MethodConfig,
    "loss": LossConfig,
    "meta": MetaConfig,
    "sampler": SamplerConfig,
    "correction": CorrectionConfig,
    "evaluation": EvaluationConfig,
    "train": TrainConfig,
}

# What says where and how fast, not what is trained: two runs that differ in these only are the same experiment.
RUNTIME_KEYS = {
    "data", "val", "verify", "image_column", "label_column", "max_pixels", "loader", "memory", "device", "compile",
    "checkpoint_every", "checkpoint_minutes", "track",
}  # fmt: skip
# What the machine or the source decides where it is left alone. A run keeps them, but is no other experiment by them:
# whether images were left out is told by the data.
INCIDENTAL_KEYS = {"precision", "bn", "on_corrupt"}

LOCAL_BN = 32  # images with which a process's own batch statistics are as good as those of the whole batch

Keys = dict[str, Any]

# Beginnings of keys, the longer ones first, that are read with some values of other keys only: when, and what to set.
# Each method says which of its keys are read.
READERS: dict[str, tuple[Callable[[Keys], bool], str]] = {
    "last_relu": (lambda k: ":" not in k["model"], "model=resnet32"),
    "size": (lambda k: k["dataset"] in ("folder", "imagenet"), "dataset=folder"),
    "image_column": (lambda k: k["dataset"] not in ("digits", "imagenet"), "dataset=folder"),
    "label_column": (lambda k: k["dataset"] not in ("digits", "imagenet"), "dataset=folder"),
    "exif": (lambda k: k["dataset"] not in ("digits", "imagenet"), "dataset=folder"),
    "max_pixels": (lambda k: k["dataset"] not in ("digits", "imagenet"), "dataset=folder"),
    "nca_margin": (lambda k: k["loss"] == "nca" and k["nca_variant"] == "paper", "loss=nca nca_variant=paper"),
    "nca_": (lambda k: k["loss"] == "nca", "loss=nca"),
    "meta_": (lambda k: k["loss"] == "meta_balanced", "loss=meta_balanced"),
    "exemplar_selection": (lambda k: k["exemplars_per_class"] != 0, "exemplars_per_class=20"),
    "finetune_": (lambda k: k["correction"] == "balanced_finetuning", "correction=balanced_finetuning"),
    "nme_": (lambda k: k["predictor"] == "nme", "predictor=nme"),
    "proxies": (lambda k: k["head"] == "proxies", "head=proxies"),
    "milestones": (lambda k: k["schedule"] == "multistep", "schedule=multistep"),
    "lr_drop": (lambda k: k["schedule"] == "multistep", "schedule=multistep"),
}


@dataclass(frozen=True)
class About:
    """What a recipe says of itself; no keys of a run."""

    description: str = ""
    published: Annotated[float, Field(ge=0, le=100, description="a percentage")] | None = None
    fidelity: str = ""


@dataclass(frozen=True)
class Recipe:
    """The effective configuration of a run."""

    name: str
    description: str
    published: float | None  # average incremental accuracy of the paper, percent
    fidelity: str  # how this recipe relates to the paper
    data: DataConfig
    protocol: ProtocolConfig
    memory: MemoryConfig
    model: ModelConfig
    method: MethodConfig
    loss: LossConfig
    meta: MetaConfig
    sampler: SamplerConfig
    correction: CorrectionConfig
    evaluation: EvaluationConfig
    train: TrainConfig
    of_methods: Mapping[str, Any]  # the validated `Config` of each method, by the method
    foreign: Mapping[str, Any]  # keys of a method whose code is not loaded
    code: Mapping[str, Any]  # from outside, as far as it is loaded, by what `method` and `model` call it
    sources: Mapping[str, str | None]  # sha256 of the source of that code, by `method` and `model`

    @property
    def procedure(self) -> type[Method]:
        """The class of the method. UserError where a run directory names code that this command does not."""
        if self._procedure is None:
            raise UserError(
                f"method={self.method.method}: code that a run directory names is not loaded; give method= here, too "
                f"(fastil predict and export-model: --method)"
            )
        return self._procedure

    @property
    def _procedure(self) -> type[Method] | None:
        return method_of(self.method.method, self.code)

    @property
    def predicts_by_method(self) -> bool:
        """Whether the method makes scores of its own out of logits, as far as its code is known."""
        return self._procedure is not None and self._procedure.predict is not Method.predict

    def build_method(self, width: int, num_classes: int, device: torch.device) -> Method:
        """The method of a run, for a network of this width."""
        make = partial(self.procedure, self.method, self.loss, width, device, self.of_methods, num_classes)
        return outside.imported(f"method={self.method.method}", make)

    def build_network(self, num_classes: int, seed: int) -> Network:
        """The network of a run. UserError where a run directory names code that this command does not."""
        maps = self._procedure is not None and self._procedure.reads_maps
        factory = self.code.get(self.model.model)
        return build_network(self.model, num_classes, seed, factory=factory, keeps_maps=maps)

    def build_protocol(self, num_classes: int, names: Sequence[str] | None = None) -> Protocol:
        """The protocol of a run on a data set of so many classes. names: of the classes, by id, if they are known."""
        return build_protocol(self.protocol, num_classes, names, self.train.seed)

    @property
    def holds_out(self) -> bool:
        """Whether images of every class stay out of training in an incremental step: Meta's B_t, BiC's second stage."""
        return self.loss.loss == "meta_balanced" or self.procedure.holds_out

    @property
    def reserves(self) -> bool:
        """Whether those are the same ones in every step, never trained on."""
        return self.procedure.reserves(self.keys())

    def held_out(self, quota: int) -> int:
        """How many of each class, of `quota` exemplars per class (2 or more): at least one, and never all of them."""
        meta = self.loss.loss == "meta_balanced"
        share = self.meta.meta_share if meta else self.procedure.held_out_share(self.keys())
        return min(quota - 1, max(1, round(share * quota)))

    def settled(self, device: torch.device, before: Precision | None = None) -> "Recipe":
        """The recipe with the precision that `precision=auto` means on this device, or in a run that has begun.

        before: the precision that its run directory holds; a run keeps it wherever it is resumed.
        """
        precision = self.train.precision
        if before is None:
            return self.in_precision(settle_precision(precision, device))
        # One that was asked for and differs is refused with the other settings that changed.
        return self.in_precision(before) if precision == "auto" else self

    def shared_by(self, processes: int, before: "Recipe | None" = None) -> "Recipe":
        """The recipe with what `bn=auto` means for so many processes, or in a run that has begun: `before`. One process
        has whole batches, and a run that it began keeps to them, but for layers from outside. Raises UserError for
        batches that are too small to be shared out."""
        batch = self.train.batch_size
        if batch < 2 * processes and processes > 1:
            raise UserError(
                f"batch_size={batch}: too few images for {processes} processes; start at most {max(1, batch // 2)}, or "
                f"raise batch_size"
            )
        if self.train.bn != "auto":
            return self
        enough = ":" in self.model.model if processes == 1 else batch // processes >= LOCAL_BN
        bn: Literal["auto", "local", "sync"] = "local" if enough else "sync"
        if before is not None and before.train.bn != "auto":
            bn = before.train.bn
        return dataclasses.replace(self, train=dataclasses.replace(self.train, bn=bn))

    @property
    def precision(self) -> Precision:
        """What a run of this recipe computes in: of one that is settled, or was read from a run directory."""
        assert self.train.precision != "auto"
        return self.train.precision

    def in_precision(self, precision: Precision) -> "Recipe":
        """The recipe, trained in this precision."""
        return dataclasses.replace(self, train=dataclasses.replace(self.train, precision=precision))

    def read_by(self, loader: str) -> "Recipe":
        """The recipe, its images read by this loader, which `loader=auto` has become."""
        return dataclasses.replace(self, data=dataclasses.replace(self.data, loader=loader))

    def keys(self) -> dict[str, Any]:
        """Every key with its value, flat."""
        parts = [getattr(self, part) for part in PARTS] + list(self.of_methods.values())
        return {key: value for part in parts for key, value in values_of(part).items()} | dict(self.foreign)

    def identity(self, *, seed: bool = True) -> dict[str, Any]:
        """The keys that decide what is trained; None for those that nothing reads with the others as they are."""
        ignored = RUNTIME_KEYS if seed else RUNTIME_KEYS | {"seed"}
        keys = {key: value for key, value in self.keys().items() if key not in ignored}
        keys |= {"bn": "sync"} if keys["bn"] == "auto" else {}  # as one process has it
        code = {f"code of {key}": value[:12] for key, value in self.sources.items() if value is not None}
        return {key: None if self.reader(key) else value for key, value in keys.items()} | code

    def reader(self, key: str) -> str | None:
        """A setting that would make this recipe read the key, where it does not."""
        owner = next((name for name, config in self.of_methods.items() if key in values_of(config)), None)
        if owner is not None or key == "temperature":
            if self._read_by_method is None or key in self._read_by_method:
                return None
            return "method=il_baseline" if owner is None else METHODS.get(owner, self.procedure).to_read(key)
        for prefix, (reads, advice) in READERS.items():
            if key.startswith(prefix) and key not in self.foreign:
                return None if reads(self.keys()) else advice
        return None

    @cached_property
    def _read_by_method(self) -> set[str] | None:
        """None: not known, because its code is not loaded."""
        return None if self._procedure is None else self._procedure.reads(self.keys())

    def differences(self, before: "Recipe") -> dict[str, Any]:
        """The settings that differ from those of another recipe, but for the seed, the runtime keys and the incidental
        ones."""
        ours, theirs, written = self.identity(seed=False), before.identity(seed=False), before.keys()
        # A key may only be read, or not be read any more, because of another one that was changed.
        return {
            key: value
            for key, value in self.keys().items()
            if key in ours and key not in INCIDENTAL_KEYS and ours[key] != theirs.get(key) and value != written.get(key)
        }

    def dump(self) -> str:
        """The recipe as YAML, every default filled in."""
        head = {
            "recipe": self.name,
            "description": self.description,
            "published": self.published,
            "fidelity": self.fidelity,
            **{f"{key}_source": value for key, value in self.sources.items()},
        }
        return settings.dump(head | self.keys())


def values_of(part: Any) -> dict[str, Any]:
    """The keys of a part, with their values."""
    return {field.name: getattr(part, field.name) for field in dataclasses.fields(part)}


def method_of(name: str, code: Mapping[str, Any]) -> type[Method] | None:
    """The class of a method. None: it comes from outside and is not loaded."""
    method: type[Method] | None = code.get(name, METHODS.get(name))
    return method
