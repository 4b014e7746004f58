"""Class orders, ImageNet-100 subsets and steps, against the published lists.

LUCIR's order is what its code draws; PODNet's option files list the same 100 classes. iCaRL's is PODNet's published
"order 1" for CIFAR-100. The subset of LUCIR is what `gen_imagenet_subset.py` and a second shuffle under seed 1993 give.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastil.data.published import table
from fastil.errors import UserError
from fastil.protocol import (
    Protocol,
    ProtocolConfig,
    build_protocol,
    class_order,
    imagenet_subset,
    numbering_note,
)

LUCIR_100 = [
    68, 56, 78, 8, 23, 84, 90, 65, 74, 76, 40, 89, 3, 92, 55, 9, 26, 80, 43, 38, 58, 70, 77, 1, 85, 19, 17, 50, 28, 53,
    13, 81, 45, 82, 6, 59, 83, 16, 15, 44, 91, 41, 72, 60, 79, 52, 20, 10, 31, 54, 37, 95, 14, 71, 96, 98, 97, 2, 64,
    66, 42, 22, 35, 86, 24, 34, 87, 21, 99, 0, 88, 27, 18, 94, 11, 12, 47, 25, 30, 46, 62, 69, 36, 61, 7, 63, 75, 5, 32,
    4, 51, 48, 73, 93, 39, 67, 29, 49, 57, 33,
]  # fmt: skip
ICARL_100 = [
    87, 0, 52, 58, 44, 91, 68, 97, 51, 15, 94, 92, 10, 72, 49, 78, 61, 14, 8, 86, 84, 96, 18, 24, 32, 45, 88, 11, 4, 67,
    69, 66, 77, 47, 79, 93, 29, 50, 57, 83, 17, 81, 41, 12, 37, 59, 25, 20, 80, 73, 1, 28, 6, 46, 62, 82, 53, 9, 31, 75,
    38, 63, 33, 74, 27, 22, 36, 3, 16, 21, 60, 19, 70, 90, 89, 43, 5, 42, 65, 76, 40, 30, 23, 85, 2, 95, 56, 48, 71, 64,
    98, 13, 99, 7, 34, 55, 54, 26, 35, 39,
]  # fmt: skip
LUCIR_SUBSET = [
    637, 509, 782, 85, 238, 852, 911, 622, 722, 748, 394, 906, 44, 928, 508, 105, 262, 812, 419, 390, 523, 658, 761, 11,
    856, 192, 174, 478, 275, 494, 127, 836, 446, 842, 75, 539, 850, 160, 142, 437, 912, 400, 699, 542, 783, 493, 215,
    108, 288, 507, 337, 979, 133, 665, 988, 990, 989, 14, 600, 632, 413, 224, 323, 859, 240, 312, 886, 219, 999, 7, 894,
    274, 186, 966, 123, 126, 470, 260, 284, 466, 590, 650, 324, 548, 77, 597, 730, 62, 289, 54, 490, 471, 704, 959, 391,
    634, 279, 473, 512, 303,
]  # fmt: skip
LUCIR_1000_START = [54, 7, 894, 512, 126, 337, 988, 11, 284, 493]


def sizes(protocol):
    return [len(step) for step in protocol.steps]


@pytest.mark.parametrize(("name", "published"), [("lucir", LUCIR_100), ("icarl", ICARL_100)])
def test_the_orders_of_100_classes_are_the_published_ones(name, published):
    order = class_order(name, 100)
    assert order.dtype == np.int64
    assert order.tolist() == published


def test_lucirs_order_of_1000_classes_starts_as_published_and_names_every_class():
    order = class_order("lucir", 1000)
    assert order[:10].tolist() == LUCIR_1000_START
    assert sorted(order.tolist()) == list(range(1000))


def shuffles(classes, count):
    """class_incremental_cifar100.py: one seed, then a shuffle of the ids in each of the runs."""
    before = np.random.get_state()
    try:
        np.random.seed(1993)
        drawn = []
        for _ in range(count):
            order = np.arange(classes)
            np.random.shuffle(order)
            drawn.append(order.tolist())
    finally:
        np.random.set_state(before)
    return drawn


@pytest.mark.parametrize("classes", [1, 7, 10, 100, 1000])
def test_lucirs_runs_have_the_orders_that_its_script_draws(classes):
    drawn = shuffles(classes, 12)
    named = ["lucir", *(f"lucir{run}" for run in range(2, 13))]
    assert [class_order(name, classes).tolist() for name in named] == drawn
    assert [class_order("per_seed", classes, seed=seed).tolist() for seed in range(12)] == drawn


def test_a_thousand_runs_have_an_order():
    last = shuffles(10, 1000)[-1]
    assert class_order("lucir1000", 10).tolist() == class_order("per_seed", 10, seed=999).tolist() == last
    with pytest.raises(UserError, match=r"^order=per_seed: seeds 0 to 999 .*seed=1000 has none; .*order=seed1000$"):
        class_order("per_seed", 10, seed=1000)


@pytest.mark.parametrize("order", ["lucir", "lucir2", "icarl", "seed7", "alphabetical"])
def test_the_seed_of_a_run_leaves_other_orders_alone(order):
    assert np.array_equal(class_order(order, 100, seed=5), class_order(order, 100))


def test_lucirs_second_and_third_order_begin_as_published():
    assert class_order("lucir2", 100)[:4].tolist() == [82, 14, 51, 9]
    assert class_order("lucir3", 100)[:4].tolist() == [14, 69, 22, 28]


@pytest.mark.parametrize("seed", [0, 1, 1993, 2**32 - 1])
@pytest.mark.parametrize("classes", [7, 100])
def test_an_order_by_seed_is_what_pycil_draws(seed, classes):
    before = np.random.get_state()
    try:
        np.random.seed(seed)
        drawn = np.random.permutation(len(list(range(classes)))).tolist()
    finally:
        np.random.set_state(before)
    order = class_order(f"seed{seed}", classes)
    assert (order.tolist(), order.dtype) == (drawn, np.int64)


@pytest.mark.parametrize(
    "name",
    ["seed", "seed-1", "seed07", "seed1.5", f"seed{2**32}", "seedN", "lucir0", "lucir1", "lucir02", "lucir1001",
     "lucir-2", "lucirN", "per_run"],
)  # fmt: skip
def test_an_order_that_is_none_is_refused_with_those_that_are(name):
    with pytest.raises(UserError, match=r"unknown; use lucir, lucirN .*per_seed, .*natural, seedN, or a list") as error:
        class_order(name, 100)
    assert str(error.value).startswith(f"order={name}: ")


@given(
    st.lists(st.integers(0, 2000).map(str) | st.sampled_from(["a", "a2", "a10", "a02", "b-1", "", "10b"]), min_size=2)
)
@settings(deadline=None, database=None, derandomize=True)
def test_the_natural_order_takes_numbers_in_names_by_their_value(names):
    ordered = [names[c] for c in class_order("natural", len(names), names)]
    assert sorted(ordered) == sorted(names)
    assert [int(n) for n in ordered if n.isdecimal()] == sorted(int(n) for n in names if n.isdecimal())
    assert [n for n in ordered if n in ("a2", "a02", "a10")] == (
        [n for n in names if n in ("a2", "a02")] + [n for n in names if n == "a10"]
    )


def test_the_natural_order_needs_names():
    with pytest.raises(UserError, match=r"order=natural.*--data"):
        class_order("natural", 10)


TEN = ["0", "1", "10", "2", "3"]  # as a folder has them


@pytest.mark.parametrize(
    ("order", "names", "wanted"),
    [
        (["dog", "cat"], ["cat", "dog"], [1, 0]),
        (["10", "3", "0", "1", "2"], TEN, [2, 4, 0, 1, 3]),  # names,
        ([2, 4, 0, 1, 3], TEN, [2, 4, 0, 1, 3]),  # and ids
        (["dog", 0], ["cat", "dog"], [1, 0]),
        ("natural", TEN, [0, 1, 3, 4, 2]),
        ("alphabetical", TEN, [0, 1, 2, 3, 4]),
    ],
)
def test_a_list_holds_ids_or_names(order, names, wanted):
    assert class_order(order, len(names), names).tolist() == wanted


@pytest.mark.parametrize(
    ("order", "names", "complaint"),
    [
        (["dog", "bird"], ["cat", "dog"], "no class bird; classes are cat, dog"),
        (["dog", "cta"], ["cat", "dog"], "no class cta; did you mean cat"),
        (["dog", "dog"], ["cat", "dog"], "twice: dog"),
        (["dog"], ["cat", "dog"], "missing: cat"),
        (["dog", "cat", 0], ["cat", "dog"], "twice: cat"),
        ([1, 2], ["cat", "dog"], "there is no: 2"),
        (["dog", "cat"], None, "without the images only ids are known; give --data"),
    ],
)
def test_a_list_of_names_with_a_mistake_says_which(order, names, complaint):
    with pytest.raises(UserError, match=complaint) as error:
        class_order(order, 2, names)
    assert str(error.value).startswith('order=["dog"' if order != [1, 2] else "order=[1, 2]")


@pytest.mark.parametrize(("names", "odd"), [(TEN, "id 2 is class 10"), (["10", "9"], "id 0 is class 10")])
def test_names_that_are_numbers_in_another_order_are_said_so(names, odd):
    assert odd in numbering_note(names)
    assert "order=natural" in numbering_note(names)


@pytest.mark.parametrize("names", [["0", "1", "2"], ["a10", "a2"], ["0", "10", "a"], ["007", "08"]])
def test_other_names_need_no_word_about_numbers(names):
    assert numbering_note(names) is None


def test_the_alphabetical_order_is_the_order_of_the_ids():
    assert class_order("alphabetical", 7).tolist() == [0, 1, 2, 3, 4, 5, 6]


def test_lucirs_imagenet_subset_is_the_published_list():
    subset = imagenet_subset("lucir")
    assert subset.dtype == np.int64
    assert subset.tolist() == LUCIR_SUBSET


def test_lucirs_imagenet_subset_holds_the_first_100_of_the_1000_order_in_another_order():
    subset, order = imagenet_subset("lucir"), class_order("lucir", 1000)
    assert set(subset.tolist()) == set(order[:100].tolist())
    assert subset.tolist() != order[:100].tolist()


def test_podnets_imagenet_subset_is_the_first_100_classes_in_lucirs_order():
    assert imagenet_subset("first100").tolist() == LUCIR_100


def test_the_two_imagenet_subsets_share_nine_classes():
    assert len(np.intersect1d(imagenet_subset("lucir"), imagenet_subset("first100"))) == 9


def test_drawing_an_order_leaves_numpys_global_generator_alone():
    before = np.random.get_state()[1].copy()
    class_order("icarl", 100), class_order("lucir", 100), imagenet_subset("lucir")
    assert np.array_equal(before, np.random.get_state()[1])


@pytest.mark.parametrize(
    ("order", "base", "increment", "wanted"),
    [
        ("lucir", 50, 10, [50] + 5 * [10]),  # B50, 5 steps
        ("lucir", 50, 5, [50] + 10 * [5]),  # B50, 10 steps
        ("icarl", 50, 1, [50] + 50 * [1]),
        ("lucir", 10, 10, 10 * [10]),
        ("lucir", 100, 10, [100]),
        ("lucir", 1, 99, [1, 99]),
    ],
)
def test_steps_cut_the_order_into_the_base_and_equal_increments(order, base, increment, wanted):
    order = class_order(order, 100)
    protocol = Protocol(order, base, increment)
    assert sizes(protocol) == wanted
    assert np.concatenate(protocol.steps).tolist() == order.tolist()


def test_imagenet_in_five_steps_is_500_classes_and_five_times_100():
    protocol = Protocol(class_order("lucir", 1000), 500, 100)
    assert sizes(protocol) == [500, 100, 100, 100, 100, 100]
    assert protocol.steps[0][:10].tolist() == LUCIR_1000_START


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 60))
@settings(deadline=None, database=None, derandomize=True)
def test_a_protocol_covers_every_class_once_or_is_refused(total, base, increment):
    order = np.arange(total)[::-1].copy()
    fits = base <= total and (total - base) % increment == 0
    if not fits:
        with pytest.raises(UserError):
            Protocol(order, base, increment)
        return
    steps = Protocol(order, base, increment).steps
    assert len(steps[0]) == base
    assert all(len(step) == increment for step in steps[1:])
    assert np.concatenate(steps).tolist() == order.tolist()


@given(st.lists(st.integers(1, 9), max_size=8), st.integers(1, 9))
@settings(deadline=None, database=None, derandomize=True)
def test_a_list_of_increments_is_taken_as_it_is(increments, base):
    order = np.arange(base + sum(increments))[::-1]
    protocol = Protocol(order, base, increments)
    assert sizes(protocol) == [base, *increments]
    assert np.concatenate(protocol.steps).tolist() == order.tolist()
    assert protocol.sizes == sizes(protocol)


@pytest.mark.parametrize(
    ("base", "increment", "complaint"),
    [
        (4, [4], r"increment=\[4\]: .*6 classes after the base step \(base_classes=4\), not 4"),
        (4, [4, 3], "not 7"), (4, [], "not 0"), (4, [7, -1], "6 classes"), (4, [6, 0], "6 classes"),
        (4, 4, r"increment=4: .*use 1 or 2 or 3 or 6, or a list such as \[4, 2\]"),
        (0, 1, "base_classes=0: .*from scratch is base_classes=1 increment=1"),
        (0, 5, "from scratch is base_classes=5 increment=5"),
        (0, [3, 3, 3, 1], r"from scratch is base_classes=3 increment=\[3, 3, 1\]"),
    ],
)  # fmt: skip
def test_steps_that_do_not_take_all_classes_say_what_would(base, increment, complaint):
    with pytest.raises(UserError, match=complaint):
        Protocol(np.arange(10), base, increment)


def test_what_is_told_for_uneven_steps_and_from_scratch_works():
    assert sizes(Protocol(np.arange(10), 4, [4, 2])) == [4, 4, 2]
    assert sizes(Protocol(np.arange(10), 1, 1)) == 10 * [1]
    assert sizes(Protocol(np.arange(10), 3, [3, 3, 1])) == [3, 3, 3, 1]


@pytest.mark.parametrize(
    ("base", "increment", "complaint"),
    [
        (50, 7, "increment=7.*50 classes.*use 1 or 2 or 5 or 10 or 25 or 50"),
        (50, 0, "increment=0"),
        (50, -10, "increment=-10"),
        (50, 51, "increment=51"),
        (101, 10, "base_classes=101.*100"),
        (0, 10, "base_classes=0"),
        (-1, 10, "base_classes=-1"),
    ],
)
def test_a_base_or_increment_that_does_not_fit_is_one_clear_error(base, increment, complaint):
    with pytest.raises(UserError, match=complaint):
        Protocol(class_order("lucir", 100), base, increment)


def test_a_negative_increment_after_a_base_of_all_classes_is_refused_or_harmless():
    try:
        protocol = Protocol(class_order("lucir", 100), 100, -5)
    except UserError:
        return
    assert sizes(protocol) == [100]


@pytest.mark.parametrize(
    ("config", "num_classes", "wanted"),
    [
        (ProtocolConfig(), 100, [50] + 5 * [10]),
        (ProtocolConfig(), 10, [5, 1, 1, 1, 1, 1]),
        (ProtocolConfig(increment=5), 100, [50] + 10 * [5]),
        (ProtocolConfig(base_classes=40), 100, [40] + 5 * [12]),
        (ProtocolConfig(base_classes=500, increment=100), 1000, [500] + 5 * [100]),
        (ProtocolConfig(base_classes=100), 100, [100]),
        (ProtocolConfig(base_classes=100, increment=10), 100, [100]),
        (ProtocolConfig(increment=[3, 3, 1]), 10, [3, 3, 3, 1]),  # the base step takes what is left
        (ProtocolConfig(base_classes=4, increment=[4, 2]), 10, [4, 4, 2]),
        (ProtocolConfig(classes=7, increment=[2, 2]), 10, [3, 2, 2]),
        (ProtocolConfig(base_classes=10, increment=[]), 10, [10]),
        (ProtocolConfig(increment=[3, 3, 3, 1]), 10, [3, 3, 3, 1]),  # of all classes: begins with the base step
        (ProtocolConfig(increment=[10]), 10, [10]),
        (ProtocolConfig(base_classes=5, increment=[5, 5]), 10, [5, 5]),
        (ProtocolConfig(classes=7, increment=[4, 3]), 10, [4, 3]),
        (ProtocolConfig(subset="lucir"), 1000, [50] + 5 * [10]),
        (ProtocolConfig(subset="first100", increment=5), 1000, [50] + 10 * [5]),
    ],
)
def test_a_recipe_gets_half_of_the_classes_and_five_steps_unless_it_says_otherwise(config, num_classes, wanted):
    assert sizes(build_protocol(config, num_classes)) == wanted


@pytest.mark.parametrize(
    ("config", "num_classes", "wanted"),
    [
        (ProtocolConfig(), 100, LUCIR_100),
        (ProtocolConfig(order="icarl"), 100, ICARL_100),
        (ProtocolConfig(order=LUCIR_100[::-1]), 100, LUCIR_100[::-1]),
        (ProtocolConfig(subset="lucir"), 1000, LUCIR_SUBSET),
        (ProtocolConfig(subset="first100"), 1000, LUCIR_100),
    ],
)
def test_a_recipe_learns_the_classes_in_the_order_it_names(config, num_classes, wanted):
    assert build_protocol(config, num_classes).order.tolist() == wanted


@pytest.mark.parametrize(
    ("config", "num_classes", "complaint"),
    [
        (ProtocolConfig(subset="lucir", order=[*range(100)]), 1000, "subset=lucir with order=.*per_seed.*subset=null"),
        (ProtocolConfig(subset="first100", order="natural"), 1000, "with order=natural: .*alphabetical.*subset=null"),
        (ProtocolConfig(subset="lucir", order="lucir1"), 1000, "order=lucir1: unknown"),
        (ProtocolConfig(subset="lucir"), 99, "1000 classes.*this data set has 99 others.*subset=null"),
        (ProtocolConfig(subset="lucir"), 100, "1000 classes.*this data set has 100 others.*subset=null"),
        (ProtocolConfig(subset="last100"), 1000, "subset=last100.*lucir or first100"),
        (ProtocolConfig(base_classes=42), 100, "58 classes.*give increment=1 or 2 or 29 or 58"),
        (ProtocolConfig(base_classes=101), 100, "base_classes=101"),
        (ProtocolConfig(base_classes=106), 100, "base_classes=106"),
        (ProtocolConfig(base_classes=0), 100, "base_classes=0"),
        (ProtocolConfig(increment=7), 100, "increment=7"),
        (ProtocolConfig(base_classes=4, increment=[3, 3, 3, 1]), 10, "begins with the base step, .*base_classes=null"),
        (ProtocolConfig(base_classes=0, increment=[5, 5]), 10, "begins with the base step, .*base_classes=null"),
        (ProtocolConfig(increment=[30]), 10, "takes 30 of 10 classes; shorten the list"),
        (ProtocolConfig(order="icarl"), 10, "icarl.*100 classes only"),
        (ProtocolConfig(order="icarl"), 1000, "icarl.*100 classes only"),
        (ProtocolConfig(order="random"), 10, "order=random: unknown"),
        (ProtocolConfig(order=""), 10, "order=: unknown"),
    ],
)
def test_a_recipe_that_makes_no_protocol_is_one_clear_error(config, num_classes, complaint):
    with pytest.raises(UserError, match=complaint):
        build_protocol(config, num_classes)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.none() | st.integers(1, 30), st.integers(-9, 9))
@settings(deadline=None, database=None, derandomize=True)
def test_a_list_of_steps_means_the_one_thing_that_it_can(increments, base, more):
    """Against every way to read it: as it follows a base step, or as it begins with one."""
    total = max(1, sum(increments) + more)
    after = [base, *increments] if base is not None else [total - sum(increments), *increments]
    begins = increments if base in (None, increments[0]) else []
    meant = [steps for steps in (after, begins) if sum(steps) == total and min(steps) > 0]
    if not meant:
        with pytest.raises(UserError, match=f"increment=|base_classes={base}"):
            build_protocol(ProtocolConfig(base_classes=base, increment=increments), total)
        return
    protocol = build_protocol(ProtocolConfig(base_classes=base, increment=increments), total)
    assert [sizes(protocol)] == meant
    assert np.concatenate(protocol.steps).tolist() == class_order("lucir", total).tolist()


WNIDS = list(table()["imagenet"].class_names)


@pytest.mark.parametrize("subset", ["lucir", "first100"])
@pytest.mark.parametrize(("order", "seed", "run"), [("lucir2", 0, 1), ("per_seed", 3, 3), ("per_seed", 0, 0)])
def test_a_subset_has_the_orders_of_a_data_set_of_100_classes(subset, order, seed, run):
    members = sorted(imagenet_subset(subset).tolist())
    wanted = [members[place] for place in shuffles(100, run + 1)[run]]
    config, names = ProtocolConfig(subset=subset, order=order), [WNIDS[c] for c in members]
    assert build_protocol(config, 1000, WNIDS, seed).order.tolist() == wanted
    assert [members[c] for c in build_protocol(config, 100, names, seed).order] == wanted


@pytest.mark.parametrize(("subset", "other"), [("lucir", "first100"), ("first100", "lucir")])
def test_a_data_set_of_the_subset_alone_has_the_same_classes_in_the_same_order(subset, other):
    names = sorted(WNIDS[c] for c in imagenet_subset(subset))
    whole, alone = (build_protocol(ProtocolConfig(subset=subset), len(n), n) for n in (WNIDS, names))
    assert [names[c] for c in alone.order] == [WNIDS[c] for c in whole.order]
    assert sizes(alone) == sizes(whole)
    turned = build_protocol(ProtocolConfig(subset=subset), 100, names[::-1])
    assert [names[::-1][c] for c in turned.order] == [names[c] for c in alone.order]
    # Any 100 classes with wnids passed, and were trained in the place of the subset.
    with pytest.raises(UserError, match=f"subset={other}: .*set subset={subset}, or .*--classes {other}"):
        build_protocol(ProtocolConfig(subset=other), 100, names)
    for odd in ("cat", next(name for name in WNIDS if name not in names)):
        with pytest.raises(UserError, match="subset=null"):
            build_protocol(ProtocolConfig(subset=subset), 100, [odd, *names[1:]])


@pytest.mark.parametrize("order", [[3, 1, 0, 2], (3, 1, 0, 2), np.array([3, 1, 0, 2])])
def test_an_explicit_list_is_taken_as_it_is(order):
    taken = class_order(order, 4)
    assert taken.dtype == np.int64
    assert taken.tolist() == [3, 1, 0, 2]


@pytest.mark.parametrize(
    "order",
    [
        pytest.param([3, 1, 1, 0], id="duplicate"),
        pytest.param([3, 1, 0], id="missing"),
        pytest.param([3, 1, 0, 2, 2], id="too long"),
        pytest.param([4, 1, 0, 2], id="outside"),
        pytest.param([-1, 1, 0, 2], id="negative"),
        pytest.param([], id="empty"),
        pytest.param([[3], [1], [0], [2]], id="nested"),
    ],
)
def test_an_explicit_list_must_hold_every_class_exactly_once(order):
    with pytest.raises(UserError, match=r"each of the 4 class ids \(0 to 3\) exactly once"):
        class_order(order, 4)


def test_positions_invert_the_order():
    protocol = Protocol(class_order("icarl", 100), 50, 10)
    table = protocol.positions(100)
    assert table.dtype == np.int64
    assert [int(table[class_id]) for class_id in ICARL_100] == list(range(100))


def test_positions_are_minus_one_for_classes_the_protocol_leaves_out():
    table = build_protocol(ProtocolConfig(subset="lucir"), 1000).positions(1000)
    assert len(table) == 1000
    for class_id in range(1000):
        wanted = LUCIR_SUBSET.index(class_id) if class_id in LUCIR_SUBSET else -1
        assert table[class_id] == wanted


def test_the_class_hash_tells_the_two_subsets_and_two_orders_apart():
    names = [f"n{i:08d}" for i in range(1000)]
    a = build_protocol(ProtocolConfig(subset="lucir"), 1000)
    b = build_protocol(ProtocolConfig(subset="first100"), 1000)
    c = Protocol(a.order[::-1], 50, 10)
    d = Protocol(a.order, 50, 5)  # the same classes in the same order, in other steps
    hashes = [p.class_hash(names) for p in (a, b, c)]
    assert len(set(hashes)) == 3
    assert d.class_hash(names) == hashes[0]
    assert a.class_hash([name.upper() for name in names]) != hashes[0]
