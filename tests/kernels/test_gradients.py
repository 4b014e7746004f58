"""Every argument of every public kernel, asked for its gradient: it gets one, or the call raises and names it."""

import inspect

import numpy as np
import pytest
import torch
from torch import nn

import fastil.kernels
from fastil.kernels import BalancedSoftmaxLoss, IncrementalLoss, alpha_hypergradient, incremental_loss
from fastil.losses import balanced_cross_entropy, log_prior

BATCH, WIDTH, OLD = 6, 8, 3
NO_DERIVATIVE = "{} has no derivative in {}, which requires a gradient"


def loss_arguments():
    torch.manual_seed(0)
    logits, teacher = torch.randn(2, BATCH, WIDTH)
    return {
        "logits": logits, "target": torch.tensor([0, 7, -1, 3, 2, -100]), "log_prior": torch.zeros(WIDTH),
        "teacher_logits": teacher, "num_old": OLD, "num_seen": WIDTH, "ce_weight": 0.4, "kd_weight": 0.6,
        "temperature": 2.0, "sample_weight": torch.rand(BATCH), "separated": False, "label_smoothing": 0.1,
    }  # fmt: skip


def cosines():
    more = {"logit_scale": torch.tensor(2.0), "margin_weight": 0.7, "margin": 0.5, "hardest": 2}
    return loss_arguments() | more | {"meter": torch.zeros(BATCH, 4)}


def alpha():
    given = loss_arguments()
    names = ("logits", "target", "log_prior", "num_old", "num_seen", "ce_weight")
    return {name: given[name] for name in names} | {"tangent": torch.randn(BATCH, WIDTH)}


def crops():
    images = torch.randint(0, 256, (4, 9, 7, 3), dtype=torch.uint8)
    boxes = torch.tensor([[0, 0, 9, 7], [1, -1, 9, 7]])
    return {
        "images": images, "ids": torch.tensor([0, 3]), "boxes": boxes, "flips": torch.tensor([True, False]),
        "mean": torch.full((3,), 0.5), "std": torch.full((3,), 0.25), "dtype": torch.float32, "size": (9, 7),
    }  # fmt: skip


def maps():
    layers = [torch.randn(2, 4, 3, 3) for _ in range(4)]
    return {"maps": layers[:2], "teacher_maps": layers[2:]}


def head():
    features, weight = torch.randn(BATCH, 5), torch.randn(WIDTH, 2, 5)
    return {"features": features, "weight": weight, "scale": torch.tensor(3.0), "sharpness": 2.0}


def frames():
    table = torch.tensor([[0, 2, 2, 0, 0, 2, 2, 3, 3, 0, 0, 0]])
    return {"store": torch.zeros(12, dtype=torch.uint8), "table": table, "frames": torch.zeros(1, 3, 3, 3).byte()}


COUNTS = torch.tensor([20.0, 20.0, 500.0])
# By name in fastil.kernels: all arguments, and those that the result has a derivative in.
CALLS = {
    "incremental_loss": (cosines, {"logits", "logit_scale"}),
    # The gradient it returns is that of the logits, and is given to them by their own backward pass.
    "incremental_loss_grad": (lambda: loss_arguments() | {"meter": torch.zeros(BATCH, 4)}, {"logits"}),
    "alpha_hypergradient": (alpha, set()),
    "augment": (crops, set()),
    "crop_resize": (frames, set()),
    "cosine_head": (head, {"features", "weight", "scale"}),
    "herd": (lambda: {"gram": torch.eye(5)[None], "counts": torch.tensor([5]), "m": 3}, set()),
    "less_forget": (lambda: {"features": torch.randn(2, 3), "teacher_features": torch.randn(2, 3)}, {"features"}),
    "pod_spatial": (maps, {"maps"}),
    "BalancedSoftmaxLoss": (lambda: {"counts": COUNTS, "alpha": 0.5, "num_old": 2}, set()),
    "IncrementalLoss": (
        lambda: {"counts": COUNTS, "num_old": 2, "balanced": True, "alpha": 0.5, "temperature": 2.0, "rho": 0.5}, set()
    ),
}  # fmt: skip


def wanting(value):
    """The same, requiring a gradient, and the leaf that it would lie in; None for what no gradient is of."""
    if isinstance(value, list):
        leaves = [v.clone().requires_grad_() for v in value]
        return leaves, leaves[-1]
    numbers = value.dtype == torch.float32 if isinstance(value, torch.Tensor) else type(value) in (int, float)
    if not numbers:
        return None
    leaf = torch.as_tensor(value, dtype=torch.float32).clone().requires_grad_()
    return leaf, leaf


def test_no_kernel_and_no_argument_is_left_out():
    assert {*CALLS} == {*fastil.kernels.__all__}
    for name, (arguments, _) in CALLS.items():
        assert {*arguments()} == {*inspect.signature(getattr(fastil.kernels, name)).parameters}


@pytest.mark.parametrize(
    ("name", "argument"),
    [(name, a) for name, (arguments, _) in CALLS.items() for a, v in arguments().items() if wanting(v)],
)
def test_an_argument_that_requires_a_gradient_gets_one_or_is_named(name, argument):
    arguments, differentiable = CALLS[name]
    function, given = getattr(fastil.kernels, name), arguments()
    value, leaf = wanting(given[argument])
    given[argument] = value
    if argument not in differentiable:
        with pytest.raises(RuntimeError, match=NO_DERIVATIVE.format(name, argument)):
            function(**given)
        with torch.no_grad():  # nobody wants one here
            function(**given)
        return
    result = function(**given)
    if name == "incremental_loss_grad":
        leaf.backward(result)
    else:
        result.sum().backward()
    assert leaf.grad.ne(0).any()


def test_alpha_learned_through_the_kernel_raises_where_the_formula_has_the_derivative():
    """What was silent: alpha.grad was None after a backward pass of the kernel."""
    random = torch.Generator().manual_seed(0)
    counts = torch.tensor([20.0, 20.0, 500.0, 500.0])
    x, y = torch.randn(8, 4, generator=random), torch.randint(0, 4, (8,), generator=random)
    step = {"num_old": 2, "num_seen": 4, "ce_weight": 1.0, "kd_weight": 0.0, "temperature": 2.0}
    alpha = torch.tensor(1.0, requires_grad=True)
    for logits in (x, x.clone().requires_grad_()):
        with pytest.raises(RuntimeError, match=NO_DERIVATIVE.format("incremental_loss", "log_prior")):
            incremental_loss(logits, y, log_prior(counts, 2, alpha), **step)

    def formula(a):
        """Eq. 4 and 5 in float64."""
        z = x.double().numpy() + np.log(counts.double().numpy() * [a, a, 1, 1])
        return (np.log(np.exp(z).sum(1)) - z[np.arange(8), y.numpy()]).mean()

    balanced_cross_entropy(x, y, log_prior(counts, 2, alpha)).backward()
    assert alpha.grad.item() == pytest.approx((formula(1 + 1e-5) - formula(1 - 1e-5)) / 2e-5, rel=1e-4)
    with torch.no_grad():  # a learned alpha is evaluated by the kernel
        value = incremental_loss(x, y, log_prior(counts, 2, alpha), **step).item()
    assert value == pytest.approx(formula(1.0), rel=1e-5)


def test_the_modules_name_what_gets_no_gradient():
    logits, target = torch.randn(3, 3, requires_grad=True), torch.tensor([0, 1, 2])
    criterion = BalancedSoftmaxLoss(COUNTS)
    criterion.log_prior = nn.Parameter(criterion._buffers.pop("log_prior"))  # as somebody would learn the prior
    with pytest.raises(RuntimeError, match=NO_DERIVATIVE.format("incremental_loss", "log_prior")):
        criterion(logits, target)
    with pytest.raises(RuntimeError, match=NO_DERIVATIVE.format("incremental_loss", "teacher_logits")):
        IncrementalLoss(COUNTS, 2)(logits, target, torch.randn(3, 3, requires_grad=True))


@pytest.mark.parametrize("function", ["alpha_hypergradient", "incremental_loss_grad"])
def test_compiled_code_raises_too(function):
    """There what they return is a constant, which would be wrong in silence."""
    arguments, _ = CALLS[function]
    given = arguments() | {"log_prior": torch.zeros(WIDTH, requires_grad=True)}
    torch._dynamo.reset()
    compiled = torch.compile(getattr(fastil.kernels, function), backend="eager")
    with pytest.raises(RuntimeError, match=NO_DERIVATIVE.format(function, "log_prior")):
        compiled(**given)
    fine = compiled(**arguments())
    torch.testing.assert_close(fine, getattr(fastil.kernels, function)(**arguments()))


def test_compiled_code_without_breaks_takes_the_modules():
    torch._dynamo.reset()
    criterion = IncrementalLoss(COUNTS, 2)
    logits, teacher, target = torch.randn(4, 3), torch.randn(4, 3), torch.tensor([0, 1, 2, -100])
    compiled = torch.compile(criterion, backend="eager", fullgraph=True)
    assert torch.equal(compiled(logits, target, teacher), criterion(logits, target, teacher))


@pytest.mark.parametrize("wanted", ["tangent", "primal"])
def test_operators_without_an_autograd_function_refuse_forward_mode_and_torch_func(wanted):
    given = alpha()
    x = given.pop("logits")
    if wanted == "tangent":
        with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="only its first derivative"):
            alpha_hypergradient(torch.autograd.forward_ad.make_dual(x, x), **given)
    else:
        with pytest.raises(RuntimeError, match=r"only its first derivative|no derivative in logits"):
            torch.func.grad(lambda z: alpha_hypergradient(z, **given).sum())(x)
