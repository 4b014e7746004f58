"""fastil's kernels, one file each: the plain form, which defines the result and runs on the CPU, and the registration
with torch. The Triton forms are in `jit/` and load on first use on a GPU.
"""

from fastil.kernels.alpha_hypergradient import alpha_hypergradient
from fastil.kernels.augment import augment
from fastil.kernels.cosine_head import cosine_head
from fastil.kernels.crop_resize import crop_resize
from fastil.kernels.herd import herd
from fastil.kernels.incremental_loss import incremental_loss, incremental_loss_grad
from fastil.kernels.less_forget import less_forget
from fastil.kernels.modules import BalancedSoftmaxLoss, IncrementalLoss
from fastil.kernels.pod_spatial import pod_spatial

__all__ = [
    "BalancedSoftmaxLoss",
    "IncrementalLoss",
    "alpha_hypergradient",
    "augment",
    "cosine_head",
    "crop_resize",
    "herd",
    "incremental_loss",
    "incremental_loss_grad",
    "less_forget",
    "pod_spatial",
]
