"""Training procedures, one file each, and the parts that they combine. `registry` says how one comes from outside."""

import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

import torch

from fastil.errors import UserError
from fastil.methods.classification_loss import ClassificationLoss, LossConfig, StepContext
from fastil.methods.corrections import CorrectionConfig
from fastil.methods.meta import MetaAlpha, MetaConfig
from fastil.methods.method import Images, Keys, Memory, Meter, Method, MethodConfig
from fastil.methods.registry import METHODS, find, known_as, register

for _file in pkgutil.iter_modules(__path__):  # each registers its own
    importlib.import_module(f"{__name__}.{_file.name}")

BUILT_IN = tuple(METHODS)


def configs_of(name: str) -> dict[str, type]:
    """The classes of the keys that a recipe with this method has, by the method that they belong to: those of all
    methods that come with fastil, and its own."""
    found: dict[str, type] = {}
    for key in dict.fromkeys((*BUILT_IN, name)):
        config = METHODS[key].Config if key in METHODS else None
        if config is not None and config not in found.values():  # a subclass may have that of its parent
            found[key] = config
    return found


def check_parts(config: MethodConfig, loss: LossConfig, head: str) -> None:
    """Raise UserError where parts do not go together."""
    method = METHODS[config.method]
    if head not in method.heads:
        raise UserError(f"method={config.method} with head={head}: it trains head={' or '.join(method.heads)}")
    if loss.loss == "nca" and head == "linear":
        raise UserError("loss=nca is over similarities: it needs head=cosine or head=proxies")
    if loss.loss not in method.losses:
        raise UserError(
            f"method={config.method} with loss={loss.loss}: it has a loss of its own; set loss={method.losses[0]}"
        )


def build_method(
    config: MethodConfig,
    loss: LossConfig,
    parts: Mapping[str, Any],
    *,
    width: int,
    num_classes: int,
    device: torch.device,
) -> Method:
    """The procedure of a recipe. parts: of `configs_of`, by the same names."""
    return METHODS[config.method](config, loss, width, device, parts, num_classes)


__all__ = [
    "BUILT_IN",
    "METHODS",
    "ClassificationLoss",
    "CorrectionConfig",
    "Images",
    "Keys",
    "LossConfig",
    "Memory",
    "MetaAlpha",
    "MetaConfig",
    "Meter",
    "Method",
    "MethodConfig",
    "StepContext",
    "build_method",
    "check_parts",
    "configs_of",
    "find",
    "known_as",
    "register",
]
