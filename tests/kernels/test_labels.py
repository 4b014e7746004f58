"""Labels that are no class, and numbers that cannot be: what the incremental loss and the contraction of Meta make of
them, the plain form and the Triton kernel alike."""

import math

import numpy as np
import pytest
import torch
from guards import poisoned
from test_alpha_hypergradient import run as run_alpha
from test_incremental_loss import STEP, check, example, run
from torch._subclasses.fake_tensor import FakeTensorMode

from fastil.kernels import IncrementalLoss, alpha_hypergradient, cosine_head, incremental_loss
from fastil.kernels.incremental_loss import Operands

both_forms = pytest.mark.parametrize("form", ["operator", "triton"])
# Of 50 classes in 56 columns, and what 32 bits, or 8, would make of the last ones: 1, 49, -1 and 0.
MISTAKES = [50, 55, 56, 57, 4_000, -2, -99, -101, 2**31, 2**40 + 1, 2**32 + 49, -(2**40) - 1, 2**63 - 1, -(2**63)]
ALL = {"separated": True, "label_smoothing": 0.1, "logit_scale": 3.0, "margin_weight": 0.7}


@both_forms
@pytest.mark.parametrize("options", [{}, ALL], ids=["plain", "all options"])
def test_a_label_that_is_no_class_is_not_a_number_in_its_row_alone(form, options, device):
    logits, target, prior, teacher = example(len(MISTAKES) + 2, 50, 30, cosines=True)
    target = target.clamp(min=0)
    target[1:-1] = torch.tensor(MISTAKES)
    wrong = torch.arange(len(target)).sub(1).clamp(min=0) < len(MISTAKES)
    wrong[0] = False
    keys = STEP | options | {"device": device}
    ours = run(form, logits, target, prior, teacher, **keys)
    assert ours.value.isnan()
    assert ours.meter[:, 0].isnan().tolist() == wrong.tolist()
    assert (ours.meter[wrong, 2] == 0).all()
    assert ours.gradient[wrong].isnan().all()
    right = run(form, logits, torch.where(wrong, -1, target), prior, teacher, **keys)
    assert torch.equal(ours.gradient[~wrong], right.gradient[~wrong])
    assert torch.equal(ours.meter[~wrong], right.meter[~wrong])
    assert torch.equal(ours.meter[:, [1, 3]], right.meter[:, [1, 3]])


@both_forms
@pytest.mark.parametrize("label", [8_200, 2**40 + 1, -2])
def test_rows_that_are_streamed_do_the_same(form, label, device):
    logits, target, prior, _ = example(2, 8_200, 0)
    target[0] = 8_199
    target[1] = label
    keys = {"num_old": 0, "num_seen": 8_200, "ce_weight": 1.0, "kd_weight": 0.0, "temperature": 1.0}
    ours = run(form, logits, target, prior, **keys, device=device)
    assert ours.meter[:, 0].isnan().tolist() == [False, True]
    assert ours.gradient[1].isnan().all()
    assert ours.gradient[0].isfinite().all()


@both_forms
@pytest.mark.parametrize("options", [{}, ALL], ids=["plain", "all options"])
def test_rows_without_a_class_add_nothing_and_count_in_the_mean(form, options, device):
    logits, target, prior, teacher = example(7, 50, 30, cosines=True)
    target[:4] = torch.tensor([-100, -1, 49, -100])
    keys = STEP | options | {"device": device}
    ours = check(form, (logits, torch.where(target == -100, -1, target), prior, teacher), **keys)
    assert torch.equal(run(form, logits, target, prior, teacher, **keys).gradient, ours.gradient)
    kept = target >= 0
    alone = run(form, logits[kept], target[kept], prior, **keys).value
    torch.testing.assert_close(
        run(form, logits, target, prior, **keys).value, alone * kept.sum().item() / 7, rtol=1e-5, atol=1e-6
    )


@both_forms
@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8, torch.uint8])
def test_labels_of_any_integer_type_are_the_same(form, dtype, device):
    logits, target, prior, teacher = example(6, 50, 30)
    target = target.clamp(min=0 if dtype == torch.uint8 else -100)
    target[0] = 127
    if dtype == torch.uint8:
        target[1] = 156  # -100 in the bits of int8
    a = run(form, logits, target, prior, teacher, **STEP, device=device)
    b = run(form, logits, target.to(dtype), prior, teacher, **STEP, device=device)
    assert a.meter[:2, 0].isnan().tolist() == [True, dtype == torch.uint8]
    torch.testing.assert_close(a.meter, b.meter, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(a.gradient, b.gradient, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("num_seen", [10, 4_000])
def test_no_label_and_no_number_of_classes_reads_out_of_bounds(num_seen, device):
    launcher = pytest.importorskip("fastil.kernels.jit.incremental_loss")
    logits, _, prior, teacher = (t.to(device) for t in example(3, 10, 5))
    target = torch.tensor([3, 3_999, -7], device=device)
    operands = Operands(poisoned(logits), target, prior, poisoned(teacher), 5, num_seen, 0.4, 0.6, 2.0, value=True)
    with np.errstate(all="ignore"):
        loss = launcher.incremental_loss(*operands)[2]
    assert loss.isnan().tolist() == [False, True, True]


@both_forms
@pytest.mark.parametrize("label", [37, 40, 2**40 + 1, -2, -(2**40) - 1])
def test_the_contraction_of_meta_is_not_a_number_either(form, label, device):
    random = torch.Generator().manual_seed(0)
    z, u = torch.randn(2, 3, 40, generator=random)
    prior, target = torch.zeros(40), torch.tensor([-1, 5, -100])
    without = run_alpha(form, z, u, target, prior, 20, 37, 0.4, device=device)
    alone = run_alpha(form, z[1:2], u[1:2], target[1:2], prior, 20, 37, 0.4 / 3, device=device)
    torch.testing.assert_close(without, alone)
    assert without[:20].ne(0).any()
    target[0] = label
    result = run_alpha(form, z, u, target, prior, 20, 37, 0.4, device=device)
    assert result[:20].isnan().all()
    assert (result[20:] == 0).all()


@both_forms
def test_a_prior_that_is_not_a_number_shows_in_the_loss(form, device):
    """Counts below 0 on a device: what cannot be raised must not look like a class without images."""
    logits, target, prior, teacher = example(5, 50, 30)
    prior[7] = math.nan
    ours = run(form, logits, target.clamp(min=0), prior, teacher, **STEP, device=device)
    assert ours.meter[:, 0].isnan().all()
    z, u = torch.randn(2, 3, 56)
    assert run_alpha(form, z, u, torch.tensor([1, 2, 3]), prior, 30, 50, 0.4, device=device)[:30].isnan().all()


@pytest.mark.parametrize("temperature", [0.0, math.nan, -2.0])
def test_a_temperature_on_the_device_gives_the_same_in_both_forms(temperature, device):
    logits, target, prior, teacher = (t.nan_to_num(0) for t in example(4, 16, 6))
    keys = STEP | {"num_old": 6, "num_seen": 16, "temperature": torch.tensor(temperature, device=device)}
    a, b = (run(form, logits, target, prior, teacher, **keys, device=device) for form in ("operator", "triton"))
    torch.testing.assert_close(a.value, b.value, rtol=1e-5, atol=1e-6, equal_nan=True)
    if temperature == -2.0:  # the formula goes on
        torch.testing.assert_close(a.gradient, b.gradient, rtol=1e-4, atol=1e-6)
        return
    assert a.value.isnan()
    assert a.gradient.isnan().any(1).all()
    assert b.gradient.isnan().any(1).all()


IMPOSSIBLE = [
    ({"temperature": 0.0}, "temperature=0.0: must be finite and above 0"),
    ({"temperature": -1}, "temperature=-1: must be finite and above 0"),
    ({"temperature": math.nan}, "temperature=nan: must be finite and above 0"),
    ({"temperature": math.inf}, "temperature=inf: must be finite and above 0"),
    ({"num_old": 51}, "num_old=51, num_seen=50: must be numbers of classes, 0 <= num_old <= num_seen <= 56"),
    ({"num_old": -1}, "num_old=-1, num_seen=50: must be numbers of classes"),
    ({"num_seen": 57}, "num_old=30, num_seen=57: must be numbers of classes"),
    ({"num_old": 2.5}, "num_old=2.5, num_seen=50: must be numbers of classes"),
    ({"teacher_logits": None}, "kd_weight=0.6: there is no teacher to distil"),
    ({"kd_weight": math.nan}, "kd_weight=nan: must be finite"),
    ({"ce_weight": math.inf}, "ce_weight=inf: must be finite"),
    ({"ce_weight": torch.ones(5)}, r"ce_weight must be a number or a 0-d tensor, not \[5\]"),
    ({"margin_weight": math.nan}, "margin_weight=nan: must be finite"),
    ({"margin_weight": 1.0, "margin": math.nan}, "margin=nan: must be finite"),
    ({"margin_weight": 1.0, "hardest": 0}, "hardest=0: must be an integer of at least 1"),
    ({"label_smoothing": math.nan}, r"label_smoothing=nan: must be in \[0, 1\)"),
    ({"target": torch.zeros(5, dtype=torch.bool)}, "target must hold integers, not torch.bool"),
]


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.parametrize(("change", "message"), IMPOSSIBLE)
def test_what_the_host_knows_to_be_impossible_raises_for_either_form(change, message, kind):
    """CUDA tensors without values: whatever reads one raises another error."""
    logits, target, prior, teacher = example(5, 50, 30)
    given = {"logits": logits, "target": target, "log_prior": prior, "teacher_logits": teacher} | STEP | change
    with FakeTensorMode(allow_non_fake_inputs=True):
        for name, value in given.items():
            if kind == "cuda" and isinstance(value, torch.Tensor):
                given[name] = torch.empty(value.shape, dtype=value.dtype, device=kind)
        with pytest.raises(ValueError, match=message):
            incremental_loss(**given)


def test_the_other_kernels_refuse_what_cannot_be():
    logits, target, prior, teacher = example(5, 50, 30)
    with pytest.raises(ValueError, match="num_old=51"):
        alpha_hypergradient(logits, teacher, target, prior, num_old=51, num_seen=50, ce_weight=0.4)
    with pytest.raises(ValueError, match="ce_weight=nan"):
        alpha_hypergradient(logits, teacher, target, prior, num_old=30, num_seen=50, ce_weight=math.nan)
    with pytest.raises(ValueError, match="sharpness=inf"):
        cosine_head(torch.ones(2, 3), torch.ones(4, 3), torch.ones(()), math.inf)
    with pytest.raises(ValueError, match="temperature=nan"):
        IncrementalLoss([3, 4], 1, temperature=math.nan)
