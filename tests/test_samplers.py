"""Samplers, held-out images and cycled batches: frequencies by chi-squared tests, contents by brute force."""

import numpy as np
import pytest
from scipy import stats

from fastil.memory import hold_out
from fastil.plan import Key, SamplerConfig, Transform, cycled_plan, draw, sequential_plan, training_plan

TRANSFORM = Transform(8, 8, pad=2, flip=True, mean=(0.5,) * 3, std=(0.25,) * 3)
NUM_OLD = 4
POSITIONS = np.repeat(np.arange(7), [3, 5, 2, 4, 40, 31, 50])  # four old classes with few exemplars, three new ones
IDS = np.random.default_rng(0).permutation(1000)[: len(POSITIONS)]


def visits(sampler: str, epochs: int) -> np.ndarray:
    """How often each image was drawn."""
    probabilities = SamplerConfig(sampler).probabilities(POSITIONS, NUM_OLD)
    counts = np.zeros(len(IDS))
    for epoch in range(epochs):
        drawn = draw(IDS, probabilities, Key(0, 1, "train", epoch))
        assert len(drawn) == len(IDS)
        for row in drawn:
            counts[np.flatnonzero(row == IDS)[0]] += 1
    return counts


@pytest.mark.parametrize("sampler", ["memory_oversampling", "class_oversampling"])
def test_images_are_drawn_as_often_as_the_paper_says(sampler):
    """Section 4.3.3. Memory: "the same number of sample from new and old classes"; class: "each class has the same
    probability of appearing"; within a group all images alike."""
    wanted = np.zeros(len(IDS))
    old = POSITIONS < NUM_OLD
    for row, position in enumerate(POSITIONS):
        if sampler == "memory_oversampling":
            wanted[row] = 0.5 / (old.sum() if old[row] else (~old).sum())
        else:
            wanted[row] = 1 / 7 / (position == POSITIONS).sum()
    probabilities = SamplerConfig(sampler).probabilities(POSITIONS, NUM_OLD)
    np.testing.assert_allclose(probabilities, wanted, rtol=1e-12)
    counts = visits(sampler, 400)
    assert stats.chisquare(counts, wanted * counts.sum()).pvalue > 0.01
    uniform = np.full(len(IDS), counts.sum() / len(IDS))
    assert stats.chisquare(counts, uniform).pvalue < 1e-9  # the test can fail


def test_uniform_and_the_base_step_visit_every_image_once():
    assert SamplerConfig("uniform").probabilities(POSITIONS, NUM_OLD) is None
    for sampler in ("memory_oversampling", "class_oversampling"):
        assert SamplerConfig(sampler).probabilities(POSITIONS, 0) is None


def test_an_exemplar_drawn_again_is_cropped_anew():
    probabilities = SamplerConfig("class_oversampling").probabilities(POSITIONS, NUM_OLD)
    drawn = draw(IDS, probabilities, Key(0, 1))
    plan = training_plan(drawn, Key(0, 1), TRANSFORM, 16)
    assert sorted(plan.ids) == sorted(drawn)
    often = [i for i in np.unique(plan.ids) if (plan.ids == i).sum() >= 4]
    assert often
    for i in often:
        assert len({tuple(box) for box in plan.boxes[plan.ids == i]}) > 1


def test_epochs_and_seeds_draw_apart_and_a_resume_draws_the_same():
    probabilities = SamplerConfig("memory_oversampling").probabilities(POSITIONS, NUM_OLD)
    first = draw(IDS, probabilities, Key(0, 1, "train", 0))
    assert np.array_equal(first, draw(IDS, probabilities, Key(0, 1, "train", 0)))
    for other in (Key(0, 1, "train", 1), Key(1, 1, "train", 0), Key(0, 2, "train", 0)):
        assert not np.array_equal(first, draw(IDS, probabilities, other))


@pytest.mark.parametrize("per_class", [1, 2])
def test_held_out_images_are_balanced_and_leave_training(per_class):
    stay, held = hold_out(IDS, POSITIONS, per_class, Key(0, 1, "meta"))
    position_of = dict(zip(IDS.tolist(), POSITIONS.tolist(), strict=True))
    assert np.bincount([position_of[i] for i in held.tolist()]).tolist() == [per_class] * 7
    assert set(stay) | set(held) == set(IDS)
    assert len(stay) + len(held) == len(IDS)
    assert stay.tolist() == [i for i in IDS.tolist() if i not in set(held.tolist())]


def test_every_image_is_held_out_as_often():
    counts = dict.fromkeys(IDS.tolist(), 0)
    for seed in range(600):
        for i in hold_out(IDS, POSITIONS, 2, Key(seed, 1, "meta"))[1].tolist():
            counts[i] += 1
    for position in range(7):
        of_class = [counts[i] for i in IDS[position == POSITIONS].tolist()]
        assert sum(of_class) == 1200
        assert len(set(of_class)) == 1 or stats.chisquare(of_class).pvalue > 1e-3


@pytest.mark.parametrize("count", [3, 16, 23, 70])
def test_a_cycled_plan_is_a_piece_of_one_endless_stream(count):
    ids, key = IDS[:count], Key(0, 2, "meta")
    passes = [training_plan(ids, key._replace(epoch=p), TRANSFORM, 16) for p in range(200 // count + 2)]
    for stream in passes:
        assert sorted(stream.ids) == sorted(ids)
    endless = np.concatenate([stream.ids for stream in passes])
    boxes = np.concatenate([stream.boxes for stream in passes])
    for first, number in [(0, 1), (0, 5), (1, 2), (3, 4), (7, 5)]:
        plan = cycled_plan(ids, key, TRANSFORM, 16, first, number)
        assert [s.stop - s.start for s in plan.batches()] == [16] * number
        assert np.array_equal(plan.ids, endless[16 * first : 16 * (first + number)])
        assert np.array_equal(plan.boxes, boxes[16 * first : 16 * (first + number)])
    assert not np.array_equal(passes[0].ids, passes[1].ids)


def test_a_mirrored_plan_mirrors_everything():
    plan = sequential_plan(IDS, TRANSFORM, 16, mirrored=True)
    assert plan.flips.all()
    assert not sequential_plan(IDS, TRANSFORM, 16).flips.any()
