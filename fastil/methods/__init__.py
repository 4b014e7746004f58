"""Training procedures, one file each."""

from fastil.methods.il_baseline import ILBaseline, ILBaselineConfig, StepContext

__all__ = ["ILBaseline", "ILBaselineConfig", "StepContext"]
