"""The network: a backbone and a head.

`model=module:factory` or `model=path/to/file.py:factory` names a backbone from outside: factory() returns a module that
takes images [B, 3, H, W] to features [B, d], or to (features, maps of the stages) for methods that read maps. Its
`feature_dim` or `num_features` is d.
"""

import contextlib
import difflib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from fastil import outside
from fastil.errors import UserError
from fastil.models.blocks import BatchNorm, scale_filters
from fastil.models.heads import CosineHead, Head, LinearHead, padded_width
from fastil.models.resnet_cifar import ResNetCifar, ResNetRebuffi
from fastil.models.resnet_imagenet import ResNet18
from fastil.settings import shown

MODELS = ("resnet8", "resnet14", "resnet20", "resnet32", "resnet32_rebuffi", "resnet18", "resnet18_pod")
Factory = Callable[[], nn.Module]  # of a backbone from outside


@dataclass(frozen=True)
class ModelConfig:
    """The network. The paper says "32-layer ResNet" (CIFAR) and "18-layer" (ImageNet) and leaves the variant open."""

    model: str = "resnet32"  # resnet8|14|20|32 | resnet32_rebuffi | resnet18 | resnet18_pod | module:factory
    last_relu: bool = True  # ReLU on the features; off in LUCIR's cosine networks and under PODNet's classifier
    stem: Literal["own", "7x7", "3x3"] = (
        "own"  # resnet18*: 7x7 with stride 2, or PODNet's 3x3 with 1 (3.8 times the work)
    )
    head: Literal["linear", "cosine", "proxies"] = "linear"  # cosine: LUCIR's; proxies: PODNet's, several per class
    proxies: Annotated[int, Field(ge=1, le=1000)] = 10  # of each class, with head=proxies
    weight_transfer: bool = False  # a factor for each filter of each convolution (meta-transfer learning; Mnemonics)

    def __post_init__(self) -> None:
        if self.model not in MODELS and ":" not in self.model:
            near = difflib.get_close_matches(self.model.lower(), MODELS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"use one of {', '.join(MODELS)}, or module:factory"
            if self.model.endswith(".py"):
                hint = f"write {self.model}:NAME, with the name of the function that returns the backbone"
            raise UserError(f"model={shown(self.model)}: unknown; {hint}")
        if self.stem != "own" and not self.model.startswith("resnet18"):
            raise UserError(f"stem={self.stem}: model={self.model} has another; use model=resnet18 or resnet18_pod")


class Output(NamedTuple):
    """The result of one forward pass."""

    features: Tensor  # [B, d], pooled, as the head sees them
    maps: list[Tensor]  # stage outputs, [B, C, H, W] each; empty if the network does not keep them
    logits: Tensor  # [B, W]; for a cosine head the similarities, before the scale
    scale: Tensor | None = None  # 0-d, of a cosine head, learned

    @property
    def scaled_logits(self) -> Tensor:
        """The logits that go into a softmax, [B, W]."""
        return self.logits if self.scale is None else self.scale * self.logits


class ExternalBackbone(nn.Module):
    """A backbone from outside, wrapped for the network. wants_maps: whether the method reads the stages' maps. Raises
    UserError if it is not a module of known width."""

    def __init__(self, name: str, module: nn.Module, wants_maps: bool) -> None:
        super().__init__()
        if not isinstance(module, nn.Module):
            raise UserError(f"model={name}: returns {type(module).__name__}, not a torch.nn.Module")
        if any(map(nn.parameter.is_lazy, (*module.parameters(), *module.buffers()))):
            raise UserError(f"model={name}: has lazy layers, such as LazyConv2d; give each layer its size")
        self.name, self.module, self.wants_maps = name, module, wants_maps
        width = getattr(module, "feature_dim", getattr(module, "num_features", None))
        if not isinstance(width, int):
            raise UserError(f"model={name}: the module needs `feature_dim`, an int: the width of its features")
        self.feature_dim = width

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return features [B, d] and the stages' maps, in the dtype of images [B, 3, H, W]. Raises UserError for
        features of another shape and for missing maps."""
        half = images.dtype == torch.bfloat16
        with torch.autocast(images.device.type, torch.bfloat16, enabled=half):  # its weights stay in float32
            out = self.module(images)
        features, maps = out if isinstance(out, tuple) else (out, [])
        if features.shape != (images.shape[0], self.feature_dim):  # len() would fix it in an export
            raise UserError(
                f"model={self.name}: features are {[*features.shape]}, not {[len(images), self.feature_dim]}; pool and "
                "flatten them"
            )
        if self.wants_maps and not maps:
            raise UserError(f"model={self.name}: the method reads the stages' maps; return (features, maps), too")
        return features.to(images.dtype), maps


class Network(nn.Module):
    """A backbone and a head; W is the padded number of classes of the whole run.

    keeps_maps: whether outputs hold the maps of the stages. Only a method that reads them (PODNet) asks for it, because
    a compiled step would write them out, and zero gradients for them.
    """

    def __init__(self, backbone: nn.Module, num_classes: int, config: ModelConfig, keeps_maps: bool = False) -> None:
        super().__init__()
        self.backbone, self.keeps_maps = backbone, keeps_maps
        self.width = padded_width(num_classes)
        dim = int(backbone.feature_dim)  # type: ignore[arg-type]
        self.head: Head
        if config.head == "linear":
            self.head = LinearHead(dim, self.width)
        else:
            self.head = CosineHead(dim, self.width, config.proxies if config.head == "proxies" else None)

    def forward(self, images: Tensor) -> Output:
        """Return features, maps and logits of images [B, 3, H, W]."""
        features, maps = self.backbone(images)
        logits, scale = self.head(features)
        return Output(features, maps if self.keeps_maps else [], logits, scale)

    @contextlib.contextmanager
    def as_formula(self) -> Iterator[None]:
        """Make forward passes differentiable twice and in forward mode inside the block."""
        before = getattr(self.head, "formula", None)
        try:
            if before is not None:
                self.head.formula = True
            yield
        finally:
            if before is not None:
                self.head.formula = before

    def synchronise(self, copies: int = 1) -> None:
        """Make batch normalisation train on the statistics of the whole batch, if several processes share one. copies:
        how many of them hold the same images. Raises UserError for a backbone from outside, whose layers are its own.
        """
        if isinstance(self.backbone, ExternalBackbone):
            raise UserError(f"bn=sync: model={self.backbone.name} has layers of its own; use bn=local")
        for part in self.modules():
            if isinstance(part, BatchNorm):
                part.copies = copies


def build_network(
    config: ModelConfig, num_classes: int, seed: int, *, factory: Factory | None = None, keeps_maps: bool = False
) -> Network:
    """Return the network of a recipe, initialised from the seed, channels-last, on the CPU. factory: of a backbone from
    outside. keeps_maps: see Network. Raises UserError if a backbone from outside is not loaded."""
    generator = torch.Generator().manual_seed(seed)
    name = config.model
    backbone: nn.Module
    with torch.random.fork_rng(devices=[]):  # torch's layers draw from the global generator before `initialise`
        if ":" in name:
            if factory is None:
                raise UserError(
                    f"model={name}: code that a run directory names is not loaded; give model= here, too "
                    f"(fastil predict and export-model: --model)"
                )
            torch.default_generator.manual_seed(seed)
            backbone = ExternalBackbone(name, outside.imported(f"model={name}", factory), keeps_maps)
        elif name == "resnet32_rebuffi":
            backbone = ResNetRebuffi(config.last_relu, generator)
        elif name.startswith("resnet18"):
            small = config.stem == "3x3" if config.stem != "own" else name == "resnet18_pod"
            backbone = ResNet18(config.last_relu, name == "resnet18_pod", generator, small)
        else:
            backbone = ResNetCifar(int(name.removeprefix("resnet")), config.last_relu, generator)
    if config.weight_transfer:
        scale_filters(backbone)
    network = Network(backbone, num_classes, config, keeps_maps)
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def find_factory(given: Any) -> tuple[str, Factory | None]:
    """Return the value of `model` and, for a backbone from outside, its factory: module:factory, imported, or the
    function itself. Raises UserError if it does not exist or is not a function with a name.

    A name from a run directory never reaches this, so reading a run runs no code that it names.
    """
    if not callable(given) and not (isinstance(given, str) and ":" in given):
        return given, None
    if isinstance(given, str):
        factory = outside.attribute(f"model={given}")
        if not callable(factory):
            raise UserError(f"model={given}: is no function or class that returns a backbone")
        return given, factory
    name = getattr(given, "__qualname__", "<lambda>")
    if "<lambda>" in name:
        called = "..."
        if isinstance(given, partial):
            arguments = [*map(repr, given.args), *(f"{key}={value!r}" for key, value in given.keywords.items())]
            called = f"{getattr(given.func, '__qualname__', given.func)}({', '.join(arguments)})"
        raise UserError(
            f"model={type(given).__name__}: give a function with a name, because the run builds the backbone twice "
            f"and a resume knows it by its source; write `def backbone(): return {called}`"
        )
    return f"{given.__module__}:{name}", given


def check_backbone(network: Network, height: int, width: int) -> None:
    """Raise UserError if a backbone from outside does not take images of this size or return what the method reads."""
    backbone, training = network.backbone, network.training
    if not isinstance(backbone, ExternalBackbone):
        return
    images = torch.zeros(2, 3, height, width, device=next(network.parameters()).device)
    with torch.no_grad():
        outside.imported(f"model={backbone.name}: fails on images {[*images.shape]}", partial(network.eval(), images))
    network.train(training)
