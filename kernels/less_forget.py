"""Distillation of features by their direction, 1 - cos: LUCIR's less-forget constraint and PODNet's flat term."""

from typing import Any

import torch
from torch import Tensor

from fastil.kernels.registration import jitted, refuse_second_order, register
from fastil.losses import SHORTEST, differentiable_in, wide

WIDEST = 8_192  # columns a Triton program holds in registers; wider features take the plain form on CUDA too


@differentiable_in("features")
def less_forget(features: Tensor, teacher_features: Tensor) -> Tensor:
    """Return the mean over the batch of 1 - cos(features, teacher_features), as `fastil.losses.less_forget`: a float32
    scalar.

    features, teacher_features: [B, d] in float32, bfloat16 or float16, computed in float32. A vector shorter than 1e-12
    has no direction, so its row counts 1 and has no gradient.

    Differentiable once, in features. A teacher that requires a gradient, a second derivative and a forward-mode one
    raise RuntimeError. The gradient keeps its relative accuracy when student and teacher are nearly equal.
    """
    if features.ndim != 2 or features.shape != teacher_features.shape:
        shapes = f"{[*features.shape]} and {[*teacher_features.shape]}"
        raise ValueError(f"features and teacher_features must both be [B, d], not {shapes}")
    value: Tensor = _Value.apply(features, teacher_features)  # type: ignore[no-untyped-call]
    return value


class _Value(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, teacher: Tensor) -> Tensor:
        row_value, gradient = torch.ops.fastil.less_forget(features, teacher)
        ctx.save_for_backward(gradient)
        value: Tensor = row_value.sum()
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        refuse_second_order("less_forget")
        return ctx.saved_tensors[0] * grad, None


def unit_difference(x: Tensor, y: Tensor, x_minus_y: Tensor, dim: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Return x / |x| - y / |y| along the dimensions `dim`, to the relative accuracy of x_minus_y, and |x| and |y|.

    The difference of the quotients would keep only the digits in which they differ. Instead, with k = |x| - |y| = <x -
    y, x + y> / (|x| + |y|), it is (x - y - k y / |y|) / |x|, or the same with x and y swapped if x is shorter.
    """
    x_norm = torch.linalg.vector_norm(x, dim=dim, keepdim=True)
    y_norm = torch.linalg.vector_norm(y, dim=dim, keepdim=True)
    x_length, y_length = x_norm.clamp(min=SHORTEST), y_norm.clamp(min=SHORTEST)
    k = (x_minus_y * (x + y)).sum(dim, keepdim=True) / (x_length + y_length)
    k = torch.where((x_norm < SHORTEST) | (y_norm < SHORTEST), x_length - y_length, k)
    shorter = torch.where(x_length < y_length, x / x_length, y / y_length)
    return (x_minus_y - k * shorter) / torch.maximum(x_length, y_length), x_norm, y_norm


def plain(features: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Return each row's part of the loss [B] and the gradient [B, d]: the operator in plain torch."""
    x, y = wide(features), wide(teacher)
    difference, x_norm, y_norm = unit_difference(x, y, x - y, [1])
    one_minus_cos = difference.square().sum(1, keepdim=True) / 2
    blank = (x_norm < SHORTEST) | (y_norm < SHORTEST)
    # The part of the difference that is orthogonal to x. <x / |x|, difference> is 1 - cos as well.
    length = x_norm.clamp(min=SHORTEST)
    gradient = torch.where(blank, 0, (difference - x / length * one_minus_cos) / length) / len(x)
    return torch.where(blank, 1, one_minus_cos)[:, 0] / len(x), _gradient_like(features).copy_(gradient)


def _gradient_like(features: Tensor) -> Tensor:
    return torch.empty_like(features, memory_format=torch.contiguous_format)


def _fake(features: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    return features.new_empty(features.shape[0], dtype=torch.float32), _gradient_like(features)


def _cuda(features: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    narrow = features.shape[1] <= WIDEST
    result: tuple[Tensor, Tensor] = (jitted("less_forget", "less_forget") if narrow else plain)(features, teacher)
    return result


register(
    "less_forget(Tensor features, Tensor teacher) -> (Tensor, Tensor)",
    plain=plain,
    cuda=_cuda,
    fake=_fake,
)
