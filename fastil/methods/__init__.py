"""The methods, one file each, and the parts that they combine. `registry` says how to add one from outside."""

import importlib
import pkgutil

from fastil.errors import UserError
from fastil.methods.classification_loss import ClassificationLoss, LossConfig
from fastil.methods.context import FeatureExtractor, MemoryContext, Meter, StepContext
from fastil.methods.corrections import CorrectionConfig
from fastil.methods.meta import MetaAlpha, MetaConfig
from fastil.methods.method import Keys, Method, MethodConfig
from fastil.methods.registry import METHODS, find, installed, name_of, register

for _file in pkgutil.iter_modules(__path__):  # each registers its own
    importlib.import_module(f"{__name__}.{_file.name}")

BUILT_IN = tuple(METHODS)


def configs_of(name: str, method: type[Method] | None = None) -> dict[str, type]:
    """Return the `Config` classes whose keys a recipe has, by the method that they belong to: those of all of fastil's
    methods and that of the recipe's own. method: None if its code is not loaded.
    """
    found: dict[str, type] = {}
    for key, known in ({key: METHODS[key] for key in BUILT_IN} | ({} if method is None else {name: method})).items():
        if known.Config is not None and known.Config not in found.values():  # a subclass may share its parent's
            found[key] = known.Config
    return found


def check_parts(name: str, method: type[Method], loss: LossConfig, head: str) -> None:
    """Raise UserError if the method does not go with the loss or the head."""
    if head not in method.heads:
        raise UserError(f"method={name} with head={head}: it trains head={' or '.join(method.heads)}")
    if loss.loss == "nca" and head == "linear":
        raise UserError("loss=nca is over similarities: it needs head=cosine or head=proxies")
    if loss.loss not in method.losses:
        raise UserError(f"method={name} with loss={loss.loss}: it has a loss of its own; set loss={method.losses[0]}")


__all__ = [
    "BUILT_IN",
    "METHODS",
    "ClassificationLoss",
    "CorrectionConfig",
    "FeatureExtractor",
    "Keys",
    "LossConfig",
    "MemoryContext",
    "MetaAlpha",
    "MetaConfig",
    "Meter",
    "Method",
    "MethodConfig",
    "StepContext",
    "check_parts",
    "configs_of",
    "find",
    "installed",
    "name_of",
    "register",
]
