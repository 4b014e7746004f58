"""Exemplars with learned pixels: both losses and their gradients against loops in float64 written from the description,
turns, updates, bytes, and a signal that comes while pixels are learned."""

import math
import os
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_published import method_of
from test_runs import METHODS, SHORT
from torch import nn

from fastil.data import Batch
from fastil.errors import UserError
from fastil.methods import FeatureExtractor, MemoryContext
from fastil.methods.mnemonics import Exemplars
from fastil.models import Output
from fastil.models.heads import CosineHead
from fastil.recipe_file import load
from fastil.training.experiment import Experiment
from fastil.training.trainer import Stopped

pytestmark = pytest.mark.usefixtures("without_figures")

D, SIDE, OLD, SEEN = 4, 2, 3, 5
POSITIONS = np.repeat(np.arange(SEEN), [3, 2, 4, 3, 2])  # old classes first, best exemplars first
RANKS = np.array([0, 1, 2, 0, 1, 0, 1, 2, 3, 0, 1, 2, 0, 1])
LABELS = [4, 0, 3, 3, 2, 4, 3]
RATE = 0.7  # of the inner step


def random(seed, *shape):
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape))


class Small(nn.Module):
    """A matrix and a tanh under a cosine head, in float64."""

    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(0.5 * random(1, 3 * SIDE**2, D))
        self.head = CosineHead(D, 8).double()
        self.head.formula = True
        self.head.weight.data.copy_(random(2, 8, D))
        self.head.scale.data.fill_(2.3)

    def forward(self, images):
        features = torch.tanh(images.flatten(1) @ self.matrix)
        return Output(features, [], *self.head(features))


def features_of(pixels):
    """The features of Small, in numpy."""
    return np.tanh(pixels.reshape(len(pixels), -1) @ SMALL.matrix.detach().numpy())


SMALL = Small()
WEIGHT, SCALE = SMALL.head.weight.detach().numpy()[:SEEN], 2.3
BATCH = Batch(random(3, len(LABELS), 3, SIDE, SIDE), torch.tensor(LABELS), torch.arange(len(LABELS)))
UPRIGHT, MIRRORED = 3 * random(4, 9, D), 0.2 * random(5, 9, D)  # features of the old exemplars, by another network


def memory_of(pixels, training=None):
    loader = SimpleNamespace(
        device="cpu", whole=lambda ids: pixels.clone(), mean=torch.full((3,), 0.4), std=torch.full((3,), 0.2)
    )
    extractor = FeatureExtractor(
        lambda ids, mirrored: Output((MIRRORED if mirrored else UPRIGHT)[ids], [], None), lambda p: None
    )
    return MemoryContext(np.arange(len(POSITIONS)), POSITIONS, extractor, loader, training)


@pytest.fixture
def exemplars():
    return Exemplars(SMALL, memory_of(random(6, len(POSITIONS), 3, SIDE, SIDE)), OLD)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def cross_entropy(scores, labels):
    return np.mean([math.log(np.exp(row).sum()) - row[y] for row, y in zip(scores, labels, strict=True)])


def differences(function, pixels, step=1e-5):
    """The gradient of a function of an array, by central differences."""
    gradient = np.zeros_like(pixels)
    for place in np.ndindex(pixels.shape):
        moved = [pixels.copy(), pixels.copy()]
        moved[0][place] += step
        moved[1][place] -= step
        gradient[place] = (function(moved[0]) - function(moved[1])) / (2 * step)
    return gradient


def check(exemplars, loss, wanted):
    """Value and gradient; wanted: (pixels that move, pixels of those that validate) to a number."""
    (gradient,) = torch.autograd.grad(loss, exemplars.pixels)
    pixels = exemplars.pixels.detach().numpy().copy()
    assert float(loss.detach()) == pytest.approx(wanted(pixels, pixels), rel=1e-12)
    found = differences(lambda moved: wanted(moved, pixels), pixels)
    np.testing.assert_allclose(gradient.numpy(), found, rtol=1e-6, atol=1e-9)
    return gradient.flatten(1).any(1)


def test_the_released_loss_is_a_softmax_over_cosines_with_class_means(exemplars):
    """Old means as the nearest-mean classifier has them, new ones means of features that are not normalised."""

    def wanted(pixels, _):
        old = [sum(unit(f.numpy()[POSITIONS[:9] == c]).sum(0) for f in (UPRIGHT, MIRRORED)) for c in range(OLD)]
        new = [features_of(pixels[c == POSITIONS]).mean(0) for c in range(OLD, SEEN)]
        return cross_entropy(unit(features_of(BATCH.images.numpy())) @ unit(np.stack(old + new)).T, LABELS)

    moved = check(exemplars, exemplars.class_mean_loss(BATCH, math.nan), wanted)
    assert moved.tolist() == (POSITIONS >= OLD).tolist()


def after_a_step(train, aims, images, labels):
    """Cross-entropy after w <- w - RATE dL/dw, where L is that of softmax(SCALE cos(train, w)), w all rows seen."""
    f, w = unit(train), unit(WEIGHT)
    z = SCALE * f @ w.T
    error = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    error[np.arange(len(z)), aims] -= 1
    gradient = np.zeros_like(WEIGHT)
    for i, k in np.ndindex(z.shape):  # the derivative of a cosine in the vector that is normalised
        gradient[k] += error[i, k] * SCALE * (f[i] - (f[i] @ w[k]) * w[k]) / np.linalg.norm(WEIGHT[k]) / len(z)
    return cross_entropy(SCALE * unit(images) @ unit(WEIGHT - RATE * gradient).T, labels)


def test_the_inner_step_is_one_of_sgd_on_the_head_alone(exemplars):
    images, labels = random(8, 6, D), [0, 1, 2, 3, 4, 4]
    train, aims = random(7, 5, D), [4, 2, 2, 0, 1]
    found = exemplars.after_a_step(train, torch.tensor(aims), images, torch.tensor(labels), RATE)
    plain = exemplars.after_a_step(train, torch.tensor(aims), images, torch.tensor(labels), 0.0)
    assert float(found.detach()) == pytest.approx(after_a_step(train.numpy(), aims, images.numpy(), labels), rel=1e-12)
    assert float(plain.detach()) == pytest.approx(
        cross_entropy(SCALE * unit(images.numpy()) @ unit(WEIGHT).T, labels), rel=1e-12
    )


def bilevel(chosen, labels):
    """New exemplars are validated by the new images, old ones of even and of odd rank by each other."""
    of_new = np.array(labels) >= OLD

    def wanted(pixels, standing):
        train, held, images = features_of(pixels), features_of(standing), features_of(BATCH.images.numpy())
        new, a, b = (
            [i for i in chosen if half(POSITIONS[i] < OLD, RANKS[i] % 2)]
            for half in (lambda old, odd: not old, lambda old, odd: old and not odd, lambda old, odd: old and odd)
        )
        loss = 0.0
        if new and of_new.any():
            loss += after_a_step(train[new], POSITIONS[new], images[of_new], np.array(labels)[of_new])
        if a and b:
            loss += after_a_step(train[a], POSITIONS[a], held[b], POSITIONS[b])
            loss += after_a_step(train[b], POSITIONS[b], held[a], POSITIONS[a])
        return loss

    return wanted


def test_the_papers_loss_validates_new_exemplars_on_images_and_halves_of_the_old_on_each_other(exemplars):
    """Batches of seven of the 14 exemplars; each moves those that have their turn."""
    order = sorted(range(len(POSITIONS)), key=lambda i: (RANKS[i], POSITIONS[i]))
    for batch in range(3):
        chosen = [order[(7 * batch + i) % 14] for i in range(7)]
        moved = check(exemplars, exemplars.bilevel_loss(BATCH, RATE), bilevel(chosen, LABELS))
        assert set(np.flatnonzero(moved)) <= set(chosen)
    everything = Batch(*(torch.cat(3 * [part]) for part in BATCH[:3]))  # more images than exemplars: each once
    exemplars.bilevel_loss(everything, RATE)
    assert exemplars.turn == 21 + 14


def test_a_batch_without_new_images_leaves_the_new_exemplars_alone(exemplars):
    labels = [0, 1, 2, 2, 1, 0, 0]
    order = sorted(range(len(POSITIONS)), key=lambda i: (RANKS[i], POSITIONS[i]))
    loss = exemplars.bilevel_loss(BATCH._replace(labels=torch.tensor(labels)), RATE)
    moved = check(exemplars, loss, bilevel(order[:7], labels))
    assert moved.any()
    assert not moved[POSITIONS >= OLD].any()


def test_a_turn_that_nothing_validates_costs_nothing(exemplars):
    """Two exemplars of the first rank and of old classes: no other half, no new exemplar."""
    loss = exemplars.bilevel_loss(Batch(*(part[:2] for part in BATCH[:3])), RATE)
    (gradient,) = torch.autograd.grad(loss, exemplars.pixels)
    assert loss == 0
    assert not gradient.any()


@pytest.mark.parametrize("size", [3, 5, 8])
def test_turns_visit_every_class_equally_and_every_exemplar_once_a_round(size, monkeypatch):
    """Four exemplars of each of five classes, in batches of any size."""
    monkeypatch.setattr(f"{__name__}.POSITIONS", np.repeat(np.arange(SEEN), 4))
    exemplars, visits = Exemplars(SMALL, memory_of(random(6, 20, 3, SIDE, SIDE)), 0), []
    monkeypatch.setattr(exemplars, "features", lambda chosen: (visits.extend(chosen.tolist()), random(7, size, D))[1])
    batch = Batch(*(torch.cat(2 * [part])[:size] for part in BATCH[:3]))
    for _ in range(40):
        exemplars.bilevel_loss(batch, RATE)
    for start in range(0, len(visits) - 19, 20):
        assert sorted(visits[start : start + 20]) == list(range(20))
    classes = [POSITIONS[i] for i in visits]
    for start in range(0, len(visits) - 4, 5):
        assert sorted(classes[start : start + 5]) == list(range(5))


def test_pixels_move_by_sgd_with_momentum_and_decay_in_their_turn_only(exemplars):
    pixels = exemplars.pixels.detach().numpy().copy()
    velocity = np.zeros_like(pixels)
    for step, lr in enumerate((0.3, 0.3, 0.1)):
        gradient = random(20 + step, *pixels.shape)
        waiting = (np.arange(len(pixels)) + step) % 3 == 0
        gradient[waiting] = 0
        exemplars.move(gradient, lr, 0.01)
        for i in np.flatnonzero(~waiting):
            velocity[i] = 0.9 * velocity[i] + gradient[i].numpy() + 0.01 * pixels[i]
            pixels[i] -= lr * velocity[i]
        np.testing.assert_allclose(exemplars.pixels.detach().numpy(), pixels, rtol=1e-12)
    before = exemplars.pixels.detach().clone()
    for decay in (0.0, 0.5):  # whatever the momentum is
        exemplars.move(torch.zeros_like(before), 0.3, decay)
        assert torch.equal(exemplars.pixels, before)


def test_decay_fades_pixels_towards_the_mean_colour(exemplars):
    start, factor, velocity = exemplars.pixels.detach().clone(), 1.0, 0.0
    for _ in range(50):
        exemplars.move(torch.full_like(start, 1e-30), 0.5, 5e-4)
        velocity = 0.9 * velocity + 5e-4 * factor
        factor -= 0.5 * velocity
    assert factor < 0.95
    torch.testing.assert_close(exemplars.pixels.detach(), factor * start, rtol=1e-9, atol=0)


def test_the_rate_is_halved_every_so_many_epochs(monkeypatch):
    method = method_of(
        "mnemonics", "mnemonics_epochs=5", "mnemonics_halving=2", "mnemonics_lr=0.8", "mnemonics_decay=0.25",
        "mnemonics_inner_lr=0.6", num_old=OLD,
    )  # fmt: skip
    moves, steps, epochs = [], [], []
    bilevel_loss = Exemplars.bilevel_loss
    monkeypatch.setattr(Exemplars, "move", lambda self, gradient, lr, decay: moves.append((lr, decay)))
    monkeypatch.setattr(Exemplars, "bilevel_loss", lambda self, b, lr: (steps.append(lr), bilevel_loss(self, b, lr))[1])
    memory = memory_of(random(6, 14, 3, SIDE, SIDE), lambda epoch: (epochs.append(epoch), [BATCH] * 3)[1])
    changed = method.after_memory(SMALL, memory)
    assert epochs == [0, 1, 2, 3, 4]
    assert moves == [(lr, 0.25) for lr in (0.8, 0.8, 0.4, 0.4, 0.2) for _ in range(3)]
    assert steps == [0.6] * 15
    assert changed["ids"].tolist() == list(range(14))
    assert changed["images"].shape == (14, SIDE, SIDE, 3)


def exemplars_of(pixels, mean, std):
    """With these normalised pixels [3, h, w] for every exemplar."""
    found = Exemplars(SMALL, memory_of(random(6, len(POSITIONS), 3, SIDE, SIDE)), OLD)
    found.pixels = pixels.repeat(len(POSITIONS), 1, 1, 1)
    found.loader.mean, found.loader.std = mean, std
    return found


def test_pixels_become_bytes_by_rounding_and_clipping():
    values = torch.tensor([[-40.0, -0.6, -0.4, 0.4], [0.6, 99.4, 127.5, 99.6], [254.4, 254.6, 255.4, 300.0]])
    wanted = [[0, 0, 0, 0], [1, 99, 128, 100], [254, 255, 255, 255]]
    mean, std = torch.tensor([0.2, 0.5, 0.3]), torch.tensor([0.5, 0.25, 2.0])
    pixels = (values / 255 - mean[:, None]) / std[:, None]
    found = exemplars_of(pixels.view(3, SIDE, SIDE), mean, std).as_bytes()
    assert (found.dtype, found.is_contiguous()) == (torch.uint8, True)
    for image in found:
        assert image.permute(2, 0, 1).flatten(1).tolist() == wanted


def test_every_byte_comes_back_as_it_was():
    values = torch.arange(256).repeat(3, 1).view(3, 16, 16)
    mean, std = torch.tensor([0.4914, 0.4822, 0.305]), torch.tensor([0.2023, 0.1994, 0.376])
    pixels = (values.float() / 255 - mean[:, None, None]) / std[:, None, None]
    assert torch.equal(exemplars_of(pixels, mean, std).as_bytes()[0].permute(2, 0, 1), values.byte())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_pixels_that_are_not_finite_are_one_clear_line(exemplars, value):
    with torch.no_grad():
        exemplars.pixels[3, 1, 0, 1] = value
    with pytest.raises(UserError, match="lower mnemonics_lr"):
        exemplars.as_bytes()


RUN = [
    *SHORT, "increment=4", "base_epochs=3", "epochs=2", "batch_size=32", "lr=0.03", *METHODS["mnemonics"],
    "mnemonics_epochs=2",
]  # fmt: skip


def experiment_of(out, resume=False):
    return Experiment(load("digits", RUN), out, resume)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run, what its last step gave the method to learn exemplars with, and the images that each bar counted."""
    experiment, given, counted = experiment_of(tmp_path_factory.mktemp("mnemonics") / "run"), [], []
    after_memory, progress = experiment.method.after_memory, experiment.progress
    begin, tick = progress.begin_phase, experiment.trainer.tick
    experiment.method.after_memory = lambda *a: (given.append(a), after_memory(*a))[1]
    progress.begin_phase = lambda step, phase, *a: (counted.append([(step, phase), 0]), begin(step, phase, *a))[1]
    experiment.trainer.tick = lambda images: (counted[-1].__setitem__(1, counted[-1][1] + images), tick(images))[1]
    return experiment, experiment.run(), given[-1], dict(counted)


def test_the_exemplars_stage_visits_what_the_plan_says(finished):
    experiment, _, _, counted = finished
    for step, plan in enumerate(experiment.steps):
        assert counted[step, "memory"] == plan.memory_visits == 2 * plan.visits // plan.epochs


@pytest.mark.parametrize("moving", ["new", "even", "odd", "released"])
def test_an_epoch_lowers_the_outer_loss_where_what_validates_stands_still(finished, moving, monkeypatch):
    """On a trained network and the same batches. (If both halves of the old exemplars move, each hardens what validates
    the other, and their two losses may rise.)"""
    experiment, _, (network, memory), _ = finished
    memory.loader.images[memory.ids] = torch.from_numpy(experiment.dataset.train.images[memory.ids])  # as at first
    exemplars, batches, parts = Exemplars(network, memory, 6), list(memory.training(0)), []
    new, even = exemplars.positions >= 6, exemplars.rank % 2 == 0
    part, of = {"new": (0, new), "even": (1, ~new & even), "odd": (2, ~new & ~even), "released": (0, new)}[moving]
    after_a_step = Exemplars.after_a_step
    monkeypatch.setattr(Exemplars, "after_a_step", lambda *a: (parts.append(after_a_step(*a)), parts[-1])[1])
    name, lr, bound = ("class_mean_loss", 10.0, 0.99) if moving == "released" else ("bilevel_loss", 50.0, 0.97)

    def epoch(learn):
        """The mean of the loss that the moving ones lower."""
        exemplars.turn, found = 0, []
        for batch in batches:
            parts.clear()
            loss = getattr(exemplars, name)(batch, 1.0)
            if moving == "released" or len(parts) == 3:
                found.append(float((loss if moving == "released" else parts[part]).detach()))
            if learn:
                (gradient,) = torch.autograd.grad(loss, exemplars.pixels)
                exemplars.move(gradient * of[:, None, None, None], lr, 0.0)
        assert len(found) > 5
        return np.mean(found)

    before = epoch(learn=False)
    epoch(learn=True)
    assert epoch(learn=False) < bound * before


def test_a_signal_while_pixels_are_learned_stops_at_the_next_batch_and_resume_ends_the_same(
    finished, tmp_path, monkeypatch
):
    """A real one, at the third update of the last step's exemplars."""
    whole, results, _, _ = finished
    experiment, moves, move = experiment_of(tmp_path / "run"), [], Exemplars.move

    def interrupted(exemplars, *arguments):
        move(exemplars, *arguments)
        moves.append(experiment.step)
        if moves.count(1) == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Exemplars, "move", interrupted)
    with pytest.raises(Stopped):
        experiment.run()
    assert moves.count(1) == 3
    assert experiment.interrupt.number == signal.SIGTERM
    monkeypatch.undo()
    assert experiment_of(tmp_path / "run", resume=True).run() == results
    for file in ("results.json", "metrics.jsonl", "memory/step_1.json"):
        assert (tmp_path / "run" / file).read_bytes() == (whole.directory.path / file).read_bytes()
    ours, theirs = (
        torch.load(out / "checkpoints/last.pt", weights_only=True)["overlay"]
        for out in (tmp_path / "run", whole.directory.path)
    )
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
