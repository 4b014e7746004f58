"""What the operators run on CUDA tensors, taken through Triton's interpreter: the form chosen and its arguments."""

import contextlib
import importlib

import pytest
import torch

from fastil import machine
from fastil.errors import UserError
from fastil.kernels import registration
from fastil.kernels.incremental_loss import Operands
from fastil.kernels.registration import jitted, scalar_tensor


@pytest.fixture(autouse=True)
def no_gpu_needed(monkeypatch):
    pytest.importorskip("triton")
    if not torch.cuda.is_available():
        monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())


def loss_arguments(device, cosines):
    torch.manual_seed(0)
    logits, teacher = torch.randn(2, 5, 24, device=device)
    prior = torch.zeros(24, device=device)
    options = [torch.tensor(2.0, device=device), torch.tensor(0.5, device=device)] if cosines else [None, None]
    scalars = [scalar_tensor(v) for v in (8, 20, 0.4, 0.6, 2.0)]  # numbers: on the CPU with any device
    target = torch.tensor([0, 19, -1, 7, 8], device=device)
    return Operands(logits, target, prior, teacher, *scalars, None, *options, value=True)


def alpha_arguments(device):
    o = loss_arguments(device, False)
    return [o.logits, o.teacher, o.target, o.log_prior, o.num_old, o.num_seen, o.ce_weight]


def herd_arguments(device):
    torch.manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(2, 9, 4, dtype=torch.float64, device=device), dim=2)
    return [rows @ rows.mT, torch.tensor([9, 6], device=device), 5, 30, 1e-9]


def test_without_a_compiler_the_first_launch_says_so_in_one_line(monkeypatch):
    """In the place of Triton's error, whose last line tells a user nothing of what to install."""

    def launch(*args):
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC environment variable")

    jit = importlib.import_module("fastil.kernels.jit.less_forget")
    monkeypatch.setattr(jit, "never", launch, raising=False)
    call, inputs = jitted("less_forget", "never"), torch.zeros(2, 3)
    monkeypatch.setattr(registration, "lacks_for_triton", lambda: None)
    with pytest.raises(RuntimeError, match="Failed to find"):  # something else is wrong
        call(inputs)
    monkeypatch.setattr(registration, "lacks_for_triton", machine.lacks_for_triton)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(UserError, match=r"^fastil's CUDA kernels: Triton needs a C compiler: apt-get install gcc, or "):
        call(inputs)


@pytest.mark.parametrize(
    ("kernel", "limit", "arguments"),
    [
        ("incremental_loss", "WIDEST_COSINES", lambda device: loss_arguments(device, True)),
        ("alpha_hypergradient", "WIDEST", alpha_arguments),
        ("herd", "LARGEST", herd_arguments),
        ("less_forget", "WIDEST", lambda device: [*torch.randn(2, 5, 24, device=device)]),
    ],
)
def test_what_triton_does_not_hold_in_registers_takes_the_plain_form(kernel, limit, arguments, device, monkeypatch):
    module = importlib.import_module(f"fastil.kernels.{kernel}")
    jit = importlib.import_module(f"fastil.kernels.jit.{kernel}")
    launches = []
    launch = jit.launch
    monkeypatch.setattr(jit, "launch", lambda *a, **k: (launches.append(a), launch(*a, **k)))
    inputs = arguments(device)
    wanted = torch.utils._pytree.tree_leaves(module.plain(*inputs))
    narrow = torch.utils._pytree.tree_leaves(module._cuda(*inputs))
    assert len(launches) == 1
    monkeypatch.setattr(module, limit, 4)
    wide = torch.utils._pytree.tree_leaves(module._cuda(*inputs))
    assert len(launches) == 1
    for a, b, c in zip(wanted, narrow, wide, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6)
        assert torch.equal(c, a)


def test_wide_logits_without_cosines_are_streamed(device, monkeypatch):
    module = importlib.import_module("fastil.kernels.incremental_loss")
    inputs = loss_arguments(device, False)
    narrow = module._cuda(*inputs)
    monkeypatch.setattr(importlib.import_module("fastil.kernels.jit.incremental_loss"), "IN_REGISTERS", 16)
    for a, b in zip(module._cuda(*inputs), narrow, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("module", "function"),
    [
        ("alpha_hypergradient", "alpha_hypergradient"), ("augment", "augment"), ("cosine_head", "cosine_head"),
        ("cosine_head", "cosine_head_grad"), ("crop_resize", "crop_resize"), ("herd", "herd"),
        ("less_forget", "less_forget"), ("pod_spatial", "pod_spatial"),
    ],
)  # fmt: skip
def test_the_three_forms_of_an_operator_take_the_same_arguments(module, function):
    """The schema's names, where a form names them, in the schema's order."""
    plain = importlib.import_module(f"fastil.kernels.{module}")
    plain = plain.plain_grad if function.endswith("_grad") else plain.plain
    jitted = getattr(importlib.import_module(f"fastil.kernels.jit.{module}"), function)
    schema = [a.name for a in getattr(torch.ops.fastil, function).default._schema.arguments]
    for form in (plain, jitted):
        code = form.__code__
        assert code.co_argcount == len(schema)
    assert jitted.__code__.co_varnames[: len(schema)] == tuple(schema)


def test_the_operands_of_the_loss_are_those_of_its_schema():
    """Whose forms all take them by these names."""
    assert [*Operands._fields] == [a.name for a in torch.ops.fastil.incremental_loss.default._schema.arguments]


def test_a_tensor_on_another_device_is_named(device):
    registration = importlib.import_module("fastil.kernels.registration")
    arguments = loss_arguments(device, False)
    arguments = arguments._replace(teacher=arguments.teacher.to("meta"))
    with pytest.raises(ValueError, match=f"all tensors must be on {device}.*, not one on meta"):
        registration.jitted("incremental_loss", "incremental_loss")(*arguments)
