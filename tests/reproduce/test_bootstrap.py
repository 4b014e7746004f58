"""The bootstrap against a loop over single images, and its coverage on data whose truth is known."""

import numpy as np
import pytest

from fastil.reproduce.bootstrap import average_accuracy, paired_interval


def a_run(random, classes_per_step=(3, 5, 6), images=8, skill=0.6):
    """Predictions of a run over its steps: an image of a class keeps its place."""
    steps = []
    for classes in classes_per_step:
        true = np.sort(np.tile(np.arange(classes), images))
        right = random.random(len(true)) < skill
        steps.append(np.stack((true, np.where(right, true, (true + 1) % classes)), axis=1).astype(np.int16))
    return steps


def brute_force(ours, theirs, replicates, random):
    """Draw images within classes one by one, then seeds, and count hits image by image."""
    found = []
    for _ in range(replicates):
        of_seeds = []
        last = ours[0][-1][:, 0]
        drawn = {c: random.integers((last == c).sum(), size=(last == c).sum()) for c in np.unique(last)}
        for s in random.integers(len(ours), size=len(ours)):
            accuracies = []
            for run in (ours[s], theirs[s]):
                of_steps = []
                for step in run:
                    hits = []
                    for c in np.unique(step[:, 0]):
                        rows = step[step[:, 0] == c]
                        hits += [float(rows[i, 0] == rows[i, 1]) for i in drawn[c]]
                    of_steps.append(100 * np.mean(hits))
                accuracies.append(np.mean(of_steps))
            of_seeds.append(accuracies[0] - accuracies[1])
        found.append(np.mean(of_seeds))
    return np.quantile(found, [0.025, 0.975])


@pytest.mark.parametrize("seeds", [1, 2, 3])
def test_the_interval_is_that_of_a_loop_over_images(seeds):
    random = np.random.default_rng(1)
    ours = [a_run(random, skill=0.7) for _ in range(seeds)]
    theirs = [a_run(random, skill=0.5) for _ in range(seeds)]
    wanted = brute_force(ours, theirs, 1_500, random)
    found = paired_interval(ours, theirs)
    width = wanted[1] - wanted[0]
    np.testing.assert_allclose(found, wanted, atol=0.08 * width)


def test_a_run_beside_itself_has_no_width_and_the_mean_is_inside():
    random = np.random.default_rng(2)
    runs = [a_run(random) for _ in range(2)]
    assert paired_interval(runs, runs) == (0, 0)
    others = [a_run(random) for _ in range(2)]
    low, high = paired_interval(runs, others)
    gain = np.mean([average_accuracy(a) - average_accuracy(b) for a, b in zip(runs, others, strict=True)])
    assert low < gain < high
    assert paired_interval(others, runs) == pytest.approx((-high, -low), abs=0.3 * (high - low))


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    """One seed, images independent of each other: 95 % intervals of a true difference of 10 points."""
    random = np.random.default_rng(3)
    covered = 0
    for trial in range(120):
        ours, theirs = a_run(random, (10,), 20, 0.6), a_run(random, (10,), 20, 0.5)
        low, high = paired_interval([ours], [theirs], seed=trial)
        covered += low <= 10 <= high
    assert 0.87 <= covered / 120 <= 1


def test_images_that_are_hard_for_every_seed_do_not_average_out():
    """Three seeds on one test set, of whose images some gain by 40 points and others lose by 20, whatever the seed."""
    random, covered, trials = np.random.default_rng(5), 0, 120
    true = np.repeat(np.arange(10), 20)

    def run(chances):
        right = random.random(len(true)) < chances
        return [np.stack((true, np.where(right, true, (true + 1) % 10)), axis=1)]

    for trial in range(trials):
        gains = random.random(len(true)) < 0.5
        ours = [run(np.where(gains, 0.9, 0.3)) for _ in range(3)]
        theirs = [run(np.full(len(true), 0.5)) for _ in range(3)]
        low, high = paired_interval(ours, theirs, seed=trial)
        covered += low <= 10 <= high
    assert covered / trials >= 0.92


def test_runs_on_other_images_are_refused():
    random = np.random.default_rng(4)
    with pytest.raises(ValueError, match="same images"):
        paired_interval([a_run(random)], [a_run(random, images=9)])
    with pytest.raises(ValueError, match="same images"):
        paired_interval([a_run(random), a_run(random, images=9)], [a_run(random), a_run(random, images=9)])


def test_average_accuracy_is_the_mean_of_the_steps():
    steps = [np.array([[0, 0], [1, 0]]), np.array([[0, 0], [1, 1], [2, 0], [2, 2]])]
    assert average_accuracy(steps) == pytest.approx((50 + 75) / 2)
