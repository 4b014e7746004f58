"""PODNet's spatial distillation against its formula in float64, differentiated by autograd."""

import math

import numpy as np
import pytest
import torch
from conftest import SOAK

from fastil import losses
from fastil.kernels.pod_spatial import pod_spatial

both_forms = pytest.mark.parametrize("form", ["operator", "triton"])
DTYPES = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}  # the interpreter truncates to bfloat16
CIFAR = [(16, 32, 32), (32, 16, 16), (64, 8, 8)]
IMAGENET = [(256, 14, 14), (512, 7, 7), *([(64, 56, 56), (128, 28, 28)] if SOAK else [])]
ODD = [(1, 1, 1), (10, 5, 7), (3, 1, 9), (20, 33, 3), (65, 3, 2), (1, 6, 5), (2, 70, 40)]
PARTS = [(100, 5, 60), (48, 3, 130), (9, 2, 400)]  # rows wider than a tile: the channels in parts


def formula(maps, teacher_maps):
    """Row by row in float64, and its gradients. F.normalize's smallest length."""
    maps = [m.double().cpu().requires_grad_() for m in maps]
    value = 0.0
    for student, teacher in zip(maps, teacher_maps, strict=True):
        for x, y in zip(student, teacher.double().cpu(), strict=True):
            units = []
            for z in (x, y):
                pooled = torch.cat(((z * z).sum(2).flatten(), (z * z).sum(1).flatten()))
                length = (pooled * pooled).sum().sqrt()
                units.append(pooled / (length if length >= 1e-12 else 1e-12))
            squared = (units[0] - units[1]).square().sum()
            if squared > 0:  # the root has no derivative in 0
                value = value + squared.sqrt() / (len(student) * len(maps))
    value.backward()
    return value.detach(), [m.grad for m in maps]


def run(form, maps, teacher_maps, device):
    """The value and the gradients, by autograd from the operator or as the Triton kernel writes them."""
    maps, teacher_maps = [m.to(device) for m in maps], [m.to(device) for m in teacher_maps]
    if form == "operator":
        maps = [m.detach().requires_grad_() for m in maps]
        value = pod_spatial(maps, teacher_maps)
        value.backward()
        return value.detach(), [m.grad for m in maps]
    launcher = pytest.importorskip("fastil.kernels.jit.pod_spatial", reason="triton is not installed")
    with np.errstate(all="ignore"):
        layers = [launcher.pod_spatial(m, t, len(maps)) for m, t in zip(maps, teacher_maps, strict=True)]
    return torch.cat([row_value for row_value, _ in layers]).sum(), [gradient for _, gradient in layers]


def relative(ours, wanted):
    return ((ours.double().cpu() - wanted).norm() / wanted.norm()).item()


def example(shape, batch=2, near=None, ratio=1.0, seed=0):
    """A map of the student and the teacher's: unrelated, or the student's up to a relative difference and a factor."""
    generator = torch.Generator().manual_seed(seed)
    x, noise = torch.randn(2, batch, *shape, generator=generator)
    y = ratio * (x + near * noise if near is not None else noise)
    return x.contiguous(memory_format=torch.channels_last), y.contiguous(memory_format=torch.channels_last)


def assert_close(ours, wanted, limit=1e-6):
    assert ours[0].dtype == torch.float32
    assert ours[0].shape == ()
    assert relative(ours[0], wanted[0]) <= 1e-6
    for gradient, wanted_gradient in zip(ours[1], wanted[1], strict=True):
        assert relative(gradient, wanted_gradient) <= limit


@both_forms
@pytest.mark.parametrize("shape", [*CIFAR, *IMAGENET, *ODD[1:], *PARTS], ids=str)
def test_value_and_gradient_are_those_of_the_formula(form, shape, device):
    x, y = example(shape)
    ours = run(form, [x], [y], device)
    assert_close(ours, formula([x], [y]))
    assert ours[1][0].is_contiguous(memory_format=torch.channels_last)


@both_forms
def test_several_layers_are_averaged(form, device):
    maps, teacher_maps = zip(*(example(shape, batch=3) for shape in [*CIFAR, (10, 5, 7)]), strict=True)
    assert_close(run(form, maps, teacher_maps, device), formula(maps, teacher_maps))


@both_forms
@pytest.mark.parametrize("near", [1e-1, 1e-3, 1e-5])
@pytest.mark.parametrize("shape", [*CIFAR, (10, 5, 7), (100, 5, 60)], ids=str)
def test_nearly_equal_maps_lose_no_digit(form, shape, near, device):
    x, y = example(shape, near=near)
    assert_close(run(form, [x], [y], device), formula([x], [y]))


@both_forms
@pytest.mark.parametrize("near", [None, 0.3])
@pytest.mark.parametrize("ratio", [1e-2, 0.5, 2.0, 1e2])
def test_the_scales_of_student_and_teacher_may_differ_widely(form, ratio, near, device):
    """By the square of the ratio in what is pooled."""
    x, y = example((16, 8, 8), near=near, ratio=ratio)
    assert_close(run(form, [x], [y], device), formula([x], [y]))


@both_forms
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("teacher_dtype", DTYPES)
def test_every_precision_is_computed_in_float32(form, dtype, teacher_dtype, device):
    x, y = example((16, 9, 8))
    x, y = x.to(dtype), y.to(teacher_dtype)
    ours = run(form, [x], [y], device)
    assert ours[1][0].dtype == dtype
    assert_close(ours, formula([x], [y]), DTYPES[dtype])


@both_forms
@pytest.mark.parametrize("shape", [(16, 32, 32), (10, 5, 7), (1, 1, 1)], ids=str)
def test_equal_maps_have_no_loss_and_no_gradient_at_all(form, shape, device):
    x, _ = example(shape)
    value, (gradient,) = run(form, [x], [x.clone()], device)
    assert value == 0
    assert (gradient == 0).all()


@both_forms
@pytest.mark.parametrize("blank", ["student", "teacher", "both"])
@pytest.mark.parametrize("filler", [0.0, 1e-8])
def test_blank_maps_are_divided_by_the_smallest_length(form, blank, filler, device):
    """1e-8 squared and pooled is shorter than 1e-12, the divisor that F.normalize then takes."""
    x, y = example((6, 5, 4), batch=3)
    if blank != "teacher":
        x[1] = filler
    if blank != "student":
        y[1] = filler / 2
    value, (gradient,) = run(form, [x], [y], device)
    wanted, (wanted_gradient,) = formula([x], [y])
    assert relative(value, wanted) <= 1e-6
    assert gradient.isfinite().all()
    if blank == "teacher":
        # The distance to (nearly) nothing is nearly constant: the gradient is the small rest of numbers that cancel.
        assert (gradient[1].double().cpu() - wanted_gradient[1]).norm() <= 1e-6 * wanted_gradient.norm()
        gradient, wanted_gradient = gradient[[0, 2]], wanted_gradient[[0, 2]]
    for ours, reference in zip(gradient, wanted_gradient, strict=True):
        if reference.any():
            assert relative(ours, reference) <= 1e-6
        else:
            assert (ours == 0).all()


@both_forms
def test_a_diverged_network_is_not_hidden(form, device):
    x, y = example((6, 5, 4), batch=3)
    x[1, 2, 3, 0] = math.nan
    value, (gradient,) = run(form, [x], [y], device)
    assert value.isnan()
    assert gradient[[0, 2]].isfinite().all()


@both_forms
def test_maps_of_any_memory_layout_are_taken(form, device):
    x, y = (z.contiguous() for z in example((12, 6, 10)))
    for student, teacher in ((x, y), (x[:, ::2], y[:, 1::2]), (x.transpose(2, 3), y.transpose(2, 3)), (x[:1], y[1:])):
        assert_close(run(form, [student], [teacher], device), formula([student], [teacher]))


@pytest.mark.parametrize("shape", [(3, 5, 7), (16, 32, 32), (100, 5, 60)], ids=str)
def test_nothing_is_read_or_written_beyond_the_maps(shape, device, monkeypatch):
    """Inputs lie between NaN, outputs and the room for what is pooled between sentinels."""
    launcher = pytest.importorskip("fastil.kernels.jit.pod_spatial", reason="triton is not installed")
    x, y = example(shape)
    wanted = run("triton", [x], [y], device)
    border, buffers = 5000, []

    def embedded(like, filler, shape):
        buffer = torch.full((math.prod(shape) + 2 * border,), filler, dtype=like.dtype, device=device)
        buffers.append(buffer)
        return buffer[border:-border]

    def embedded_map(like, filler, **_):
        room = embedded(like, filler, like.shape)
        return room.view(len(like), *like.shape[2:], like.shape[1]).permute(0, 3, 1, 2)

    inputs = [embedded_map(z, math.nan).copy_(z) for z in (x, y)]
    buffers.clear()
    monkeypatch.setattr(torch, "empty_like", lambda like, **_: embedded_map(like, 7.0))
    monkeypatch.setattr(launcher, "rows_like", lambda like, *shape: embedded(like, 7.0, shape))
    value, (gradient,) = run("triton", inputs[:1], inputs[1:], device)
    monkeypatch.undo()
    assert torch.equal(value, wanted[0])
    assert torch.equal(gradient, wanted[1][0])
    assert len(buffers) == 3
    for buffer in buffers:
        assert (buffer[:border] == 7).all()
        assert (buffer[-border:] == 7).all()


def test_the_operator_is_the_formula_of_the_losses():
    maps, teacher_maps = zip(*(example(shape) for shape in CIFAR), strict=True)
    ours = run("operator", maps, teacher_maps, torch.device("cpu"))
    maps = [m.requires_grad_() for m in maps]
    wanted = losses.pod_spatial(maps, teacher_maps)
    wanted.backward()
    assert_close(ours, (wanted.detach().double(), [m.grad.double() for m in maps]), 2e-6)


def test_the_gradient_scales_with_that_of_the_result():
    x, y = example((6, 5, 4))
    x.requires_grad_()
    (2.5 * pod_spatial([x], [y])).backward()
    assert relative(x.grad, 2.5 * formula([x.detach()], [y])[1][0]) <= 1e-6


def test_maps_that_do_not_belong_together_are_refused():
    x = torch.zeros(2, 3, 4, 5)
    with pytest.raises(ValueError, match="as many maps as teacher_maps are needed, not 0 and 0"):
        pod_spatial([], [])
    with pytest.raises(ValueError, match="as many maps as teacher_maps are needed, not 1 and 2"):
        pod_spatial([x], [x, x])
    for other in (x[:1], x[:, :2], x[..., :4], x[0]):
        with pytest.raises(ValueError, match=r"must be \[B, C, H, W\]"):
            pod_spatial([x], [other])
    with pytest.raises(ValueError, match=r"with one B, not .* where B = 2"):
        pod_spatial([x, x[:1]], [x, x[:1]])


def test_second_derivatives_and_forward_mode_raise():
    x, y = example((6, 5, 4))
    x.requires_grad_()
    with pytest.raises(RuntimeError, match="pod_spatial is differentiable once only"):
        torch.autograd.grad(pod_spatial([x], [y]), x, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.func.jvp(lambda z: pod_spatial([z], [y]), (x.detach(),), (y,))
    with pytest.raises(RuntimeError), torch.autograd.forward_ad.dual_level():
        pod_spatial([torch.autograd.forward_ad.make_dual(x.detach(), y)], [y])


def test_it_compiles_as_one_graph():
    maps, teacher_maps = zip(*(example(shape) for shape in CIFAR), strict=True)
    wanted = run("operator", maps, teacher_maps, torch.device("cpu"))
    compiled = torch.compile(lambda m, t: 2 * pod_spatial(m, t), fullgraph=True, backend="aot_eager")
    maps = [m.requires_grad_() for m in maps]
    value = compiled(maps, teacher_maps)
    value.backward()
    assert torch.equal(value.detach(), 2 * wanted[0])
    for m, gradient in zip(maps, wanted[1], strict=True):
        assert torch.equal(m.grad, 2 * gradient)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_operator_keeps_the_rules_of_torch(dtype):
    x, y = (z.to(dtype) for z in example((6, 5, 4)))
    for student in (x, x.contiguous(), x.transpose(0, 1).contiguous().transpose(0, 1), x[:, :1], x[..., :1, :1]):
        teacher = y[:, : student.shape[1], : student.shape[2], : student.shape[3]]
        torch.library.opcheck(
            torch.ops.fastil.pod_spatial,
            (student, teacher, 3),
            test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
        )
