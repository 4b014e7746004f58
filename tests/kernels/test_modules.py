"""The losses as modules: the formula in float64, a whole training, and bad input."""

import math

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

from fastil.kernels import BalancedSoftmaxLoss, IncrementalLoss

COUNTS = torch.tensor([20, 20, 500, 3, 0])


def formula(logits, target, counts, old=0, alpha=1.0):
    """Eq. 5 in float64: -log of lambda_y e^z_y over the sum, lambda = n, alpha n on old classes."""
    weight = counts.double().clone()
    weight[:old] *= alpha
    shifted = logits.double() + weight.log()
    return F.cross_entropy(shifted[target >= 0], target[target >= 0], reduction="sum") / len(target)


@pytest.mark.parametrize(("old", "alpha"), [(0, 1.0), (2, 0.25)])
def test_the_balanced_softmax_loss_is_the_formula(device, old, alpha):
    logits = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
    target = torch.tensor([0, 1, 2, 3, 2, -1, 0], device=device)
    loss = BalancedSoftmaxLoss(COUNTS, alpha, old).to(device)(logits, target)
    expected = formula(logits, target, COUNTS.to(device), old, alpha)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
    ours, theirs = (torch.autograd.grad(value, logits, retain_graph=True)[0] for value in (loss, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("balanced", [True, False])
def test_the_incremental_loss_is_eq_1(device, balanced):
    generator = torch.Generator().manual_seed(1)
    logits, teacher = (torch.randn(6, 5, generator=generator).to(device) for _ in range(2))
    target = torch.tensor([0, 1, 2, 3, 2, 2], device=device)
    criterion = IncrementalLoss(COUNTS, 2, balanced=balanced, temperature=3.0).to(device)
    counts = (COUNTS if balanced else (COUNTS > 0).long()).to(device)
    softened = (teacher[:, :2].double() / 3).softmax(1)
    distilled = -9 * (softened * (logits[:, :2].double() / 3).log_softmax(1)).sum(1).mean()
    expected = 0.5 * formula(logits, target, counts) + 0.5 * distilled  # rho: 2 old of 4 classes that have images
    torch.testing.assert_close(criterion(logits, target, teacher).double(), expected, rtol=1e-6, atol=1e-6)
    alone = formula(logits, target, counts)
    torch.testing.assert_close(criterion(logits, target).double(), alone, rtol=1e-6, atol=1e-6)


def test_two_hundred_steps_with_it_end_where_those_with_the_formula_end():
    """Two classes of digits, one with a tenth of the images; the loss of all images falls to the same value."""
    data = load_digits(n_class=2)
    images, labels = torch.from_numpy(data.data).float() / 16, torch.from_numpy(data.target).long()
    kept = torch.cat([torch.nonzero(labels == 0)[:, 0][::10], torch.nonzero(labels == 1)[:, 0]])
    images, labels = images[kept], labels[kept]
    counts = torch.bincount(labels)
    criterion = BalancedSoftmaxLoss(counts)
    ends = []
    for loss in (criterion, lambda z, y: formula(z, y, counts).float()):
        network = torch.nn.Linear(64, 2)
        with torch.no_grad():
            network.weight.copy_(torch.randn(2, 64, generator=torch.Generator().manual_seed(0)))
            network.bias.zero_()
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
        began = loss(network(images), labels).item()
        for _ in range(200):
            optimizer.zero_grad()
            loss(network(images), labels).backward()
            optimizer.step()
        ends.append(loss(network(images), labels).item())
        assert ends[-1] < 0.1 * began
    assert ends[0] == pytest.approx(ends[1], rel=1e-3)


def test_a_second_derivative_raises():
    criterion, logits = IncrementalLoss(COUNTS, 2), torch.randn(3, 5, requires_grad=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(criterion(logits, torch.tensor([0, 1, 2])), logits, create_graph=True)


def test_rows_without_a_class_count_in_the_mean_and_a_label_that_is_none_shows():
    """nn.CrossEntropyLoss would divide by the two rows that have a class."""
    logits = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    target, criterion = torch.tensor([3, -1, 0, -100]), BalancedSoftmaxLoss(COUNTS)
    kept = target >= 0
    expected = formula(logits[kept], target[kept], COUNTS) * 2 / 4
    torch.testing.assert_close(criterion(logits, target).double(), expected, rtol=1e-6, atol=1e-6)
    for label in (5, -2, 2**40 + 1):
        target[1] = label
        assert criterion(logits, target).isnan()
    assert criterion(logits, torch.tensor([3, 4, 0, 1])) == math.inf  # no image of class 4


ODD_COUNTS = [
    ([0, 0], "at least one class must have images"),
    ([], "at least one class must have images"),
    ([-1, 3], r"counts\[0\]=-1: "),
    ([3.0, math.nan], r"counts\[1\]=nan: "),
    ([3.0, math.inf], r"counts\[1\]=inf: "),
    ([[1, 2]], r"counts must be \[W\], .* not torch.int64 \[1, 2\]"),
    (5, r"counts must be \[W\], .* not torch.int64 \[\]"),
    ([True, False], r"counts must be \[W\], .* not torch.bool \[2\]"),
    ([1j, 2], r"counts must be \[W\]"),
    (["3", "4"], r"counts must be \[W\], .* not \['3', '4'\]"),
    ({0: 3}, r"counts must be \[W\], .* not \{0: 3\}"),
    (None, r"counts must be \[W\], .* not None"),
    ([[1], [2, 3]], r"counts must be \[W\]"),
]


@pytest.mark.parametrize(("counts", "message"), ODD_COUNTS)
def test_odd_counts_say_what_is_wrong(counts, message):
    for module in (
        lambda: BalancedSoftmaxLoss(counts),
        lambda: IncrementalLoss(counts, 0),
        lambda: IncrementalLoss(counts, 0, balanced=False),
    ):
        with pytest.raises(ValueError, match=message):
            module()


def test_counts_may_be_a_list_or_an_array():
    wanted = BalancedSoftmaxLoss(COUNTS).log_prior
    for counts in (COUNTS.tolist(), COUNTS.numpy(), COUNTS.float(), COUNTS.to(torch.int32)):
        assert torch.equal(BalancedSoftmaxLoss(counts).log_prior, wanted)


def test_counts_of_another_number_of_classes_than_the_logits_are_named():
    for criterion in (BalancedSoftmaxLoss(COUNTS), IncrementalLoss(COUNTS, 2)):
        for width in (4, 6):
            message = rf"counts has 5 classes, logits are \[3, {width}\]"
            with pytest.raises(ValueError, match=message):
                criterion(torch.zeros(3, width), torch.tensor([0, 1, 2]))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"alpha": 0.0}, "alpha=0.0: "), ({"alpha": -1.0}, "alpha=-1.0: "), ({"alpha": math.nan}, "alpha=nan: "),
        ({"alpha": math.inf}, "alpha=inf: "), ({"num_old": 6}, "num_old=6"), ({"num_old": -1}, "num_old=-1"),
        ({"num_old": 2.5}, "num_old=2.5"),
    ],
)  # fmt: skip
def test_an_alpha_or_a_number_of_classes_that_cannot_be_is_named(keys, message):
    for module in (BalancedSoftmaxLoss, IncrementalLoss):
        with pytest.raises(ValueError, match=message):
            module(COUNTS, **({"num_old": 2} | keys))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"balanced": False, "alpha": 0.5}, "alpha=0.5: the plain softmax"),
        ({"rho": 1.5}, "rho=1.5"), ({"rho": math.nan}, "rho=nan"),
        ({"temperature": 0}, "temperature=0: "), ({"temperature": math.nan}, "temperature=nan: "),
    ],
)  # fmt: skip
def test_settings_of_the_incremental_loss_that_cannot_be_are_named(keys, message):
    with pytest.raises(ValueError, match=message):
        IncrementalLoss(COUNTS, 2, **keys)
