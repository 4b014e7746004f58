"""Class orders and steps on their way through a run: the plan, its first lines, protocol.json, a resume, the report."""

import json
import re

import numpy as np
import pytest
import yaml
from conftest import TINY, assert_user_error, make_folder

from fastil import recipe_file
from fastil.errors import UserError
from fastil.recipe_file import load
from fastil.reporting.report import write_report
from fastil.reporting.runs import Run
from fastil.reproduce import tables
from fastil.reproduce.worklist import WorkList
from fastil.training.experiment import Experiment

pytestmark = pytest.mark.usefixtures("without_figures")

NAMES = ["class4", "class0", "class6", "class2", "class5", "class1", "class3"]
UNEVEN = [
    "folder", *TINY, "size=12", "model=resnet8", "base_classes=2", "increment=[1, 3, 1]", "exemplars_per_class=2",
    f"order=[{', '.join(NAMES)}]",
]  # fmt: skip


def test_uneven_steps_of_classes_by_name_are_planned_trained_resumed_and_reported(fastil, tmp_path):
    data = make_folder(tmp_path / "data", classes=7, train=4, val=2)
    run = ["run", *UNEVEN, "--data", data, "--out", "run"]
    of_steps = [NAMES[:2], NAMES[2:3], NAMES[3:6], NAMES[6:]]
    plan, done = fastil("plan", *UNEVEN, "--data", data), fastil(*run)
    for process in (plan, done):
        assert process.returncode == 0, process.stderr
        said = re.findall(r"^step (\d) adds  (.*)$", process.stdout, re.MULTILINE)
        assert said == [(str(step), ", ".join(names)) for step, names in enumerate(of_steps)]
    protocol = json.loads((tmp_path / "run/protocol.json").read_text())
    assert protocol["class_names_by_step"] == of_steps
    assert [[protocol["class_names"][c] for c in classes] for classes in protocol["steps"]] == of_steps
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert [step["classes_seen"] for step in results["steps"]] == [2, 3, 6, 7]
    before = {file: file.read_bytes() for file in (tmp_path / "run").glob("*.json")}
    resumed = fastil(*run, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert "finished already" in resumed.stdout
    assert before == {file: file.read_bytes() for file in before}
    assert_user_error(fastil(*run, "increment=[3, 1, 1]", "--resume"), "increment was [1, 3, 1], now [3, 1, 1]")
    report = fastil("report", "run")
    assert report.returncode == 0, report.stderr
    assert "| il_baseline, balanced, model=resnet8 | 1 " in report.stdout


def test_the_natural_order_of_a_folder_takes_numbers_in_names_by_their_value(fastil, tmp_path):
    data = make_folder(tmp_path / "data", classes=12, train=2, val=1)
    plan = ["plan", "folder", *TINY, "size=12", "model=resnet8", "base_classes=6", "increment=6", "--data", data]
    for order, numbers in (("alphabetical", (0, 1, 10, 11, 2, 3)), ("natural", range(6))):
        process = fastil(*plan, f"order={order}")
        assert process.returncode == 0, process.stderr
        assert f"step 0 adds  {', '.join(f'class{number}' for number in numbers)}\n" in process.stdout


def test_a_folder_of_numbers_is_taken_by_number_and_said_to_be(fastil, tmp_path):
    data = make_folder(tmp_path / "data", classes=12, train=2, val=1)
    for split in ("train", "val"):
        for folder in sorted((data / split).iterdir()):
            folder.rename(folder.with_name(folder.name.removeprefix("class")))
    plan = ["plan", "folder", *TINY, "size=12", "model=resnet8", "base_classes=6", "increment=6", "--data", data]
    for order in ("alphabetical", "natural", f"{[*range(12)]}".replace(" ", "")):
        found = fastil(*plan, f"order={order}")
        assert "step 0 adds  0, 1, 2, 3, 4, 5\n" in found.stdout, found.stderr
        assert found.stdout.count("id 2 is class 2, where text is sorted (torchvision) it is class 10") == 1


def test_a_run_of_an_older_version_goes_on_with_the_same_meaning(tmp_path, capsys):
    """Written by YAML 1.1's rules and without names by step; its settings are those that it was given."""
    settings = [*TINY, "base_classes=6", "increment=2", "order=[9, 8, 7, 6, 5, 4, 3, 2, 1, 0]", "weight_decay=1e-5"]
    run = tmp_path / "run"
    Experiment(load("digits", settings), run, resume=False).run()
    results, protocol = (run / "results.json").read_bytes(), json.loads((run / "protocol.json").read_text())
    written = recipe_file.read_effective(run / "recipe.yaml")
    keys = {"recipe": written.name, "description": written.description, "published": None, "fidelity": "x"}
    (run / "recipe.yaml").write_text(yaml.safe_dump(keys | written.keys(), sort_keys=False))
    assert "1.0e-05" in (run / "recipe.yaml").read_text()
    names = protocol.pop("class_names_by_step")
    (run / "protocol.json").write_text(json.dumps(protocol))
    Experiment(load("digits", settings), run, resume=True).run()
    assert "finished already" in capsys.readouterr().out
    assert (run / "results.json").read_bytes() == results
    assert json.loads((run / "protocol.json").read_text())["class_names_by_step"] == names
    assert recipe_file.read_effective(run / "recipe.yaml").keys() == written.keys()


def test_a_row_of_a_table_may_have_a_list_of_increments():
    content = tables.read_tables()
    content["scales"]["cpu"]["overrides"] = {"increment": [4, 4, 2], "milestones": [0.5, 0.75], "schedule": "multistep"}
    entry = tables.table_of(content, "table2", "cpu").entries[0]
    keys = entry.load(0).keys()
    assert (keys["increment"], keys["milestones"]) == ([4, 4, 2], [0.5, 0.75])


@pytest.fixture(scope="module")
def of_seeds(tmp_path_factory):
    """Two seeds from scratch, each in an order of its own, with a last step that is smaller."""
    root = tmp_path_factory.mktemp("seeds")
    steps = ["base_classes=null", "increment=[4, 4, 2]", "exemplars_per_class=null", "memory_budget=30"]
    for seed in (0, 1):
        recipe = load("digits", [*TINY, *steps, "order=per_seed", f"seed={seed}"])
        Experiment(recipe, root / f"digits/row-s{seed}", resume=False).run()
    return root


def test_each_seed_has_an_order_of_its_own_and_both_are_one_row(of_seeds):
    paths, random = sorted((of_seeds / "digits").iterdir()), np.random.RandomState(1993)
    for path in paths:
        order = np.arange(10)
        random.shuffle(order)
        protocol = json.loads((path / "protocol.json").read_text())
        assert protocol["class_order"] == order.tolist()
        assert protocol["steps"] == [order[:4].tolist(), order[4:8].tolist(), order[8:].tolist()]
        assert yaml.safe_load((path / "recipe.yaml").read_text())["order"] == "per_seed"
        memory = json.loads((path / "memory/step_2.json").read_text())
        assert {label: len(ids) for label, ids in memory.items()} == {str(c): 3 for c in order}
        assert Experiment(load(str(path)), path, resume=True).run() == Run(path).results
    text, _ = write_report(paths, None, False)
    mean = np.mean([Run(path).results.average_incremental_accuracy for path in paths])
    assert re.findall(r"^\| (il_baseline.*?) +\| (\d) +\| ([\d.]+) ±", text, re.MULTILINE)[0] == (
        "il_baseline, balanced", "2", f"{mean:.2f}"
    )  # fmt: skip


def test_a_base_step_is_taken_from_a_run_of_the_same_order_only(of_seeds, tmp_path):
    row = {"base_classes": 4, "increment": [4, 2], "order": "per_seed", "epochs": 2, "base_epochs": 2, "batch_size": 64}
    content = {
        "scales": {"cpu": {"recipes": {5: "digits"}, "seeds": 1, "note": ""}},
        "rows": {"row": row | {"alpha": 0.5}, "other": row | {"alpha": 0.25}},
        "tables": {
            "t": {"title": "", "entries": [{"row": name, "steps": 5, "label": name} for name in ("row", "other")]}
        },
    }
    table = tables.table_of(content, "t", "cpu")
    settings = [*TINY, *(f"{key}={value}" for key, value in row.items())]
    for seed in (0, 1):
        recipe = load("digits", [*settings, "alpha=0.5", f"seed={seed}"])
        Experiment(recipe, tmp_path / f"digits/row-s{seed}", resume=False).run()
    work = WorkList(table.entries, [0, 1], tmp_path, None, wanted="fp32")
    donors = {job.name: work.donor(job) for job in work.missing}
    assert donors == {f"digits/other-s{seed}": tmp_path / f"digits/row-s{seed}" for seed in (0, 1)}
    other, base = load("digits", [*settings, "alpha=0.25", "seed=1"]), tmp_path / "digits/row-s1"
    taken = Experiment(other, tmp_path / "taken", resume=False, base_run=base).run()
    assert taken.steps[0] == Run(base).results.steps[0]
    in_one_order = load("digits", [*settings, "alpha=0.25", "seed=1", "order=lucir3"])
    with pytest.raises(UserError, match="order is per_seed there and lucir3 here"):
        Experiment(in_one_order, tmp_path / "refused", resume=False, base_run=base)
