"""PODNet's spatial distillation of feature maps: pooled energies, normalised, and their distance to the teacher's."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastil.kernels.less_forget import unit_difference
from fastil.kernels.registration import jitted, refuse_second_order, register
from fastil.losses import SHORTEST, differentiable_in, wide


@differentiable_in("maps")
def pod_spatial(maps: Sequence[Tensor], teacher_maps: Sequence[Tensor]) -> Tensor:
    """Return PODNet's spatial distillation (arXiv 2004.13513), as `fastil.losses.pod_spatial`, a float32 scalar: the
    mean over the batch and over the layers of the distance between the pooled and normalised maps.

    maps, teacher_maps: for each layer [B, C, H, W] in float32, bfloat16 or float16, computed in float32. On CUDA the
    kernel reads them channels-last; other layouts are copied, and gradients are channels-last.

    Differentiable once, in maps. A teacher that requires a gradient, a second derivative and a forward-mode one raise
    RuntimeError. The gradient keeps its relative accuracy when student and teacher are nearly equal, and is 0 when they
    are equal.
    """
    if not maps or len(maps) != len(teacher_maps):
        raise ValueError(f"as many maps as teacher_maps are needed, not {len(maps)} and {len(teacher_maps)}")
    for student, teacher in zip(maps, teacher_maps, strict=True):
        if student.ndim != 4 or student.shape != teacher.shape or len(student) != len(maps[0]):
            raise ValueError(
                "maps and teacher_maps must be [B, C, H, W] with one B, "
                f"not {[*student.shape]} and {[*teacher.shape]} where B = {len(maps[0])}"
            )
    value: Tensor = _Value.apply(*maps, *teacher_maps)  # type: ignore[no-untyped-call]
    return value


class _Value(torch.autograd.Function):
    """The student's maps of all layers, then the teacher's."""

    @staticmethod
    def forward(ctx: Any, *maps: Tensor) -> Tensor:
        layers = len(maps) // 2
        row_values, gradients = [], []
        for student, teacher in zip(maps[:layers], maps[layers:], strict=True):
            row_value, gradient = torch.ops.fastil.pod_spatial(student, teacher, layers)
            row_values.append(row_value)
            gradients.append(gradient)
        ctx.save_for_backward(*gradients)
        return torch.cat(row_values).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        refuse_second_order("pod_spatial")
        gradients = ctx.saved_tensors
        return *(gradient * grad for gradient in gradients), *(None for _ in gradients)


def plain(maps: Tensor, teacher: Tensor, layers: int) -> tuple[Tensor, Tensor]:
    """Return the operator in plain torch for one of `layers` layers: each image's part of the loss [B] and the
    gradient [B, C, H, W]."""
    x, y = wide(maps), wide(teacher)
    energy = _pooled(x * x)
    # Pool the difference. The difference of the pooled values would lose the digits they share.
    difference, norm, _ = unit_difference(energy, _pooled(y * y), _pooled((x - y) * (x + y)), [1, 2])
    distance = torch.linalg.vector_norm(difference, dim=[1, 2], keepdim=True)
    length = norm.clamp(min=SHORTEST)
    unit = energy / length
    # A vector that is too short is divided by the shortest length, a constant without a derivative.
    along = torch.where(norm < SHORTEST, 0, (unit * difference).sum([1, 2], keepdim=True))
    weight = 1 / (layers * max(1, len(x)))
    scale = torch.where(distance == 0, 0, 2 * weight / (length * distance))
    pooled_gradient = scale * (difference - along * unit)
    height = maps.shape[2]
    over_width, over_height = pooled_gradient[:, :, :height], pooled_gradient[:, :, height:]
    gradient = x * (over_width[:, :, :, None] + over_height[:, :, None, :])
    return distance[:, 0, 0] * weight, _gradient_like(maps).copy_(gradient)


def _pooled(x: Tensor) -> Tensor:
    """Return sums over the width and sums over the height, [B, C, H + W]."""
    return torch.cat((x.sum(3), x.sum(2)), 2)


def _gradient_like(maps: Tensor) -> Tensor:
    return torch.empty_like(maps, memory_format=torch.channels_last)


def _fake(maps: Tensor, teacher: Tensor, layers: int) -> tuple[Tensor, Tensor]:
    return maps.new_empty(maps.shape[0], dtype=torch.float32), _gradient_like(maps)


register(
    "pod_spatial(Tensor maps, Tensor teacher, int layers) -> (Tensor, Tensor)",
    plain=plain,
    cuda=jitted("pod_spatial", "pod_spatial"),
    fake=_fake,
)
