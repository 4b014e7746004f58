"""The cosine head of LUCIR and, with several proxies per class, PODNet's Local Similarity Classifier."""

from typing import Any

import torch
from torch import Tensor

from fastil.kernels.registration import jitted, refuse_second_order, register
from fastil.losses import check_scalar, differentiable_in

EPS = 1e-12  # F.normalize's


@differentiable_in("features", "weight", "scale")
def cosine_head(features: Tensor, weight: Tensor, scale: Tensor, sharpness: float = 1.0) -> Tensor:
    """Return the scaled cosine similarity of every image to every class, [B, W] in the dtype of features.

    features: [B, d] in float32, bfloat16 or float16. weight: [W, d], one proxy per class, or [W, P, d]; where its dtype
    differs it is rounded to the features'. scale: 0-d, on the device of features. With s_kp the cosine of a feature and
    proxy p of class k, in float32:

    - one proxy (LUCIR's CosineLinear, eq. 4 of Hou et al. 2019, "Learning a Unified Classifier Incrementally via
      Rebalancing"): y_k = scale * s_k, whatever the sharpness;
    - P proxies (PODNet's LSC, eq. 6 and 7 of arXiv 2004.13513): y_k = scale * sum_p softmax_p(sharpness * s_kp) s_kp.
      PODNet's released code puts s' = 2 s - 2, a negative squared distance, instead of s: with its factor gamma
      inside the softmax it computes 2 y - 2 of this function's y at sharpness = 2 gamma and scale = 1.

    A feature or proxy no longer than 1e-12 (F.normalize's eps; a class not seen yet is all zeros) has cosine 0 and gets
    gradient 0, where F.normalize would multiply the gradient by 1e12.

    Differentiable once, in features, weight and scale: a second derivative or a forward-mode one raises RuntimeError.
    Wrong shapes and a sharpness that is not finite raise ValueError, other dtypes TypeError.
    """
    if features.ndim != 2 or weight.ndim not in (2, 3) or weight.shape[-1] != features.shape[1]:
        raise ValueError(
            f"features and weight must be [B, d] and [W, d] or [W, P, d], not {[*features.shape]} and {[*weight.shape]}"
        )
    if scale.ndim:
        raise ValueError(f"scale must be a 0-d tensor, not {[*scale.shape]}")
    check_scalar("sharpness", sharpness)
    for name, tensor in (("features", features), ("weight", weight)):
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise TypeError(f"{name} must be float32, bfloat16 or float16, not {tensor.dtype}")
    similarities: Tensor = _CosineHead.apply(features, weight, scale, sharpness)  # type: ignore[no-untyped-call]
    return similarities


class _CosineHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, weight: Tensor, scale: Tensor, sharpness: float) -> Tensor:
        similarities, *saved = torch.ops.fastil.cosine_head(features, weight, scale, sharpness)
        ctx.save_for_backward(features, weight, scale, *saved)
        ctx.sharpness = sharpness
        result: Tensor = similarities
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        refuse_second_order("cosine_head")
        return *torch.ops.fastil.cosine_head_grad(grad, *ctx.saved_tensors, ctx.sharpness), None


def _rows(features: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return both as float32 matrices with one row per image or proxy."""
    return features.float(), weight.reshape(-1, weight.shape[-1]).to(features.dtype).float()


def _inverse_norm(rows: Tensor) -> Tensor:
    norm = rows.norm(dim=1)
    return torch.where(norm > EPS, 1 / norm, 0)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Return the product in float32, inside an autocast region too."""
    with torch.autocast("cpu", enabled=False):
        return a @ b


def _mean_over_proxies(cosines: Tensor, classes: int, sharpness: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the cosines as [B, W, P], their softmax over the proxies, and the mean under it, [B, W, 1]."""
    s = cosines.reshape(len(cosines), classes, cosines.shape[1] // classes)
    q = torch.softmax(sharpness * s, 2)
    return s, q, (q * s).sum(2, keepdim=True)


def plain(features: Tensor, weight: Tensor, scale: Tensor, sharpness: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the operator in plain torch: similarities [B, W] and, for its gradient, cosines [B, W * P] and the inverse
    norms [B] and [W * P], in float32."""
    x, v = _rows(features, weight)
    inv_x, inv_v = _inverse_norm(x), _inverse_norm(v)
    cosines = _product(x * inv_x[:, None], (v * inv_v[:, None]).T)
    _, _, mean = _mean_over_proxies(cosines, len(weight), sharpness)
    return (scale * mean[:, :, 0]).to(features.dtype), cosines, inv_x, inv_v


def plain_grad(
    grad: Tensor,
    features: Tensor,
    weight: Tensor,
    scale: Tensor,
    cosines: Tensor,
    inv_x: Tensor,
    inv_v: Tensor,
    sharpness: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients in features, weight and scale, from the similarities' gradient and what `plain` returned."""
    x, v = _rows(features, weight)
    x_hat, v_hat = x * inv_x[:, None], v * inv_v[:, None]
    s, q, mean = _mean_over_proxies(cosines, len(weight), sharpness)
    a = (grad.float()[:, :, None] * q * (1 + sharpness * (s - mean))).reshape(cosines.shape)
    along = a * cosines  # the part of each product that only changes the vector's length
    dx = scale * inv_x[:, None] * (_product(a, v_hat) - x_hat * along.sum(1)[:, None])
    dv = scale * inv_v[:, None] * (_product(a.T, x_hat) - v_hat * along.sum(0)[:, None])
    dscale = (grad * mean[:, :, 0]).sum()
    return dx.to(features.dtype), dv.reshape(weight.shape).to(weight.dtype), dscale.to(scale.dtype)


def _fake(features: Tensor, weight: Tensor, scale: Tensor, sharpness: float) -> tuple[Tensor, ...]:
    batch, proxies = features.shape[0], weight.shape[:-1].numel()
    saved = [features.new_empty(shape, dtype=torch.float32) for shape in ((batch, proxies), (batch,), (proxies,))]
    return features.new_empty(batch, len(weight)), *saved


def _fake_grad(grad: Tensor, features: Tensor, weight: Tensor, scale: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return features.new_empty(features.shape), weight.new_empty(weight.shape), scale.new_empty(())


register(
    "cosine_head(Tensor features, Tensor weight, Tensor scale, float sharpness) -> (Tensor, Tensor, Tensor, Tensor)",
    plain=plain,
    cuda=jitted("cosine_head", "cosine_head"),
    fake=_fake,
)
register(
    "cosine_head_grad(Tensor grad, Tensor features, Tensor weight, Tensor scale, Tensor cosines, Tensor inv_x,"
    " Tensor inv_v, float sharpness) -> (Tensor, Tensor, Tensor)",
    plain=plain_grad,
    cuda=jitted("cosine_head", "cosine_head_grad"),
    fake=_fake_grad,
)
