"""Accuracy and confusion of a step against loops over images, and the pass that yields its logits."""

import math

import numpy as np
import pytest
import torch

from fastil import evaluation
from fastil.data import Split, make_loader
from fastil.errors import UserError
from fastil.evaluation import evaluate, forward
from fastil.models import Folded, ModelConfig, build_network
from fastil.plan import Transform, sequential_plan


def brute_force(logits, positions, num_base, num_old, num_seen):
    """Top-1 per group of classes, top-5 and the confusion matrix, image by image."""
    confusion = [[0] * num_seen for _ in range(num_seen)]
    groups = {
        "top1": (0, num_seen),
        "top1_base": (0, num_base),
        "top1_old": (0, num_old),
        "top1_new": (num_old, num_seen),
    }
    hits, totals, in_five = dict.fromkeys(groups, 0), dict.fromkeys(groups, 0), 0
    for row, true in zip(logits.tolist(), positions.tolist(), strict=True):
        values = row[:num_seen]
        ranked = sorted(range(num_seen), key=values.__getitem__, reverse=True)
        confusion[true][ranked[0]] += 1
        in_five += true in ranked[:5]
        for name, (start, stop) in groups.items():
            if start <= true < stop:
                totals[name] += 1
                hits[name] += ranked[0] == true
    scores = {name: 100 * hits[name] / totals[name] if totals[name] else None for name in groups}
    scores["top5"] = 100 * in_five / len(positions) if num_seen > 5 else None
    return scores, confusion


def example(rows, width, num_seen, seed, signal=1.5):
    """Logits with some truth in them; every class seen has an image."""
    generator = torch.Generator().manual_seed(seed)
    positions = torch.cat((torch.arange(num_seen), torch.randint(0, num_seen, (rows - num_seen,), generator=generator)))
    logits = torch.randn(rows, width, generator=generator)
    logits[torch.arange(rows), positions] += signal
    return logits, positions


def check(logits, positions, num_base, num_old, num_seen, step=3):
    result, confusion, predicted = evaluate(
        logits, positions, step=step, num_base=num_base, num_old=num_old, num_seen=num_seen
    )
    scores, wanted = brute_force(logits, positions, num_base, num_old, num_seen)
    for name, score in scores.items():
        assert getattr(result, name) == (None if score is None else pytest.approx(score)), name
    assert confusion.dtype == np.int64
    assert confusion.tolist() == wanted
    assert confusion.sum() == len(positions)
    assert predicted.tolist() == [max(range(num_seen), key=row.__getitem__) for row in logits.float().tolist()]
    assert (result.step, result.classes_seen, result.nme_top1) == (step, num_seen, None)
    return result


@pytest.mark.parametrize(
    ("rows", "width", "num_base", "num_old", "num_seen"),
    [
        (300, 16, 5, 8, 10),
        (60, 104, 50, 55, 60),
        (200, 8, 2, 4, 6),
        (40, 8, 2, 3, 5),  # too few classes for a top-5
        (50, 8, 6, 0, 6),  # the base step has no old classes
        (30, 8, 1, 1, 2),
        (7, 8, 1, 0, 1),
        (24, 24, 12, 12, 24),
    ],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_results_are_those_of_a_loop_over_images(rows, width, num_base, num_old, num_seen, seed):
    result = check(*example(rows, width, num_seen, seed), num_base, num_old, num_seen)
    assert (result.top1_old is None) == (num_old == 0)
    assert (result.top5 is None) == (num_seen <= 5)


def test_the_accuracy_of_all_classes_is_not_the_mean_of_the_groups():
    """Ten images of an old class, all wrong, thirty of a new one, all right."""
    positions = torch.tensor([0] * 10 + [1] * 30)
    logits = torch.tensor([[0.0, 1.0]]).repeat(40, 1)
    result = check(logits, positions, 1, 1, 2)
    assert (result.top1, result.top1_base, result.top1_old, result.top1_new) == (75, 0, 0, 100)


@pytest.mark.parametrize("garbage", [math.nan, math.inf, 1e30, -1e30])
def test_columns_of_classes_not_seen_are_ignored(garbage):
    logits, positions = example(100, 16, 9, 4)
    clean = check(logits, positions, 3, 6, 9)
    logits[:, 9:] = garbage
    assert check(logits, positions, 3, 6, 9) == clean


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_diverged_network_gets_no_accuracy_by_accident(value):
    logits, positions = example(60, 8, 7, 6)
    logits[41, 3] = value
    with pytest.raises(UserError, match="diverged"):
        evaluate(logits, positions, step=0, num_base=7, num_old=0, num_seen=7)


def test_bfloat16_logits_are_evaluated():
    logits, positions = example(100, 16, 9, 4)
    logits = (logits * 64).round().to(torch.bfloat16)
    logits += torch.arange(16) * 1024  # no ties
    check(logits, positions, 3, 6, 9)


# --- forward

TRANSFORM = Transform(8, 8, pad=2, flip=True, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))


@pytest.fixture
def world():
    random = np.random.default_rng(0)
    split = Split(random.integers(0, 256, (23, 8, 8, 3), dtype=np.uint8), random.integers(0, 5, 23))
    network = build_network(ModelConfig("resnet8"), 5, 0)
    network.head.open_rows(0, 5, torch.Generator().manual_seed(0))
    return split, network, make_loader(split, "auto", TRANSFORM, "cpu")


def whole_images(split, ids):
    pixels = torch.from_numpy(split.images[ids]).permute(0, 3, 1, 2).float() / 255
    return (pixels - torch.tensor(TRANSFORM.mean).view(3, 1, 1)) / torch.tensor(TRANSFORM.std).view(3, 1, 1)


@pytest.mark.parametrize("batch", [2, 5, 11, 22, 256])
def test_forward_gives_a_row_per_id_in_their_order_from_whole_images(world, monkeypatch, batch):
    monkeypatch.setattr(evaluation, "BATCH", batch)
    split, network, loader = world
    ids = np.random.default_rng(1).permutation(23)
    out = forward(Folded(network, torch.float32, 256), loader, ids)
    with torch.no_grad():
        wanted = network.eval()(whole_images(split, ids))
    torch.testing.assert_close(out.features, wanted.features, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out.logits, wanted.logits, rtol=1e-4, atol=1e-5)


def test_forward_leaves_the_network_as_it_was_and_returns_float32(world):
    _, network, loader = world
    network.train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    out = forward(Folded(network, torch.float32, 256), loader, np.arange(23))
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert network.training
    assert (out.features.dtype, out.logits.dtype) == (torch.float32, torch.float32)
    assert not out.logits.requires_grad


def test_forward_follows_the_weights_that_the_network_has_now(world):
    _, network, loader = world
    frozen = Folded(network, torch.float32, 256)
    forward(frozen, loader, np.arange(5))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(0.5)
    moved = forward(frozen, loader, np.arange(5))
    torch.testing.assert_close(moved, forward(Folded(network, torch.float32, 256), loader, np.arange(5)))


@pytest.mark.parametrize(("batch", "count"), [(5, 23), (11, 22), (256, 23), (7, 1)])
@pytest.mark.parametrize("head", ["linear", "cosine"])
def test_forward_is_its_batches_one_after_the_other_with_logits_or_without(world, monkeypatch, batch, count, head):
    monkeypatch.setattr(evaluation, "BATCH", batch)
    _, _, loader = world
    frozen = Folded(build_network(ModelConfig("resnet8", head=head), 5, 0), torch.float32, batch)
    ids = np.random.default_rng(2).permutation(23)[:count]
    plan = sequential_plan(ids, TRANSFORM, batch)
    apart = [frozen(one.images) for one in loader.batches(plan)]
    out, features = (forward(frozen, loader, ids, keeps_logits=keeps) for keeps in (True, False))
    assert torch.equal(out.features, torch.cat([one.features for one in apart]))
    assert torch.equal(out.logits, torch.cat([one.scaled_logits for one in apart]))
    assert torch.equal(features.features, out.features)
    assert features.logits.shape == (count, 0)
