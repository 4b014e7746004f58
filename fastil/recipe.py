"""The configuration of a run: each part's own dataclass, gathered under flat keys.

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

# Keys that say where and how fast, not what is trained: runs that differ only in these are the same experiment.
RUNTIME_KEYS = {
    "data", "val", "verify", "image_column", "label_column", "max_pixels", "loader", "memory", "device", "compile",
    "checkpoint_every", "checkpoint_minutes", "track",
}  # fmt: skip
# Keys that the machine or the source decides unless they are set. A run keeps them, but they do not make it another
# experiment: the data says whether images were left out.
INCIDENTAL_KEYS = {"precision", "bn", "on_corrupt"}

LOCAL_BN = 32  # from that many images on, a process's batch statistics are as good as those of the whole batch

Keys = dict[str, Any]

# Prefixes of keys, longer ones first, that are read only with some values of other keys: when, and what to set. Each
# method says which of its own keys are read.
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
    """What a recipe says about itself. These are no keys of a run."""

    description: str = ""
    published: Annotated[float, Field(ge=0, le=100, description="a percentage")] | None = None
    fidelity: str = ""


@dataclass(frozen=True)
class Recipe:
    """The configuration of a run."""

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
    foreign: Mapping[str, Any]  # keys of a method that is not loaded
    code: Mapping[str, Any]  # code from outside, as far as it is loaded, by its name in `method` and `model`
    sources: Mapping[str, str | None]  # sha256 of the source of that code, by `method` and `model`

    @property
    def procedure(self) -> type[Method]:
        """The class of the method. Raises UserError for code that only a run directory names."""
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
        """Whether the method computes its own scores from logits, as far as its code is known."""
        return self._procedure is not None and self._procedure.predict is not Method.predict

    def build_method(self, width: int, num_classes: int, device: torch.device) -> Method:
        """Return the method of a run, for a network of this width."""
        make = partial(self.procedure, self.method, self.loss, width, device, self.of_methods, num_classes)
        return outside.imported(f"method={self.method.method}", make)

    def build_network(self, num_classes: int, seed: int) -> Network:
        """Return the network of a run. Raises UserError for code that only its run directory names."""
        maps = self._procedure is not None and self._procedure.reads_maps
        factory = self.code.get(self.model.model)
        return build_network(self.model, num_classes, seed, factory=factory, keeps_maps=maps)

    def build_protocol(self, num_classes: int, names: Sequence[str] | None = None) -> Protocol:
        """Return the protocol of a run on num_classes classes. names: the classes' names by id, if known."""
        return build_protocol(self.protocol, num_classes, names, self.train.seed)

    @property
    def holds_out(self) -> bool:
        """Whether images of every class stay out of training in an incremental step: Meta's B_t, BiC's second stage."""
        return self.loss.loss == "meta_balanced" or self.procedure.holds_out

    @property
    def reserves(self) -> bool:
        """Whether those images are the same in every step, and never trained on."""
        return self.procedure.reserves(self.keys())

    def held_out(self, quota: int) -> int:
        """Return how many images of each class are held out of `quota` exemplars (2 or more): at least one, never
        all.
        """
        meta = self.loss.loss == "meta_balanced"
        share = self.meta.meta_share if meta else self.procedure.held_out_share(self.keys())
        return min(quota - 1, max(1, round(share * quota)))

    def settled(self, device: torch.device, before: Precision | None = None) -> "Recipe":
        """Return the recipe with what `precision=auto` means on this device, or in a run that has begun.

        before: the precision in its run directory; a run keeps it wherever it is resumed.
        """
        precision = self.train.precision
        if before is None:
            return self.in_precision(settle_precision(precision, device))
        # A different precision that was asked for is refused with the other changed settings.
        return self.in_precision(before) if precision == "auto" else self

    def shared_by(self, processes: int, before: "Recipe | None" = None) -> "Recipe":
        """Return the recipe with what `bn=auto` means for this many processes, or in a run that has begun (`before`).

        A single process has whole batches, and a run that it began keeps to them, except for layers from outside.
        Raises UserError for batches that are too small to be shared out.
        """
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
        """The precision of a recipe that is settled or was read from a run directory."""
        assert self.train.precision != "auto"
        return self.train.precision

    def in_precision(self, precision: Precision) -> "Recipe":
        """Return the recipe in this precision."""
        return dataclasses.replace(self, train=dataclasses.replace(self.train, precision=precision))

    def read_by(self, loader: str) -> "Recipe":
        """Return the recipe with this loader, which `loader=auto` was resolved to."""
        return dataclasses.replace(self, data=dataclasses.replace(self.data, loader=loader))

    def keys(self) -> dict[str, Any]:
        """Return every key with its value, flat."""
        parts = [getattr(self, part) for part in PARTS] + list(self.of_methods.values())
        return {key: value for part in parts for key, value in values_of(part).items()} | dict(self.foreign)

    def identity(self, *, seed: bool = True) -> dict[str, Any]:
        """Return the keys that decide what is trained; None for those that nothing reads, given the others."""
        ignored = RUNTIME_KEYS if seed else RUNTIME_KEYS | {"seed"}
        keys = {key: value for key, value in self.keys().items() if key not in ignored}
        keys |= {"bn": "sync"} if keys["bn"] == "auto" else {}  # what one process does
        code = {f"code of {key}": value[:12] for key, value in self.sources.items() if value is not None}
        return {key: None if self.reader(key) else value for key, value in keys.items()} | code

    def reader(self, key: str) -> str | None:
        """Return a setting that would make this recipe read the key; None if it reads it."""
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
        """The keys that the method reads. None: not known, because its code is not loaded."""
        return None if self._procedure is None else self._procedure.reads(self.keys())

    def differences(self, before: "Recipe") -> dict[str, Any]:
        """Return the settings that differ from another recipe's, without seed, runtime keys and incidental ones."""
        ours, theirs, written = self.identity(seed=False), before.identity(seed=False), before.keys()
        # Whether a key is read may depend on another key that was changed.
        return {
            key: value
            for key, value in self.keys().items()
            if key in ours and key not in INCIDENTAL_KEYS and ours[key] != theirs.get(key) and value != written.get(key)
        }

    def dump(self) -> str:
        """Return the recipe as YAML, with every default filled in."""
        head = {
            "recipe": self.name,
            "description": self.description,
            "published": self.published,
            "fidelity": self.fidelity,
            **{f"{key}_source": value for key, value in self.sources.items()},
        }
        return settings.dump(head | self.keys())


def values_of(part: Any) -> dict[str, Any]:
    """Return the keys of a part with their values."""
    return {field.name: getattr(part, field.name) for field in dataclasses.fields(part)}


def method_of(name: str, code: Mapping[str, Any]) -> type[Method] | None:
    """Return the class of a method. None: it comes from outside and is not loaded."""
    method: type[Method] | None = code.get(name, METHODS.get(name))
    return method
