"""Typed configuration: each part's own dataclass, gathered under flat keys.

A recipe is a YAML file of keys with a `base:` parent, `description`, `published` (average incremental accuracy in
percent) and `fidelity`. Every key of every part is set at the top level, in the file or as KEY=VALUE.
"""

import contextlib
import dataclasses
import difflib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import torch
import yaml
from pydantic import Field

from fastil import outside, settings
from fastil.data import DataConfig
from fastil.device import Precision, settle_precision
from fastil.errors import UserError
from fastil.evaluation import EvaluationConfig
from fastil.memory import MemoryConfig
from fastil.methods import (
    BUILT_IN,
    METHODS,
    CorrectionConfig,
    LossConfig,
    MetaConfig,
    Method,
    MethodConfig,
    check_parts,
    configs_of,
    find,
    installed,
    name_of,
)
from fastil.models import ModelConfig, Network, build_network, find_factory
from fastil.optimiser import TrainConfig
from fastil.plan import SamplerConfig
from fastil.protocol import ProtocolConfig
from fastil.settings import shown

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
    "data", "val", "verify", "image_column", "label_column", "max_pixels", "memory", "device", "compile",
    "checkpoint_every", "checkpoint_minutes",
}  # fmt: skip
# What the machine or the source decides where it is left alone. A run keeps them, but is no other experiment by them:
# whether images were left out is told by the data.
INCIDENTAL_KEYS = {"precision", "loader", "on_corrupt"}

Keys = dict[str, Any]
DEEPEST = 10  # parents of a recipe

# Beginnings of keys, the longer ones first, that are read beside some values of other keys only: when, and what to set.
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
                f"method={self.method.method}: code that a run directory names is not loaded; give method= here, too"
            )
        return self._procedure

    @property
    def _procedure(self) -> type[Method] | None:
        return _method_of(self.method.method, self.code)

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

    @property
    def precision(self) -> Precision:
        """What a run of this recipe computes in: of one that is settled, or was read from a run directory."""
        assert self.train.precision != "auto"
        return self.train.precision

    def in_precision(self, precision: Precision) -> "Recipe":
        """The recipe, trained in this precision."""
        return dataclasses.replace(self, train=dataclasses.replace(self.train, precision=precision))

    def keys(self) -> dict[str, Any]:
        """Every key with its value, flat."""
        parts = [getattr(self, part) for part in PARTS] + list(self.of_methods.values())
        return {key: value for part in parts for key, value in values_of(part).items()} | dict(self.foreign)

    def identity(self, *, seed: bool = True) -> dict[str, Any]:
        """The keys that decide what is trained; None for those that nothing reads beside the others."""
        ignored = RUNTIME_KEYS if seed else RUNTIME_KEYS | {"seed"}
        keys = {key: value for key, value in self.keys().items() if key not in ignored}
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

    def differences(self) -> dict[str, Any] | None:
        """The settings that differ from those of fastil's own recipe of this name, but for the seed, the runtime keys
        and the incidental ones. None: no such recipe comes with it."""
        before = shipped(self.name)
        if before is None:
            return None
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


def names() -> list[str]:
    """Recipes that come with fastil."""
    return sorted(
        f.name.removesuffix(".yaml")
        for f in resources.files("fastil.recipes").iterdir()
        if f.name.endswith(".yaml") and f.name != "tables.yaml"
    )


def shipped(name: str) -> Recipe | None:
    """The recipe of this name that comes with fastil. A name out of a run directory may be anything, also the path of a
    file that names code: that is not read."""
    return load(name) if name in names() else None


def load(name: str, overrides: Iterable[str] | Keys = (), **paths: str | None) -> Recipe:
    """A recipe by name, or by the path of a YAML file, with KEY=VALUE overrides, or a dictionary of them; paths: the
    keys `data` and `val`. What `method` and `model` name outside the package is imported; a dictionary may hold the
    class and the function themselves."""
    if isinstance(overrides, dict):
        given = {key: settings.from_python(value) for key, value in overrides.items()}
    else:
        given = dict(map(settings.parse_override, overrides))
    values = _read(name) | given | {key: path for key, path in paths.items() if path is not None}
    method = values.get("method", MethodConfig.method)
    procedure = find(method)
    values["method"] = name_of(procedure) if isinstance(method, type) else method
    given_model, factory = find_factory(values.get("model", ModelConfig.model))
    values["model"] = given_model
    outer: dict[str, Any] = {"method": procedure} if values["method"] not in BUILT_IN else {}
    outer |= {} if factory is None else {"model": factory}
    code = {values[key]: thing for key, thing in outer.items()}
    sources = {key: outside.source_hash(thing) for key, thing in outer.items()}
    keys = _parts_of(PARTS | configs_of(values["method"], procedure))
    for key in given:
        _known(key, keys)
    recipe = _build(Path(name).stem, values, code, sources)
    try:
        if recipe.method.method not in BUILT_IN:
            recipe.dump()
    except yaml.YAMLError as error:
        raise UserError(f"method={recipe.method.method}: a key cannot be written as YAML: {error.args[0]}") from None
    for key, value in given.items():
        reader = recipe.reader(key)
        if reader:
            raise UserError(f"{key}={shown(value)}: nothing reads it here; set {reader} as well, or leave it out")
    return recipe


def read_effective(path: Path, code: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe.yaml of a run directory. code: from outside, for what the recipe calls it; nothing is imported."""
    try:
        text = path.read_text()
        values = settings.parse_mapping(text, str(path))
        name = values.pop("recipe")
        # Cut off: defaults must not fill it up.
        if not text.endswith("\n") or "checkpoint_every" not in values or not isinstance(name, str):
            raise KeyError
        if values["precision"] == "auto":  # older ones, from before it was settled when a run starts
            values["precision"] = _older_auto(path.parent, str(values["device"]))
    except (OSError, UserError, UnicodeDecodeError, KeyError):
        raise UserError(f"{path}: missing or damaged; is this a run directory of fastil?") from None
    with contextlib.suppress(UserError):  # it must stay readable without what is broken
        installed(str(values.get("method")))
    sources = {key: values.pop(f"{key}_source", None) for key in ("method", "model")}
    return _build(name, values, code or {}, {key: str(value) for key, value in sources.items() if value is not None})


def _older_auto(run: Path, device: str) -> Precision:
    """What precision=auto meant before it was stored: bf16 on CUDA. Where device=auto took a run, its timings.json
    tells once a step is done."""
    if device != "auto":
        return "bf16" if device.startswith("cuda") else "fp32"
    try:
        name = json.loads((run / "timings.json").read_bytes())["machine"]["device"]
    except (OSError, ValueError, LookupError, TypeError):
        return "fp32"
    return "fp32" if str(name).startswith("CPU") else "bf16"


def _method_of(name: str, code: Mapping[str, Any]) -> type[Method] | None:
    """None: it comes from outside and is not loaded."""
    method: type[Method] | None = code.get(name, METHODS.get(name))
    return method


def _read(name: str, children: tuple[str, ...] = ()) -> dict[str, Any]:
    """The keys of a recipe file over those of its parents."""
    if name in children:
        raise UserError(f"{name}: is its own parent; change a base")
    if len(children) > DEEPEST:
        raise UserError(f"{children[0]}: has more than {DEEPEST} parents, {shown(name)} among them; change a base")
    values = settings.parse_mapping(_text_of(name), name)
    for key, kinds in (("base", (".yaml", ".yml")), ("method", (".py",)), ("model", (".py",))):
        place, colon, attribute = str(values.get(key)).partition(":")
        if place.endswith(kinds) and name not in names():  # a path, from the folder of this file
            values[key] = f"{Path(name).parent / place}{colon}{attribute}"
    parent = values.pop("base", None)
    if parent is None:
        return values
    # What was published belongs to the very recipe that says so, not to those that derive from it.
    parent = str(parent)
    return {key: value for key, value in _read(parent, (*children, name)).items() if key != "published"} | values


def _text_of(name: str) -> str:
    """A recipe that comes with fastil, or a file of the user's own."""
    if name in names():
        return resources.files("fastil.recipes").joinpath(f"{name}.yaml").read_text()
    if not name.endswith((".yaml", ".yml")):
        near = difflib.get_close_matches(name, names(), n=1)
        hint = f"did you mean {near[0]}?" if near else "fastil recipes lists them"
        raise UserError(f"unknown recipe {shown(name)}: {hint}")
    try:
        if Path(name).exists() and not Path(name).is_file():  # a pipe would be waited for, for ever
            raise OSError(None, "not a file")
        with open(name, encoding="utf-8") as file:
            return file.read(settings.MOST_TEXT + 1)
    except (OSError, ValueError) as error:  # ValueError: no text, or a name that no file can have
        reason = getattr(error, "strerror", None) or "not a text file"
        raise UserError(
            f"{shown(name)}: {reason}; give a recipe's name (fastil recipes lists them) or a YAML file"
        ) from None


def _parts_of(configs: Mapping[str, type]) -> dict[str, str]:
    """The part that each key belongs to. UserError where a method from outside has a key that is taken."""
    heads = ("recipe", "description", "published", "fidelity", "base", "method_source", "model_source")
    parts = dict.fromkeys(heads, "")
    for part, config in configs.items():
        for field in dataclasses.fields(config):
            if parts.setdefault(field.name, part) != part:
                raise UserError(f"method={part}: its key {field.name} is taken; rename it in {config.__name__}")
    return {key: part for key, part in parts.items() if part}


def _known(key: str, keys: Mapping[str, str]) -> str:
    if key in keys:
        return key
    near = [k for k in keys if k.startswith(key)] or difflib.get_close_matches(key, keys, n=1, cutoff=0.6)
    hint = f"did you mean {' or '.join(near)}?" if near else f"keys are {', '.join(sorted(keys))}"
    raise UserError(f"unknown key {shown(key)}: {hint}")


def _build(name: str, values: Keys, code: Mapping[str, Any], sources: Mapping[str, str | None]) -> Recipe:
    """code: what of it is loaded; without the method's, unknown keys may be its own."""
    about = settings.build(About, {key: values.pop(key) for key in values_of(About()) if key in values})
    method = str(values.get("method", MethodConfig.method))
    procedure = _method_of(method, code)
    configs = PARTS | configs_of(method, procedure)
    keys = _parts_of(configs)
    unknown = {key: values.pop(key) for key in list(values) if procedure is None and key not in keys}
    parts: dict[str, Keys] = {part: {} for part in configs}
    for key, value in values.items():
        parts[keys[_known(key, keys)]][key] = value
    built: dict[str, Any] = {part: settings.build(config, parts[part]) for part, config in configs.items()}
    own = {part: built.pop(part) for part in configs if part not in PARTS}
    if procedure is not None:
        check_parts(method, procedure, built["loss"], built["model"].head)
    code = {name: thing for name, thing in code.items() if name in (method, built["model"].model)}
    return Recipe(name, **values_of(about), of_methods=own, foreign=unknown, code=code, sources=sources, **built)
