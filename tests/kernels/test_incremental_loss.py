"""Eq. 1 of arXiv 2103.12532 as the kernel computes it, against the equations in float64."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastil.kernels import incremental_loss
from fastil.losses import log_prior


def softmax(x):
    e = np.exp(x - x.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def equation_1(z, target, counts, z_hat, num_old, ce_weight, kd_weight, temperature):
    """ce_weight * eq. 4 + kd_weight * eq. 2 with means over the batch, and the gradient in z, in float64."""
    rows, seen = len(z), int((counts > 0).sum())
    q = softmax(z[:, :seen] + np.log(counts[:seen]))
    value, gradient = 0.0, np.zeros(z.shape)
    for row, y in enumerate(target):
        if y >= 0:
            value -= ce_weight * math.log(q[row, y]) / rows
            gradient[row, :seen] += ce_weight * q[row] / rows
            gradient[row, y] -= ce_weight / rows
    if z_hat is not None and num_old:
        p, p_hat = softmax(z[:, :num_old] / temperature), softmax(z_hat[:, :num_old] / temperature)
        value -= kd_weight * temperature**2 * (p_hat * np.log(p)).sum() / rows
        gradient[:, :num_old] += kd_weight * temperature * (p - p_hat) / rows
    return value, gradient


def example(rows, seen, seed):
    random = np.random.default_rng(seed)
    width = -(-seen // 8) * 8
    logits, teacher = random.normal(0, 2, (2, rows, width)).astype(np.float32)
    counts = np.zeros(width)
    counts[:seen] = random.integers(1, 600, seen)
    return (
        torch.from_numpy(logits),
        torch.from_numpy(random.integers(-1, seen, rows)),
        counts,
        torch.from_numpy(teacher),
    )


def run(logits, target, prior, teacher=None, **keys):
    logits = logits.clone().requires_grad_()
    value = incremental_loss(logits, target, prior, teacher, **keys)
    value.backward()
    return value.detach(), logits.grad


@given(
    st.integers(1, 9), st.integers(1, 20), st.integers(0, 2**32 - 1),
    st.sampled_from([1.0, 2.0, 3.5]), st.floats(0, 1), st.booleans(), st.data(),
)  # fmt: skip
@settings(deadline=None, database=None, derandomize=True, max_examples=60)
def test_the_loss_is_equation_1(rows, seen, seed, temperature, rho, with_teacher, data):
    num_old = data.draw(st.integers(0, seen))
    logits, target, counts, teacher = example(rows, seen, seed)
    keys = {"num_old": num_old, "num_seen": seen, "ce_weight": 1 - rho, "kd_weight": rho, "temperature": temperature}
    prior = log_prior(torch.from_numpy(counts), num_old)
    value, gradient = run(logits, target, prior, teacher if with_teacher else None, **keys)
    z_hat = teacher.double().numpy() if with_teacher else None
    keys.pop("num_seen")
    wanted = equation_1(logits.double().numpy(), target.numpy(), counts, z_hat, **keys)
    assert value.shape == ()
    np.testing.assert_allclose(value.double().numpy(), wanted[0], rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(gradient.double().numpy(), wanted[1], rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("num_old", [0, 5, 10])
def test_device_scalars_give_the_loss_of_numbers(num_old):
    """A step then changes values and neither shapes nor code."""
    logits, target, counts, teacher = example(6, 10, 1)
    prior = log_prior(torch.from_numpy(counts))
    keys = {"num_old": num_old, "num_seen": 10, "ce_weight": 0.4, "kd_weight": 0.6, "temperature": 2.0}
    a = run(logits, target, prior, teacher, **keys)
    b = run(logits, target, prior, teacher, **{key: torch.tensor(value) for key, value in keys.items()})
    assert torch.equal(a[0], b[0])
    assert torch.equal(a[1], b[1])


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
def test_columns_not_seen_never_reach_value_or_gradient(garbage):
    logits, target, counts, teacher = example(5, 10, 2)
    prior = log_prior(torch.from_numpy(counts), 6)
    keys = {"num_old": 6, "num_seen": 10, "ce_weight": 0.4, "kd_weight": 0.6, "temperature": 2.0}
    clean = run(logits, target, prior, teacher, **keys)
    dirty, dirty_teacher = logits.clone(), teacher.clone()
    dirty[:, 10:] = garbage
    dirty_teacher[:, 6:] = garbage  # the teacher knows neither the new classes nor the padding
    value, gradient = run(dirty, target, prior, dirty_teacher, **keys)
    assert torch.equal(value, clean[0])
    assert torch.equal(gradient, clean[1])
    assert (gradient[:, 10:] == 0).all()


@pytest.mark.parametrize("num_seen", [7, torch.tensor(7)])
def test_columns_from_num_seen_on_are_ignored_whatever_the_prior_says(num_seen):
    logits, target, counts, teacher = example(5, 10, 3)
    target = target.clamp(max=6)
    logits[:, 7] = math.nan
    keys = {"num_old": 4, "ce_weight": 0.4, "kd_weight": 0.6, "temperature": 2.0}
    value, gradient = run(logits, target, log_prior(torch.from_numpy(counts)), teacher, num_seen=num_seen, **keys)
    counts[7:] = 0
    wanted = equation_1(logits.double().numpy(), target.numpy(), counts, teacher.double().numpy(), **keys)
    np.testing.assert_allclose(value.double().numpy(), wanted[0], rtol=2e-5)
    np.testing.assert_allclose(gradient.double().numpy(), wanted[1], rtol=2e-5, atol=2e-6)
    assert (gradient[:, 7:] == 0).all()


def test_at_the_base_step_a_teacher_changes_nothing():
    """No old classes: even a teacher of NaN, whatever its weight."""
    logits, target, counts, teacher = example(5, 10, 2)
    prior = log_prior(torch.from_numpy(counts))
    keys = {"num_old": 0, "num_seen": 10, "ce_weight": 1.0, "kd_weight": 1.0, "temperature": 2.0}
    a = run(logits, target, prior, None, **keys)
    b = run(logits, target, prior, torch.full_like(teacher, math.nan), **keys)
    assert torch.equal(a[0], b[0])
    assert torch.equal(a[1], b[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_computed_in_float32(dtype):
    logits, target, counts, teacher = example(6, 10, 1)
    logits, teacher, prior = logits.to(dtype), teacher.to(dtype), log_prior(torch.from_numpy(counts))
    keys = {"num_old": 6, "num_seen": 10, "ce_weight": 0.4, "kd_weight": 0.6, "temperature": 2.0}
    value, gradient = run(logits, target, prior, teacher, **keys)
    assert value.dtype == torch.float32
    assert torch.equal(value, run(logits.float(), target, prior, teacher.float(), **keys)[0])
    assert gradient.dtype == dtype
