"""Recipes that train from scratch: what they are made of, that every method can be planned, what others published."""

import re

import numpy as np
import pytest
import yaml
from conftest import ROOT

from fastil import recipe_file
from fastil.errors import UserError
from fastil.recipe_file import differences, file_names, in_protocols, load, names, published_elsewhere
from fastil.reporting.fidelity import labelled, remark_of
from fastil.training.step_plan import effective_steps

DATASETS = {"cifar100": 500, "subimagenet": 1300}  # training images of a class
METHODS = {
    dataset: [
        name.split("_", 1)[1].removesuffix("_5") for name in file_names() if re.fullmatch(f"{dataset}_.*_5", name)
    ]
    for dataset in DATASETS
}
MEMORY = ("exemplars_per_class", "memory_budget")


def test_every_method_has_them():
    assert {"icarl", "bic", "wa", "lucir", "podnet", "il_baseline", "balanced", "meta"} <= set(METHODS["subimagenet"])
    assert set(METHODS["subimagenet"]) <= set(METHODS["cifar100"])
    made = {
        f"{dataset}_{method}_b0_{steps}{memory}"
        for dataset, methods in METHODS.items()
        for method in methods
        for steps in (5, 10, 20)
        for memory in ("", "_r20")
        if not (memory and load(f"{dataset}_{method}_5").memory.exemplars_per_class == 0)  # the same experiment
    }
    assert set(in_protocols()) == made
    assert set(names()) == made | set(file_names())


@pytest.mark.parametrize("memory", ["", "_r20"])
@pytest.mark.parametrize("steps", [5, 10, 20])
@pytest.mark.parametrize("dataset", DATASETS)
def test_each_has_equal_steps_and_its_memory_and_the_settings_of_its_method(dataset, steps, memory):
    """The plan, against exemplars that are counted class by class; no image is trained on."""
    each, images = 100 // steps, DATASETS[dataset]
    for method in METHODS[dataset]:
        name, parent = f"{dataset}_{method}_b0_{steps}{memory}", load(f"{dataset}_{method}_5")
        if memory and parent.memory.exemplars_per_class == 0:
            assert name not in names()
            continue
        loaded = load(name)
        changed = {"base_classes": each, "increment": each}
        if parent.memory.exemplars_per_class != 0:
            changed |= dict(zip(MEMORY, (20, None) if memory else (None, 2000), strict=True))
        changed |= {"subset": "first100"} if dataset == "subimagenet" else {}
        assert loaded.keys() == parent.keys() | changed
        assert (loaded.name, loaded.published, differences(loaded)) == (name, None, {})
        whole = 1000 if dataset == "subimagenet" else 100
        protocol = loaded.build_protocol(whole)
        assert [len(classes) for classes in protocol.steps] == steps * [each]
        plan = effective_steps(loaded, protocol, np.full(whole, images))
        assert [step.new_images for step in plan] == steps * [each * images]
        if parent.memory.exemplars_per_class == 0:
            continue
        kept = [
            sum(min(images, 20 if memory else 2000 // (k * each)) for _ in range(k * each)) for k in range(1, steps)
        ]
        assert [step.exemplars for step in plan] == [0, *kept]
        assert max(kept) <= 2000


def test_they_say_what_they_are():
    loaded = load("cifar100_tpcil_b0_20")
    assert loaded.description == "CIFAR-100, from scratch 20 x 5 with 2000 exemplars, TPCIL"
    assert loaded.fidelity.startswith("not in the paper; the settings of cifar100_tpcil_5: approximation; ")
    assert load("subimagenet_meta_b0_5_r20").description == (
        "SubImageNet, from scratch 5 x 20 with R = 20, IL-Baseline with Meta BalancedS-CE"
    )


def test_a_recipe_without_a_memory_stays_without(monkeypatch):
    of_method = recipe_file._read("cifar100_il_baseline_5")
    monkeypatch.setattr(recipe_file, "_read", lambda name: of_method | {"exemplars_per_class": 0})
    made = recipe_file._in_protocol("cifar100_il_baseline_5", "b0_10")
    assert (made["base_classes"], made["increment"]) == (10, 10)
    assert not set(made) & set(MEMORY)


def test_they_are_changed_and_derived_from_like_any_other(tmp_path):
    growing = load("cifar100_icarl_b0_10", ["exemplars_per_class=20", "memory_budget=null"])
    assert growing.identity() == load("cifar100_icarl_b0_10_r20").identity()
    own = tmp_path / "mine.yaml"
    own.write_text("base: cifar100_podnet_b0_5\nepochs: 3\n")
    assert load(str(own)).keys() == load("cifar100_podnet_b0_5", ["epochs=3"]).keys()
    for name, near in (
        ("cifar100_icarl_b0_15", "cifar100_icarl_b0_"),
        ("cifar100_podnet_b010", "cifar100_podnet_b0_10"),
    ):
        with pytest.raises(UserError, match=f"unknown recipe {name}: did you mean {near}"):
            load(name)
    for name in ("protocols", "tables", "cifar100_icarl_b0", "imagenet_icarl_b0_10", "cifar100_icarl_10_b0_10"):
        with pytest.raises(UserError, match=f"unknown recipe {name}"):
            load(name)


def test_a_number_of_others_stands_next_to_unchanged_settings_only():
    """And never in the place of the paper's."""
    line = remark_of(labelled(load("cifar100_wa_b0_10"), None))
    assert line.startswith("published elsewhere: 69.46 ± 0.29, another network and schedule (docs/protocols.md")
    assert remark_of(labelled(load("cifar100_wa_b0_10", ["epochs=3"]), None)) == "modified: epochs=3"
    assert remark_of(labelled(load("cifar100_wa_b0_10_r20"), None)) is None
    assert labelled(load("cifar100_wa_b0_10"), None).published is None


def test_the_documentation_has_every_number():
    elsewhere = recipe_file.protocols()["elsewhere"]
    assert set(elsewhere) <= set(in_protocols())
    text = (ROOT / "docs/protocols.md").read_text()
    cells = {
        f"{dataset}_{method}_b0_{steps}": number
        for dataset, method, *numbers in re.findall(r"^\| (\w+) \| `(\w+)` \| (.*?) \| (.*?) \| (.*?) \|$", text, re.M)
        for steps, number in zip((5, 10, 20), numbers, strict=True)
        if number.strip()
    }
    assert cells == elsewhere
    for number in elsewhere.values():
        assert 0 < float(re.match(r"[0-9.]+", number).group()) < 100
    assert published_elsewhere("digits") is None
    assert yaml.safe_load((ROOT / "fastil/recipes/protocols.yaml").read_text()) == recipe_file.protocols()
