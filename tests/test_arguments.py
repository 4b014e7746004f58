"""What losses and kernels refuse, and which labels they take for a class, against a loop over the labels."""

import inspect
import math
import re

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastil import losses
from fastil.losses import check_classes, check_counts, check_integer, check_scalar, differentiable_in, labels

ODD_LABELS = [
    0, 1, 4, 5, 6, -1, -2, -99, -100, -101, 127, -128, 255, 156, 2**31 - 1, -(2**31), 2**31, 2**32 - 1, 2**40 + 1,
    -(2**40) - 1, 2**63 - 1, -(2**63),
]  # fmt: skip
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("num_classes", [0, 1, 5, torch.tensor(5), torch.tensor(6.0)])
def test_a_label_is_a_class_or_none_or_a_mistake(dtype, num_classes):
    limits = torch.iinfo(dtype)
    given = [y for y in ODD_LABELS if limits.min <= y <= limits.max]
    y, factor = labels(torch.tensor(given, dtype=dtype), num_classes)
    assert y.dtype == torch.int64
    assert factor.dtype == torch.float32
    for label, column, weight in zip(given, y.tolist(), factor.tolist(), strict=True):
        if 0 <= label < num_classes:
            assert (column, weight) == (label, 1)
        elif label in (-1, -100):
            assert (column, weight) == (0, 0)
        else:
            assert column == 0
            assert math.isnan(weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.complex64])
def test_labels_that_are_no_integers_are_refused(dtype):
    with pytest.raises(ValueError, match=f"target must hold integers, not {dtype}"):
        labels(torch.zeros(3).to(dtype), 5)


@pytest.mark.parametrize(
    "value", [0, -1, -0.5, math.nan, math.inf, -math.inf, np.float32("nan"), np.int64(0), 1e39, 1e-50]
)
def test_a_temperature_that_cannot_be_is_named(value):
    with pytest.raises(ValueError, match=re.escape(f"temperature={value}: must be finite and above 0 in float32")):
        check_scalar("temperature", value, positive=True)


def test_what_may_be_a_scalar():
    for value in (1, 0.5, np.float32(2), np.int64(3), torch.tensor(1.0), torch.tensor(math.nan), torch.tensor(0)):
        check_scalar("temperature", value, positive=True)  # a tensor is not read
    for value in (-1.0, 0):
        check_scalar("kd_weight", value)
    for value in (math.nan, math.inf, 1e39, -1e39):
        with pytest.raises(ValueError, match=re.escape(f"kd_weight={value}: must be finite in float32")):
            check_scalar("kd_weight", value)
    with pytest.raises(ValueError, match=r"kd_weight must be a number or a 0-d tensor, not \[2\]"):
        check_scalar("kd_weight", torch.zeros(2))


@pytest.mark.parametrize(("old", "seen"), [(0, 0), (0, 8), (8, 8), (3, 5), (np.int64(3), 5), (torch.tensor(9), 8)])
def test_numbers_of_classes(old, seen):
    check_classes(old, seen, 8)


@pytest.mark.parametrize(
    ("old", "seen"),
    [(6, 5), (-1, 5), (3, 9), (2.5, 5), (2, 5.5), (math.nan, 5), (0, math.inf), (torch.tensor(1), 9),
     (9, torch.tensor(5)), (-1, torch.tensor(5))],
)  # fmt: skip
def test_numbers_of_classes_that_cannot_be(old, seen):
    with pytest.raises(ValueError, match=r"num_old|num_seen"):
        check_classes(old, seen, 8)


@pytest.mark.parametrize("value", [0, -3, 1.5, math.nan, math.inf])
def test_a_number_of_rivals_that_cannot_be(value):
    with pytest.raises(ValueError, match=f"hardest={value}: must be an integer of at least 1"):
        check_integer("hardest", value, least=1)


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        (torch.tensor([3, -2, 5]), r"counts\[1\]=-2: "),
        (torch.tensor([3.0, 2.0, math.nan]), r"counts\[2\]=nan: "),
        (torch.tensor([math.inf, 2.0]), r"counts\[0\]=inf: "),
        (torch.tensor([0, 0]), "at least one class must have images"),
        (torch.tensor([]), "at least one class must have images"),
        (torch.tensor([True, False]), r"counts must be \[W\], .* not torch.bool \[2\]"),
        (torch.tensor([[1, 2]]), r"counts must be \[W\], .* not torch.int64 \[1, 2\]"),
        (torch.tensor(3), r"counts must be \[W\], .* not torch.int64 \[\]"),
        (torch.tensor([1j]), r"not torch.complex64 \[1\]"),
    ],
)
def test_counts_that_are_none_are_refused_where_a_prior_is_made_of_them(counts, message):
    for check in (check_counts, losses.log_prior):
        with pytest.raises(ValueError, match=message):
            check(counts)


def test_counts_on_a_device_are_not_read():
    """`.tolist()` raises under fake tensors."""
    with FakeTensorMode():
        for device in ("cuda", "cpu"):
            assert losses.log_prior(torch.empty(5, device=device), 2).shape == (5,)
    compiled = torch.compile(losses.log_prior, backend="eager", fullgraph=True)
    counts = torch.tensor([20.0, 500.0, 0.0])
    assert torch.equal(compiled(counts, 1, torch.tensor(0.5)), losses.log_prior(counts, 1, torch.tensor(0.5)))


@differentiable_in("x")
def example(x, other, many=(), *, keyword=None):
    return x


WANTS = torch.ones(2, requires_grad=True)


@pytest.mark.parametrize(
    ("arguments", "keys", "name"),
    [
        ((1.0, WANTS), {}, "other"),
        ((1.0,), {"other": WANTS}, "other"),
        ((1.0, 2.0), {"keyword": WANTS}, "keyword"),
        ((1.0, 2.0, [torch.ones(1), WANTS]), {}, "many"),
        ((WANTS, 2.0), {"many": (WANTS,)}, "many"),
    ],
)
def test_what_requires_a_gradient_and_gets_none_is_named(arguments, keys, name):
    with pytest.raises(RuntimeError, match=f"example has no derivative in {name}, which requires a gradient"):
        example(*arguments, **keys)
    with torch.no_grad():
        example(*arguments, **keys)


def test_what_gets_one_passes_and_the_signature_stays():
    assert example(WANTS, torch.ones(2), [torch.ones(1)]) is WANTS
    assert [*inspect.signature(example).parameters] == ["x", "other", "many", "keyword"]


# --- the formulas of fastil.losses

ROWS, WIDTH = 5, 8
TARGET = torch.tensor([0, 6, 3, -1, 5])
FORMULAS = {
    "balanced_cross_entropy": lambda x, y: losses.balanced_cross_entropy(x, y, torch.zeros(WIDTH)),
    "separated_cross_entropy": lambda x, y: losses.separated_cross_entropy(x, y, 3, 7),
    "margin_ranking": lambda x, y: losses.margin_ranking(x, y, 3, 7),
    "nca released": lambda x, y: losses.nca(x, y, 7, 2.0),
    "nca paper": lambda x, y: losses.nca(x, y, 7, 2.0, variant="paper"),
    "icarl_cross_entropy": lambda x, y: losses.icarl_cross_entropy(x, y, None, 3, 7, 7),
    "icarl_cross_entropy distilling": lambda x, y: losses.icarl_cross_entropy(x, y, x.detach().roll(1), 3, 7, 7),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_a_formula_ignores_two_labels_and_shows_every_other_mistake(name):
    formula = FORMULAS[name]
    x = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0), requires_grad=True)
    wanted = formula(x, TARGET)
    for ignored in (-100, -1):
        assert torch.equal(formula(x, TARGET.where(TARGET >= 0, ignored)), wanted)
    if "distilling" not in name:  # else the teacher's aims are left
        kept = TARGET >= 0
        torch.testing.assert_close(wanted, formula(x[kept], TARGET[kept]) * 4 / 5)
        (gradient,) = torch.autograd.grad(wanted, x)
        assert (gradient[~kept] == 0).all()
    for mistake in (8, 4_000, -2, -99, 2**40 + 1, -(2**40) - 1):
        value = formula(x, TARGET.where(TARGET != 3, mistake))
        assert value.isnan()
        assert torch.autograd.grad(value, x)[0].isnan().any()


def test_a_label_beyond_the_classes_seen_is_a_mistake_where_they_are_given():
    x = torch.randn(ROWS, WIDTH)
    for name, formula in FORMULAS.items():
        value = formula(x, TARGET.where(TARGET != 3, 7))
        assert value.isnan() == (name != "balanced_cross_entropy"), name
    prior = losses.log_prior(torch.tensor([5] * 7 + [0]))
    assert losses.balanced_cross_entropy(x, TARGET.where(TARGET != 3, 7), prior) == math.inf  # a class without images


def test_formulas_read_no_tensor():
    """Nothing waits for a device: `.item()` and branches on a value raise under fake tensors."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        x, y, number = torch.empty(ROWS, WIDTH), torch.empty(ROWS, dtype=torch.int64), torch.empty(())
        for formula in FORMULAS.values():
            assert formula(x, y).shape == ()
        losses.balanced_cross_entropy(x, y, losses.log_prior(x[0], number, number))
        losses.separated_cross_entropy(x, y, number, number)
        losses.distillation(x, x, number, number)


def leaf(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


TEACHER = leaf(ROWS, WIDTH, seed=1).detach()


def positive(*shape):
    return leaf(*shape).detach().abs().add(0.5).requires_grad_()


@pytest.mark.parametrize(
    ("formula", "inputs"),
    [
        (lambda x, p: losses.balanced_cross_entropy(x, TARGET, p), (leaf(ROWS, WIDTH), leaf(WIDTH))),
        (lambda x, t: losses.distillation(x, TEACHER, 3, t), (leaf(ROWS, WIDTH), positive())),
        (lambda x: losses.separated_cross_entropy(x, TARGET, 3, 7), (leaf(ROWS, WIDTH),)),
        (lambda x, m: losses.margin_ranking(x, TARGET, 3, 7, margin=m), (leaf(ROWS, WIDTH), positive())),
        (lambda x, s: losses.nca(x, TARGET, 7, s), (leaf(ROWS, WIDTH), positive())),
        (lambda x, s, m: losses.nca(x, TARGET, 7, s, m, "paper"), (leaf(ROWS, WIDTH), positive(), positive())),
        (lambda x: losses.icarl_cross_entropy(x, TARGET, TEACHER, 3, 7, 7), (leaf(ROWS, WIDTH),)),
        (lambda x: losses.less_forget(x, leaf(ROWS, 4, seed=1).detach()), (leaf(ROWS, 4),)),
        (lambda x: losses.pod_spatial([x], [leaf(2, 3, 4, 2, seed=1).detach()]), (leaf(2, 3, 4, 2),)),
        (lambda x: losses.topology(x, leaf(3, 4, seed=1).detach(), torch.ones(3, 4, dtype=torch.bool)), (leaf(3, 4),)),
    ],
)
def test_every_other_argument_of_a_formula_has_the_gradient_of_finite_differences(formula, inputs):
    assert torch.autograd.gradcheck(formula, inputs)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda x: losses.distillation(x.detach(), x, 3, 2.0), "distillation has no derivative in teacher_logits"),
        (lambda x: losses.less_forget(x.detach(), x), "less_forget has no derivative in teacher_features"),
        (lambda x: losses.pod_flat(x.detach(), x), "no derivative in teacher_features"),
        (lambda x: losses.pod_spatial([x[None, None].detach()], [x[None, None]]), "no derivative in teacher_maps"),
        (lambda x: losses.icarl_cross_entropy(x.detach(), TARGET, x, 3, 7, 7), "no derivative in teacher_logits"),
        (lambda x: losses.topology(x.detach(), x, x > 0), "topology has no derivative in teacher_similarities"),
    ],
)
def test_a_teacher_that_requires_a_gradient_is_named(call, name):
    with pytest.raises(RuntimeError, match=name):
        call(leaf(ROWS, WIDTH))


X = torch.zeros(ROWS, WIDTH)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: losses.distillation(X, X, 3, 0), "temperature=0: "),
        (lambda: losses.distillation(X, X, 3, math.nan), "temperature=nan: "),
        (lambda: losses.distillation(X, X, 9, 2.0), "num_old=9"),
        (lambda: losses.log_prior(torch.ones(4), 5), "num_old=5"),
        (lambda: losses.log_prior(torch.ones(4), 2, 0.0), "alpha=0.0: must be finite and above 0"),
        (lambda: losses.log_prior(torch.ones(4), 2, math.nan), "alpha=nan: "),
        (lambda: losses.separated_cross_entropy(X, TARGET, 7, 3), "num_old=7, num_seen=3"),
        (lambda: losses.margin_ranking(X, TARGET, 3, 9), "num_seen=9"),
        (lambda: losses.margin_ranking(X, TARGET, 3, 7, 0), "k=0: "),
        (lambda: losses.margin_ranking(X, TARGET, 3, 7, 2, math.nan), "margin=nan: "),
        (lambda: losses.nca(X, TARGET, 9, 1.0), "num_seen=9"),
        (lambda: losses.nca(X, TARGET, 7, math.inf), "scale=inf: "),
        (lambda: losses.icarl_cross_entropy(X, TARGET, None, 7, 3, 7), "num_old=7, num_seen=3"),
        (lambda: losses.icarl_cross_entropy(X, TARGET, None, 3, 7, 0), "num_outputs=0: "),
    ],
)
def test_numbers_that_cannot_be_are_named_by_the_formulas(call, message):
    with pytest.raises(ValueError, match=message):
        call()
