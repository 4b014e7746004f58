"""Eq. 1 of arXiv 2103.12532 with every option, against the equations in float64, row by row.

Each test that says so runs both forms: the operator (on a CPU the plain formula) and the Triton kernel, launched on a
GPU or in Triton's interpreter.
"""

import math

import numpy as np
import pytest
import torch
from guards import guarded, poisoned

from fastil.kernels import incremental_loss, incremental_loss_grad
from fastil.kernels.incremental_loss import Operands
from fastil.losses import log_prior

# Relative error, the norm of the difference over the norm of the reference. The plain formula rounds z + log lambda.
LIMIT = {"operator": 2e-5, "triton": 1e-6}
HALF = {torch.bfloat16: 8e-3, torch.float16: 1e-3}  # the interpreter cuts bfloat16 off instead of rounding it
both_forms = pytest.mark.parametrize("form", ["operator", "triton"])


def log_sum_exp(x):
    return x.max() + math.log(np.exp(x - x.max()).sum())


def softmax(x):
    return np.exp(x - log_sum_exp(x))


def equation_1(
    x, target, prior, teacher, *, num_old, num_seen, ce_weight, kd_weight, temperature, sample_weight=None,
    separated=False, label_smoothing=0.0, logit_scale=None, margin_weight=None, margin=0.5, hardest=2,
):  # fmt: skip
    """In float64: value, gradient in x, derivative in the scale, and the meter's rows (CE, KD, hits, ranking)."""
    batch, scale = len(x), 1.0 if logit_scale is None else logit_scale
    value, dx, dscale, meter = 0.0, np.zeros(x.shape), 0.0, np.zeros((batch, 4))
    for b, y in enumerate(target):
        z, dz = x[b] * scale, np.zeros(x.shape[1])
        if y >= 0:
            competing = [
                k for k in range(num_seen) if prior[k] > -math.inf and (not separated or (k < num_old) == (y < num_old))
            ]
            log_q = z[competing] + prior[competing]
            log_q -= log_sum_exp(log_q)
            aim = np.full(len(competing), label_smoothing / len(competing))
            aim[competing.index(y)] += 1 - label_smoothing
            weight = 1.0 if sample_weight is None else sample_weight[b]
            meter[b, 0] = -weight * (aim * log_q).sum()
            dz[competing] += ce_weight * weight * (np.exp(log_q) - aim)
            meter[b, 2] = np.argmax(x[b, :num_seen]) == y
        if teacher is not None and num_old:
            p_teacher = softmax(teacher[b, :num_old] / temperature)
            log_p = z[:num_old] / temperature - log_sum_exp(z[:num_old] / temperature)
            meter[b, 1] = -(temperature**2) * (p_teacher * log_p).sum()
            dz[:num_old] += kd_weight * temperature * (np.exp(log_p) - p_teacher)
        value += ce_weight * meter[b, 0] + kd_weight * meter[b, 1]
        dx[b] += dz * scale
        dscale += (dz[:num_seen] * x[b, :num_seen]).sum()
        if margin_weight is not None and 0 <= y < num_old:
            rivals = num_old + np.argsort(-x[b, num_old:num_seen], kind="stable")[:hardest]
            for k in rivals:
                excess = max(0.0, margin - x[b, y] + x[b, k])
                meter[b, 3] += excess / hardest
                if excess > 0:
                    dx[b, k] += margin_weight / hardest
                    dx[b, y] -= margin_weight / hardest
            value += margin_weight * meter[b, 3]
    return value / batch, dx / batch, dscale / batch, meter


def example(rows, seen, num_old, seed=0, spread=2.0, shift=0.0, alpha=1.0, width=None, cosines=False):
    """Logits, target (some rows without one), prior and teacher, NaN wherever nothing may be read."""
    random = np.random.default_rng([rows, seen, num_old, seed])
    width = width or -(-seen // 8) * 8
    logits, teacher = (random.normal(0, spread, (2, rows, width)) + shift).astype(np.float32)
    if cosines:
        logits = np.tanh(logits)
    logits[:, seen:], teacher[:, num_old:] = np.nan, np.nan
    counts = np.zeros(width)
    counts[:seen] = random.integers(1, 600, seen)
    target = random.integers(-1 if rows > 1 else 0, seen, rows)
    prior = log_prior(torch.from_numpy(counts), num_old, alpha)
    return torch.from_numpy(logits), torch.from_numpy(target), prior, torch.from_numpy(teacher)


class Result:
    def __init__(self, value, gradient, scale_gradient, meter):
        self.value, self.gradient = value, gradient
        self.scale_gradient, self.meter = scale_gradient, meter


def run(form, logits, target, prior, teacher=None, *, device, logit_scale=None, **keys):
    """Value, gradient and meter of one form."""
    if teacher is None:
        keys["kd_weight"] = 0.0
    tensors = [None if t is None else t.to(device) for t in (logits, target, prior, teacher)]
    meter = torch.zeros(len(logits), 4, device=device)
    scale = None if logit_scale is None else torch.tensor(logit_scale, device=device, requires_grad=True)
    if keys.get("sample_weight") is not None:
        keys["sample_weight"] = keys["sample_weight"].to(device)
    if form == "operator":
        tensors[0] = tensors[0].clone().requires_grad_()
        value = incremental_loss(*tensors, logit_scale=scale, meter=meter, **keys)
        value.backward()
        return Result(value.detach(), tensors[0].grad, None if scale is None else scale.grad, meter)
    launcher = pytest.importorskip("fastil.kernels.jit.incremental_loss", reason="triton is not installed")
    scale = None if scale is None else scale.detach()
    with np.errstate(all="ignore"):  # masked lanes of the interpreter
        gradient, scale_gradient, row_loss = launcher.incremental_loss(
            *Operands(*tensors, logit_scale=scale, meter=meter, value=True, **keys)
        )
    return Result(row_loss.sum(), gradient, scale_gradient.sum(), meter)


def relative(ours, wanted):
    ours = np.asarray(torch.as_tensor(ours).double().cpu())
    return np.linalg.norm(ours - wanted) / max(np.linalg.norm(wanted), 1e-30)


def check(form, arguments, limit=None, **keys):
    """One form against float64; padding gets exactly 0. Returns its result."""
    limit = limit or LIMIT[form]
    ours = run(form, *arguments, **keys)
    keys.pop("device")
    logits, target, prior, teacher = (None if a is None else a.double().numpy() for a in arguments)
    numbers = {k: v.item() if isinstance(v, torch.Tensor) and v.ndim == 0 else v for k, v in keys.items()}
    if numbers.get("sample_weight") is not None:
        numbers["sample_weight"] = numbers["sample_weight"].double().cpu().numpy()
    value, gradient, scale_gradient, meter = equation_1(logits, target.astype(int), prior, teacher, **numbers)
    assert relative(ours.gradient[:, : gradient.shape[1]], gradient) <= limit
    assert (ours.gradient[:, numbers["num_seen"] :] == 0).all()
    if keys.get("logit_scale") is not None:
        assert relative(ours.scale_gradient, scale_gradient) <= 10 * limit
    for column in (0, 1, 3):
        assert relative(ours.meter[:, column], meter[:, column]) <= 3 * limit
    assert ours.meter[:, 2].tolist() == meter[:, 2].tolist()
    assert relative(ours.value, value) <= 2 * limit  # the interpreter sums a row's 1,000 values one after the other
    return ours


CLASSES = [(2, 3), (10, 1), (37, 7), (55, 16), (100, 3), (101, 5), (110, 2), (1000, 1)]


@both_forms
@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
@pytest.mark.parametrize("old", ["none", "one", "all but one"])
@pytest.mark.parametrize(("seen", "rows"), CLASSES)
def test_loss_and_gradient_are_equation_1(form, seen, rows, old, temperature, device):
    num_old = {"none": 0, "one": 1, "all but one": seen - 1}[old]
    # Logits spread with the temperature: soft targets near the student's would make p - p_teacher ill-conditioned.
    arguments = example(rows, seen, num_old, spread=2 * temperature, alpha=0.1 if old == "one" else 1.0)
    rho = num_old / seen
    check(form, arguments, num_old=num_old, num_seen=seen, ce_weight=1 - rho, kd_weight=rho, temperature=temperature,
          device=device)  # fmt: skip


STEP = {"num_old": 30, "num_seen": 50, "ce_weight": 0.4, "kd_weight": 0.6, "temperature": 2.0}


@both_forms
@pytest.mark.parametrize("width", [50, 56, 64, 200, 101])
def test_any_width_will_do(form, width, device):
    """A multiple of 8 is only the fast one."""
    check(form, example(3, 50, 30, width=width), **STEP, device=device)


@pytest.mark.parametrize("shift", [0.0, 100.0, -1000.0])
@pytest.mark.parametrize("spread", [1.0, 30.0, 100.0, 1e4])
def test_large_logits_lose_no_digit(spread, shift, device):
    arguments = example(5, 50, 30, spread=spread, shift=shift, width=56)
    # A teacher far from the student in every row, so that the term of each row counts.
    check("triton", arguments, **STEP, device=device)


def test_old_logits_far_below_the_new_ones_still_distil(device):
    """One shared maximum would make every old exponential underflow."""
    logits, target, prior, teacher = example(4, 50, 30)
    logits[:, :30] -= 300.0
    check("triton", (logits, target, prior, teacher), **STEP, device=device)


def test_a_confident_row_keeps_a_relative_precision(device):
    """-(1 - q_y) is the sum over the other classes: near q_y = 1 the difference would keep no digit."""
    logits, target, prior, _ = example(1, 20, 0, spread=0.5)
    logits[0, target[0]] = 14.0
    check("triton", (logits, target, prior, None), num_old=0, num_seen=20, ce_weight=1.0, kd_weight=0.0,
          temperature=2.0, device=device)  # fmt: skip


OPTIONS = {
    "sample_weight": lambda rows: torch.rand(rows, generator=torch.Generator().manual_seed(1)) * 3,
    "separated": lambda rows: True,
    "label_smoothing": lambda rows: 0.1,
    "logit_scale": lambda rows: 7.5,
    "margin_weight": lambda rows: 0.7,
}


@both_forms
@pytest.mark.parametrize("with_teacher", [True, False])
@pytest.mark.parametrize("chosen", [*([name] for name in OPTIONS), ["logit_scale", "margin_weight"], list(OPTIONS)])
def test_every_option_is_its_formula(form, chosen, with_teacher, device):
    arguments = list(example(9, 50, 30, cosines=True))
    if not with_teacher:
        arguments[3] = None
    check(form, arguments, **STEP, **{name: OPTIONS[name](9) for name in chosen}, device=device)


@both_forms
@pytest.mark.parametrize(("num_old", "hardest"), [(0, 2), (48, 1), (49, 3), (50, 2)])
def test_margin_ranking_with_few_or_no_new_classes(form, num_old, hardest, device):
    arguments = example(8, 50, num_old, cosines=True)
    keys = STEP | {"num_old": num_old, "margin_weight": 0.7, "hardest": hardest, "logit_scale": 3.0}
    check(form, arguments, **keys, device=device)


@both_forms
def test_an_empty_separated_block_is_harmless(form, device):
    arguments = example(6, 50, 0)
    keys = STEP | {"num_old": 0, "separated": True, "label_smoothing": 0.2}
    result = check(form, arguments, **keys, device=device)
    assert torch.isfinite(result.gradient).all()


@both_forms
def test_streaming_rows_are_the_same_formula(form, device):
    """Rows too wide for the registers of a program."""
    arguments = example(2, 8_300, 4_200, spread=3.0)
    keys = {"num_old": 4_200, "num_seen": 8_300, "ce_weight": 0.5, "kd_weight": 0.5, "temperature": 2.0}
    check(form, arguments, **keys, device=device)
    check(form, arguments, **keys, separated=True, label_smoothing=0.1, sample_weight=torch.tensor([0.5, 2.0]),
          device=device)  # fmt: skip
    for num_old in (0, 1, 8_299):
        arguments = example(1, 8_300, num_old, shift=100.0)
        check(form, arguments, **(keys | {"num_old": num_old}), device=device)


@both_forms
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seen", [37, 100])
def test_half_precision_is_computed_in_float32_and_rounded_once(form, dtype, seen, device):
    logits, target, prior, teacher = example(5, seen, seen // 2)
    logits, teacher = logits.to(dtype), teacher.to(dtype)
    keys = STEP | {"num_old": seen // 2, "num_seen": seen}
    half = check(form, (logits, target, prior, teacher), limit=HALF[dtype], **keys, device=device)
    full = run(form, logits.float(), target, prior, teacher.float(), **keys, device=device)
    # Next to a value the launcher leaves float16's gradient in float32, to be rounded once it is scaled.
    assert half.gradient.dtype == (torch.float32 if (form, dtype) == ("triton", torch.float16) else dtype)
    assert half.value.dtype == torch.float32
    assert torch.equal(half.value, full.value)
    assert torch.equal(half.meter, full.meter)


def test_nothing_beside_the_tensors_is_read_or_written(device):
    launcher = pytest.importorskip("fastil.kernels.jit.incremental_loss")
    for rows, seen, width in ((3, 37, 37), (5, 100, 104), (1, 8_200, 8_200)):
        arguments = [t.to(device) for t in example(rows, seen, seen // 2, width=width)]
        weight, scale = torch.rand(rows, device=device), torch.tensor(2.0, device=device)
        options = (weight, None, None) if width > 8_192 else (weight, scale, scale)
        scalars = [torch.tensor(v, device=device) for v in (seen // 2, seen, 0.4, 0.6, 2.0)]
        tensors = [*arguments, *scalars, *options]
        clean_meter, meter = torch.zeros(rows, 4, device=device), poisoned(torch.zeros(rows, 4, device=device))
        keys = {"label_smoothing": 0.1, "value": True}
        with np.errstate(all="ignore"):
            wanted = launcher.incremental_loss(*Operands(*tensors, meter=clean_meter, **keys))
            with guarded():
                ours = launcher.incremental_loss(*Operands(*poisoned(*tensors), meter=meter, **keys))
        for a, b in zip(ours, wanted, strict=True):
            assert torch.equal(a, b)
        assert torch.equal(meter, clean_meter)
        around = meter.untyped_storage()
        values = torch.tensor([], device=device).set_(around)
        assert values.isnan().sum() == len(values) - 4 * rows


@both_forms
def test_logits_that_are_not_contiguous_are_copied(form, device):
    logits, target, prior, teacher = example(4, 50, 30)
    strided = torch.full((4, 2 * logits.shape[1]), math.nan)[:, ::2].copy_(logits)
    backwards = teacher.T.contiguous().T
    a = run(form, strided, target, prior, backwards, **STEP, device=device)
    b = run(form, logits, target, prior, teacher, **STEP, device=device)
    assert torch.equal(a.gradient, b.gradient)
    assert torch.equal(a.value, b.value)


@both_forms
def test_device_scalars_give_the_loss_of_numbers(form, device):
    """A step then changes values and neither shapes nor code."""
    arguments = example(6, 50, 30)
    a = run(form, *arguments, **STEP, device=device)
    scalars = {key: torch.tensor(value, device=device) for key, value in STEP.items()}
    b = run(form, *arguments, **scalars, device=device)
    assert torch.equal(a.value, b.value)
    assert torch.equal(a.gradient, b.gradient)


@both_forms
def test_columns_from_num_seen_on_are_ignored_whatever_the_prior_says(form, device):
    logits, target, prior, teacher = example(5, 50, 30)
    prior[50:] = 0.0
    check(form, (logits, target.clamp(max=49), prior, teacher), **STEP, device=device)


@both_forms
def test_a_seen_class_without_images_is_masked(form, device):
    logits, target, prior, _ = example(7, 50, 30)
    empty = [k for k in range(50) if k not in target.tolist()][:4]
    prior[empty] = -math.inf
    result = check(form, (logits, target, prior, None), **STEP, device=device)
    assert (result.gradient[:, empty] == 0).all()


@both_forms
def test_a_batch_without_targets_distils_only(form, device):
    logits, target, prior, teacher = example(3, 50, 30)
    result = check(form, (logits, torch.full_like(target, -1), prior, teacher), **STEP, device=device)
    assert (result.meter[:, [0, 2]] == 0).all()


@both_forms
def test_equal_counts_are_the_plain_softmax(form, device):
    """Equal counts leave nothing: log lambda is exactly 0 on every class. The plain form is then torch's
    cross-entropy of every row, bit for bit."""
    logits, target, _, _ = example(8, 50, 30)
    equal = log_prior(torch.where(torch.arange(logits.shape[1]) < 50, 500, 0), 30)
    assert (equal[:50] == 0).all()
    keys = STEP | {"ce_weight": 1.0, "kd_weight": 0.0}
    plain = torch.nn.functional.cross_entropy(logits[:, :50].double(), target, ignore_index=-1, reduction="sum") / 8
    result = run(form, logits, target, equal, None, **keys, device=device)
    assert relative(result.value, plain.item()) <= LIMIT[form]
    if form == "operator" and device.type == "cpu":
        masked = logits.masked_fill(torch.arange(logits.shape[1]) >= 50, -math.inf)
        rows = torch.nn.functional.cross_entropy(masked, target, ignore_index=-1, reduction="none")
        assert torch.equal(result.meter[:, 0], rows)


@both_forms
def test_a_student_equal_to_its_teacher_gets_exactly_no_distillation_gradient(form, device):
    logits, target, prior, _ = example(6, 50, 30)
    keys = STEP | {"ce_weight": 0.0, "kd_weight": 1.0}
    assert (run(form, logits, target, prior, logits.clone(), **keys, device=device).gradient == 0).all()


@both_forms
def test_at_the_base_step_a_teacher_changes_nothing(form, device):
    """No old classes: even a teacher of NaN, whatever its weight."""
    logits, target, prior, teacher = example(5, 50, 0)
    keys = STEP | {"num_old": 0}
    a = run(form, logits, target, prior, None, **keys, device=device)
    b = run(form, logits, target, prior, torch.full_like(teacher, math.nan), **keys, device=device)
    assert relative(b.value, a.value.item()) <= 1e-7
    assert relative(b.gradient, a.gradient.double().cpu().numpy()) <= 1e-7
    assert (b.meter[:, 1] == 0).all()


@both_forms
@pytest.mark.parametrize(("ce_weight", "kd_weight"), [(1.0, 0.0), (0.0, 1.0)])
def test_the_gradient_of_each_term_sums_to_zero_in_every_row(form, ce_weight, kd_weight, device):
    arguments = example(7, 100, 60)
    keys = {"num_old": 60, "num_seen": 100, "temperature": 2.0, "ce_weight": ce_weight, "kd_weight": kd_weight}
    gradient = run(form, *arguments, **keys, device=device).gradient.double()
    assert (gradient.sum(1).abs() <= 1e-6 * gradient.abs().sum(1).clamp(min=1e-30)).all()


@both_forms
def test_hits_follow_argmax_where_logits_tie(form, device):
    logits = torch.zeros(4, 8)
    logits[0, [2, 5]] = 1.0
    logits[1, [2, 5]] = 1.0
    logits[2, 7] = 9.0  # not seen
    target = torch.tensor([2, 5, 0, 1])
    prior = log_prior(torch.tensor([1, 1, 1, 1, 1, 1, 1, 0]))
    result = run(form, logits, target, prior, **(STEP | {"num_old": 0, "num_seen": 7}), device=device)
    assert result.meter[:, 2].tolist() == [1, 0, 1, 0]


@both_forms
def test_what_cannot_be_right_is_no_hit_and_no_finite_loss(form, device):
    logits, _, prior, _ = example(3, 50, 0)
    logits[0] = math.nan
    prior[7] = -math.inf
    logits[1, 7] = 99.0  # the target's logit is the highest, but its class has no images
    result = run(form, logits, torch.tensor([3, 7, 4]), prior, **(STEP | {"num_old": 0}), device=device)
    assert result.meter[0, 2] == 0
    assert math.isnan(result.meter[0, 0])
    assert result.meter[1, 0] == math.inf
    assert torch.isfinite(result.meter[2]).all()


def test_float16_gradients_survive_a_loss_scale(device):
    """Divided by a batch of 1,024 most of them lie below float16's smallest number; scaled by 2^16 they do not."""
    batch, width = 1024, 104
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(batch, width, generator=random).mul(4).half().to(device)
    target, prior = torch.randint(0, width, (batch,), generator=random).to(device), torch.zeros(width, device=device)
    keys = STEP | {"num_old": 0, "num_seen": width, "ce_weight": 1.0, "kd_weight": 0.0}
    x = logits.clone().requires_grad_()
    (incremental_loss(x, target, prior, **keys) * 2.0**16).backward()
    wanted = torch.softmax(logits.double(), 1)
    wanted[torch.arange(batch), target] -= 1
    wanted *= 2.0**16 / batch
    assert x.grad.dtype == torch.float16
    assert ((x.grad.double() - wanted).norm() / wanted.norm()).item() <= 1e-3
    assert (x.grad == 0).double().mean() < 1e-2


@both_forms
def test_the_meter_adds_up_over_calls(form, device):
    arguments = example(5, 50, 30)
    once = run(form, *arguments, **STEP, device=device)
    meter = torch.zeros(7, 4, device=device)
    on_device = [t.to(device) for t in arguments]
    for _ in range(3):
        incremental_loss_grad(*on_device, **STEP, meter=meter)
    torch.testing.assert_close(meter[:5], 3 * once.meter, rtol=1e-4, atol=1e-6)
    assert (meter[5:] == 0).all()
    total = torch.zeros(4, device=device)
    incremental_loss_grad(*on_device, **STEP, meter=total)
    torch.testing.assert_close(total, meter.sum(0) / 3, rtol=1e-5, atol=1e-6)


def test_the_training_form_is_the_autograd_form(device):
    logits, target, prior, teacher = (t.to(device) for t in example(6, 50, 30))
    weight = torch.randn(6, logits.shape[1], device=device)
    results = []
    for training in (False, True):
        x = logits.clone().requires_grad_()
        z = x * weight
        if training:
            z.backward(incremental_loss_grad(z, target, prior, teacher, **STEP, meter=torch.zeros(6, 4, device=device)))
        else:
            incremental_loss(z, target, prior, teacher, **STEP).backward()
        results.append(x.grad)
    assert torch.equal(*(r.nan_to_num(0) for r in results))


def test_an_incoming_gradient_scales_the_result(device):
    logits, target, prior, teacher = (t.to(device) for t in example(6, 50, 30))
    one, three = (logits.clone().requires_grad_() for _ in range(2))
    incremental_loss(one, target, prior, teacher, **STEP).backward()
    (3 * incremental_loss(three, target, prior, teacher, **STEP)).backward()
    torch.testing.assert_close(three.grad, 3 * one.grad)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": torch.zeros(3, dtype=torch.int64)}, r"target must be \[5\] with logits \[5, 56\], not \[3\]"),
        ({"log_prior": torch.zeros(50)}, r"log_prior must be \[56\]"),
        ({"teacher_logits": torch.zeros(5, 30)}, r"teacher_logits must be \[5, 56\]"),
        ({"sample_weight": torch.zeros(5, 1)}, r"sample_weight must be \[5\]"),
        ({"logits": torch.zeros(56)}, r"logits must be floating-point \[B, W\]"),
        ({"logits": torch.zeros(5, 56, dtype=torch.int64)}, r"not torch.int64"),
        ({"target": torch.zeros(5)}, "target must hold integers, not torch.float32"),
        ({"label_smoothing": 1.0}, r"label_smoothing=1.0: must be in \[0, 1\)"),
        ({"meter": torch.zeros(4, 4)}, r"meter must be contiguous float32 \[4\] or \[R, 4\] with R >= 5"),
        ({"meter": torch.zeros(5, 8)[:, :4]}, r"meter must be contiguous"),
        ({"meter": torch.zeros(5, 3)}, r"meter must be contiguous float32 \[4\]"),
        ({"meter": torch.zeros(4, dtype=torch.float64)}, r"not torch.float64"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change, message):
    logits, target, prior, teacher = example(5, 50, 30)
    arguments = {"logits": logits, "target": target, "log_prior": prior, "teacher_logits": teacher,
                 "meter": torch.zeros(4)} | STEP | change  # fmt: skip
    with pytest.raises(ValueError, match=message):
        incremental_loss_grad(**arguments)


def test_an_empty_batch_has_an_empty_gradient(device):
    _, _, prior, _ = example(1, 50, 30)
    logits = torch.zeros(0, 56, device=device)
    target = torch.zeros(0, dtype=torch.int64, device=device)
    for form in ("operator", "triton"):
        assert run(form, logits, target, prior, logits, **STEP, device=device).gradient.shape == (0, 56)
