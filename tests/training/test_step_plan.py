"""The effective protocol against a simulation of the run: what is kept, listed and cut into batches at each step."""

import re
from itertools import pairwise

import numpy as np
import pytest

from fastil import recipe_file as recipes
from fastil.errors import UserError
from fastil.plan import Key, Transform, training_plan
from fastil.protocol import Protocol, class_order
from fastil.text import format_table
from fastil.training.step_plan import as_table, class_lines, effective_steps, names_by_step, notes, run_flops

TRANSFORM = Transform(8, 8, pad=1, flip=True, mean=(0.0,) * 3, std=(1.0,) * 3)


def recipe_of(**keys):
    written = {key: "null" if value is None else value for key, value in keys.items()}
    return recipes.load("digits", [f"{key}={value}" for key, value in written.items()])


def simulated(recipe, protocol, counts):
    """(new classes, classes seen, new images, exemplars, epochs, iterations, visits) of every step, from id lists."""
    bounds = np.cumsum([0, *counts])
    ids_of = [np.arange(a, b) for a, b in pairwise(bounds)]
    memory, seen, steps = {}, 0, []
    for step, classes in enumerate(protocol.steps):
        new = [ids_of[c] for c in classes]
        old = list(memory.values())
        ids = np.concatenate(new + old)
        epochs = recipe.train.base_epochs if step == 0 and recipe.train.base_epochs else recipe.train.epochs
        iterations = visits = 0
        for epoch in range(epochs):
            plan = training_plan(ids, Key(0, step, "train", epoch), TRANSFORM, recipe.train.batch_size)
            batches = list(plan.batches())
            iterations += len(batches)
            visits += sum(len(plan.ids[part]) for part in batches)
        seen += len(classes)
        steps.append((len(classes), seen, sum(map(len, new)), sum(map(len, old)), epochs, iterations, visits))
        budget = recipe.memory.memory_budget
        quota = budget // seen if budget else recipe.memory.exemplars_per_class
        memory |= {c: ids_of[c] for c in classes}
        memory = {c: ids[:quota] for c, ids in memory.items()}
    return steps


def rows(plans):
    return [(p.new_classes, p.classes_seen, p.new_images, p.exemplars, p.epochs, p.iterations, p.visits) for p in plans]


EVEN = [30] * 10
UNEVEN = [31, 2, 17, 40, 1, 9, 23, 5, 12, 8]  # two classes have fewer images than a quota of 3 or more
MEMORIES = [
    {"exemplars_per_class": 0, "loss": "softmax"},
    {"exemplars_per_class": 1},
    {"exemplars_per_class": 4},
    {"exemplars_per_class": 100},  # more than any class has
    {"exemplars_per_class": None, "memory_budget": 37},
    {"exemplars_per_class": None, "memory_budget": 10},
    {"exemplars_per_class": None, "memory_budget": 1000},
]


@pytest.mark.parametrize("counts", [EVEN, UNEVEN], ids=["even", "uneven"])
@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize(("base", "increment"), [(5, 1), (4, 3), (2, 4), (10, 1), (3, [3, 3, 1]), (1, [1, 7, 1])])
def test_steps_are_those_of_a_simulated_run(counts, memory, base, increment):
    protocol = Protocol(class_order("lucir", 10), base, increment)
    recipe = recipe_of(epochs=3, base_epochs=2, batch_size=16, **memory)
    plans = effective_steps(recipe, protocol, np.array(counts))
    assert rows(plans) == simulated(recipe, protocol, counts)
    assert [p.step for p in plans] == list(range(len(protocol.steps)))


@pytest.mark.parametrize("batch_size", range(2, 12))
@pytest.mark.parametrize("images", [1, 2, 3, 7, 11, 20])
def test_iterations_are_the_batches_of_the_plan_whatever_is_left_over(batch_size, images):
    """The rest of a batch is nothing, one image (which joins the batch before it) or more."""
    protocol = Protocol(class_order("alphabetical", 4), 1, 1)
    recipe = recipe_of(epochs=2, base_epochs=1, batch_size=batch_size, exemplars_per_class=2)
    counts = [images, 1, images + 1, 2 * images]
    assert rows(effective_steps(recipe, protocol, np.array(counts))) == simulated(recipe, protocol, counts)


def test_the_published_setting_on_cifar100():
    """B50, five steps, R = 20: 390 full batches of 64 and a rest of 40 at the base step."""
    protocol = Protocol(class_order("lucir", 100), 50, 10)
    recipe = recipe_of(epochs=250, base_epochs=None, batch_size=64, exemplars_per_class=20)
    plans = effective_steps(recipe, protocol, np.full(100, 500))
    assert [p.new_images for p in plans] == [25_000] + 5 * [5_000]
    assert [p.exemplars for p in plans] == [0, 1000, 1200, 1400, 1600, 1800]
    assert [p.exemplars_per_class for p in plans] == [0, 20, 20, 20, 20, 20]
    assert [p.iterations for p in plans] == [250 * n for n in (391, 94, 97, 100, 104, 107)]
    assert [p.visits for p in plans] == [250 * n for n in (25_000, 6_000, 6_200, 6_400, 6_600, 6_800)]


def test_a_growing_memory_grows_and_a_budget_is_shared():
    protocol, counts = Protocol(class_order("lucir", 10), 4, 2), np.array(EVEN)
    growing = effective_steps(recipe_of(exemplars_per_class=3), protocol, counts)
    budget = effective_steps(recipe_of(exemplars_per_class=None, memory_budget=40), protocol, counts)
    assert [p.exemplars for p in growing] == [0, 12, 18, 24]
    assert [p.exemplars_per_class for p in budget] == [0, 10, 6, 5]
    assert [p.exemplars for p in budget] == [0, 40, 36, 40]


def test_base_epochs_are_those_of_the_others_unless_given():
    protocol, counts = Protocol(class_order("lucir", 10), 4, 2), np.array(EVEN)
    assert [p.epochs for p in effective_steps(recipe_of(epochs=7, base_epochs=None), protocol, counts)] == [7] * 4
    assert [p.epochs for p in effective_steps(recipe_of(epochs=7, base_epochs=9), protocol, counts)] == [9, 7, 7, 7]


@pytest.mark.parametrize(
    ("schedule", "epochs", "last"),
    [("multistep", 250, 1e-4), ("multistep", 5, 1e-4), ("cosine", 10, 0.05 * (1 + np.cos(0.9 * np.pi)))],
)
def test_learning_rates_are_those_of_the_first_and_the_last_epoch(schedule, epochs, last):
    """0.1, divided by 10 at 0.4, 0.6 and 0.8 of the epochs of the step; or along half a cosine."""
    drops = {"milestones": "[0.4, 0.6, 0.8]"} if schedule == "multistep" else {}
    recipe = recipe_of(epochs=epochs, base_epochs=20, lr=0.1, schedule=schedule, **drops)
    plan = effective_steps(recipe, Protocol(class_order("lucir", 10), 5, 5), np.array(EVEN))[1]
    assert (plan.first_lr, plan.last_lr) == (pytest.approx(0.1), pytest.approx(last))


def test_a_budget_too_small_for_a_rehearsed_step_is_refused_beforehand():
    recipe = recipe_of(exemplars_per_class=None, memory_budget=4)
    with pytest.raises(UserError, match="memory_budget=4"):
        effective_steps(recipe, Protocol(class_order("lucir", 10), 5, 1), np.array(EVEN))


def test_a_budget_too_small_for_the_memory_after_the_last_step_is_refused_beforehand():
    """The exemplars are selected after every step, the last one too, among all 10 classes."""
    recipe = recipe_of(exemplars_per_class=None, memory_budget=9)
    with pytest.raises(UserError, match="memory_budget=9"):
        effective_steps(recipe, Protocol(class_order("lucir", 10), 5, 1), np.array(EVEN))


def test_training_costs_three_forwards_and_a_fourth_with_the_teacher():
    plans = effective_steps(
        recipe_of(epochs=3, base_epochs=2), Protocol(class_order("lucir", 10), 5, 5), np.array(EVEN)
    )
    base, last = (p.visits for p in plans)
    assert run_flops(plans, 1000) == 3000 * base + 4000 * last
    assert base == 2 * 150
    assert last == 3 * (150 + 5 * 2)


@pytest.mark.parametrize("keys", [{"mnemonics": "bilevel"}, {"mnemonics": "released"}])
def test_mnemonics_visits_the_training_set_of_each_step_again_for_its_exemplars(keys):
    """In the base step too; a visit costs as much as one of training. No other method has any."""
    protocol, cosine = Protocol(class_order("lucir", 10), 4, 3), {"head": "cosine", "loss": "softmax"}
    recipe = recipe_of(
        method="mnemonics", mnemonics_epochs=7, exemplars_per_class=5, epochs=3, base_epochs=2, **keys, **cosine
    )
    plans = effective_steps(recipe, protocol, np.array(EVEN))
    images = [4 * 30, 3 * 30 + 4 * 5, 3 * 30 + 7 * 5]
    assert [p.memory_visits for p in plans] == [7 * n for n in images]
    assert [p.visits for p in plans] == [e * n for e, n in zip((2, 3, 3), images, strict=True)]
    assert run_flops(plans, 10) == 30 * 9 * images[0] + 40 * 10 * (images[1] + images[2])
    others = effective_steps(recipe_of(method="lucir", **cosine), protocol, np.array(EVEN))
    assert not any(p.memory_visits for p in others)


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("images", [EVEN, UNEVEN, [1300] * 10], ids=["even", "uneven", "many"])
def test_the_table_shows_every_step_and_lines_up(memory, images):
    protocol = Protocol(class_order("lucir", 10), 5, 1)
    plans = effective_steps(recipe_of(epochs=90, base_epochs=120, lr=0.1, **memory), protocol, np.array(images))
    table, rates = as_table(plans).rsplit("\n", 1)
    header, *lines = table.splitlines()
    assert len(lines) == 6
    bounds = {match.end() for match in re.finditer(r"step|new images|epochs|iterations|visits", header)}
    for plan, line in zip(plans, lines, strict=True):
        assert len(line) <= 80
        assert all(line[end - 1].isdigit() for end in bounds)  # numbers end below the end of their heading
        cells = re.split("  +", line.strip())
        assert cells[:3] == [str(plan.step), f"+{plan.new_classes} = {plan.classes_seen}", f"{plan.new_images:,}"]
        assert cells[4:] == [str(plan.epochs), f"{plan.iterations:,}", f"{plan.visits:,}"]
        number, _, of_class = cells[3].partition(" ")
        assert number == f"{plan.exemplars:,}"
        exact = plan.exemplars == plan.exemplars_per_class * plan.classes_old
        everything = plan.exemplars == sum(before.new_images for before in plans[: plan.step])
        known = "all" if everything else f"{'' if exact else 'max '}{plan.exemplars_per_class}/class"
        assert of_class == (f"({known})" if plan.exemplars else "")
    assert rates == f"lr 0.1 to {plans[0].last_lr:.2g} in step 0, 0.1 to {plans[1].last_lr:.2g} in steps 1 to 5"


def test_the_largest_table_of_the_paper_fits_a_terminal():
    """ImageNet in ten steps, with as many images in each class as the largest have."""
    recipe = recipes.load("imagenet_meta_10", ["order=natural"])
    protocol = Protocol(np.arange(1000), 500, 50)
    table = as_table(effective_steps(recipe, protocol, np.full(1000, 1300)))
    assert max(map(len, table.splitlines())) <= 80
    words = " ".join(table.split())
    assert "held out of new images and exemplars 0 in step 0, 1,100 in step 1, 1,200 in step 2, " in words


def test_a_markdown_table_is_as_wide_as_its_longest_cells():
    table = format_table(("a", "long header"), [("longer cell", "b"), ("", "")])
    assert table.splitlines() == [
        "| a           | long header |",
        "|-------------|-------------|",
        "| longer cell | b           |",
        "|             |             |",
    ]


def test_the_classes_of_each_step_are_named():
    names = [f"class {chr(97 + number)}" for number in range(6)]
    protocol = Protocol(np.array([5, 0, 3, 1, 2, 4]), 3, [1, 2])
    assert names_by_step(protocol, names) == [["class f", "class a", "class d"], ["class b"], ["class c", "class e"]]
    assert class_lines(protocol, names, 2) == [
        "step 0 adds  class f, class a and 1 more", "step 1 adds  class b", "step 2 adds  class c, class e",
    ]  # fmt: skip


@pytest.mark.parametrize("sampler", ["memory_oversampling", "class_oversampling"])
@pytest.mark.parametrize("loss", ["softmax", "balanced", "meta_balanced", "separated", "rescaled"])
def test_a_correction_that_comes_twice_is_said_so(loss, sampler):
    names = ["cat", "dog"]
    found = notes(recipes.load("digits", [f"loss={loss}", f"sampler={sampler}"]), names)
    twice = loss in ("balanced", "meta_balanced", "rescaled")
    assert [f"loss={loss} with sampler={sampler} corrects the imbalance twice" in line for line in found] == [
        True
    ] * twice
    assert notes(recipes.load("digits", [f"loss={loss}"]), names) == []


def test_names_that_are_numbers_in_the_order_of_their_text_are_said_so_unless_the_order_is_natural():
    names = ["0", "1", "10", "2"]
    (line,) = notes(recipes.load("digits"), names)
    assert "id 2 is class 10" in line
    assert notes(recipes.load("digits", ["order=natural"]), names) == notes(recipes.load("digits"), None) == []
