"""Registration of the kernels as torch operators, `torch.ops.fastil.*`.

Each operator has a plain form (CPU), a Triton form (CUDA) and a shape-only form, which torch.compile, fake tensors and
CUDA graphs need. `Library.define` and `impl` cost a third of `custom_op` per call. Autograd functions on top of them
raise under forward-mode differentiation, where with `custom_op` they return a zero tangent.
"""

import importlib
from collections.abc import Callable
from subprocess import CalledProcessError
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastil.errors import UserError
from fastil.machine import lacks_for_triton

LIBRARY = torch.library.Library("fastil", "DEF")


def register(schema: str, *, plain: Callable[..., Any], cuda: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Define `torch.ops.fastil.NAME` from its schema and its three forms, which take the same arguments."""
    LIBRARY.define(schema)
    name = schema.split("(")[0]
    LIBRARY.impl(name, plain, "CPU")
    LIBRARY.impl(name, cuda, "CUDA")
    LIBRARY.impl(name, _undifferentiable(name), "Autograd")
    torch.library.register_fake(f"fastil::{name}", fake, lib=LIBRARY)


def _undifferentiable(name: str) -> Callable[..., Any]:
    """Return an operator's autograd form: it calls the operator, and raises RuntimeError if there is something to
    differentiate. The autograd functions of this package call operators with gradients switched off. Other callers,
    such as torch.func inside compiled code, which looks through those functions, would get a zero derivative.
    """

    def run(*arguments: Any) -> Any:
        for a in arguments:
            if isinstance(a, Tensor) and (
                (a.requires_grad and torch.is_grad_enabled())
                or torch._C._functorch.is_gradtrackingtensor(a)
                or forward_ad.unpack_dual(a).tangent is not None
            ):
                raise RuntimeError(
                    f"{name}: only its first derivative, in reverse mode and outside torch.func, is there"
                )
        with torch._C._AutoDispatchBelowAutograd():
            return getattr(torch.ops.fastil, name)(*arguments)

    return run


def jitted(module: str, function: str) -> Callable[..., Any]:
    """Return `function` of fastil.kernels.jit.`module`, imported at its first call and run on the device of its
    arguments. It raises ImportError without Triton, UserError if Triton lacks something to compile with, and ValueError
    for tensors on several devices.
    """

    def run(*args: Any) -> Any:
        try:
            launcher = getattr(importlib.import_module(f"fastil.kernels.jit.{module}"), function)
        except ModuleNotFoundError as error:
            if error.name != "triton":
                raise
            raise ImportError("fastil's CUDA kernels need Triton: pip install triton") from None
        device = args[0].device
        for tensor in args:
            if isinstance(tensor, Tensor) and tensor.ndim and tensor.device != device:
                raise ValueError(f"{function}: all tensors must be on {device}, not one on {tensor.device}")
        with torch.cuda.device(device):
            try:
                return launcher(*args)
            except (RuntimeError, OSError, CalledProcessError) as error:
                lacking = lacks_for_triton()  # which does not matter if Triton's cache has the kernel
                if lacking is None:
                    raise
                raise UserError(f"fastil's CUDA kernels: Triton needs {lacking}") from error

    return run


def scalar_tensor(value: float | Tensor) -> Tensor:
    """Return a 0-d tensor; a number stays on the CPU and becomes an argument, without a copy or a launch."""
    return value if isinstance(value, Tensor) else torch.tensor(value, device="cpu")


def refuse_second_order(name: str) -> None:
    """Raise RuntimeError if the backward function that calls this runs under create_graph=True: autograd cannot
    differentiate its gradient again, and a wrong answer must not be silent.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{name} is differentiable once only (create_graph=True asked for more); "
            "for second derivatives use plain torch, such as the formulas of fastil.losses"
        )
