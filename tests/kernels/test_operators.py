"""The incremental loss as a torch operator: compiled, traced with fake tensors, and asked for what it cannot do."""

import subprocess
import sys

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch._subclasses.fake_tensor import FakeTensorMode

from fastil.kernels import incremental_loss, incremental_loss_grad
from fastil.kernels.incremental_loss import Operands
from fastil.losses import log_prior

BATCH, WIDTH, SEEN, OLD = 6, 56, 50, 30


def arguments():
    random = torch.Generator().manual_seed(0)
    features, teacher = torch.randn(BATCH, 16, generator=random), torch.randn(BATCH, WIDTH, generator=random)
    weight = torch.randn(WIDTH, 16, generator=random, requires_grad=True)
    target = torch.randint(-1, SEEN, (BATCH,), generator=random)
    return features, weight, target, log_prior((torch.arange(WIDTH) < SEEN).long()), teacher


STEP = {"num_old": torch.tensor(OLD), "num_seen": torch.tensor(SEEN), "ce_weight": torch.tensor(0.4),
        "kd_weight": torch.tensor(0.6), "temperature": 2.0}  # fmt: skip


def value(features, weight, target, prior, teacher):
    return incremental_loss(features @ weight.T, target, prior, teacher, **STEP)


def training(meter, features, weight, target, prior, teacher):
    logits = features @ weight.T
    return logits, incremental_loss_grad(logits, target, prior, teacher, **STEP, meter=meter)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_both_forms_compile_into_one_graph(backend):
    inputs = arguments()
    wanted = torch.autograd.grad(value(*inputs), inputs[1])[0]
    torch._dynamo.reset()
    ours = torch.autograd.grad(torch.compile(value, fullgraph=True, backend=backend)(*inputs), inputs[1])[0]
    torch.testing.assert_close(ours, wanted)
    meters = torch.zeros(2, BATCH + 2, 4)
    training(meters[0], *inputs)
    torch._dynamo.reset()
    compiled = torch.compile(training, fullgraph=True, backend=backend)
    logits, gradient = compiled(meters[1], *inputs)
    torch.testing.assert_close(torch.autograd.grad(logits, inputs[1], gradient)[0], wanted)
    assert torch.equal(*meters)
    assert meters[0, :BATCH, :2].ne(0).any()


def test_one_compiled_graph_serves_every_step():
    """Counts and weights are values; changing them must not compile anything again."""
    inputs, meter = arguments(), torch.zeros(BATCH, 4)
    torch._dynamo.reset()
    keys = {k: torch.as_tensor(v).clone() for k, v in STEP.items()}
    prior = inputs[3].clone()
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph

    def step(features, weight, target, teacher):
        return incremental_loss_grad(features @ weight.T, target, prior, teacher, **keys, meter=meter)

    compiled = torch.compile(step, fullgraph=True, backend=count)
    for old, seen in ((0, 30), (30, 50), (49, 56)):
        keys["num_old"].fill_(old)
        keys["num_seen"].fill_(seen)
        keys["kd_weight"].fill_(old / seen)
        keys["ce_weight"].fill_(1 - old / seen)
        prior.copy_(log_prior((torch.arange(WIDTH) < seen).long()))
        with torch.no_grad():
            batch = (inputs[0], inputs[1], inputs[2].clamp(max=seen - 1), inputs[4])
            torch.testing.assert_close(compiled(*batch), step(*batch))
    assert len(graphs) == 1


def test_the_operator_follows_its_schema_with_every_option():
    features, weight, target, prior, teacher = arguments()
    logits = (features @ weight.T).detach()
    scalars = [torch.as_tensor(v) for v in STEP.values()]
    scale, margin = torch.tensor(2.0), torch.tensor(0.7)
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    step = Operands(logits, target, prior, teacher, *scalars)
    for operands in (
        step._replace(meter=torch.zeros(BATCH, 4)),
        step._replace(sample_weight=torch.rand(BATCH), logit_scale=scale, margin_weight=margin, separated=True,
                      label_smoothing=0.1, meter=torch.zeros(BATCH, 4), value=True),
        step._replace(value=True),
    ):  # fmt: skip
        torch.library.opcheck(torch.ops.fastil.incremental_loss.default, tuple(operands), test_utils=checks)


@pytest.mark.parametrize("strides", ["transposed", "sliced"])
def test_the_fake_gradient_is_laid_out_as_the_real_one(strides):
    features, weight, target, prior, _ = arguments()
    logits = (features @ weight.T).detach()
    logits = logits.T.contiguous().T if strides == "transposed" else torch.stack((logits, logits), 2)[..., 0]
    scalars = [torch.as_tensor(v) for v in STEP.values()]
    inputs = tuple(Operands(logits, target, prior, None, *scalars, value=True))
    torch.library.opcheck(torch.ops.fastil.incremental_loss.default, inputs, test_utils=("test_faketensor",))


def test_fake_cuda_tensors_pass_without_a_read_from_the_device():
    """`.item()` raises under fake tensors, and so would any branch of the host on a value."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        logits = torch.empty(BATCH, WIDTH, device="cuda")
        target = torch.empty(BATCH, dtype=torch.int64, device="cuda")
        prior, meter = torch.empty(WIDTH, device="cuda"), torch.empty(BATCH, 4, device="cuda")
        gradient = incremental_loss_grad(logits, target, prior, logits, **STEP, meter=meter)
        loss = incremental_loss(logits, target, prior, logits, **STEP)
    assert gradient.shape == logits.shape
    assert gradient.device.type == "cuda"
    assert loss.shape == ()


def test_a_second_derivative_raises():
    inputs = arguments()
    with pytest.raises(RuntimeError, match="incremental_loss is differentiable once only"):
        torch.autograd.grad(value(*inputs), inputs[1], create_graph=True)
    logits, gradient = training(torch.zeros(BATCH, 4), *inputs)
    first = torch.autograd.grad(logits, inputs[1], gradient, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(first.sum(), inputs[1])


@pytest.mark.parametrize("form", ["value", "training"])
def test_forward_mode_raises(form):
    features, weight, *rest = arguments()
    meter = torch.zeros(BATCH, 4)

    def loss(w):
        return value(features, w, *rest) if form == "value" else training(meter, features, w, *rest)[1]

    primal = weight.detach()
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.jvp(loss, (primal,), (torch.ones_like(primal),))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
        loss(forward_ad.make_dual(primal, torch.ones_like(primal)))


@pytest.mark.parametrize("derivative", ["jvp", "grad of grad"])
def test_they_raise_in_compiled_code_too(derivative):
    """There torch.func looks through autograd functions, and would find a derivative of 0."""
    features, weight, *rest = arguments()

    def loss(w):
        return value(features, w, *rest)

    def jvp(w):
        return torch.func.jvp(loss, (w,), (torch.ones_like(w),))[1]

    def grad_of_grad(w):
        return torch.func.grad(lambda v: torch.func.grad(loss)(v).square().sum())(w)

    torch._dynamo.reset()
    compiled = torch.compile(jvp if derivative == "jvp" else grad_of_grad, backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match="only its first derivative"):
        compiled(weight.detach())


def test_one_graph_serves_batches_of_several_sizes():
    _, weight, target, prior, teacher = arguments()
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph

    def loss(features, target, teacher):
        return incremental_loss(features @ weight.T, target, prior, teacher, **STEP)

    torch._dynamo.reset()
    compiled = torch.compile(loss, backend=count, dynamic=True, fullgraph=True)
    for rows in (3, 5, 8):
        batch = torch.randn(rows, 16), target[:1].expand(rows).contiguous(), teacher[:1].repeat(rows, 1)
        torch.testing.assert_close(compiled(*batch), loss(*batch))
    assert len(graphs) == 1


def test_the_package_imports_and_runs_without_triton():
    code = """
import sys
sys.modules["triton"] = None
import torch
import fastil.kernels as kernels
assert kernels.herd(torch.eye(3).double()[None], torch.tensor([3]), 2).tolist() == [[0, 1]]
assert not any(name.startswith("fastil.kernels.jit") for name in sys.modules)
from fastil.kernels.registration import jitted
try:
    jitted("herd", "herd")(torch.zeros(1))
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "need Triton: pip install triton" in done.stdout
