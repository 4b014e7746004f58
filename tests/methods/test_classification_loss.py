"""The five classification losses against formulas in float64, and what base sharing stands on: bit equality."""

import numpy as np
import pytest
import torch
from torch import Tensor

from fastil.data import Batch
from fastil.errors import UserError
from fastil.methods import LossConfig, Meter, MethodConfig, StepContext
from fastil.methods.il_baseline import ILBaseline
from fastil.models import Output
from fastil.recipe_file import load

W, NUM_OLD, NUM_SEEN = 16, 5, 11
COUNTS = np.array([3, 7, 2, 9, 4, 50, 41, 60, 13, 22, 38] + [0] * (W - NUM_SEEN))
CASES = [("softmax", 1.0), ("balanced", 1.0), ("balanced", 0.3), ("separated", 1.0), ("rescaled", 1.0)]


def method_of(loss: str, alpha: float = 1.0, counts=COUNTS, num_old=NUM_OLD, num_seen=NUM_SEEN) -> ILBaseline:
    method = ILBaseline(MethodConfig(), LossConfig(loss, alpha), W, torch.device("cpu"))
    method.begin_step(StepContext(1, num_old, num_seen, np.asarray(counts)))
    return method


def a_batch(rows: int = 9) -> tuple[Batch, Output, Output]:
    generator = torch.Generator().manual_seed(0)
    logits, teacher = (3 * torch.randn(rows, W, generator=generator) for _ in range(2))
    labels = torch.randint(0, NUM_SEEN, (rows,), generator=generator)
    nothing = torch.zeros(rows, 1)
    return Batch(nothing, labels, labels), Output(nothing, [], logits.requires_grad_()), Output(nothing, [], teacher)


def written_out(loss: str, alpha: float, logits: Tensor, labels: Tensor) -> Tensor:
    """The mean cross-entropy of section 4.3.3's losses, image by image, from their definitions."""
    counts = COUNTS[:NUM_SEEN].astype(np.float64)
    total = torch.zeros((), dtype=torch.float64)
    for z, y in zip(logits.double(), labels.tolist(), strict=True):
        weight, block, lambdas = 1.0, range(NUM_SEEN), torch.ones(NUM_SEEN, dtype=torch.float64)
        if loss == "balanced":  # eq. 5: n_i alpha for old classes, n_i for new ones
            lambdas = torch.tensor([n * (alpha if i < NUM_OLD else 1) for i, n in enumerate(counts)])
        if loss == "separated":
            block = range(NUM_OLD) if y < NUM_OLD else range(NUM_OLD, NUM_SEEN)
        if loss == "rescaled":
            weight = (1 / counts[y]) / sum(n * (1 / n) for n in counts) * counts.sum()
        shares = sum(lambdas[k] * z[k].exp() for k in block)
        total = total - weight * (lambdas[y] * z[y].exp() / shares).log()
    return total / len(labels)


@pytest.mark.parametrize(("loss", "alpha"), CASES)
def test_value_and_gradient_are_those_of_the_definition(loss, alpha):
    method, (batch, out, teacher_out) = method_of(loss, alpha), a_batch()
    rho = NUM_OLD / NUM_SEEN
    wanted_logits = out.logits.detach().clone().requires_grad_()
    p_hat = torch.softmax(teacher_out.logits[:, :NUM_OLD].double() / 2, 1)
    log_p = torch.log_softmax(wanted_logits[:, :NUM_OLD].double() / 2, 1)
    wanted = (1 - rho) * written_out(loss, alpha, wanted_logits, batch.labels) - rho * 4 * (p_hat * log_p).sum(1).mean()
    wanted.backward()
    value = method.loss(batch, out, teacher_out)
    assert float(value.detach()) == pytest.approx(float(wanted.detach()), rel=1e-6)
    method.backward(batch, out, teacher_out, a_meter(len(batch.labels)))
    torch.testing.assert_close(out.logits.grad, wanted_logits.grad, rtol=1e-5, atol=1e-7)


def a_meter(rows):
    return Meter(torch.zeros(rows, 4), torch.zeros(()))


@pytest.mark.parametrize(("loss", "alpha"), [("balanced", 1.0), ("balanced", 0.3)])
@pytest.mark.parametrize("with_teacher", [False, True])
def test_the_formula_is_the_loss(loss, alpha, with_teacher):
    method, (batch, out, teacher_out) = method_of(loss, alpha), a_batch()
    teacher_out = teacher_out if with_teacher else None
    formula = method.formula(batch, out, teacher_out, method.classification.log_prior)
    assert float(formula.detach()) == pytest.approx(float(method.loss(batch, out, teacher_out).detach()), rel=1e-6)


def test_weights_have_mean_one_over_the_training_images():
    weight = method_of("rescaled").classification.class_weight.double().numpy()
    assert (weight[:NUM_SEEN] * COUNTS[:NUM_SEEN]).sum() / COUNTS.sum() == pytest.approx(1, rel=1e-6)
    ratios = weight[:NUM_SEEN] * COUNTS[:NUM_SEEN]
    np.testing.assert_allclose(ratios, ratios[0], rtol=1e-6)


def test_equal_counts_without_old_classes_make_all_losses_one_bit_for_bit():
    """What lets rows of a table share their base step."""
    gradients = []
    for loss in ("softmax", "balanced", "meta_balanced", "separated", "rescaled"):
        for images in (7, 500, 1300):
            counts = [images] * NUM_SEEN + [0] * (W - NUM_SEEN)
            method, (batch, out, _) = method_of(loss, counts=counts, num_old=0), a_batch()
            method.backward(batch, out, None, a_meter(len(batch.labels)))
            gradients.append(out.logits.grad)
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)


def test_a_step_forgets_the_alpha_of_the_one_before():
    classification = method_of("balanced", 0.3).classification
    before = classification.log_prior.clone()
    classification.set_log_alpha(torch.tensor(-3.0))
    assert not torch.equal(classification.log_prior, before)
    assert torch.equal(classification.log_prior[NUM_OLD:], before[NUM_OLD:])
    classification.begin_step(StepContext(2, NUM_OLD, NUM_SEEN, COUNTS))
    assert torch.equal(classification.log_prior, before)


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf")])
def test_alpha_must_be_a_positive_number(alpha):
    with pytest.raises(UserError, match="alpha="):
        load("digits", {"loss": "balanced", "alpha": alpha})


@pytest.mark.parametrize("loss", ["softmax", "separated", "rescaled", "meta_balanced"])
def test_an_alpha_that_nothing_reads_is_named(loss):
    with pytest.raises(UserError, match="only loss=balanced reads it"):
        LossConfig(loss, 0.5)
