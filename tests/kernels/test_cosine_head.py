"""The cosine head in both of its forms, against its formulas in float64."""

import pytest
import torch

from fastil.kernels.cosine_head import cosine_head, plain

FLOAT32 = 1e-6
TOLERANCE = {torch.float32: FLOAT32, torch.float16: 1e-3, torch.bfloat16: 8e-3}  # the interpreter truncates to bfloat16
BORDER = 64  # elements around a tensor; keeps its alignment
OPERATOR_CHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")


def formula(features, weight, scale, sharpness):
    """Eq. 4 of LUCIR, or eq. 6 and 7 of PODNet, for features [B, d], weight [W, d] or [W, P, d]."""
    weight = weight if weight.ndim == 3 else weight[:, None]
    inner = torch.einsum("bd,kpd->bkp", features, weight)
    s = inner / features.square().sum(1).sqrt()[:, None, None] / weight.square().sum(2).sqrt()
    e = torch.exp(sharpness * s)
    return scale * (e / e.sum(2, keepdim=True) * s).sum(2)


def wanted(features, weight, scale, sharpness, grad):
    """Value and gradients of the formula in float64, with the weight rounded as the head does; and the norm of the
    terms that the gradient in the scale sums."""
    inputs = [t.detach().double().requires_grad_() for t in (features, weight.to(features.dtype), scale)]
    value = formula(*inputs, sharpness)
    value.backward(grad.double())
    return value.detach(), *(t.grad for t in inputs), float((value.detach() * grad / scale).norm())


def example(batch, dim, classes, proxies, dtype=torch.float32, weight_dtype=None, seed=0):
    random = torch.Generator().manual_seed(seed)
    features = torch.randn(batch, dim, generator=random) * 3
    shape = (classes, dim) if proxies is None else (classes, proxies, dim)
    weight = torch.randn(shape, generator=random) * 0.05
    grad = torch.randn(batch, classes, generator=random)
    return features.to(dtype), weight.to(weight_dtype or dtype), torch.tensor(7.5), grad.to(dtype)


def error(got, reference):
    difference = (got.detach().double().cpu() - reference).norm()
    return float(difference / reference.norm())


def assert_close(got, reference, tolerance):
    """Similarities and gradients in features and weight by norm; the scale's, a sum that may cancel, by that of its
    terms."""
    for name, a, b in zip(("similarities", "features", "weight"), got, reference, strict=False):
        assert a.shape == b.shape, name
        assert error(a, b) <= tolerance, (name, error(a, b))
    assert got[3].shape == ()
    assert abs(float(got[3]) - float(reference[3])) <= tolerance * reference[4]


def run(features, weight, scale, sharpness, grad):
    """The public function: value and gradients."""
    inputs = [t.detach().requires_grad_() for t in (features, weight, scale)]
    value = cosine_head(*inputs, sharpness)
    value.backward(grad)
    return value.detach(), *(t.grad for t in inputs)


def embedded(tensor):
    """A copy inside a buffer of NaN, and that buffer."""
    buffer = torch.full((tensor.numel() + 2 * BORDER,), torch.nan, dtype=tensor.dtype, device=tensor.device)
    inside = buffer[BORDER : BORDER + tensor.numel()].view(tensor.shape)
    inside.copy_(tensor)
    return inside, buffer


@pytest.fixture
def launched(device, monkeypatch):
    """The Triton form as `run`. Every tensor a kernel sees lies in NaN, which it must neither read nor overwrite."""
    from fastil.kernels.jit import cosine_head as jit

    launch = jit.launch

    def guarded(kernel, grid, *arguments, **options):
        tensors = {i: embedded(t) for i, t in enumerate(arguments) if isinstance(t, torch.Tensor)}
        launch(kernel, grid, *(tensors[i][0] if i in tensors else a for i, a in enumerate(arguments)), **options)
        for i, (inside, buffer) in tensors.items():
            assert buffer[:BORDER].isnan().all(), i
            assert buffer[-BORDER:].isnan().all(), i
            arguments[i].copy_(inside)

    def forward_and_backward(features, weight, scale, sharpness, grad):
        features, weight, scale, grad = (t.to(device) for t in (features, weight, scale, grad))
        value, *saved = jit.cosine_head(features, weight, scale, sharpness)
        gradients = jit.cosine_head_grad(grad, features, weight, scale, *saved, sharpness)
        for tensor, like in zip(gradients, (features, weight, scale), strict=True):
            assert tensor.dtype == like.dtype
        assert value.dtype == features.dtype
        return tuple(t.cpu() for t in (value, *gradients))

    monkeypatch.setattr(jit, "launch", guarded)
    return forward_and_backward


SHAPES = [
    (1, 5, 8, None),
    (7, 64, 24, None),
    (7, 70, 101, None),
    (33, 64, 104, None),
    (3, 512, 24, None),
    (7, 5, 24, 1),
    (1, 64, 8, 2),
    (7, 18, 101, 3),
    (5, 16, 104, 10),
    (17, 64, 5, 10),
    (3, 16, 2, 33),  # more proxies than the smallest tile has columns
]


@pytest.mark.parametrize(("batch", "dim", "classes", "proxies"), [*SHAPES, (128, 512, 100, 10)])
@pytest.mark.parametrize("sharpness", [1.0, 6.0])
def test_the_plain_form_is_the_formula(batch, dim, classes, proxies, sharpness):
    features, weight, scale, grad = example(batch, dim, classes, proxies)
    reference = wanted(features, weight, scale, sharpness, grad)
    assert_close(run(features, weight, scale, sharpness, grad), reference, FLOAT32)


@pytest.mark.parametrize(("batch", "dim", "classes", "proxies"), SHAPES)
def test_the_triton_form_is_the_formula(launched, batch, dim, classes, proxies):
    features, weight, scale, grad = example(batch, dim, classes, proxies)
    reference = wanted(features, weight, scale, 4.0, grad)
    assert_close(launched(features, weight, scale, 4.0, grad), reference, FLOAT32)


@pytest.mark.parametrize(("rows", "columns"), [(32, 64), (16, 64), (16, 32)])
def test_every_tile_of_the_launch_table_is_right(launched, monkeypatch, rows, columns):
    """Small batches would only ever take the smallest."""
    from fastil.kernels.jit import cosine_head as jit

    assert (rows, columns) in jit.TILES
    monkeypatch.setattr(jit, "TILES", ((rows, columns),))
    for proxies in (None, 10):
        features, weight, scale, grad = example(35, 70, 5, proxies)
        reference = wanted(features, weight, scale, 4.0, grad)
        assert_close(launched(features, weight, scale, 4.0, grad), reference, FLOAT32)


def test_larger_problems_take_larger_tiles():
    pytest.importorskip("triton")
    from fastil.kernels.jit.cosine_head import TILES, tile

    assert tile(1, 8) == TILES[-1]
    assert tile(10_000, 512) == TILES[0]
    areas = [rows * columns for rows, columns in (tile(128, width) for width in (8, 104, 1_000, 4_000, 16_000))]
    assert areas == sorted(areas)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weight_dtype", [None, torch.float32])
@pytest.mark.parametrize("proxies", [None, 3])
def test_half_precision_is_close_to_the_formula_in_both_forms(launched, dtype, weight_dtype, proxies):
    """Also with the float32 weight that an autocast region meets."""
    features, weight, scale, grad = example(7, 70, 24, proxies, dtype, weight_dtype)
    reference = wanted(features, weight, scale, 4.0, grad)
    assert_close(run(features, weight, scale, 4.0, grad), reference, TOLERANCE[dtype])
    assert_close(launched(features, weight, scale, 4.0, grad), reference, TOLERANCE[dtype])


@pytest.mark.parametrize("form", ["plain", "triton"])
@pytest.mark.parametrize("proxies", [None, 3])
def test_zero_rows_have_cosine_zero_and_gradient_zero_and_change_nothing_else(form, proxies, request):
    call = run if form == "plain" else request.getfixturevalue("launched")
    features, weight, scale, grad = example(6, 20, 16, proxies)
    reference = wanted(features, weight[:11], scale, 2.0, grad[:, :11])
    weight[11:] = 0
    value, dx, dv, dscale = call(features, weight, scale, 2.0, grad)
    assert (value[:, 11:] == 0).all()
    assert (dv[11:] == 0).all()
    assert_close((value[:, :11], dx, dv[:11], dscale), reference, FLOAT32)
    features[2] = 0
    value, dx, dv, dscale = call(features, weight, scale, 2.0, grad)
    assert (value[2] == 0).all()
    assert (dx[2] == 0).all()
    others = torch.arange(6) != 2
    reference = wanted(features[others], weight[:11], scale, 2.0, grad[others, :11])
    assert_close((value[others, :11], dx[others], dv[:11], dscale), reference, FLOAT32)


@pytest.mark.parametrize("form", ["plain", "triton"])
@pytest.mark.parametrize("factor", [1e-11, 1e-8, 1e8])
def test_very_short_and_very_long_vectors_lose_no_digit(form, factor, request):
    """Down to F.normalize's eps; the squares of the shortest are near 1e-22."""
    call = run if form == "plain" else request.getfixturevalue("launched")
    features, weight, scale, grad = example(4, 32, 9, 3)
    features, weight = features * factor, weight * 20 * factor
    reference = wanted(features, weight, scale, 2.0, grad)
    assert_close(call(features, weight, scale, 2.0, grad), reference, FLOAT32)


@pytest.mark.parametrize("form", ["plain", "triton"])
def test_rows_no_longer_than_eps_count_as_zero(form, request):
    call = run if form == "plain" else request.getfixturevalue("launched")
    features, weight, scale, grad = example(4, 32, 9, None)
    weight[3] *= 0.5e-12 / weight[3].norm()
    value, _, dv, _ = call(features, weight, scale, 1.0, grad)
    assert (value[:, 3] == 0).all()
    assert (dv[3] == 0).all()
    assert (value[:, 4] != 0).all()


@pytest.mark.parametrize("form", ["plain", "triton"])
def test_gradients_are_orthogonal_to_their_rows_even_where_both_point_the_same_way(form, request):
    call = run if form == "plain" else request.getfixturevalue("launched")
    features, weight, scale, grad = example(5, 24, 5, None)
    weight = features.flip(0) * 0.1
    value, dx, dv, _ = call(features, weight, scale, 1.0, grad)
    torch.testing.assert_close(value.flip(0).diagonal(), torch.full((5,), 7.5), rtol=1e-6, atol=0)
    for gradient, rows in ((dx, features), (dv, weight)):
        cosine = (gradient * rows).double().sum(1) / gradient.double().norm(dim=1) / rows.double().norm(dim=1)
        assert (cosine.abs() < FLOAT32).all()


def test_one_proxy_is_the_plain_cosine_whatever_the_sharpness():
    features, weight, scale, _ = example(6, 20, 16, None)
    once = cosine_head(features, weight, scale)
    assert torch.equal(once, cosine_head(features, weight[:, None], scale, 9.0))
    assert error(once, 7.5 * torch.cosine_similarity(features[:, None].double(), weight.double(), 2)) <= FLOAT32


@pytest.mark.parametrize("form", ["plain", "triton"])
@pytest.mark.parametrize("sharpness", [0.0, 400.0])
def test_sharpness_goes_from_the_mean_to_the_maximum_over_the_proxies(form, sharpness, request):
    call = run if form == "plain" else request.getfixturevalue("launched")
    features, weight, scale, grad = example(6, 20, 16, 3)
    s = torch.cosine_similarity(features[:, None, None].double(), weight.double(), 3)
    value = call(features, weight, scale, sharpness, grad)[0]
    if sharpness == 0:
        assert error(value, 7.5 * s.mean(2)) <= FLOAT32
    else:  # weighted by exp(-400 * gap), the rest reaches no more than 1 / (400 e) each
        assert (value - 7.5 * s.amax(2)).abs().max() <= 7.5 * 2 / (400 * 2.718)


def test_podnets_released_form_is_an_affine_step_away():
    """There s' = 2 s - 2, minus the squared distance of the normalised vectors, and gamma stands inside the softmax."""
    features, weight, _, _ = example(6, 20, 16, 10)
    gamma = 1.7
    x, v = (torch.nn.functional.normalize(t.double(), dim=-1) for t in (features, weight))
    s = -(x[:, None, None] - v).square().sum(3)
    released = (torch.softmax(gamma * s, 2) * s).sum(2)
    assert error(2 * cosine_head(features, weight, torch.tensor(1.0), 2 * gamma) - 2, released) <= FLOAT32


@pytest.mark.parametrize("form", ["plain", "triton"])
@pytest.mark.parametrize("proxies", [None, 3])
def test_any_memory_layout_gives_the_same(form, proxies, request):
    call = run if form == "plain" else request.getfixturevalue("launched")
    features, weight, scale, _ = example(6, 20, 16, proxies)
    expanded = torch.ones(()).expand(6, 16)  # the gradient of a sum
    once = call(features, weight, scale, 2.0, torch.ones(6, 16))
    other = call(features.T.contiguous().T, weight.transpose(0, -1).contiguous().transpose(0, -1), scale, 2.0, expanded)
    assert_close(other, (*(t.double() for t in once), float(once[0].norm()) / 7.5), FLOAT32)


@pytest.mark.parametrize("form", ["plain", "triton"])
@pytest.mark.parametrize("proxies", [None, 3])
def test_an_empty_batch_has_gradient_zero(form, proxies, request):
    call = run if form == "plain" else request.getfixturevalue("launched")
    features, weight, scale, grad = example(0, 20, 16, proxies)
    value, dx, dv, dscale = call(features, weight, scale, 2.0, grad)
    assert value.shape == (0, 16)
    assert dx.shape == (0, 20)
    assert (dv == 0).all()
    assert dscale == 0


def test_an_autocast_region_changes_nothing():
    features, weight, scale, grad = example(6, 20, 16, 3)
    once = run(features, weight, scale, 2.0, grad)
    with torch.autocast("cpu", torch.bfloat16):
        again = run(features, weight, scale, 2.0, grad)
    for a, b in zip(once, again, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("proxies", [None, 3])
def test_compiled_code_gives_the_same(proxies):
    features, weight, scale, grad = example(6, 20, 16, proxies)
    compiled = torch.compile(lambda x, v, s: cosine_head(x * 1.5, v, s, 2.0) + 1, fullgraph=True, backend="aot_eager")
    inputs = [t.requires_grad_() for t in (features, weight, scale)]
    got = torch.autograd.grad(compiled(*inputs), inputs, grad)
    expected = torch.autograd.grad(cosine_head(inputs[0] * 1.5, *inputs[1:], 2.0) + 1, inputs, grad)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("proxies", [None, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operators_keep_torchs_rules(proxies, dtype):
    features, weight, scale, grad = example(6, 20, 16, proxies, dtype, torch.float32)
    torch.library.opcheck(torch.ops.fastil.cosine_head, (features, weight, scale, 2.0), test_utils=OPERATOR_CHECKS)
    saved = plain(features, weight, scale, 2.0)[1:]
    arguments = (grad, features, weight, scale, *saved, 2.0)
    torch.library.opcheck(torch.ops.fastil.cosine_head_grad, arguments, test_utils=OPERATOR_CHECKS)


def test_the_shapes_of_fake_tensors_are_those_of_the_triton_form(device):
    from fastil.kernels.jit import cosine_head as jit

    features, weight, scale, grad = (t.to(device) for t in example(6, 20, 16, 3, torch.bfloat16, torch.float32))
    forward, saved = jit.cosine_head(features, weight, scale, 2.0), plain(*example(6, 20, 16, 3)[:3], 2.0)[1:]
    backward = jit.cosine_head_grad(grad, features, weight, scale, *(t.to(device) for t in saved), 2.0)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = [mode.from_tensor(t) for t in (features, weight, scale, grad)]
        fake_forward = torch.ops.fastil.cosine_head(*fake[:3], 2.0)
        fake_backward = torch.ops.fastil.cosine_head_grad(fake[3], *fake[:3], *fake_forward[1:], 2.0)
    for real, shape in zip((*forward, *backward), (*fake_forward, *fake_backward), strict=True):
        assert (real.shape, real.dtype, real.stride()) == (shape.shape, shape.dtype, shape.stride())


def test_what_autograd_cannot_do_is_an_error_and_not_a_wrong_number():
    features, weight, scale, _ = example(6, 20, 16, 3)
    features.requires_grad_()
    value = cosine_head(features, weight, scale).sum()
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(value, features, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.func.jvp(lambda x: cosine_head(x, weight, scale), (features.detach(),), (torch.ones(6, 20),))


@pytest.mark.parametrize(
    ("features", "weight", "scale", "kind", "words"),
    [
        ((6,), (16, 6), (), ValueError, r"\[B, d\].*\[6\]"),
        ((6, 20), (16, 21), (), ValueError, r"\[6, 20\] and \[16, 21\]"),
        ((6, 20), (20,), (), ValueError, r"\[20\]"),
        ((6, 20), (2, 3, 4, 20), (), ValueError, "W, P, d"),
        ((6, 20), (16, 20), (1,), ValueError, "scale must be a 0-d tensor"),
    ],
)
def test_wrong_shapes_are_named(features, weight, scale, kind, words):
    with pytest.raises(kind, match=words):
        cosine_head(torch.ones(features), torch.ones(weight), torch.ones(scale))


def test_other_dtypes_are_named():
    with pytest.raises(TypeError, match=r"features must be .* not torch\.float64"):
        cosine_head(torch.ones(6, 20).double(), torch.ones(16, 20), torch.tensor(1.0))
    with pytest.raises(TypeError, match=r"weight must be .* not torch\.int64"):
        cosine_head(torch.ones(6, 20), torch.ones(16, 20).long(), torch.tensor(1.0))
