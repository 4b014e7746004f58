"""The hyper-gradient of alpha against autograd through an unrolled step, finite differences and its formula."""

import math

import numpy as np
import pytest
import torch
from guards import guarded, poisoned
from torch import nn

from fastil.kernels import alpha_hypergradient
from fastil.losses import balanced_cross_entropy, log_prior

LIMIT = {"operator": 2e-6, "triton": 1e-6}
both_forms = pytest.mark.parametrize("form", ["operator", "triton"])


def formula(z, u, target, prior, num_old, num_seen, ce_weight):
    """Row by row in float64."""
    total = np.zeros(z.shape[1])
    for b, y in enumerate(target):
        if y < 0:
            continue
        seen = [k for k in range(num_seen) if prior[k] > -math.inf]
        a = z[b, seen] + prior[seen]
        q = np.exp(a - a.max())
        q /= q.sum()
        total[seen] += q * (u[b, seen] - (q * u[b, seen]).sum())
    total[num_old:] = 0
    return total * ce_weight / len(z)


def example(rows, seen, num_old, seed=0, width=None, shift=0.0):
    random = np.random.default_rng([rows, seen, num_old, seed])
    width = width or -(-seen // 8) * 8
    z, u = random.normal(0, 2, (2, rows, width)).astype(np.float32)
    z += np.float32(shift)
    z[:, seen:], u[:, seen:] = np.nan, np.nan
    counts = np.zeros(width)
    counts[:seen] = random.integers(1, 600, seen)
    target = random.integers(-1, seen, rows)
    return torch.from_numpy(z), torch.from_numpy(u), torch.from_numpy(target), log_prior(torch.from_numpy(counts))


def run(form, z, u, target, prior, *scalars, device):
    tensors = [t.to(device) for t in (z, u, target, prior)]
    if form == "operator":
        return alpha_hypergradient(*tensors, num_old=scalars[0], num_seen=scalars[1], ce_weight=scalars[2])
    launcher = pytest.importorskip("fastil.kernels.jit.alpha_hypergradient", reason="triton is not installed")
    with np.errstate(all="ignore"):
        return launcher.alpha_hypergradient(*tensors, *scalars)


def relative(ours, wanted):
    return np.linalg.norm(ours.double().cpu().numpy() - wanted) / max(np.linalg.norm(wanted), 1e-30)


@both_forms
@pytest.mark.parametrize("shift", [0.0, 100.0])
@pytest.mark.parametrize("old", ["none", "one", "most", "all"])
@pytest.mark.parametrize(("rows", "seen"), [(1, 2), (3, 10), (7, 37), (70, 55), (130, 100), (5, 101), (2, 1000)])
def test_the_contraction_is_its_formula(form, rows, seen, old, shift, device):
    num_old = {"none": 0, "one": 1, "most": seen - 1, "all": seen}[old]
    arguments = example(rows, seen, num_old, shift=shift)
    ours = run(form, *arguments, num_old, seen, 0.4, device=device)
    z, u, target, prior = (a.double().numpy() for a in arguments)
    assert ours.dtype == torch.float32
    limit = LIMIT[form] if shift == 0 or form == "triton" else 2e-5  # the plain form rounds z + prior
    assert relative(ours, formula(z, u, target, prior, num_old, seen, 0.4)) <= limit
    assert (ours[num_old:] == 0).all()


def small_network():
    torch.manual_seed(0)
    layers = (
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4, track_running_stats=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * 16, 16),
    )
    return nn.Sequential(*layers).double()


@pytest.mark.parametrize("per_class", [False, True])
def test_it_is_the_derivative_through_an_unrolled_step(per_class):
    """dL_val(theta - lr dL/dtheta)/dalpha by create_graph, and by one forward-mode pass and the contraction."""
    network, lr, num_old, num_seen, ce_weight = small_network(), 0.5, 9, 14, 0.4
    parameters = {k: v.detach() for k, v in network.named_parameters()}
    images, validation = torch.randn(2, 12, 3, 6, 6, dtype=torch.float64)
    target, val_target = torch.randint(0, num_seen, (2, 12))
    counts = torch.tensor([20.0] * num_old + [500.0] * (num_seen - num_old) + [0.0] * 2, dtype=torch.float64)

    def forward(weights, x):
        return torch.func.functional_call(network, weights, (x,))

    def loss(weights, alpha):
        scale = torch.where(torch.arange(16) < num_old, alpha, 1.0)
        z = (forward(weights, images) + (counts * scale).log())[:, :num_seen]
        return ce_weight * torch.nn.functional.cross_entropy(z, target)

    def val_loss(weights):
        return torch.nn.functional.cross_entropy(forward(weights, validation)[:, :num_seen], val_target)

    alpha = torch.full((16,) if per_class else (), 0.7, dtype=torch.float64, requires_grad=True)
    leaves = {k: v.clone().requires_grad_() for k, v in parameters.items()}
    gradient = torch.autograd.grad(loss(leaves, alpha), list(leaves.values()), create_graph=True)
    moved = {k: v - lr * g for (k, v), g in zip(leaves.items(), gradient, strict=True)}
    wanted = torch.autograd.grad(val_loss(moved), alpha)[0]

    leaves = {k: v.detach().clone().requires_grad_() for k, v in moved.items()}
    v = dict(zip(leaves, torch.autograd.grad(val_loss(leaves), list(leaves.values())), strict=True))
    z, u = torch.func.jvp(lambda weights: forward(weights, images), (parameters,), (v,))
    prior = log_prior(counts, num_old, alpha.detach())
    result = alpha_hypergradient(z, u, target, prior, num_old=num_old, num_seen=num_seen, ce_weight=ce_weight).double()
    ours = -lr * (result if per_class else result.sum()) / alpha.detach()
    assert ((ours - wanted).norm() / wanted.norm()).item() <= 1e-5  # the contraction computes in float32


def test_it_agrees_with_autograd_of_the_balanced_cross_entropy():
    """d/dlog alpha of <u, dL/dz> by differentiating the formula twice."""
    z, u, target, _ = example(6, 16, 9)
    counts = torch.arange(1.0, 17.0)
    log_alpha = torch.zeros(16, requires_grad=True)
    z.requires_grad_()
    gradient = torch.autograd.grad(
        balanced_cross_entropy(z, target, log_prior(counts, 9, log_alpha.exp())), z, create_graph=True
    )[0]
    wanted = torch.autograd.grad((gradient * u).sum(), log_alpha)[0]
    z = z.detach()
    ours = alpha_hypergradient(z, u, target, log_prior(counts, 9), num_old=9, num_seen=16, ce_weight=1.0)
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-6)


@both_forms
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(form, dtype, device):
    z, u, target, prior = example(9, 37, 20)
    z, u = z.to(dtype), u.to(dtype)
    half = run(form, z, u, target, prior, 20, 37, 0.4, device=device)
    assert torch.equal(half, run(form, z.float(), u.float(), target, prior, 20, 37, 0.4, device=device))


@both_forms
def test_device_scalars_give_the_result_of_numbers(form, device):
    arguments = example(5, 37, 20)
    scalars = [torch.tensor(v, device=device) for v in (20, 37, 0.4)]
    a = run(form, *arguments, *scalars, device=device)
    assert torch.equal(a, run(form, *arguments, 20, 37, 0.4, device=device))


def test_nothing_beside_the_tensors_is_read_or_written(device):
    launcher = pytest.importorskip("fastil.kernels.jit.alpha_hypergradient")
    for rows, width in ((3, 37), (70, 104)):
        arguments = [t.to(device) for t in example(rows, 37, 20, width=width)]
        with np.errstate(all="ignore"), guarded():
            ours = launcher.alpha_hypergradient(*poisoned(*arguments), 20, 37, 0.4)
        assert torch.equal(ours, run("triton", *arguments, 20, 37, 0.4, device=device))


def test_the_operator_compiles_and_follows_its_schema():
    arguments = [*example(6, 16, 9), *(torch.tensor(v) for v in (9, 16, 0.4))]
    torch.library.opcheck(torch.ops.fastil.alpha_hypergradient.default, tuple(arguments))


@pytest.mark.parametrize(("name", "shape"), [("tangent", (1, 40)), ("target", (3,)), ("log_prior", (3,))])
def test_arguments_that_do_not_fit_are_named(name, shape):
    keys = dict(zip(("logits", "tangent", "target", "log_prior"), example(5, 37, 20), strict=True))
    keys[name] = torch.zeros(shape, dtype=keys[name].dtype)
    with pytest.raises(ValueError, match=f"{name} must be"):
        alpha_hypergradient(**keys, num_old=20, num_seen=37, ce_weight=1.0)


@both_forms
def test_an_empty_batch_has_a_gradient_of_zero(form, device):
    z, u, target, prior = example(5, 37, 20)
    assert (run(form, z[:0], u[:0], target[:0], prior, 20, 37, 0.4, device=device) == 0).all()
