"""The hot paths of fastil, one file each, with the plain form that gives it its meaning and runs on the CPU."""

from fastil.kernels.augment import augment
from fastil.kernels.herd import herd
from fastil.kernels.incremental_loss import incremental_loss

__all__ = ["augment", "herd", "incremental_loss"]
