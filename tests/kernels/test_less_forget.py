"""1 - cos of features and its gradient against the formula in float64, differentiated by autograd."""

import math

import numpy as np
import pytest
import torch

from fastil import losses
from fastil.kernels.less_forget import less_forget

both_forms = pytest.mark.parametrize("form", ["operator", "triton"])
DTYPES = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}  # the interpreter truncates to bfloat16


def formula(features, teacher):
    """Mean over the batch of 1 - <f, t> / (|f| |t|), and its gradient, in float64."""
    f, t = features.double().cpu().requires_grad_(), teacher.double().cpu()
    value = (1 - (f * t).sum(1) / (f.square().sum(1).sqrt() * t.square().sum(1).sqrt())).mean()
    value.backward()
    return value.detach(), f.grad


def run(form, features, teacher, device):
    """The value and the gradient, by autograd from the operator or as the Triton kernel writes them."""
    features, teacher = features.to(device), teacher.to(device)
    if form == "operator":
        features = features.detach().requires_grad_()
        value = less_forget(features, teacher)
        value.backward()
        return value.detach(), features.grad
    launcher = pytest.importorskip("fastil.kernels.jit.less_forget", reason="triton is not installed")
    with np.errstate(all="ignore"):
        row_value, gradient = launcher.less_forget(features, teacher)
    return row_value.sum(), gradient


def relative(ours, wanted):
    return ((ours.double().cpu() - wanted).norm() / wanted.norm()).item()


def example(rows, width, near=None, ratio=1.0, seed=0):
    """Features and the teacher's: unrelated, or the student's up to a relative difference and a factor."""
    generator = torch.Generator().manual_seed(seed)
    features, noise = torch.randn(2, rows, width, generator=generator)
    return features, ratio * (features + near * noise if near is not None else noise)


@both_forms
@pytest.mark.parametrize(
    ("rows", "width"), [(1, 1000), (3, 7), (5, 64), (2, 100), (4, 512), (1, 2048), (9, 2), (2, 1500)]
)
def test_value_and_gradient_are_those_of_the_formula(form, rows, width, device):
    features, teacher = example(rows, width)
    value, gradient = run(form, features, teacher, device)
    wanted = formula(features, teacher)
    assert value.dtype == torch.float32
    assert value.shape == ()
    assert relative(value, wanted[0]) <= 1e-6
    assert relative(gradient, wanted[1]) <= 1e-6


@both_forms
@pytest.mark.parametrize("near", [1e-1, 1e-3, 1e-5])
@pytest.mark.parametrize("width", [64, 512])
def test_nearly_equal_features_lose_no_digit(form, width, near, device):
    """1 - cos is about near^2 / 2: below float32's resolution of 1 for the smallest."""
    features, teacher = example(6, width, near)
    value, gradient = run(form, features, teacher, device)
    wanted = formula(features, teacher)
    assert relative(value, wanted[0]) <= 1e-6
    assert relative(gradient, wanted[1]) <= 1e-6


@both_forms
@pytest.mark.parametrize("near", [None, 0.3])
@pytest.mark.parametrize("ratio", [1e-3, 0.1, 10.0, 1e3])
def test_lengths_may_differ_widely(form, ratio, near, device):
    features, teacher = example(6, 64, near, ratio)
    value, gradient = run(form, features, teacher, device)
    wanted = formula(features, teacher)
    assert relative(value, wanted[0]) <= 1e-6
    assert relative(gradient, wanted[1]) <= 1e-6


@both_forms
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("teacher_dtype", DTYPES)
def test_every_precision_is_computed_in_float32(form, dtype, teacher_dtype, device):
    features, teacher = example(6, 64)
    features, teacher = features.to(dtype), teacher.to(teacher_dtype)
    value, gradient = run(form, features, teacher, device)
    wanted = formula(features, teacher)
    assert value.dtype == torch.float32
    assert relative(value, wanted[0]) <= 1e-6
    assert gradient.dtype == dtype
    assert relative(gradient, wanted[1]) <= DTYPES[dtype]


@both_forms
def test_equal_features_have_no_loss_and_no_gradient_at_all(form, device):
    features, _ = example(5, 37)
    value, gradient = run(form, features, features.clone(), device)
    assert value == 0
    assert (gradient == 0).all()


@both_forms
def test_opposite_features_count_two(form, device):
    features, _ = example(5, 37)
    value, gradient = run(form, features, -features, device)
    assert value.item() == pytest.approx(2, rel=1e-6)
    assert gradient.norm() <= 1e-6


@both_forms
@pytest.mark.parametrize("blank", ["student", "teacher", "both"])
@pytest.mark.parametrize("filler", [0.0, 1e-20])
def test_a_vector_without_a_direction_counts_one_and_has_no_gradient(form, blank, filler, device):
    features, teacher = example(4, 24)
    if blank != "teacher":
        features[1] = filler
    if blank != "student":
        teacher[1] = filler
    value, gradient = run(form, features, teacher, device)
    others = [0, 2, 3]
    wanted = formula(features[others], teacher[others])
    assert relative(value, (wanted[0] * 3 + 1) / 4) <= 1e-6
    assert (gradient[1] == 0).all()
    assert relative(gradient[others], wanted[1] * 3 / 4) <= 1e-6


@both_forms
def test_a_diverged_network_is_not_hidden(form, device):
    features, teacher = example(3, 16)
    features[1, 5] = math.nan
    value, gradient = run(form, features, teacher, device)
    assert value.isnan()
    assert gradient[1].isnan().all()
    assert gradient[[0, 2]].isfinite().all()


@both_forms
def test_strided_features_are_taken_as_they_are(form, device):
    features, teacher = example(12, 48)
    ours = run(form, features[::2, ::3], teacher.T[:16, :6].T, device)
    wanted = formula(features[::2, ::3], teacher.T[:16, :6].T)
    assert relative(ours[0], wanted[0]) <= 1e-6
    assert relative(ours[1], wanted[1]) <= 1e-6


@pytest.mark.parametrize(("rows", "width"), [(1, 3), (3, 20), (2, 64)])
def test_nothing_is_read_or_written_beyond_the_rows(rows, width, device, monkeypatch):
    """Inputs lie between NaN, outputs between sentinels."""
    launcher = pytest.importorskip("fastil.kernels.jit.less_forget", reason="triton is not installed")
    features, teacher = example(rows, width)
    wanted = run("triton", features, teacher, device)
    room = rows * width + 2 * 64

    def embedded(x):
        buffer = torch.full((room,), math.nan, device=device)
        buffer[64:-64] = x.flatten().to(device)
        return buffer[64:-64].view(rows, width)

    gradient, row_value = torch.full((room,), 7.0, device=device), torch.full((rows + 128,), 7.0, device=device)
    monkeypatch.setattr(torch, "empty_like", lambda x: gradient[64:-64].view(rows, width))
    monkeypatch.setattr(launcher, "rows_like", lambda x, *shape: row_value[64:-64])
    value, result = run("triton", embedded(features), embedded(teacher), device)
    assert torch.equal(value, wanted[0])
    assert torch.equal(result, wanted[1])
    for buffer in (gradient, row_value):
        assert (buffer[:64] == 7).all()
        assert (buffer[-64:] == 7).all()


def test_the_operator_is_the_formula_of_the_losses():
    features, teacher = example(6, 64)
    value, gradient = run("operator", features, teacher, torch.device("cpu"))
    features = features.requires_grad_()
    wanted = losses.less_forget(features, teacher)
    wanted.backward()
    assert relative(value, wanted.detach().double()) <= 1e-6
    assert relative(gradient, features.grad.double()) <= 1e-6


def test_the_gradient_scales_with_that_of_the_result():
    features, teacher = example(3, 8)
    features.requires_grad_()
    (2.5 * less_forget(3 * features, teacher)).backward()
    # The cosine does not see the factor 3, and its gradient is that of the features themselves.
    assert relative(features.grad, 2.5 * formula(features.detach(), teacher)[1]) <= 1e-6


@pytest.mark.parametrize(("student", "teacher"), [((3, 8), (3, 9)), ((3, 8), (2, 8)), ((8,), (8,)), ((2, 3, 4),) * 2])
def test_features_of_other_shapes_are_refused(student, teacher):
    with pytest.raises(ValueError, match=r"must both be \[B, d\]"):
        less_forget(torch.zeros(student), torch.zeros(teacher))


def test_second_derivatives_and_forward_mode_raise():
    features, teacher = example(3, 8)
    features.requires_grad_()
    with pytest.raises(RuntimeError, match="less_forget is differentiable once only"):
        torch.autograd.grad(less_forget(features, teacher), features, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.func.jvp(lambda x: less_forget(x, teacher), (features.detach(),), (teacher,))
    with pytest.raises(RuntimeError), torch.autograd.forward_ad.dual_level():
        less_forget(torch.autograd.forward_ad.make_dual(features.detach(), teacher), teacher)


def test_it_compiles_as_one_graph():
    features, teacher = example(6, 64)
    wanted = run("operator", features, teacher, torch.device("cpu"))
    compiled = torch.compile(lambda f, t: 2 * less_forget(f, t), fullgraph=True, backend="aot_eager")
    features.requires_grad_()
    value = compiled(features, teacher)
    value.backward()
    assert torch.equal(value.detach(), 2 * wanted[0])
    assert torch.equal(features.grad, 2 * wanted[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_operator_keeps_the_rules_of_torch(dtype):
    features, teacher = (x.to(dtype) for x in example(6, 16))
    for student in (features, features.T.contiguous().T, features[:, ::2]):
        torch.library.opcheck(
            torch.ops.fastil.less_forget,
            (student, teacher[:, : student.shape[1]]),
            test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
        )
