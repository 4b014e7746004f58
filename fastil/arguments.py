"""What losses and kernels ask of their arguments, said once: gradients that exist, numbers that are possible, and which
labels count. Only what the host knows is checked: reading a tensor would mean waiting for its device."""

import functools
import math
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

FLOAT32 = torch.finfo(torch.float32)
P = ParamSpec("P")
R = TypeVar("R")


def differentiable_in(*names: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorator of a function whose result has a derivative in the arguments `names` only. It raises RuntimeError if
    another argument requires a gradient, as torch's own functions do, instead of leaving that one without. Under
    torch.no_grad() nobody gets one, and nothing is raised."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        code = function.__code__
        order = code.co_varnames[: code.co_argcount]
        title = function.__qualname__.removesuffix(".__init__")

        @functools.wraps(function)
        def checked(*args: P.args, **keys: P.kwargs) -> R:
            if torch.is_grad_enabled():
                for name, value in (*zip(order, args, strict=False), *keys.items()):
                    if _requires_gradient(value) and name not in names:
                        raise RuntimeError(
                            f"{title} has no derivative in {name}, which requires a gradient: detach it or compute it "
                            "under torch.no_grad()"
                        )
            return function(*args, **keys)

        return checked

    return decorate


def _requires_gradient(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.requires_grad
    return isinstance(value, (list, tuple)) and any(map(_requires_gradient, value))


def check_scalar(name: str, value: float | Tensor, *, positive: bool = False) -> None:
    """Raise ValueError unless it is a 0-d tensor or a number that float32, in which all losses are computed, keeps
    finite, and above 0 if it must be positive."""
    if isinstance(value, Tensor):
        if value.ndim:
            raise ValueError(f"{name} must be a number or a 0-d tensor, not {[*value.shape]}")
    elif not (FLOAT32.tiny if positive else FLOAT32.min) <= value <= FLOAT32.max:
        raise ValueError(f"{name}={value}: must be finite{' and above 0' if positive else ''} in float32")


def check_integer(name: str, value: int, least: int = 0) -> None:
    """Raise ValueError unless it is an integer of at least `least`."""
    if value % 1 or value < least:
        raise ValueError(f"{name}={value}: must be an integer of at least {least}")


def check_classes(num_old: int | Tensor, num_seen: int | Tensor, width: int) -> None:
    """Raise ValueError unless they are numbers of classes, 0 <= num_old <= num_seen <= width, as far as they are
    numbers and no tensors."""
    for name, value in (("num_old", num_old), ("num_seen", num_seen)):
        check_scalar(name, value)
    old = 0 if isinstance(num_old, Tensor) else num_old
    seen = width if isinstance(num_seen, Tensor) else num_seen
    if old % 1 or seen % 1 or not 0 <= old <= seen <= width:
        raise ValueError(f"{num_old=}, {num_seen=}: must be numbers of classes, 0 <= num_old <= num_seen <= {width}")


def check_counts(counts: Tensor) -> None:
    """Raise ValueError unless they are the images of each class, [W]: none negative, infinite or NaN, not all 0. The
    values of a tensor that is on a device, or that only stands for one while code is traced, are not read."""
    if counts.ndim != 1 or counts.dtype == torch.bool or counts.is_complex():
        raise ValueError(f"counts must be [W], numbers of images of each class, not {counts.dtype} {[*counts.shape]}")
    real = type(counts) in (Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling()
    if counts.device.type != "cpu" or not real:
        return
    values = counts.tolist()
    for position, value in enumerate(values):
        if not 0 <= value < math.inf:
            raise ValueError(f"counts[{position}]={value}: a number of images is finite and not below 0")
    if not any(values):
        raise ValueError(f"counts={values}: at least one class must have images")


def check_integers(target: Tensor) -> None:
    if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        raise ValueError(f"target must hold integers, not {target.dtype}")


def labels(target: Tensor, num_classes: int | Tensor) -> tuple[Tensor, Tensor]:
    """The column of each row's class, and a factor of the row's term; nothing waits for the device.

    target: int [B]; num_classes: columns in which a class may lie. Returns int64 [B], 0 where there is none, and
    float32 [B]: 1; 0 for the labels -1 and -100 (torch's own), which say that the row has no class; NaN for any other
    label, which is a mistake.
    """
    check_integers(target)
    y = target.long()  # the smaller types have no -100, or wrap around to it
    inside = (y >= 0) & (y < num_classes)
    factor = inside.float().masked_fill_(~(inside | (y == -1) | (y == -100)), torch.nan)
    return y * inside, factor
