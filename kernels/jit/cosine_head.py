"""The cosine head: both norms, the product and the mean over the proxies in one launch, and its gradient.

Forward, one launch. A program takes a tile of images and of proxies (those of whole classes, padded to a power of two),
runs over the feature dimension once and sums the product and the squares of both sides. Normalising features and weight
first would cost a launch and a pass over memory each.

Backward, with S the cosines and A = dL/dy dy/dS / scale. With more than one proxy, one launch gives A. Then the same
kernel serves features (R = features, X = weight) and weight (R = weight, X = features, A and S transposed):

    dR = scale / |R| (A @ X_hat - R_hat * rowsum(A * S)),  hat: divided by its norm

The product is taken in the features' dtype and summed in float32; float32 is not rounded to TF32. Everything outside
the products is float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastil.kernels.jit.launching import LOG2E, launch, power_of_two, rows_like

EPS_SQUARED = tl.constexpr(1e-24)
PROGRAMS = 128  # about as many as a large GPU has multiprocessors
TILES = ((32, 64), (16, 64), (16, 32))
MEAN_BLOCK = 1_024  # cosines per program of the gradient of the mean over the proxies


@triton.jit
def load_operand(POINTER, offset, inside, dtype: tl.constexpr, UPCAST: tl.constexpr):
    """Load a tile for tl.dot in the dtype of the product. UPCAST: rounded to that dtype but held in float32, because
    the interpreter's product of bfloat16 is wrong.
    """
    tile = tl.load(POINTER + offset, mask=inside, other=0.0).to(dtype)
    if UPCAST:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def inverse_norm(squares):
    """Return 1 / norm of rows, [R], from their squares [R, C]; 0 for a row shorter than 1e-12, whose cosines and
    gradient are then 0.
    """
    square = tl.sum(squares, 1)
    some = square > EPS_SQUARED
    return tl.where(some, tl.rsqrt(tl.where(some, square, 1.0)), 0.0)


@triton.jit
def mean_over_proxies(s, is_proxy, sharpness):
    """Return the softmax over the last axis, the proxies, and the mean of the cosines under it.

    s, is_proxy: [.., K, PADDED]
    """
    t = tl.where(is_proxy, s * (sharpness * LOG2E), float("-inf"))
    e = tl.exp2(t - tl.max(t, -1, keep_dims=True))
    q = e / tl.sum(e, -1, keep_dims=True)
    return q, tl.sum(q * s, -1, keep_dims=True)


@triton.jit(do_not_specialize=["batch", "sharpness"])
def cosine_head_forward(
    X,  # [B, D] float: features
    V,  # [W * P, D] float: weight
    SCALE,  # [] float
    Y,  # [B, W] as X: similarities
    S,  # [B, W * P] float32: cosines
    INV_X, INV_V,  # [B], [W * P] float32: inverse norms
    batch, sharpness,
    D: tl.constexpr, W: tl.constexpr, P: tl.constexpr, PADDED: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Compute a tile of BLOCK_B images and BLOCK_N proxies, PADDED of each class, per program."""
    classes: tl.constexpr = BLOCK_N // PADDED
    row = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    live = row < batch
    slot = tl.arange(0, BLOCK_N)
    k = tl.program_id(1) * classes + slot // PADDED
    p = slot % PADDED
    n = k * P + p
    used = (k < W) & (p < P)
    s = tl.zeros([BLOCK_B, BLOCK_N], tl.float32)
    squares_x = tl.zeros([BLOCK_B, BLOCK_D], tl.float32)
    squares_v = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for start in range(0, D, BLOCK_D):
        col = (start + tl.arange(0, BLOCK_D))[None, :]
        x = load_operand(X, row[:, None] * D + col, live[:, None] & (col < D), X.dtype.element_ty, UPCAST)
        v = load_operand(V, n[:, None] * D + col, used[:, None] & (col < D), X.dtype.element_ty, UPCAST)
        s = tl.dot(x, tl.trans(v), s, input_precision="ieee")
        x = x.to(tl.float32)
        v = v.to(tl.float32)
        squares_x += x * x
        squares_v += v * v
    inv_x = inverse_norm(squares_x)
    inv_v = inverse_norm(squares_v)
    s = s * inv_x[:, None] * inv_v[None, :]
    tl.store(S + row[:, None] * (W * P) + n[None, :], s, mask=live[:, None] & used[None, :])
    if tl.program_id(1) == 0:
        tl.store(INV_X + row, inv_x, mask=live)
    if tl.program_id(0) == 0:
        tl.store(INV_V + n, inv_v, mask=used)
    if P > 1:
        is_proxy = (tl.arange(0, PADDED) < P)[None, None, :]
        _, s = mean_over_proxies(tl.reshape(s, [BLOCK_B, classes, PADDED]), is_proxy, sharpness)
        s = tl.reshape(s, [BLOCK_B, classes])
    k = tl.program_id(1) * classes + tl.arange(0, classes)
    y = s * tl.load(SCALE).to(tl.float32)
    tl.store(Y + row[:, None] * W + k[None, :], y.to(Y.dtype.element_ty), mask=live[:, None] & (k < W)[None, :])


@triton.jit(do_not_specialize=["sharpness"])
def mean_gradient(
    DY,  # [B, W] float
    S,  # [B, W * P] float32: cosines
    A,  # [B, W * P] as DY: DY times the derivative of the mean over the proxies in each cosine
    DSCALE,  # [B, blocks] float32: each program's part of the derivative in the scale
    sharpness,
    W: tl.constexpr, P: tl.constexpr, PADDED: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    """Compute CLASSES classes of one image per program."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * CLASSES + tl.arange(0, CLASSES)[:, None]
    p = tl.arange(0, PADDED)[None, :]
    at = row * (W * P) + k * P + p
    used = (k < W) & (p < P)
    dy = tl.load(DY + row * W + k, mask=k < W, other=0.0).to(tl.float32)
    s = tl.load(S + at, mask=used, other=0.0)
    q, mean = mean_over_proxies(s, p < P, sharpness)
    a = dy * q * (1.0 + sharpness * (s - mean))
    tl.store(A + at, a.to(A.dtype.element_ty), mask=used)
    tl.store(DSCALE + row * tl.num_programs(1) + tl.program_id(1), tl.sum(dy * mean))


@triton.jit(do_not_specialize=["batch"])
def cosine_head_backward(
    A,  # [B, N] float
    S,  # [B, N] float32: cosines
    R, INV_R,  # [B, D] or, OF_WEIGHT, [N, D] float, and its inverse norms
    X, INV_X,  # the other side
    SCALE,  # [] float
    DR,  # as R: the gradient
    ROW_SUM,  # of A * S, float32 as long as R, or None
    batch,
    D: tl.constexpr, N: tl.constexpr, OF_WEIGHT: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Compute a tile of the gradient per program."""
    row = (tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R))[:, None]
    col = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
    if OF_WEIGHT:
        rows, inner = N, batch
    else:
        rows, inner = batch, N
    g = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    products = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
    for start in range(0, inner, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        at = k[None, :].to(tl.int64) * N + row if OF_WEIGHT else row * N + k[None, :]
        inside = (row < rows) & (k < inner)[None, :]
        a = load_operand(A, at, inside, A.dtype.element_ty, UPCAST)
        s = tl.load(S + at, mask=inside, other=0.0)
        inv_x = tl.load(INV_X + k, mask=k < inner, other=0.0)
        x = load_operand(
            X, k[:, None].to(tl.int64) * D + col, (k < inner)[:, None] & (col < D), A.dtype.element_ty, UPCAST
        )
        x_hat = (x.to(tl.float32) * inv_x[:, None]).to(x.dtype)
        g = tl.dot(a, x_hat, g, input_precision="ieee")
        products += a.to(tl.float32) * s
    row_sum = tl.sum(products, 1, keep_dims=True)
    if ROW_SUM is not None:  # noqa: SIM102 (known when compiling, unlike the next condition)
        if tl.program_id(1) == 0:
            tl.store(ROW_SUM + row, row_sum, mask=row < rows)
    inside = (row < rows) & (col < D)
    r = load_operand(R, row * D + col, inside, A.dtype.element_ty, UPCAST).to(tl.float32)
    inv_r = tl.load(INV_R + row, mask=row < rows, other=0.0)
    g = (g - r * inv_r * row_sum) * (inv_r * tl.load(SCALE).to(tl.float32))
    tl.store(DR + row * D + col, g.to(DR.dtype.element_ty), mask=inside)


def tile(rows: int, columns: int) -> tuple[int, int]:
    """Return the largest tile that still gives about every multiprocessor one: at these sizes the time goes into a
    program's chain of loads, not into arithmetic.
    """
    for block in TILES:
        if triton.cdiv(rows, block[0]) * triton.cdiv(columns, block[1]) >= PROGRAMS:
            return block
    return TILES[-1]


def inner_block(dtype: torch.dtype) -> int:
    """Return the columns per turn of a product. float32 uses no tensor cores and keeps tiles in the few registers."""
    return 16 if dtype == torch.float32 else 64


def cosine_head(
    features: Tensor, weight: Tensor, scale: Tensor, sharpness: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch the kernel. Arguments and results as those of `fastil.kernels.cosine_head.plain`."""
    features, weight = features.contiguous(), weight.contiguous()
    (batch, dim), classes = features.shape, len(weight)
    proxies = weight.shape[1] if weight.ndim == 3 else 1
    padded = power_of_two(proxies)
    block_b, block_n = tile(batch, classes * padded)
    block_n = max(block_n, padded)
    similarities = features.new_empty(batch, classes)
    cosines = rows_like(features, batch, classes * proxies)
    inv_x, inv_v = rows_like(features, batch), rows_like(features, classes * proxies)
    launch(
        cosine_head_forward,
        (triton.cdiv(batch, block_b), triton.cdiv(classes * padded, block_n)),
        features,
        weight,
        scale,
        similarities,
        cosines,
        inv_x,
        inv_v,
        batch,
        sharpness,
        num_warps=4,
        D=dim,
        W=classes,
        P=proxies,
        PADDED=padded,
        BLOCK_B=block_b,
        BLOCK_N=block_n,
        BLOCK_D=inner_block(features.dtype),
        UPCAST=features.device.type == "cpu",
    )
    return similarities, cosines, inv_x, inv_v


def cosine_head_grad(
    grad: Tensor,
    features: Tensor,
    weight: Tensor,
    scale: Tensor,
    cosines: Tensor,
    inv_x: Tensor,
    inv_v: Tensor,
    sharpness: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the kernels. Arguments and results as those of `fastil.kernels.cosine_head.plain_grad`."""
    features, weight, a = features.contiguous(), weight.contiguous(), grad.contiguous()
    batch, classes = grad.shape
    proxies = weight.shape[1] if weight.ndim == 3 else 1
    dx, dv = torch.empty_like(features), torch.empty_like(weight)
    if not batch:
        return dx, dv.zero_(), torch.zeros_like(scale)
    dscale = rows_like(features, batch)
    if proxies > 1:
        padded = power_of_two(proxies)
        block = max(1, MEAN_BLOCK // padded)
        blocks = triton.cdiv(classes, block)
        a, dscale = a.new_empty(cosines.shape), rows_like(features, batch, blocks)
        launch(
            mean_gradient,
            (batch, blocks),
            grad.contiguous(),
            cosines,
            a,
            dscale,
            sharpness,
            num_warps=4,
            W=classes,
            P=proxies,
            PADDED=padded,
            CLASSES=block,
        )
    row_sum = dscale if proxies == 1 else None  # without a mean over proxies A * S is what the scale multiplies
    for of_weight, r, inv_r, x, inverse, dr in (
        (False, features, inv_x, weight, inv_v, dx),
        (True, weight, inv_v, features, inv_x, dv),
    ):
        rows, dim = classes * proxies if of_weight else batch, features.shape[1]
        block_r, block_d = tile(rows, dim)
        launch(
            cosine_head_backward,
            (triton.cdiv(rows, block_r), triton.cdiv(dim, block_d)),
            a,
            cosines,
            r,
            inv_r,
            x,
            inverse,
            scale,
            dr,
            None if of_weight else row_sum,
            batch,
            num_warps=4,
            D=dim,
            N=classes * proxies,
            OF_WEIGHT=of_weight,
            BLOCK_R=block_r,
            BLOCK_D=block_d,
            BLOCK_K=inner_block(features.dtype),
            UPCAST=features.device.type == "cpu",
        )
    return dx, dv, dscale.sum().to(scale.dtype)
