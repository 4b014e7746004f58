"""The losses against equations 2 to 5 of arXiv 2103.12532 and those of LUCIR and PODNet, written out in float64 numpy
with means over the batch."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fastil.losses import balanced_cross_entropy, distillation, less_forget, log_prior, pod_flat, pod_spatial

CLOSE = {"rtol": 2e-5, "atol": 2e-6}
GARBAGE = [math.nan, math.inf, -math.inf, 3e38, 0.0]
checked = settings(deadline=None, database=None, derandomize=True, max_examples=50)
shapes = st.tuples(st.integers(1, 9), st.integers(1, 20), st.integers(0, 2**32 - 1))  # B, seen, seed


def float64(tensor):
    return tensor.detach().double().numpy()


def log_sum_exp(x):
    top = x.max(axis=1, keepdims=True)
    return top + np.log(np.exp(x - top).sum(axis=1, keepdims=True))


def class_weights(counts, num_old, alpha):
    """lambda of eq. 5: n_i (delta(i not in F) + alpha delta(i in F)), F the old classes."""
    counts = np.asarray(counts, dtype=np.float64)
    old = np.arange(len(counts)) < num_old
    return counts * np.where(old, np.asarray(alpha, dtype=np.float64), 1.0)


def log_q(logits, weights):
    """log of eq. 3 and 5 over the classes with a weight above 0: lambda_k e^z_k / sum_j lambda_j e^z_j."""
    shifted = logits[:, weights > 0] + np.log(weights[weights > 0])
    full = np.full(logits.shape, -np.inf)
    full[:, weights > 0] = shifted - log_sum_exp(shifted)
    return full


def equation_4(logits, target, weights):
    """Mean over the batch of - sum_k delta(k = y) log q_k; a row with target -1 adds nothing."""
    q = log_q(logits, weights)
    return -sum(q[row, y] for row, y in enumerate(target) if y >= 0) / len(target)


def equation_4_gradient(logits, target, weights):
    gradient = np.exp(log_q(logits, weights))
    for row, y in enumerate(target):
        if y < 0:
            gradient[row] = 0
        else:
            gradient[row, y] -= 1
    return gradient / len(target)


def equation_2(logits, teacher, num_old, temperature):
    """Mean over the batch of sum_k -p^_k log(p_k) T^2 over the old classes, both softened by T."""
    z, z_hat = logits[:, :num_old] / temperature, teacher[:, :num_old] / temperature
    log_p, p_hat = z - log_sum_exp(z), np.exp(z_hat - log_sum_exp(z_hat))
    return -(p_hat * log_p).sum() * temperature**2 / len(logits)


def equation_2_gradient(logits, teacher, num_old, temperature):
    z, z_hat = logits[:, :num_old] / temperature, teacher[:, :num_old] / temperature
    full = np.zeros(logits.shape)
    full[:, :num_old] = np.exp(z - log_sum_exp(z)) - np.exp(z_hat - log_sum_exp(z_hat))
    return full * temperature / len(logits)


def differences(function, x, step=1e-5):
    """Central finite differences of a float64 function of an array."""
    gradient = np.empty(x.shape)
    for index in np.ndindex(x.shape):
        moved = x.copy()
        moved[index] += step
        above = function(moved)
        moved[index] -= 2 * step
        gradient[index] = (above - function(moved)) / (2 * step)
    return gradient


def example(rows, seen, seed, width=None, spread=3.0):
    """Logits [B, W], targets and counts of a step; columns from `seen` on have no images."""
    random = np.random.default_rng(seed)
    width = width or -(-seen // 8) * 8
    logits = torch.from_numpy(random.normal(0, spread, (rows, width)).astype(np.float32))
    target = torch.from_numpy(random.integers(0, seen, rows))
    counts = np.zeros(width, dtype=np.int64)
    counts[:seen] = random.integers(1, 1300, seen)
    return logits, target, torch.from_numpy(counts)


def value_and_gradient(loss, logits):
    logits = logits.clone().requires_grad_()
    value = loss(logits)
    value.backward()
    return value.detach(), logits.grad


# --- log_prior


@given(shapes, st.floats(0.01, 4), st.data())
@checked
def test_the_prior_is_the_logarithm_of_the_class_weights_up_to_a_constant(shape, alpha, data):
    _, seen, seed = shape
    num_old = data.draw(st.integers(0, seen))
    counts = example(1, seen, seed)[2]
    prior = log_prior(counts, num_old, alpha)
    assert prior.dtype == torch.float32
    assert prior.shape == counts.shape
    assert (prior[seen:] == -math.inf).all()
    wanted = np.log(class_weights(counts[:seen], num_old, alpha) / counts.max().item())
    np.testing.assert_allclose(float64(prior[:seen]), wanted, **CLOSE)


def test_the_paper_example_of_500_new_and_20_old_images():
    prior = log_prior(torch.tensor([20] * 3 + [500] * 2 + [0] * 3), num_old=3)
    wanted = [math.log(20 / 500)] * 3 + [0.0] * 2 + [-math.inf] * 3
    assert prior.tolist() == pytest.approx(wanted)


def test_equal_counts_give_a_prior_of_exactly_zero():
    assert log_prior(torch.tensor([7, 7, 7, 0]), num_old=2).tolist() == [0.0, 0.0, 0.0, -math.inf]


def test_alpha_may_differ_from_class_to_class_and_touches_old_columns_only():
    counts, alpha = torch.tensor([5, 10, 20, 40, 0, 0]), torch.tensor([0.5, 2.0, 9.0, 9.0, 9.0, 9.0])
    wanted = np.log(np.array([5 * 0.5, 10 * 2.0, 20, 40]) / 40)
    prior = log_prior(counts, 2, alpha)
    np.testing.assert_allclose(float64(prior[:4]), wanted, **CLOSE)
    assert prior[4:].tolist() == [-math.inf, -math.inf]


@pytest.mark.parametrize("alpha", [0.5, torch.tensor(0.5), torch.tensor([0.5, 0.5, 1.0, 1.0], dtype=torch.float64)])
def test_an_old_class_without_images_stays_masked(alpha):
    prior = log_prior(torch.tensor([0, 10, 10, 0]), 2, alpha)
    assert prior[[0, 3]].tolist() == [-math.inf, -math.inf]
    assert prior[1].item() == pytest.approx(math.log(0.5))


@pytest.mark.parametrize("num_old", [0, 2, 4])
def test_a_prior_from_device_scalars_is_the_one_from_numbers(num_old):
    counts = torch.tensor([3, 5, 7, 9, 0])
    a = log_prior(counts, num_old, 0.25)
    b = log_prior(counts.float(), torch.tensor(num_old), torch.tensor(0.25))
    assert torch.equal(a, b)


def test_the_gradient_with_respect_to_alpha_is_that_of_equation_5():
    """Meta BalancedS-CE learns alpha through the prior."""
    logits, target, counts = example(6, 10, 4)
    alpha = torch.tensor(0.7, requires_grad=True)
    balanced_cross_entropy(logits, target, log_prior(counts, 6, alpha)).backward()
    z, y = float64(logits), target.numpy()
    wanted = differences(lambda a: equation_4(z, y, class_weights(counts, 6, a[0])), np.array([0.7]))
    assert alpha.grad.item() == pytest.approx(wanted[0], rel=1e-4)


# --- balanced cross-entropy


@given(shapes, st.sampled_from([0.1, 0.25, 1.0, 3.0]), st.data())
@checked
def test_balanced_cross_entropy_is_equation_4(shape, alpha, data):
    rows, seen, seed = shape
    num_old = data.draw(st.integers(0, seen))
    logits, target, counts = example(rows, seen, seed)
    target[data.draw(st.lists(st.integers(0, rows - 1), unique=True, max_size=rows))] = -1
    prior = log_prior(counts, num_old, alpha)
    value, gradient = value_and_gradient(lambda z: balanced_cross_entropy(z, target, prior), logits)
    weights, z, y = class_weights(counts, num_old, alpha), float64(logits), target.numpy()
    assert value.dtype == torch.float32
    assert value.shape == ()
    np.testing.assert_allclose(float64(value), equation_4(z, y, weights), **CLOSE)
    np.testing.assert_allclose(float64(gradient), equation_4_gradient(z, y, weights), **CLOSE)


def test_the_gradient_of_balanced_cross_entropy_is_that_of_finite_differences():
    logits, target, counts = example(4, 11, 3)
    target[1] = -1
    _, gradient = value_and_gradient(lambda z: balanced_cross_entropy(z, target, log_prior(counts, 6, 0.3)), logits)
    weights = class_weights(counts, 6, 0.3)
    wanted = differences(lambda z: equation_4(z, target.numpy(), weights), float64(logits))
    np.testing.assert_allclose(float64(gradient), wanted, **CLOSE)


@pytest.mark.parametrize(
    ("rows", "seen", "width"), [(1, 8, 8), (3, 5, 8), (1, 5, 8), (128, 100, 104), (7, 50, 104), (32, 1, 8)]
)
def test_equal_counts_are_the_plain_softmax_bit_for_bit(rows, seen, width):
    """The plain softmax over the columns seen, the others excluded by -inf; a copy of the columns seen alone is summed
    in another order by some processors, so to that the last bits are free."""
    logits, target, _ = example(rows, seen, 0, width)
    unseen = torch.arange(width) >= seen
    prior = log_prior(torch.where(unseen, 0, 500))
    ours = value_and_gradient(lambda z: balanced_cross_entropy(z, target, prior), logits)
    plain = value_and_gradient(lambda z: F.cross_entropy(z.masked_fill(unseen, -math.inf), target), logits)
    assert torch.equal(ours[0], plain[0])
    assert torch.equal(ours[1], plain[1])
    torch.testing.assert_close(ours[0], F.cross_entropy(logits[:, :seen], target), rtol=1e-6, atol=1e-7)
    if seen == width:
        assert torch.equal(ours[0], F.cross_entropy(logits, target))


@pytest.mark.parametrize("garbage", GARBAGE)
def test_columns_not_seen_never_reach_the_cross_entropy(garbage):
    logits, target, counts = example(5, 11, 1, width=16)
    dirty = logits.clone()
    dirty[:, 11:] = garbage
    prior = log_prior(counts, 4, 0.5)
    clean = value_and_gradient(lambda z: balanced_cross_entropy(z, target, prior), logits)
    value, gradient = value_and_gradient(lambda z: balanced_cross_entropy(z, target, prior), dirty)
    assert torch.equal(value, clean[0])
    assert torch.equal(gradient, clean[1])
    assert (gradient[:, 11:] == 0).all()
    assert torch.isfinite(gradient).all()


def test_rows_without_a_target_count_in_the_mean_only():
    logits, target, counts = example(6, 8, 2)
    target[[0, 3, 4]] = -1
    logits[4] = 50.0
    prior = log_prior(counts)
    value, gradient = value_and_gradient(lambda z: balanced_cross_entropy(z, target, prior), logits)
    kept = target >= 0
    torch.testing.assert_close(value, balanced_cross_entropy(logits[kept], target[kept], prior) / 2)
    assert (gradient[~kept] == 0).all()
    assert (gradient[kept] != 0).any()


def test_a_batch_without_any_target_is_zero():
    logits, target, counts = example(3, 8, 2)
    loss = value_and_gradient(
        lambda z: balanced_cross_entropy(z, torch.full_like(target, -1), log_prior(counts)), logits
    )
    assert loss[0] == 0
    assert (loss[1] == 0).all()


@pytest.mark.parametrize("spread", [1e2, 1e4])
def test_extreme_logits_stay_finite(spread):
    logits, target, counts = example(8, 10, 6, width=16, spread=1.0)
    logits = torch.where(logits > 0, spread, -spread) + logits
    logits[0] -= 2 * spread  # every class seen lies far below what stands for a class not seen in careless code
    logits[0, target[0]] = -spread
    weights, z, y = class_weights(counts, 4, 0.5), float64(logits), target.numpy()
    prior = log_prior(counts, 4, 0.5)
    value, gradient = value_and_gradient(lambda x: balanced_cross_entropy(x, target, prior), logits)
    # float32 logits near 1e4 carry an absolute error near 1e-3 once the prior is added
    np.testing.assert_allclose(float64(value), equation_4(z, y, weights), rtol=1e-5, atol=2e-3)
    np.testing.assert_allclose(float64(gradient), equation_4_gradient(z, y, weights), atol=1e-3)


def test_an_image_of_a_rare_class_is_pushed_harder_than_by_the_plain_softmax():
    """The point of eq. 3: the same logits cost more where the target has fewer images."""
    logits, counts = torch.zeros(1, 8), torch.tensor([20, 500, 500, 500, 0, 0, 0, 0])
    rare, frequent = (balanced_cross_entropy(logits, torch.tensor([y]), log_prior(counts)).item() for y in (0, 1))
    assert rare == pytest.approx(math.log(1520 / 20))
    assert frequent == pytest.approx(math.log(1520 / 500))


# --- distillation


@given(shapes, st.sampled_from([0.5, 1.0, 2.0, 4.0]), st.data())
@checked
def test_distillation_is_equation_2(shape, temperature, data):
    rows, seen, seed = shape
    num_old = data.draw(st.integers(1, seen))
    logits, teacher = example(rows, seen, seed)[0], example(rows, seen, seed + 1)[0]
    value, gradient = value_and_gradient(lambda z: distillation(z, teacher, num_old, temperature), logits)
    z, z_hat = float64(logits), float64(teacher)
    assert value.dtype == torch.float32
    assert value.shape == ()
    np.testing.assert_allclose(float64(value), equation_2(z, z_hat, num_old, temperature), **CLOSE)
    np.testing.assert_allclose(float64(gradient), equation_2_gradient(z, z_hat, num_old, temperature), **CLOSE)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_gradient_of_distillation_is_that_of_finite_differences(temperature):
    logits, teacher = example(3, 9, 0)[0], example(3, 9, 1)[0]
    _, gradient = value_and_gradient(lambda z: distillation(z, teacher, 7, temperature), logits)
    wanted = differences(lambda z: equation_2(z, float64(teacher), 7, temperature), float64(logits))
    np.testing.assert_allclose(float64(gradient), wanted, **CLOSE)


@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("where", ["student", "teacher", "both"])
def test_columns_of_new_classes_never_reach_the_distillation(garbage, where):
    logits, teacher = example(5, 16, 0)[0], example(5, 16, 1)[0]
    clean = value_and_gradient(lambda z: distillation(z, teacher, 6, 2.0), logits)
    dirty, dirty_teacher = logits.clone(), teacher.clone()
    if where != "teacher":
        dirty[:, 6:] = garbage
    if where != "student":
        dirty_teacher[:, 6:] = garbage
    value, gradient = value_and_gradient(lambda z: distillation(z, dirty_teacher, 6, 2.0), dirty)
    assert torch.equal(value, clean[0])
    assert torch.equal(gradient, clean[1])
    assert (gradient[:, 6:] == 0).all()
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("garbage", [0.0, *GARBAGE])
@pytest.mark.parametrize("num_old", [0, torch.tensor(0)])
def test_without_old_classes_distillation_is_exactly_zero(garbage, num_old):
    logits = torch.full((3, 8), garbage)
    value, gradient = value_and_gradient(lambda z: distillation(z, logits, num_old, 2.0), logits)
    assert value.item() == 0
    assert (gradient == 0).all()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_a_student_equal_to_its_teacher_has_no_gradient_and_the_entropy_as_its_value(temperature):
    logits = example(6, 12, 5)[0]
    value, gradient = value_and_gradient(lambda z: distillation(z, logits, 10, temperature), logits)
    z = float64(logits)[:, :10] / temperature
    log_p = z - log_sum_exp(z)
    entropy = -(np.exp(log_p) * log_p).sum(axis=1).mean()
    np.testing.assert_allclose(float64(value), entropy * temperature**2, **CLOSE)
    assert gradient.abs().max() < 1e-6


def test_one_old_class_leaves_nothing_to_distil():
    logits, teacher = example(4, 8, 0)[0], example(4, 8, 1)[0]
    value, gradient = value_and_gradient(lambda z: distillation(z, teacher, 1, 2.0), logits)
    assert value.item() == 0
    assert (gradient == 0).all()


@pytest.mark.parametrize("spread", [1e2, 1e4])
def test_extreme_logits_of_student_and_teacher_stay_finite(spread):
    logits, teacher = (torch.where(example(8, 16, s)[0] > 0, spread, -spread) for s in (0, 1))
    logits[:2] = -2 * spread + example(2, 16, 2)[0]
    teacher[1:3] = -2 * spread + example(2, 16, 3)[0]
    value, gradient = value_and_gradient(lambda z: distillation(z, teacher, 9, 2.0), logits)
    z, z_hat = float64(logits), float64(teacher)
    np.testing.assert_allclose(float64(value), equation_2(z, z_hat, 9, 2.0), rtol=1e-4)
    np.testing.assert_allclose(float64(gradient), equation_2_gradient(z, z_hat, 9, 2.0), atol=1e-4)


def test_device_scalars_give_the_distillation_of_numbers():
    logits, teacher = example(3, 8, 0)[0], example(3, 8, 1)[0]
    a = value_and_gradient(lambda z: distillation(z, teacher, 5, 2.0), logits)
    b = value_and_gradient(lambda z: distillation(z, teacher, torch.tensor(5), torch.tensor(2.0)), logits)
    assert torch.equal(a[0], b[0])
    assert torch.equal(a[1], b[1])


# --- precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_logits_of_half_precision_are_computed_in_float32(dtype, autocast):
    logits, target, counts = example(16, 20, 3)
    logits, teacher, prior = logits.to(dtype), example(16, 20, 4)[0].to(dtype), log_prior(counts, 12, 0.3)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        ours = balanced_cross_entropy(logits, target, prior), distillation(logits, teacher, 12, 2.0)
    wanted = (
        balanced_cross_entropy(logits.float(), target, prior),
        distillation(logits.float(), teacher.float(), 12, 2.0),
    )
    for a, b in zip(ours, wanted, strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)


def test_the_gradient_comes_back_in_the_precision_of_the_logits():
    logits, target, counts = example(4, 8, 3)
    _, gradient = value_and_gradient(
        lambda z: balanced_cross_entropy(z, target, log_prior(counts)), logits.to(torch.bfloat16)
    )
    assert gradient.dtype == torch.bfloat16
    assert torch.isfinite(gradient).all()


# --- distillation of features and maps


def example_maps(shape, seed, scale=1.0):
    return torch.from_numpy(np.random.default_rng(seed).normal(0, scale, shape).astype(np.float32))


def one_minus_cosine(features, teacher):
    norms = np.linalg.norm(features, axis=1) * np.linalg.norm(teacher, axis=1)
    return (1 - (features * teacher).sum(axis=1) / norms).mean()


def pod(maps, teacher_maps):
    """PODNet's distance image by image: sums of squares over width and over height, concatenated, normalised."""
    distances = []
    for layer, teacher_layer in zip(maps, teacher_maps, strict=True):
        for x, y in zip(layer, teacher_layer, strict=True):
            a, b = (np.concatenate(((z**2).sum(axis=2).ravel(), (z**2).sum(axis=1).ravel())) for z in (x, y))
            unit_a, unit_b = (z / max(np.linalg.norm(z), 1e-12) for z in (a, b))
            distances.append(np.linalg.norm(unit_a - unit_b) / len(layer))
    return sum(distances) / len(maps)


@pytest.mark.parametrize("loss", [less_forget, pod_flat])
@pytest.mark.parametrize(("rows", "width"), [(1, 2), (5, 64), (7, 33)])
def test_distillation_of_features_is_one_minus_the_cosine(loss, rows, width):
    features, teacher = example_maps((rows, width), 0), example_maps((rows, width), 1)
    value, gradient = value_and_gradient(lambda f: loss(f, teacher), features)
    f, t = float64(features), float64(teacher)
    assert value.dtype == torch.float32
    assert value.shape == ()
    np.testing.assert_allclose(float64(value), one_minus_cosine(f, t), **CLOSE)
    np.testing.assert_allclose(float64(gradient), differences(lambda x: one_minus_cosine(x, t), f), **CLOSE)


def test_nearly_equal_features_keep_the_digits_of_one_minus_the_cosine():
    features = example_maps((6, 64), 0)
    teacher = features + example_maps((6, 64), 1, scale=1e-4)
    wanted = one_minus_cosine(float64(features), float64(teacher))
    assert wanted < 1e-7  # less than float32 resolves near 1
    assert less_forget(features, teacher).item() == pytest.approx(wanted, rel=1e-2)


def test_equal_features_have_no_loss_and_no_gradient():
    features = example_maps((5, 16), 0)
    value, gradient = value_and_gradient(lambda f: less_forget(f, features), features)
    assert value.item() == 0
    assert (gradient == 0).all()


@pytest.mark.parametrize("blank", ["student", "teacher", "both"])
def test_features_without_a_direction_count_one_and_have_no_gradient(blank):
    features, teacher = example_maps((4, 16), 0), example_maps((4, 16), 1)
    if blank != "teacher":
        features[2] = 0
    if blank != "student":
        teacher[2] = 0
    value, gradient = value_and_gradient(lambda f: less_forget(f, teacher), features)
    others = [0, 1, 3]
    wanted = one_minus_cosine(float64(features[others]), float64(teacher[others]))
    assert value.item() == pytest.approx((3 * wanted + 1) / 4, rel=1e-6)
    assert (gradient[2] == 0).all()
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("shapes", [[(3, 5, 4, 6)], [(2, 4, 8, 8), (2, 8, 4, 4), (2, 6, 1, 3)]])
def test_spatial_distillation_is_that_of_podnet(shapes):
    maps = [example_maps(shape, seed) for seed, shape in enumerate(shapes)]
    teacher_maps = [example_maps(shape, 10 + seed) for seed, shape in enumerate(shapes)]
    leaves = [x.clone().requires_grad_() for x in maps]
    value = pod_spatial(leaves, teacher_maps)
    value.backward()
    x, y = [float64(m) for m in maps], [float64(m) for m in teacher_maps]
    assert value.dtype == torch.float32
    assert value.shape == ()
    np.testing.assert_allclose(float64(value), pod(x, y), **CLOSE)
    for layer, leaf in enumerate(leaves):
        wanted = differences(lambda z, at=layer: pod([*x[:at], z, *x[at + 1 :]], y), x[layer])
        np.testing.assert_allclose(float64(leaf.grad), wanted, **CLOSE)


def test_equal_maps_have_no_loss_and_no_gradient():
    maps = example_maps((3, 4, 5, 6), 0)
    value, gradient = value_and_gradient(lambda x: pod_spatial([x], [maps]), maps)
    assert value.item() == 0
    assert (gradient == 0).all()


@pytest.mark.parametrize("blank", ["student", "teacher", "both"])
def test_blank_maps_are_finite_and_have_no_gradient(blank):
    maps, teacher = example_maps((3, 4, 5, 6), 0), example_maps((3, 4, 5, 6), 1)
    if blank != "teacher":
        maps[1] = 0
    if blank != "student":
        teacher[1] = 0
    value, gradient = value_and_gradient(lambda x: pod_spatial([x], [teacher]), maps)
    assert value.item() == pytest.approx(pod([float64(maps)], [float64(teacher)]), rel=1e-6)
    assert torch.isfinite(gradient).all()
    # The distance of a unit vector to nothing is 1 whatever its direction.
    assert gradient[1].abs().max() <= 1e-6 * gradient.abs().max()


def test_as_many_maps_as_the_teacher_has_are_needed():
    maps = example_maps((2, 3, 4, 4), 0)
    with pytest.raises(ValueError, match="zip"):
        pod_spatial([maps], [maps, maps])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_features_and_maps_of_half_precision_are_computed_in_float32(dtype):
    student, teacher = example_maps((2, 3, 4, 4), 0).to(dtype), example_maps((2, 3, 4, 4), 1).to(dtype)
    ours = pod_spatial([student], [teacher]), less_forget(student.flatten(1), teacher.flatten(1))
    student, teacher = student.float(), teacher.float()
    wanted = pod_spatial([student], [teacher]), less_forget(student.flatten(1), teacher.flatten(1))
    for a, b in zip(ours, wanted, strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)
