"""The launch of every kernel, and parts that several kernels share."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


def launch(kernel: Any, grid: tuple[int, ...], *args: object, num_warps: int, **constants: object) -> None:
    """Run a kernel. The ahead-of-time check replaces this function by one that only compiles."""
    if grid[0]:
        # Fusing a product into a sum is set explicitly, because the default differs between versions of Triton.
        kernel[grid](*args, num_warps=num_warps, enable_fp_fusion=True, **constants)


def scalar(value: float | Tensor, like: Tensor) -> float | Tensor:
    """Return a kernel argument: a 0-d tensor on the device of `like` as it is, one on the CPU as a number."""
    if isinstance(value, Tensor) and value.device != like.device:
        return value.item()
    return value


def power_of_two(number: int) -> int:
    """Return the smallest power of two that is at least `number`."""
    return max(1, 1 << (number - 1).bit_length())


def contiguous(tensor: Tensor | None) -> Tensor | None:
    """Return a tensor made contiguous; None stays None."""
    return None if tensor is None else tensor.contiguous()


def rows_like(tensor: Tensor, *shape: int) -> Tensor:
    """Return an empty float32 tensor with a value per row."""
    return torch.empty(*shape, dtype=torch.float32, device=tensor.device)


@triton.jit
def value_of(argument, dtype: tl.constexpr):
    """Return a scalar that is given as a number or as a pointer to one."""
    # One return: after a `return` inside nested conditions Triton also compiles what follows the inner one.
    if hasattr(argument, "dtype"):  # the interpreter passes floats as they are
        value = tl.load(argument).to(dtype) if argument.dtype.is_ptr() else argument.to(dtype)
    else:
        value = tl.cast(argument, dtype)
    return value


@triton.jit
def join4(a, b, c, d):
    """Return four tensors as [..., 2, 2], which one reduction takes in one round over the lanes instead of four."""
    return tl.join(tl.join(a, b), tl.join(c, d))


@triton.jit
def split4(x):
    """Return the four tensors that `join4` joined."""
    first, second = tl.split(x)
    a, b = tl.split(first)
    c, d = tl.split(second)
    return a, b, c, d
