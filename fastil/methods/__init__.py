"""Training procedures, one file each, and the parts that they combine."""

from collections.abc import Mapping
from typing import Any

import torch

from fastil.errors import UserError
from fastil.methods.bic import BiC, BiCConfig
from fastil.methods.classification import ClassificationLoss, LossConfig, StepContext
from fastil.methods.corrections import CorrectionConfig
from fastil.methods.icarl import ICarl, ICarlBCE, ICarlConfig
from fastil.methods.il_baseline import ILBaseline
from fastil.methods.lucir import Lucir, LucirConfig
from fastil.methods.meta import MetaAlpha, MetaConfig
from fastil.methods.method import Images, Memory, Meter, Method, MethodConfig
from fastil.methods.mnemonics import Mnemonics, MnemonicsConfig
from fastil.methods.podnet import Podnet, PodnetConfig
from fastil.methods.tpcil import Tpcil, TpcilConfig

METHODS: dict[str, type[Method]] = {
    "il_baseline": ILBaseline, "icarl": ICarl, "icarl_bce": ICarlBCE, "bic": BiC, "lucir": Lucir,
    "mnemonics": Mnemonics, "podnet": Podnet, "tpcil": Tpcil,
}  # fmt: skip

# Configurations of the procedures, by the part of a recipe that holds them.
METHOD_PARTS: dict[str, type] = {
    "icarl": ICarlConfig, "bic": BiCConfig, "lucir": LucirConfig, "mnemonics": MnemonicsConfig,
    "podnet": PodnetConfig, "tpcil": TpcilConfig,
}  # fmt: skip


def check_parts(config: MethodConfig, loss: LossConfig, head: str) -> None:
    """Raise UserError where parts do not go together."""
    method = METHODS[config.method]
    if head not in method.heads:
        raise UserError(f"method={config.method} with head={head}: it trains head={' or '.join(method.heads)}")
    if loss.loss == "nca" and head == "linear":
        raise UserError("loss=nca is over similarities: it needs head=cosine or head=proxies")
    if config.method == "icarl_bce" and loss.loss != "softmax":
        raise UserError(f"method=icarl_bce has a loss of its own; set loss=softmax instead of loss={loss.loss}")


def build_method(
    config: MethodConfig,
    loss: LossConfig,
    parts: Mapping[str, Any],
    *,
    width: int,
    num_classes: int,
    device: torch.device,
) -> Method:
    """The procedure of a recipe. parts: by the names of METHOD_PARTS."""
    return METHODS[config.method](config, loss, width, device, parts, num_classes)


__all__ = [
    "METHODS",
    "METHOD_PARTS",
    "BiC",
    "BiCConfig",
    "ClassificationLoss",
    "CorrectionConfig",
    "ICarl",
    "ICarlBCE",
    "ICarlConfig",
    "ILBaseline",
    "Images",
    "LossConfig",
    "Lucir",
    "LucirConfig",
    "Memory",
    "MetaAlpha",
    "MetaConfig",
    "Meter",
    "Method",
    "MethodConfig",
    "Mnemonics",
    "MnemonicsConfig",
    "Podnet",
    "PodnetConfig",
    "StepContext",
    "Tpcil",
    "TpcilConfig",
    "build_method",
    "check_parts",
]
