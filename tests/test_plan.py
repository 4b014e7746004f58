"""What an epoch visits: every random decision is a counter, so nothing but the counter may change it."""

import dataclasses
import math
import threading
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastil.plan import (
    PHASES,
    STREAMS,
    EpochPlan,
    Key,
    Transform,
    counter_hash,
    drawn_ahead,
    occurrences,
    sequential_plan,
    training_plan,
)

PAD = 4
TRANSFORM = Transform(32, 24, pad=PAD, flip=True, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
KEY = Key(seed=1, step=2, phase="train", epoch=3)
# Quantiles 0.999 of the chi-square distribution, from any table, by degrees of freedom.
CHI_SQUARE_999 = {1: 10.83, 8: 26.12, 9: 27.88, 16: 39.25, 64: 104.72, 80: 124.84}
checked = settings(deadline=None, database=None, derandomize=True, max_examples=60)


def transform(**changes):
    return Transform(**(TRANSFORM.__dict__ | changes))


def plan_of(ids, key=KEY, to=TRANSFORM, batch_size=16):
    return training_plan(np.asarray(ids, dtype=np.int64), key, to, batch_size)


def same(a, b):
    return all(np.array_equal(getattr(a, part), getattr(b, part)) for part in ("ids", "boxes", "flips"))


def views(plan):
    """(top, left, flip) of every visit, by id."""
    seen = {}
    for sample, box, flip in zip(plan.ids.tolist(), plan.boxes.tolist(), plan.flips.tolist(), strict=True):
        seen.setdefault(sample, Counter())[(box[0], box[1], flip)] += 1
    return seen


def chi_square(counts, expected):
    return float((((np.asarray(counts) - expected) ** 2) / expected).sum())


def test_the_same_key_gives_the_same_plan():
    assert same(plan_of(range(100)), plan_of(range(100)))


@pytest.mark.parametrize("change", [{"seed": 2}, {"step": 3}, {"phase": "correct"}, {"epoch": 4}, {"seed": 2**40}])
def test_any_change_of_the_key_changes_order_crops_and_flips(change):
    a, b = plan_of(range(200)), plan_of(range(200), KEY._replace(**change))
    assert not np.array_equal(a.ids, b.ids)
    by_id = [{sample: next(iter(seen)) for sample, seen in views(plan).items()} for plan in (a, b)]
    for part, chance in ((0, 1 / 9), (1, 1 / 9), (2, 1 / 2)):
        equal = sum(by_id[0][i][part] == by_id[1][i][part] for i in range(200)) / 200
        assert abs(equal - chance) < 0.15  # as often as chance would have it, not always


def test_words_of_the_key_do_not_stand_in_for_each_other():
    keys = [Key(0, 0, "train", 1), Key(0, 1, "train", 0), Key(1, 0, "train", 0), Key(0, 0, "correct", 0)]
    orders = {tuple(plan_of(range(50), key).ids.tolist()) for key in keys}
    assert len(orders) == len(keys)


def test_an_unknown_phase_is_an_error():
    with pytest.raises(ValueError, match="tuple"):
        plan_of(range(4), Key(0, 0, "tune", 0))


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=40, unique=True), st.randoms(use_true_random=False))
@checked
def test_for_unique_ids_the_plan_does_not_depend_on_their_order_in_the_list(ids, random):
    shuffled = ids[:]
    random.shuffle(shuffled)
    assert same(plan_of(ids), plan_of(shuffled))


@given(
    st.lists(st.integers(0, 50), min_size=1, max_size=40, unique=True),
    st.lists(st.integers(51, 99), max_size=40),
    st.integers(2, 64),
)
@checked
def test_crop_and_flip_of_a_sample_do_not_depend_on_its_company(ids, others, batch_size):
    alone, among = views(plan_of(ids)), views(plan_of(others + ids, batch_size=batch_size))
    assert {sample: among[sample] for sample in ids} == alone


@given(st.integers(1, 12), st.integers(1, 12))
@checked
def test_the_views_of_a_sample_listed_more_often_include_those_of_one_listed_less(few, more):
    few, more = sorted((few, more))
    a, b = views(plan_of([7] * few + [1, 2]))[7], views(plan_of([2] + [7] * more))[7]
    assert a <= b
    assert sum(b.values()) == more


def test_a_sample_listed_many_times_is_cropped_and_flipped_differently_each_time():
    seen = views(plan_of([5] * 300))[5]
    # 300 draws from 9 * 9 * 2 = 162 views leave about 162 * (1 - 1/162)^300 = 25 of them out.
    assert 110 < len(seen) <= 162
    assert max(seen.values()) < 12


def test_every_entry_is_visited_exactly_once():
    ids = [3, 3, 8, 1, 3, 8, 40]
    assert Counter(plan_of(ids).ids.tolist()) == Counter(ids)


def test_an_epoch_is_shuffled_and_epochs_differ():
    orders = [plan_of(range(50), KEY._replace(epoch=epoch)).ids.tolist() for epoch in range(20)]
    assert len({tuple(order) for order in orders}) == 20
    assert all(order != sorted(order) for order in orders)


def test_every_sample_comes_at_every_position_equally_often():
    firsts = [int(plan_of(range(10), KEY._replace(epoch=epoch)).ids[0]) for epoch in range(1000)]
    assert chi_square(np.bincount(firsts, minlength=10), 100) < CHI_SQUARE_999[9]


def test_offsets_are_uniform_and_independent_over_samples():
    plan = plan_of(range(40_500), Key(0, 0))
    offsets = plan.boxes[:, :2].astype(np.int64) + PAD
    assert offsets.min() == 0
    assert offsets.max() == 2 * PAD
    for column in (0, 1):
        assert chi_square(np.bincount(offsets[:, column], minlength=9), 4500) < CHI_SQUARE_999[8]
    joint = np.bincount(offsets[:, 0] * 9 + offsets[:, 1], minlength=81)
    assert chi_square(joint, 500) < CHI_SQUARE_999[80]


def test_offsets_and_flips_of_one_sample_are_fair_over_epochs():
    plans = [plan_of([17], KEY._replace(epoch=epoch)) for epoch in range(1800)]
    tops = [int(plan.boxes[0, 0]) + PAD for plan in plans]
    flips = [int(plan.flips[0]) for plan in plans]
    assert chi_square(np.bincount(tops, minlength=9), 200) < CHI_SQUARE_999[8]
    assert chi_square(np.bincount(flips, minlength=2), 900) < CHI_SQUARE_999[1]


def test_flips_are_fair_and_independent_of_crop_and_order():
    plan = plan_of(range(40_000), Key(0, 0))
    assert chi_square(np.bincount(plan.flips, minlength=2), 20_000) < CHI_SQUARE_999[1]
    flipped = plan.boxes[plan.flips, 0].astype(np.int64) + PAD
    assert chi_square(np.bincount(flipped, minlength=9), len(flipped) / 9) < CHI_SQUARE_999[8]
    along = plan.flips.reshape(16, 2500).sum(axis=1)  # position in the epoch tells nothing
    assert chi_square(along, 1250) + chi_square(2500 - along, 1250) < CHI_SQUARE_999[16]


def finalised(words):
    """SplitMix64's finaliser over the words of a counter, in whole numbers of any size."""
    state, wrapped = 0, (1 << 64) - 1
    for word in words:
        state = (state + word + 0x9E3779B97F4A7C15) & wrapped
        state = ((state ^ state >> 30) * 0xBF58476D1CE4E5B9) & wrapped
        state = ((state ^ state >> 27) * 0x94D049BB133111EB) & wrapped
        state ^= state >> 31
    return state


@pytest.mark.parametrize("count", [0, 1, 2, 33])
@pytest.mark.parametrize("key", [KEY, Key(0, 0), Key(-1, 7, "meta", 249), Key(2**63 - 1, 5, "evaluate", 2**40)])
def test_the_counter_is_hashed_word_by_word_for_every_sample(count, key):
    random = np.random.default_rng(count)
    ids, again = random.integers(0, 2**62, count), random.integers(0, 9, count) << 40
    for number, stream in enumerate(STREAMS):
        words = key.seed, key.step, PHASES.index(key.phase), key.epoch, number
        found = counter_hash(key, stream, ids, again)
        assert found.dtype == np.uint64
        assert found.tolist() == [finalised((*words, i, n)) for i, n in zip(ids.tolist(), again.tolist(), strict=True)]


def test_every_bit_of_the_counter_is_fair():
    draws = counter_hash(KEY, "order", np.arange(20_000), np.zeros(20_000, dtype=np.int64))
    assert draws.dtype == np.uint64
    assert len(np.unique(draws)) == 20_000
    bits = (draws[:, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)
    statistic = (bits.sum(axis=0) - 10_000.0) ** 2 / 5_000
    assert statistic.sum() < CHI_SQUARE_999[64]
    assert statistic.max() < 20  # no single bit: 64 draws of chi-square with one degree stay below by 0.9995


def test_without_pad_and_flip_training_sees_whole_images():
    plan = plan_of(range(30), to=transform(pad=0, flip=False))
    assert (plan.boxes == [0, 0, 32, 24]).all()
    assert not plan.flips.any()
    assert sorted(plan.ids.tolist()) == list(range(30))


def test_pad_and_flip_are_switches_of_their_own():
    both, crop, flip = (plan_of(range(60), to=transform(**c)) for c in ({}, {"flip": False}, {"pad": 0}))
    assert np.array_equal(crop.boxes, both.boxes)
    assert not crop.flips.any()
    assert np.array_equal(flip.flips, both.flips)
    assert (flip.boxes == [0, 0, 32, 24]).all()


def test_a_crop_has_the_size_of_the_image_and_every_part_its_type():
    plan = plan_of([4, 4, 9])
    assert (plan.ids.dtype, plan.boxes.dtype, plan.flips.dtype) == (np.int64, np.int32, np.bool_)
    assert plan.ids.shape == plan.flips.shape == (3,)
    assert plan.boxes.shape == (3, 4)
    assert (plan.boxes[:, 2:] == [32, 24]).all()


def test_a_training_plan_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="at least one sample"):
        plan_of([])


def test_the_list_given_is_not_changed():
    ids = np.arange(20)[::-1].copy()
    training_plan(ids, KEY, TRANSFORM, 4)
    assert ids.tolist() == list(range(19, -1, -1))


@pytest.mark.parametrize("ids", [[], [5], [9, 2, 2, 0]])
def test_a_sequential_plan_is_whole_images_in_the_order_given(ids):
    plan = sequential_plan(np.array(ids, dtype=np.int64), TRANSFORM, 3)
    assert plan.ids.tolist() == ids
    assert plan.boxes.tolist() == [[0, 0, 32, 24]] * len(ids)
    assert plan.flips.tolist() == [False] * len(ids)
    assert (plan.boxes.dtype, plan.flips.dtype, plan.batch_size) == (np.int32, np.bool_, 3)


@given(st.lists(st.integers(0, 6), max_size=60))
@checked
def test_occurrences_are_the_brute_force_count(ids):
    wanted = [ids[:position].count(sample) for position, sample in enumerate(ids)]
    counted = occurrences(np.array(ids, dtype=np.int64))
    assert counted.dtype == np.int64
    assert counted.tolist() == wanted


@pytest.mark.parametrize("batch_size", range(2, 10))
def test_batches_cover_every_entry_once_and_a_rest_of_one_joins_the_batch_before(batch_size):
    for count in range(1, 51):
        rows = list(range(count))
        wanted = [rows[start : start + batch_size] for start in range(0, count, batch_size)]
        if len(wanted) > 1 and len(wanted[-1]) == 1:
            wanted[-2:] = [wanted[-2] + wanted[-1]]
        plan = sequential_plan(np.arange(count), TRANSFORM, batch_size)
        assert [rows[part] for part in plan.batches()] == wanted


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
@pytest.mark.parametrize("count", [1, 2, 9, 10, 11, 30])
def test_ranks_share_every_batch_or_all_have_the_whole_of_a_small_one(count, ranks):
    plan = training_plan(np.arange(count), Key(0, 0), TRANSFORM, 5)
    shares = [plan.of_rank(rank, ranks) for rank in range(ranks)]
    batches = [list(plan.batches()), *(list(share.batches()) for share in shares)]
    for whole, *parts in zip(*batches, strict=True):
        visits = []
        for share, part in zip(shares, parts, strict=True):
            visits += zip(share.ids[part], map(tuple, share.boxes[part]), share.flips[part], strict=True)
        wanted = zip(plan.ids[whole], map(tuple, plan.boxes[whole]), plan.flips[whole], strict=True)
        small = whole.stop - whole.start < 2 * ranks  # somebody would get less than two images
        assert sorted(visits) == sorted((ranks if small else 1) * list(wanted))
        lengths = [part.stop - part.start for part in parts]
        assert max(lengths) - min(lengths) <= (0 if small else 1)


@pytest.mark.parametrize("ends", [None, [0, 7, 7, 10, 11, 40]])
def test_a_share_is_every_nth_visit_of_each_batch_in_order(ends):
    whole = training_plan(np.arange(40), Key(0, 0), TRANSFORM, 9)
    plan = dataclasses.replace(whole, ends=None if ends is None else np.array(ends))
    for ranks in (1, 2, 3, 5, 8):
        for rank in range(ranks):
            wanted, sizes = [], []
            for part in plan.batches():
                batch = plan.ids[part].tolist()
                mine = batch if len(batch) < 2 * ranks else batch[rank::ranks]
                wanted, sizes = wanted + mine, [*sizes, len(mine)]
            share = plan.of_rank(rank, ranks)
            assert (share.ids.tolist(), share.sizes().tolist()) == (wanted, sizes)
            visits = [whole.ids.tolist().index(sample) for sample in wanted]
            np.testing.assert_array_equal(share.boxes, whole.boxes[visits])
            np.testing.assert_array_equal(share.flips, whole.flips[visits])


def test_ranks_of_ranks_and_ranks_that_are_none():
    plan = sequential_plan(np.arange(24), TRANSFORM, 12)
    assert plan.of_rank(1, 2).of_rank(1, 3).ids.tolist() == [3, 9, 15, 21]
    for rank, ranks in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match="rank"):
            plan.of_rank(rank, ranks)


def test_a_plan_of_nothing_has_no_batches():
    assert list(sequential_plan(np.empty(0, dtype=np.int64), TRANSFORM, 4).batches()) == []


def test_a_batch_size_of_one_drops_nothing_or_is_refused():
    boxes, flips = np.zeros((5, 4), dtype=np.int32), np.zeros(5, dtype=np.bool_)
    try:
        batches = list(EpochPlan(np.arange(5), boxes, flips, 1).batches())
    except ValueError:
        return
    assert [row for part in batches for row in range(5)[part]] == [0, 1, 2, 3, 4]


# Random resized crops

RESIZED = Transform(224, 224, pad=0, flip=True, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), resized=True)


def torchvision_crop(height, width, draws):
    """torchvision's RandomResizedCrop.get_params, one image at a time. draws: four uniform numbers of a try."""
    area = height * width
    for attempt in range(10):
        u_area, u_ratio, u_top, u_left = draws(attempt)
        target = area * (0.08 + 0.92 * u_area)
        ratio = math.exp(math.log(3 / 4) + u_ratio * (math.log(4 / 3) - math.log(3 / 4)))
        w, h = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if 0 < w <= width and 0 < h <= height:
            return [int((height - h + 1) * u_top), int((width - w + 1) * u_left), h, w]
    if width / height < 3 / 4:
        w, h = width, round(width / (3 / 4))
    elif width / height > 4 / 3:
        w, h = round(height * (4 / 3)), height
    else:
        w, h = width, height
    return [(height - h) // 2, (width - w) // 2, h, w]


def test_resized_crops_are_torchvisions_for_the_same_draws():
    random = np.random.default_rng(0)
    sizes = np.concatenate([random.integers(1, 600, (300, 2)), [[1, 1], [1, 900], [900, 1], [3, 4], [40, 400]]])
    key = Key(3, 2, "train", 7)
    plan = training_plan(np.arange(len(sizes)), key, RESIZED, 16, sizes.astype(np.int32))
    tall = 0
    for i, box in zip(plan.ids, plan.boxes, strict=True):

        def draws(attempt, i=i):
            words = np.array([i]), np.array([attempt << 40])
            return [counter_hash(key, stream, *words)[0] / 2.0**64 for stream in ("area", "ratio", "top", "left")]

        assert box.tolist() == torchvision_crop(*sizes[i].tolist(), draws), i
        top, left, height, width = box
        assert top >= 0
        assert left >= 0
        assert top + height <= sizes[i][0]
        assert left + width <= sizes[i][1]
        tall += sizes[i].max() > 5 * sizes[i].min()
    assert tall > 20  # where tries fail


def test_resized_crops_have_even_areas_and_log_ratios_at_even_places():
    sizes = np.full((20_000, 2), 1000, dtype=np.int32)
    boxes = training_plan(np.arange(20_000), Key(0, 0), RESIZED, 16, sizes).boxes.astype(np.float64)
    area, ratio = boxes[:, 2] * boxes[:, 3] / 1e6, np.log(boxes[:, 3] / boxes[:, 2])
    small = area < 0.6  # of which every ratio fits
    counts = np.histogram(area[small], 8, (0.08, 0.6))[0]
    assert counts.min() > 0.85 * counts.mean()
    assert np.histogram(ratio[small], 8, (math.log(3 / 4), math.log(4 / 3)))[0].min() > 0.85 * small.sum() / 8
    for place, side in ((0, 2), (1, 3)):
        parts = np.histogram(boxes[small, place] / (1001 - boxes[small, side]), 8, (0, 1))[0]
        assert parts.min() > 0.85 * small.sum() / 8


def test_the_crop_of_a_sample_depends_on_itself_alone():
    sizes = np.random.default_rng(1).integers(20, 300, (50, 2)).astype(np.int32)
    whole = training_plan(np.arange(50), Key(5, 1), RESIZED, 8, sizes)
    some = training_plan(np.array([7, 30, 2]), Key(5, 1), RESIZED, 8, sizes)
    of_image = dict(zip(whole.ids.tolist(), whole.boxes.tolist(), strict=True))
    assert [of_image[i] for i in some.ids.tolist()] == some.boxes.tolist()


def test_a_sequential_plan_of_images_of_many_sizes_is_all_of_each():
    sizes = np.array([[3, 5], [7, 2], [4, 4]], dtype=np.int32)
    plan = sequential_plan(np.array([2, 0, 1, 0]), RESIZED, 2, sizes=sizes)
    assert plan.boxes.tolist() == [[0, 0, 4, 4], [0, 0, 3, 5], [0, 0, 7, 2], [0, 0, 3, 5]]


def test_plans_are_drawn_one_ahead_and_come_in_turn():
    drawn = []
    second = threading.Event()

    def plan(epoch):
        drawn.append(epoch)
        if epoch == 6:
            second.set()
        return f"plan {epoch}"

    with drawn_ahead(plan, range(5, 9)) as plans:
        assert next(plans) == "plan 5"
        assert second.wait(30)  # although nobody has asked for it
        assert drawn == [5, 6]
        assert list(plans) == ["plan 6", "plan 7", "plan 8"]
    assert drawn == [5, 6, 7, 8]
    with drawn_ahead(plan, range(3, 3)) as plans:
        assert list(plans) == []


def test_a_loop_that_stops_early_leaves_no_thread_and_an_error_reaches_it():
    def plan(epoch):
        if epoch == 2:
            raise ValueError("no images")
        return epoch

    before = threading.active_count()
    with drawn_ahead(plan, range(10)) as plans:
        assert next(plans) == 0
    assert threading.active_count() == before
    with drawn_ahead(plan, range(10)) as plans, pytest.raises(ValueError, match="no images"):
        list(plans)
    assert threading.active_count() == before
