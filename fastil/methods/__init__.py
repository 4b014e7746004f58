"""Training procedures, one file each, and the parts that they combine."""

from fastil.methods.classification import ClassificationLoss, LossConfig, StepContext
from fastil.methods.corrections import CorrectionConfig
from fastil.methods.il_baseline import ILBaseline, MethodConfig
from fastil.methods.meta import MetaAlpha, MetaConfig

__all__ = [
    "ClassificationLoss",
    "CorrectionConfig",
    "ILBaseline",
    "LossConfig",
    "MetaAlpha",
    "MetaConfig",
    "MethodConfig",
    "StepContext",
]
