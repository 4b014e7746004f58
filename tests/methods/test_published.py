"""The losses and rules of the published methods against what their papers and codes say, written out in float64."""

import dataclasses
import io
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from scipy.optimize import minimize
from torch import nn

from fastil.data import Batch
from fastil.errors import UserError
from fastil.losses import icarl_cross_entropy, nca, topology
from fastil.methods import (
    METHODS,
    FeatureExtractor,
    LossConfig,
    MemoryContext,
    Meter,
    MethodConfig,
    StepContext,
    check_parts,
    configs_of,
)
from fastil.methods.bic import BiCConfig, fit_bias
from fastil.methods.lucir import mean_direction
from fastil.methods.podnet import class_proxies
from fastil.methods.tpcil import compete
from fastil.models import Output

W, NUM_OLD, NUM_SEEN, B, D = 16, 5, 9, 12, 7
COUNTS = np.array([20] * NUM_OLD + [500] * (NUM_SEEN - NUM_OLD) + [0] * (W - NUM_SEEN))
CPU = torch.device("cpu")


def parts_of(*overrides):
    """Every method's configuration with these keys set."""
    values = {key: yaml.safe_load(text) for key, _, text in (o.partition("=") for o in overrides)}
    return {
        part: config(**{f.name: values[f.name] for f in dataclasses.fields(config) if f.name in values})
        for part, config in configs_of("il_baseline").items()
    }


def method_of(name, *overrides, loss="softmax", num_old=NUM_OLD):
    method = METHODS[name](MethodConfig(name), LossConfig(loss), W, CPU, parts_of(*overrides), NUM_SEEN)
    method.begin_step(StepContext(1, num_old, NUM_SEEN, COUNTS))
    return method


def outputs(seed=0, cosine=True, requires_grad=True):
    """A student's output and a teacher's, of random tensors."""
    generator = torch.Generator().manual_seed(seed)

    def one(grad):
        logits = torch.randn(B, W, generator=generator)
        maps = [torch.randn(B, 3, s, s, generator=generator) for s in (6, 4)]
        features = torch.randn(B, D, generator=generator)
        logits = torch.tanh(logits) if cosine else logits
        scale = torch.tensor(3.7, requires_grad=grad) if cosine else None
        for tensor in (features, logits, *maps):
            tensor.requires_grad_(grad)
        return Output(features, maps, logits, scale)

    return one(requires_grad), one(False)


LABELS = torch.tensor([0, 8, 3, 5, 4, 4, 7, 8, 1, 6, 2, 5])
BATCH = Batch(torch.zeros(B, 3, 1, 1), LABELS, LABELS)


def assert_loss(method, wanted_of, *, cosine, teacher=True):
    """Value, gradients by autograd and gradients by `backward` are those of wanted_of(student, teacher)."""
    out, teacher_out = outputs(cosine=cosine)
    reference, _ = outputs(cosine=cosine)
    double = Output(
        reference.features.double(), [m.double() for m in reference.maps], reference.logits.double(),
        None if reference.scale is None else reference.scale.double(),
    )  # fmt: skip
    wanted = wanted_of(double, teacher_out)
    wanted.backward()
    given = teacher_out if teacher else None
    assert float(method.loss(BATCH, out, given).detach()) == pytest.approx(float(wanted.detach()), rel=2e-6)
    meter = Meter(torch.zeros(B, 4), torch.zeros(()))
    method.backward(BATCH, out, given, meter)
    leaves = [(out.features, reference.features), (out.logits, reference.logits), (out.scale, reference.scale)]
    for ours, theirs in [*leaves, *zip(out.maps, reference.maps, strict=True)]:
        if theirs is None or theirs.grad is None:
            assert ours is None or ours.grad is None
        else:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=2e-5, atol=1e-7)
    ce, kd, hits, ranking = meter.rows.sum(0).tolist()
    shown = sum(w * t for w, t in zip(method.meter_weights, (ce, kd, ranking), strict=True)) + float(meter.unfused)
    hits_wanted = (reference.logits[:, :NUM_SEEN].argmax(1) == LABELS).sum()
    assert hits == hits_wanted
    return shown / B, float(wanted.detach())


def cross_entropy(out, prior=False):
    z = out.scaled_logits[:, :NUM_SEEN]
    return F.cross_entropy(z + torch.from_numpy(np.log(COUNTS[:NUM_SEEN])) if prior else z, LABELS)


def test_icarl_is_lucirs_linear_script():
    """Its loss: nn.KLDivLoss()(...) * T * T * beta * num_old_classes, where KLDivLoss is the mean over all elements."""

    def wanted(out, teacher):
        log_p = torch.log_softmax(out.logits[:, :NUM_OLD] / 2, 1)
        p_hat = torch.softmax(teacher.logits[:, :NUM_OLD].double() / 2, 1)
        entropy = -(p_hat * p_hat.log()).sum(1).mean()  # the kernel's distillation leaves this constant out
        return (
            cross_entropy(out) + nn.KLDivLoss(reduction="mean")(log_p, p_hat) * 4 * 0.25 * NUM_OLD + 4 * 0.25 * entropy
        )

    shown, whole = assert_loss(method_of("icarl"), wanted, cosine=False)
    assert shown == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("with_teacher", [True, False])
def test_icarl_of_2017_takes_the_teachers_sigmoids_as_aims(with_teacher):
    def wanted(out, teacher):
        aims = F.one_hot(LABELS, W).double()
        if with_teacher:
            aims[:, :NUM_OLD] = torch.sigmoid(teacher.logits[:, :NUM_OLD].double())
        g = torch.sigmoid(out.logits)
        terms = -(aims * g.log() + (1 - aims) * (1 - g).log())[:, :NUM_SEEN]
        return terms.sum() / (B * NUM_SEEN)

    shown, whole = assert_loss(method_of("icarl_bce"), wanted, cosine=False, teacher=with_teacher)
    assert shown == pytest.approx(whole, rel=1e-5)


def test_icarls_loss_ignores_classes_not_seen_whatever_they_hold():
    out, teacher = outputs(cosine=False)
    logits = out.logits.detach().clone()
    logits[:, NUM_SEEN:] = math.nan
    logits.requires_grad_()
    loss = icarl_cross_entropy(logits, LABELS, teacher.logits, NUM_OLD, NUM_SEEN, NUM_SEEN)
    loss.backward()
    assert loss.isfinite()
    assert not logits.grad[:, NUM_SEEN:].any()


@pytest.mark.parametrize("mean", ["old_images", "batch"])
@pytest.mark.parametrize("loss", ["softmax", "balanced"])
def test_lucir_is_its_released_loss(mean, loss):
    def wanted(out, teacher):
        lamda = 5.0 * math.sqrt(NUM_OLD / (NUM_SEEN - NUM_OLD))
        ones = torch.ones(B)
        forget = lamda * nn.CosineEmbeddingLoss()(out.features, teacher.features.double(), ones)
        hard = LABELS < NUM_OLD
        own = out.logits.gather(1, LABELS[:, None])[hard].repeat(1, 2)
        rivals = out.logits[:, NUM_OLD:NUM_SEEN].topk(2, dim=1)[0][hard]
        ranking = nn.MarginRankingLoss(margin=0.5)(
            own.reshape(-1, 1), rivals.reshape(-1, 1), torch.ones(own.numel(), 1)
        )
        share = 1.0 if mean == "old_images" else float(hard.sum()) / B
        return cross_entropy(out, prior=loss == "balanced") + forget + share * ranking

    shown, whole = assert_loss(method_of("lucir", f"lucir_ranking_mean={mean}", loss=loss), wanted, cosine=True)
    if mean == "batch":
        assert shown == pytest.approx(whole, rel=1e-5)


def pod(out, teacher, flat, spatial):
    def pooled(x):
        x = x.double() ** 2
        vector = torch.cat([x.sum(3).flatten(1), x.sum(2).flatten(1)], 1)
        return vector / vector.norm(dim=1, keepdim=True)

    distances = [(pooled(a) - pooled(b)).norm(dim=1).mean() for a, b in zip(out.maps, teacher.maps, strict=True)]
    cosine = F.cosine_similarity(out.features, teacher.features.double())
    factor = math.sqrt(NUM_SEEN / (NUM_SEEN - NUM_OLD))
    return factor * (flat * (1 - cosine).mean() + spatial * sum(distances) / len(distances))


def test_podnet_is_nca_and_pooled_outputs_distillation():
    def wanted(out, teacher):
        s = out.scaled_logits[:, :NUM_SEEN]
        s = s - s.amax(1, keepdim=True)
        own = s.gather(1, LABELS[:, None])[:, 0]
        others = torch.where(F.one_hot(LABELS, NUM_SEEN) > 0, 0.0, s)  # exp(0) in the place of the target
        return -(own - others.exp().sum(1).log()).mean() + pod(out, teacher, 1.0, 3.0)

    shown, whole = assert_loss(method_of("podnet", loss="nca"), wanted, cosine=True)
    assert shown == pytest.approx(whole, rel=1e-5)


def test_podnet_with_balanced_softmax_replaces_its_classification_loss_only():
    assert_loss(
        method_of("podnet", "pod_flat=10", "pod_spatial=8", loss="balanced"),
        lambda out, teacher: cross_entropy(out, prior=True) + pod(out, teacher, 10.0, 8.0),
        cosine=True,
    )


@pytest.mark.parametrize("margin", [0.0, 0.6])
def test_the_papers_nca_is_its_equation_8(margin):
    y = torch.tanh(torch.randn(40, W, generator=torch.Generator().manual_seed(3))).double()
    labels = torch.arange(40) % NUM_SEEN
    y[torch.arange(20), labels[:20]] = 0.99  # where the hinge counts
    y[:20] -= torch.where(torch.arange(W) == labels[:20, None], 0.0, 1.0)
    eta, losses = 5.3, []
    for row, t in zip(y, labels, strict=True):
        rest = sum(math.exp(eta * row[j]) for j in range(NUM_SEEN) if j != t)
        losses.append(max(0.0, -math.log(math.exp(eta * (row[t] - margin)) / rest)))
    assert 0.0 in losses
    value = nca(y.float(), labels, NUM_SEEN, eta, margin, "paper")
    assert float(value) == pytest.approx(np.mean(losses), rel=1e-5)


def test_the_released_nca_forgets_its_margin_and_is_the_softmax_where_the_target_is_largest():
    y = torch.tanh(torch.randn(200, W, generator=torch.Generator().manual_seed(3)))
    labels = y[:, :NUM_SEEN].argmax(1)
    assert float(nca(y, labels, NUM_SEEN, 4.0, 0.6)) == float(nca(y, labels, NUM_SEEN, 4.0, 0.0))
    softmax = F.cross_entropy(4 * y[:, :NUM_SEEN], labels)
    assert float(nca(y, labels, NUM_SEEN, 4.0)) == pytest.approx(float(softmax), rel=1e-5)
    elsewhere = (labels + 1) % NUM_SEEN
    assert float(nca(y, elsewhere, NUM_SEEN, 4.0)) > float(F.cross_entropy(4 * y[:, :NUM_SEEN], elsewhere))


def test_bic_weighs_by_the_share_of_old_classes_and_corrects_its_teacher():
    method = method_of("bic")
    method.beta[3:NUM_OLD], method.gamma[3:NUM_OLD] = 0.6, -0.4

    def wanted(out, teacher):
        lamda = NUM_OLD / NUM_SEEN
        hat = teacher.logits[:, :NUM_OLD].double().clone()
        hat[:, 3:] = 0.6 * hat[:, 3:] - 0.4
        log_p = torch.log_softmax(out.logits[:, :NUM_OLD] / 2, 1)
        return (1 - lamda) * cross_entropy(out) - lamda * (torch.softmax(hat / 2, 1) * log_p).sum(1).mean()

    assert_loss(method, wanted, cosine=False)


def test_bic_of_all_groups_trains_through_the_corrections():
    method = method_of("bic", "bic_groups=all")
    beta, gamma = torch.ones(W), torch.zeros(W)
    beta[2:4], gamma[2:4], beta[4], gamma[4] = 0.5, 0.3, 1.7, -0.2
    method.beta.copy_(beta)
    method.gamma.copy_(gamma)

    def wanted(out, teacher):
        lamda = NUM_OLD / NUM_SEEN
        z, hat = (o.logits.double() * beta + gamma for o in (out, teacher))
        log_p = torch.log_softmax(z[:, :NUM_OLD] / 2, 1)
        distillation = -(torch.softmax(hat[:, :NUM_OLD] / 2, 1) * log_p).sum(1).mean()
        return (1 - lamda) * F.cross_entropy(z[:, :NUM_SEEN], LABELS) + lamda * distillation

    out, teacher_out = outputs(cosine=False)
    reference, _ = outputs(cosine=False)
    wanted(reference, teacher_out).backward()
    method.backward(BATCH, out, teacher_out, Meter(torch.zeros(B, 4), torch.zeros(())))
    torch.testing.assert_close(out.logits.grad, reference.logits.grad, rtol=2e-5, atol=1e-7)


def test_bics_second_stage_finds_the_minimum():
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(90, NUM_SEEN, generator=generator)
    labels = torch.arange(90) % NUM_SEEN
    logits[torch.arange(90), labels] += 2.0
    logits[:, NUM_OLD:] += 1.5  # the bias that is to be found

    def objective(parameters):
        beta, gamma = parameters
        z = logits.double().numpy().copy()
        z[:, NUM_OLD:] = beta * z[:, NUM_OLD:] + gamma
        log_q = z - np.log(np.exp(z).sum(1, keepdims=True))
        return -log_q[np.arange(90), labels].mean() + 0.1 * gamma**2 / 2

    beta, gamma = fit_bias(logits, labels, NUM_OLD, BiCConfig())
    best = minimize(objective, [1.0, 0.0], method="Nelder-Mead", options={"xatol": 1e-6, "fatol": 1e-12})
    assert beta < 0.95
    np.testing.assert_allclose([float(beta), float(gamma)], best.x, atol=5e-3)


def test_bic_corrects_the_newest_group_only_unless_all_are_asked_for():
    held_out = Output(torch.zeros(18, 2), [], torch.randn(18, W, generator=torch.Generator().manual_seed(1)))
    labels = torch.arange(18) % NUM_SEEN
    for groups, kept in (("newest", False), ("all", True)):
        method = method_of("bic", f"bic_groups={groups}")
        method.beta[3:NUM_OLD] = 0.5
        extractor = FeatureExtractor(lambda ids, mirrored: held_out, None)
        method.after_training(None, extractor, np.arange(18), labels)
        assert bool((method.beta[3:NUM_OLD] == 0.5).all()) == kept
        assert (method.beta[NUM_OLD:NUM_SEEN] != 1).all()
        assert (method.beta[:3] == 1).all()
        logits = torch.randn(4, W)
        torch.testing.assert_close(method.predict(logits), logits * method.beta + method.gamma)


def test_a_falling_decay_is_the_codes():
    method = method_of("bic", "bic_decay=falling")
    assert [method.weight_decay(1e-4, step, 10) for step in (0, 4, 9)] == pytest.approx([1e-3, 2e-4, 1e-4])
    assert method_of("bic").weight_decay(1e-4, 0, 10) == 1e-4


def test_the_topology_loss_is_one_minus_the_correlation_over_the_edges():
    generator = torch.Generator().manual_seed(5)
    student, teacher = torch.randn(B, W, generator=generator), torch.randn(B, W, generator=generator)
    edges = torch.rand(B, W, generator=generator) < 0.4
    student[~edges], teacher[~edges] = torch.nan, torch.nan  # where there is no edge nothing is read
    x, y = ([float(s[i, j]) for i in range(B) for j in range(W) if edges[i, j]] for s in (student, teacher))
    assert float(topology(student, teacher, edges)) == pytest.approx(1 - np.corrcoef(x, y)[0, 1], rel=1e-5)
    assert float(topology(student, student, edges)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("pairs", [0, 1])
def test_a_graph_too_small_for_a_correlation_costs_nothing(pairs):
    cosines = torch.randn(B, W, requires_grad=True)
    edges = torch.zeros(B, W, dtype=torch.bool)
    edges[0, 1 : 1 + pairs] = True
    loss = topology(cosines, torch.randn(B, W), edges)
    loss.backward()
    assert loss == 0
    assert not cosines.grad.any()


def test_tpcil_relates_images_to_the_vertex_that_wins_them_and_those_joined_to_it():
    """With LUCIR's cross-entropy and margin ranking; one loop over images and vertices, in float64."""
    method = method_of("tpcil", "tpcil_lambda=2")
    generator = torch.Generator().manual_seed(11)
    vertices = torch.nn.functional.normalize(torch.randn(W, D, generator=generator))
    ages = np.full((W, W), -1)
    ages[0, 3] = ages[3, 0] = ages[2, 7] = ages[7, 2] = 0  # 7 is a new class: no vertex in training
    method.load_state_dict({"ages": torch.from_numpy(ages), "vertices": vertices})

    def wanted(out, teacher):
        x, y = [], []
        for i in range(B):
            s, t = (
                [f[i].double() @ vertices[v].double() / f[i].double().norm() for v in range(NUM_OLD)]
                for f in (out.features, teacher.features)
            )
            winner = max(range(NUM_OLD), key=lambda v, t=t: float(t[v]))
            for v in range(NUM_OLD):
                if v == winner or ages[winner, v] >= 0:
                    x.append(s[v])
                    y.append(t[v])
        x, y = torch.stack(x), torch.stack(y)
        x, y = x - x.mean(), y - y.mean()
        hard = LABELS < NUM_OLD
        own = out.logits.gather(1, LABELS[:, None])[hard]
        rivals = out.logits[:, NUM_OLD:NUM_SEEN].topk(2, dim=1)[0][hard]
        ranking = (0.5 - own + rivals).clamp(min=0).mean()
        lamda = 2 * math.sqrt(NUM_OLD / (NUM_SEEN - NUM_OLD))
        return cross_entropy(out) + ranking + lamda * (1 - (x * y).sum() / (x.norm() * y.norm()))

    assert_loss(method, wanted, cosine=True)


def differences(function, x, step=1e-6):
    """The gradient of a function of a float64 array, by central differences."""
    gradient = np.zeros_like(x)
    for place in np.ndindex(x.shape):
        moved = [x.copy(), x.copy()]
        moved[0][place] += step
        moved[1][place] -= step
        gradient[place] = (function(moved[0]) - function(moved[1])) / (2 * step)
    return gradient


def test_the_gradient_of_the_topology_loss_is_that_of_the_correlation():
    generator = torch.Generator().manual_seed(6)
    student, teacher = (torch.randn(B, W, generator=generator, dtype=torch.float64) for _ in range(2))
    edges = torch.rand(B, W, generator=generator) < 0.3
    (3 * topology(student.requires_grad_(), teacher, edges)).backward()
    of = edges.numpy()
    wanted = differences(lambda x: 3 * (1 - np.corrcoef(x[of], teacher.numpy()[of])[0, 1]), student.detach().numpy())
    np.testing.assert_allclose(student.grad.numpy(), wanted, atol=1e-8)
    assert not student.grad[~edges].any()


def test_the_gradient_of_the_papers_nca_is_that_of_its_equation_8():
    """The gradient in similarities and scale; none behind the hinge, without a target, and in columns not seen."""
    y = torch.tanh(torch.randn(20, W, generator=torch.Generator().manual_seed(4))).double()
    labels = torch.arange(20) % NUM_SEEN
    y[torch.arange(5), labels[:5]] += 3.0
    labels[7] = -1

    def wanted(y, eta):
        losses = []
        for row, t in zip(y, labels.tolist(), strict=True):
            rest = sum(math.exp(eta * row[j]) for j in range(NUM_SEEN) if j != t)
            losses.append(0.0 if t < 0 else max(0.0, math.log(rest) - eta * (row[t] - 0.4)))
        return np.mean(losses)

    leaves = y.clone().requires_grad_(), torch.tensor(2.7, dtype=torch.float64, requires_grad=True)
    loss = nca(leaves[0], labels, NUM_SEEN, leaves[1], 0.4, "paper")
    loss.backward()
    assert float(loss.detach()) == pytest.approx(wanted(y.numpy(), 2.7), rel=1e-12)
    np.testing.assert_allclose(leaves[0].grad.numpy(), differences(lambda x: wanted(x, 2.7), y.numpy()), atol=1e-8)
    scale = differences(lambda eta: wanted(y.numpy(), eta[0]), np.array([2.7]))[0]
    assert float(leaves[1].grad) == pytest.approx(scale, rel=1e-6)
    assert leaves[0].grad.any(1).tolist() == [i >= 5 and i != 7 for i in range(20)]
    assert not leaves[0].grad[:, NUM_SEEN:].any()


def test_new_classes_are_no_vertices_in_training():
    """Theirs would win the first image and are joined to all others; nothing changes when they are not there."""
    out, teacher = outputs()
    ages = np.full((W, W), -1)
    ages[0, 3] = ages[3, 0] = ages[1, 2] = ages[2, 1] = 4
    vertices = F.normalize(torch.randn(W, D, generator=torch.Generator().manual_seed(12)))
    losses = []
    for present in (False, True):
        method = method_of("tpcil")
        if present:
            vertices[NUM_OLD] = F.normalize(teacher.features)[0]
            ages[NUM_OLD:], ages[:, NUM_OLD:] = 0, 0
        else:
            vertices[NUM_OLD:] = 0
        method.load_state_dict({"ages": torch.from_numpy(ages), "vertices": vertices})
        losses.append(float(method.extra_loss(BATCH, out, teacher, None).detach()))
    assert losses[0] > 0
    assert losses[0] == losses[1]


def test_a_step_grows_the_graph_and_a_checkpoint_holds_it():
    """Two steps on features of exemplars, against loops; in the second one classes 2 and 3 are new."""
    generator, ages, steps = torch.Generator().manual_seed(13), np.full((W, W), -1), []
    method = method_of("tpcil", "tpcil_age=3")
    for positions in (np.repeat([0, 1], 4), np.repeat([0, 1, 2, 3], 5)):
        features = torch.randn(len(positions), D, generator=generator) + 2 * torch.eye(W, D)[positions]
        extractor = FeatureExtractor(lambda ids, mirrored, features=features: Output(features[ids], [], None), None)
        memory = MemoryContext(np.arange(len(positions)), positions, extractor, None, None)
        assert method.after_memory(None, memory) == {}
        unit = F.normalize(features.double()).numpy()
        vertices = np.stack([unit[positions == c].mean(0) for c in range(positions.max() + 1)])
        vertices /= np.linalg.norm(vertices, axis=1, keepdims=True)
        for signal in unit:
            first, second = np.argsort(-(vertices @ signal))[:2]
            for v in range(W):
                if v == second:
                    ages[first, v] = 0
                elif ages[first, v] >= 0:
                    ages[first, v] = -1 if ages[first, v] == 3 else ages[first, v] + 1
                ages[v, first] = ages[first, v]
        np.testing.assert_array_equal(method.ages, ages)
        assert method.vertices.shape == (W, D)
        np.testing.assert_allclose(method.vertices[: len(vertices)].numpy(), vertices, atol=1e-6)
        assert not method.vertices[len(vertices) :].any()
        steps.append(ages.copy())
    assert (steps[1] != steps[0]).any()
    buffer = io.BytesIO()
    torch.save(method.state_dict(), buffer)
    buffer.seek(0)
    other, (out, teacher) = method_of("tpcil"), outputs()
    other.load_state_dict(torch.load(buffer, weights_only=True))
    np.testing.assert_array_equal(other.ages, ages)
    assert torch.equal(other.joined, torch.from_numpy(ages >= 0) | torch.eye(W, dtype=torch.bool))
    assert torch.equal(*(m.extra_loss(BATCH, out, teacher, None) for m in (method, other)))


def test_vertices_compete_for_signals_and_old_edges_go():
    ages = np.full((4, 4), -1, dtype=np.int64)
    compete(ages, np.array([[0, 1], [0, 2], [0, 1]]), 1)
    assert ages[0].tolist() == [-1, 0, 1, -1]
    assert (ages == ages.T).all()
    compete(ages, np.array([[0, 1]]), 1)
    assert ages[0].tolist() == [-1, 0, -1, -1]  # the edge to 2 was not one of the winner's for two wins
    compete(ages, np.array([[3, 2]]), 1)
    assert (ages >= 0).sum() == 4


def test_imprinted_rows_and_proxies():
    features = 5 * torch.randn(60, D, generator=torch.Generator().manual_seed(7)) + 3
    unit = features.double() / features.double().norm(dim=1, keepdim=True)
    wanted = unit.mean(0) / unit.mean(0).norm()
    torch.testing.assert_close(mean_direction(features).double(), wanted, rtol=1e-5, atol=1e-6)
    centres = class_proxies(features, 4, seed=0).double()
    assert centres.shape == (4, D)
    nearest = torch.cdist(unit, centres).argmin(1)
    for k in range(4):  # a minimum of k-means: every centre is the mean of what is nearest to it
        torch.testing.assert_close(centres[k], unit[nearest == k].mean(0), rtol=1e-5, atol=1e-6)
    assert class_proxies(features[:3], 4, seed=0).shape == (4, D)


@pytest.mark.parametrize(
    ("method", "loss", "head", "line"),
    [
        ("lucir", "softmax", "linear", "head=cosine"),
        ("podnet", "nca", "cosine", "head=proxies"),
        ("il_baseline", "nca", "linear", "similarities"),
        ("icarl_bce", "balanced", "linear", "loss=softmax"),
    ],
)
def test_parts_that_do_not_go_together_are_named(method, loss, head, line):
    with pytest.raises(UserError, match=line):
        check_parts(method, METHODS[method], LossConfig(loss), head)
