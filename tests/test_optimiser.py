"""The optimiser's step: done, taken back, as a formula, and what of it a gradient passes through."""

import pytest
import torch
from torch import nn

from fastil.optimiser import Update


def parameters(seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64)) for shape in [(4, 3), (5,)]]


def give_gradients(found: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in found:
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)


def an_update(found, frozen=False, clamp=None):
    rows = (torch.arange(4)[:, None] >= 2).expand(4, 3)
    return Update(found, torch.tensor(0.1, dtype=torch.float64), 0.9, 1e-2, {found[0]: rows} if frozen else None, clamp)


def test_several_steps_are_those_of_torchs_own_optimiser():
    ours, theirs = parameters(), parameters()
    update = an_update(ours)
    optimizer = torch.optim.SGD(theirs, lr=0.1, momentum=0.9, weight_decay=1e-2)
    for step in range(4):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        update.apply()
        optimizer.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_frozen_rows_stay_bit_for_bit_and_the_others_move_as_ever():
    ours, free = parameters(), parameters()
    update, plain = an_update(ours, frozen=True), an_update(free)
    before = ours[0].detach().clone()
    for step in range(3):
        for found, stepped in ((ours, update), (free, plain)):
            give_gradients(found, step)
            stepped.apply()
    assert torch.equal(ours[0][:2], before[:2])
    assert torch.equal(ours[0][2:], free[0][2:])
    assert torch.equal(ours[1], free[1])


def test_a_clamp_bounds_each_element_of_the_gradient():
    ours, theirs = parameters(), parameters()
    give_gradients(ours, 1)
    give_gradients(theirs, 1)
    for parameter in theirs:
        parameter.grad = torch.where(parameter.grad.abs() > 0.4, 0.4 * parameter.grad.sign(), parameter.grad)
    an_update(ours, clamp=0.4).apply()
    an_update(theirs).apply()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("raises", [False, True])
def test_a_step_that_is_taken_back_leaves_nothing(raises):
    found = parameters()
    update, other = an_update(found), torch.ones(3)
    give_gradients(found, 0)
    update.apply()
    before = [t.detach().clone() for t in [*found, *update.buffers]]

    def trial():
        with update.taken_back(other):
            give_gradients(found, 1)
            update.apply()
            other.zero_()
            assert not torch.equal(found[0], before[0])
            if raises:
                raise KeyError

    if raises:
        with pytest.raises(KeyError):
            trial()
    else:
        trial()
    assert all(torch.equal(now, then) for now, then in zip([*found, *update.buffers], before, strict=True))
    assert torch.equal(other, torch.ones(3))
    assert all(parameter.grad is None for parameter in found)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("clamp", [None, 0.4])
def test_the_formula_is_the_step_and_its_derivative_is_what_passes_through(frozen, clamp):
    found = parameters()
    update = an_update(found, frozen, clamp)
    give_gradients(found, 0)
    update.apply()  # now there is momentum
    give_gradients(found, 1)
    gradients = [p.grad.clone().requires_grad_() for p in found]
    moved = update.formula(gradients)
    vectors = [torch.randn_like(p) for p in found]
    wanted = torch.autograd.grad(moved, gradients, vectors)
    passed = update.passed_through(update.moving(), vectors)
    update.apply()
    for a, b in zip(found, moved, strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=1e-12, atol=1e-12)
    for a, b in zip(passed, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_momentum_is_forgotten_in_place():
    found = parameters()
    update = an_update(found)
    give_gradients(found, 0)
    update.apply()
    pointers = [buffer.data_ptr() for buffer in update.buffers]
    assert all(buffer.abs().sum() > 0 for buffer in update.buffers)
    update.reset()
    assert all((buffer == 0).all() for buffer in update.buffers)
    assert [buffer.data_ptr() for buffer in update.buffers] == pointers


@pytest.mark.parametrize("clamp", [None, 0.4])
def test_a_parameter_without_a_gradient_neither_moves_nor_passes_anything_through(clamp):
    """As the formula has it, by a Jacobian, and as torch's optimiser has it."""
    found = parameters()
    update = an_update(found, frozen=True, clamp=clamp)
    give_gradients(found, 1)
    found[1].grad = None
    gradient, vector = found[0].grad.clone(), torch.randn_like(found[0])

    def moved(values):
        return update.formula([values, None])[0]

    jacobian = torch.autograd.functional.jacobian(moved, gradient)
    expected = torch.einsum("ab,abcd->cd", vector, jacobian)
    first, second = update.passed_through(update.moving(), [vector, None])
    torch.testing.assert_close(first, expected)
    assert torch.equal(second, torch.zeros(5, dtype=torch.float64))
    before = found[1].detach().clone()
    wanted = update.formula([gradient, None])
    update.apply()
    assert torch.equal(found[1], before)
    assert torch.equal(found[1], wanted[1])
    torch.testing.assert_close(found[0].detach(), wanted[0])
