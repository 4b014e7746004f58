"""`fastil reproduce` on digits, with real runs; the tables of the paper as they are shipped."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, SOAK
from sklearn.datasets import load_digits

from fastil import device, recipe_file
from fastil.cli import main
from fastil.errors import UserError
from fastil.protocol import class_order
from fastil.reproduce import scheduler as reproduce
from fastil.reproduce import tables, worklist
from fastil.reproduce.preview import preview
from fastil.reproduce.scheduler import precision_line
from fastil.reproduce.worklist import WorkList
from fastil.text import duration

SHORT = {"base_classes": 8, "increment": 1, "epochs": 2, "base_epochs": 2, "batch_size": 64, "compile": False}
CONTENT = {
    "scales": {
        "cpu": {"recipes": {5: "digits"}, "seeds": 1, "note": "This is not the paper's data set."},
        "short": {"like": "cpu", "folder": "short", "overrides": {"epochs": 1, "increment": 2}, "note": "Shorter."},
    },
    "rows": {
        "softmax": {"loss": "softmax", **SHORT},
        "balanced": {"loss": "balanced", **SHORT},
        "alpha_0.5": {"loss": "balanced", "alpha": 0.5, **SHORT},
        "diverging": {"loss": "softmax", "lr": "1e30", **SHORT},
        "finetuned": {"loss": "softmax", "correction": "balanced_finetuning", **SHORT},
    },
    "tables": {
        "small": {
            "title": "a small table",
            "entries": [
                {"row": "softmax", "steps": 5, "label": "plain", "average": 43.8},
                {"row": "balanced", "steps": 5, "label": "ours", "against": "softmax", "average": 62.22},
                {"row": "alpha_0.5", "steps": 5, "label": "half", "against": "softmax"},
            ],
        },
        "broken": {"title": "one fails", "entries": [{"row": "diverging", "steps": 5, "label": "bad"}]},
        "more": {"title": "another table", "entries": [{"row": "finetuned", "steps": 5, "label": "finetuning"}]},
    },
}


pytestmark = pytest.mark.usefixtures("forked_runs")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The small table, trained once."""
    out = tmp_path_factory.mktemp("tables")
    table = tables.table_of(CONTENT, "small", "cpu")
    text, status = reproduce.reproduce(table, table.entries, [0], out, None)
    return out, table, text, status


def test_the_table_holds_what_its_runs_came_to(trained):
    out, _, text, status = trained
    assert status == 0
    results = {row: json.loads((out / f"digits/{row}-s0/results.json").read_text()) for row in ("softmax", "balanced")}
    header, *lines = csv.reader((out / "small-cpu.csv").read_text().splitlines())
    table = {line[header.index("row")]: dict(zip(header, line, strict=True)) for line in lines}
    average = {row: result["average_incremental_accuracy"] for row, result in results.items()}
    assert float(table["ours"]["average incremental"]) == pytest.approx(average["balanced"], abs=0.005)
    assert float(table["ours"]["difference"]) == pytest.approx(average["balanced"] - average["softmax"], abs=0.005)
    low, high = map(float, table["ours"]["95 % interval"].split(" to "))
    assert low <= float(table["ours"]["difference"]) <= high
    last = results["balanced"]["steps"][-1]
    for column, key in (("final", "top1"), ("final base", "top1_base"), ("final old", "top1_old")):
        assert float(table["ours"][column]) == pytest.approx(last[key], abs=0.005)
    assert table["ours"]["published average"] == "62.22"
    assert table["half"]["published average"] == "-"
    assert table["plain"]["difference"] == "-"
    assert (out / "small-cpu.png").read_bytes().startswith(b"\x89PNG")
    assert "not the paper's data set" in text
    assert (out / "small-cpu.md").read_text().strip() in text


def test_rows_with_the_same_base_step_train_it_once(trained):
    """Digits are unequal: the two balanced rows share their base step, the softmax has its own."""
    out, _, _, _ = trained
    origins = {r: json.loads((out / f"digits/{r}-s0/timings.json").read_text()) for r in ("balanced", "alpha_0.5")}
    taken = {row: timings["base_step_of"] for row, timings in origins.items()}
    assert taken["balanced"] is None
    assert taken["alpha_0.5"] == str(out / "digits/balanced-s0")
    assert json.loads((out / "digits/softmax-s0/timings.json").read_text())["base_step_of"] is None
    curves = [json.loads((out / f"digits/{r}-s0/results.json").read_text())["steps"][0] for r in taken]
    assert curves[0] == curves[1]


def test_what_is_finished_is_not_trained_again(trained, monkeypatch):
    out, table, text, _ = trained
    monkeypatch.setattr(reproduce, "subprocess", None)  # any start would raise
    again, status = reproduce.reproduce(table, table.entries, [0], out, None)
    assert (again, status) == (text, 0)
    work = WorkList(table.entries, range(1), out, None)
    assert work.missing == []
    assert "0 of 3 runs to train\nprecision: " in preview(work)


def test_a_finished_table_is_written_again_without_its_images(trained, monkeypatch):
    out, table, text, _ = trained
    monkeypatch.setattr(worklist, "load_dataset", None)  # any read would raise
    assert reproduce.reproduce(table, table.entries, [0], out, None) == (text, 0)


def test_a_base_step_is_taken_from_a_run_of_another_table(trained, tmp_path):
    """And the image visits of the work list are those that the epochs of a finished run add up to."""
    shutil.copytree(trained[0] / "digits/softmax-s0", tmp_path / "digits/softmax-s0")
    table = tables.table_of(CONTENT, "more", "cpu")
    before = WorkList(table.entries, range(1), tmp_path, None).jobs[0]
    assert reproduce.reproduce(table, table.entries, [0], tmp_path, None)[1] == 0
    origin = json.loads((tmp_path / "digits/finetuned-s0/timings.json").read_text())["base_step_of"]
    assert origin == str(tmp_path / "digits/softmax-s0")
    lines = [json.loads(line) for line in (tmp_path / "digits/finetuned-s0/metrics.jsonl").read_text().splitlines()]
    assert {line["phase"] for line in lines} == {"train", "correct"}
    assert before.visits == [sum(line["images"] for line in lines if line["step"] == step) for step in range(3)]


def test_a_preview_counts_what_a_stopped_run_has_done(trained, tmp_path):
    out, table, _, _ = trained
    shutil.copytree(out / "digits/softmax-s0", tmp_path / "digits/softmax-s0")
    run = tmp_path / "digits/softmax-s0"
    (run / "results.json").unlink()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "images": 9')  # killed in the middle of a line
    stop_at(run, 2, "train", 1, 1)  # what it did after that is lost
    work = WorkList(table.entries, range(1), tmp_path, None)
    row = next(line for line in preview(work).splitlines() if "softmax-s0" in line)
    assert "begun (step 2)" in row
    kept = [line["images"] for line in lines if (line["step"], line["epoch"]) <= (2, 1)]
    assert len(kept) == 5  # two epochs of two steps, one of the third
    left = sum(line["images"] for line in lines) - sum(kept) - SHORT["batch_size"]
    assert f"| {left:,} " in row


def stop_at(run, *position):
    """Make the checkpoint of a run one of this position."""
    state = torch.load(run / "checkpoints/last.pt", weights_only=True)
    torch.save(state | {"position": list(position)}, run / "checkpoints/last.pt")


def test_a_base_step_that_has_begun_is_the_one_that_others_wait_for(trained, tmp_path):
    """A run goes on from its checkpoint, whatever base step it could take, so no other trains one meanwhile."""
    out, table, _, _ = trained
    run = tmp_path / "digits/alpha_0.5-s0"  # the second one of its group
    shutil.copytree(out / "digits/alpha_0.5-s0", run)
    for name in ("results.json", "checkpoints/step_0.pt"):
        (run / name).unlink()
    stop_at(run, 0, "train", 1, 0)
    work = WorkList(table.entries[1:], range(1), tmp_path, None)
    balanced, half = work.jobs
    assert [(work.ready(job), work.trains_base(job)) for job in work.jobs] == [(False, False), (True, True)]
    assert work.left(half) == sum(half.visits) - half.visits[0] // 2  # two epochs
    assert work.left(balanced) == sum(balanced.visits[1:])
    (run / "checkpoints/last.pt").write_bytes(b"no checkpoint")  # damaged: the run will say so itself
    assert WorkList(table.entries[1:], range(1), tmp_path, None).jobs[1].state() == "missing"


@pytest.mark.parametrize("asked", ["auto", "fp32"])
def test_runs_train_in_the_precision_that_was_asked_for(tmp_path, asked, monkeypatch):
    table = tables.table_of(CONTENT, "small", "cpu")
    monkeypatch.setattr(device, "multiplies_in_bf16", lambda device: True)
    work = WorkList(table.entries, [0], tmp_path, None, wanted=asked)
    expected = "bf16" if asked == "auto" else "fp32"
    assert all(f"precision={expected}" in work.command(job) for job in work.jobs)
    assert f"precision: {expected} (" in precision_line(work)


def test_a_preview_says_what_is_missing_and_trains_nothing(trained, tmp_path):
    _, table, _, _ = trained
    work = WorkList(table.entries, range(2), tmp_path, None)
    text = preview(work)
    assert "6 of 6 runs to train" in text
    assert text.count("trains its own") == 4  # softmax and balanced, two seeds
    assert text.count("shared") == 2
    assert list(tmp_path.iterdir()) == []
    base, *steps = work.jobs[0].visits
    counts = np.bincount(load_digits().target)[class_order("lucir", 10)[:8]]
    assert base == 2 * sum(counts - counts // 5)  # two epochs; every 5th image is a test image
    assert len(steps) == 2


SCRIPT = """
import sys
sys.path[:0] = {tests!r}
from pathlib import Path
from test_reproduce import CONTENT
from fastil.reproduce import scheduler as reproduce, tables
table = tables.table_of(CONTENT, {name!r}, "cpu")
text, status = reproduce.reproduce(table, table.entries, [0], Path({out!r}), None)
print(text)
sys.exit(status)
"""


def start(name, out):
    script = SCRIPT.format(tests=[str(Path(__file__).parent), str(ROOT / "tests")], name=name, out=str(out))
    return subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ
    )


@pytest.mark.parametrize("number", [signal.SIGINT, *([signal.SIGTERM] if SOAK else [])])
def test_a_stopped_table_goes_on_to_the_same_results(trained, tmp_path, number):
    finished, _, _, _ = trained
    process = start("small", tmp_path)
    checkpoint = tmp_path / "digits/softmax-s0/checkpoints/step_0.pt"
    deadline = time.monotonic() + 120
    while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + number, said
    kept = f"{tmp_path}: 0 of 3 runs finished, the others are checkpointed"
    assert said.splitlines()[-2:] == [kept, "stopped; run the same command to go on"]
    assert "|" not in said  # no table where no run is finished
    assert "Traceback" not in said
    _, table, _, _ = trained
    assert reproduce.reproduce(table, table.entries, [0], tmp_path, None)[1] == 0
    for row in ("softmax", "balanced", "alpha_0.5"):
        for name in ("results.json", "metrics.jsonl", "memory/step_2.json"):
            path = f"digits/{row}-s0/{name}"
            assert (tmp_path / path).read_bytes() == (finished / path).read_bytes(), path


def test_a_run_that_fails_is_named_and_does_not_stop_the_others(tmp_path):
    broken = tables.table_of(CONTENT, "broken", "cpu")
    small = tables.table_of(CONTENT, "small", "cpu")
    text, status = reproduce.reproduce(small, [*broken.entries, small.entries[0]], [0], tmp_path, None)
    assert status == 1
    assert "diverging-s0" in text
    assert "lower lr" in text
    assert len(json.loads((tmp_path / "digits/softmax-s0/results.json").read_text())["steps"]) == 3


def test_a_killed_run_is_named_and_no_progress_is_counted_for_it(tmp_path, monkeypatch, capsys):
    table = tables.table_of(CONTENT, "small", "cpu")
    work = WorkList(table.entries[:2], range(1), tmp_path, None)
    scheduler = reproduce.Scheduler(work, 1)
    first, second = work.jobs
    scheduler.bar = None
    monkeypatch.setattr(reproduce, "LINE_EVERY", 0)
    monkeypatch.setattr(reproduce, "POLL", 0.05)
    show = scheduler.show

    def kill_the_first():
        show()
        if first.running and first.has_base:
            first.process.kill()
            first.process.wait()

    monkeypatch.setattr(scheduler, "show", kill_the_first)
    scheduler.run()
    assert first.failure == "killed by SIGKILL"
    assert second.finished
    capsys.readouterr()
    show()
    assert "1 of 2 runs, 0 running, 100 % of what was missing" in capsys.readouterr().out


def test_progress_counts_what_comes_after_training_and_the_pace_of_whole_runs(trained, tmp_path, monkeypatch, capsys):
    """A run that has trained everything still selects the last exemplars and evaluates the last step."""
    out, table, _, _ = trained
    now = [100.0]
    monkeypatch.setattr(reproduce.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(reproduce, "LINE_EVERY", 0)
    work = WorkList(table.entries[:2], range(1), tmp_path, None)
    scheduler, (first, second) = reproduce.Scheduler(work, 2), work.jobs
    of_run, total = work.work_left(first), scheduler.total
    for job in work.jobs:
        job.process, job.started, job.work = SimpleNamespace(poll=lambda: None), now[0], work.work_left(job)
    first.folder.mkdir(parents=True)
    shutil.copy(out / "digits/softmax-s0/metrics.jsonl", first.folder)
    counts = np.bincount(load_digits().target)
    tests = counts // 5
    last = class_order("lucir", 10)[-1]
    assert work.work_left(first) == (counts - tests)[last] + tests.sum()
    now[0] += 60
    scheduler.show()
    said = capsys.readouterr().out
    done = total - work.work_left(first) - work.work_left(second)
    assert (
        f"0 of 2 runs, 2 running, {100 * done // total:.0f} % of what was missing, {estimate_of(120, done, total)} left"
        in said
    )
    first.finished, first.seconds = True, 90.0  # start and figures included
    first.process.poll = lambda: 0
    scheduler.show()
    assert f"1 of 2 runs, 1 running, {100 * of_run // total:.0f} % of" in (said := capsys.readouterr().out)
    assert f"{90 * work.work_left(second) / of_run:.0f} s left" in said


def estimate_of(seconds, done, total):
    """The time that a run of two takes for which nothing is done yet, at the pace of both together."""
    return duration(seconds / done * total / 2)


def test_no_run_outlives_the_command(tmp_path, monkeypatch):
    table = tables.table_of(CONTENT, "small", "cpu")
    work = WorkList(table.entries[:1], range(1), tmp_path, None)
    scheduler = reproduce.Scheduler(work, 1)

    def broken():
        raise RuntimeError("unforeseen")

    monkeypatch.setattr(scheduler, "show", broken)
    with pytest.raises(RuntimeError, match="unforeseen"):
        scheduler.run()
    assert work.jobs[0].process.poll() is not None


def test_a_finished_run_of_other_settings_is_neither_counted_nor_built_on(trained, tmp_path):
    """Its base step is another one too, so no row may wait for it or start from it."""
    out, table, _, _ = trained
    shutil.copytree(out / "digits/balanced-s0", tmp_path / "digits/balanced-s0")
    settings = tmp_path / "digits/balanced-s0/recipe.yaml"
    settings.write_text(settings.read_text().replace("weight_decay: 0.0005", "weight_decay: 0.0004"))
    text, status = reproduce.reproduce(table, table.entries[1:], [0], tmp_path, None)
    assert status == 1
    assert "a run of another recipe (weight_decay was 0.0004, now 0.0005)" in text
    rows = {line["row"]: line for line in csv.DictReader((tmp_path / "small-cpu.csv").read_text().splitlines())}
    assert rows["ours"]["seeds"] == "-"
    assert rows["half"]["seeds"] == "1"
    assert json.loads((tmp_path / "digits/alpha_0.5-s0/timings.json").read_text())["base_step_of"] is None


def test_a_directory_of_other_settings_is_left_alone(trained, tmp_path):
    out, table, _, _ = trained
    folder = tmp_path / "digits/softmax-s0"
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text((out / "digits/balanced-s0/recipe.yaml").read_text())
    text, status = reproduce.reproduce(table, [table.entries[0]], [0], tmp_path, None)
    assert status == 1
    assert "a run of another recipe" in text


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["table9"], "unknown table table9: use one of table1, table2, table3, table4"),
        (["table2", "--scale", "gpu"], "--scale gpu: unknown; use one of paper, short, cpu"),
        (["table2", "--only", "bic"], "--only bic: no such row in table2; its rows are alpha_0.1"),
        (["table2", "--only", "meta,alhpa_0.5"], "--only alhpa_0.5: no such row in table2; did you mean alpha_0.5?"),
        (["table1", "--only", "IL-Baseline w/ Balanced-CE"], "did you mean IL-Baseline w/ BalancedS-CE?"),
        (["table2", "--only", "meta-s0,meta-s1"], "--only names runs of several seeds"),
        (["table2", "--only", "meta-s0", "--seeds", "3"], "--seeds 3: --only names a run of seed 0"),
        (["table2", "--precision", "half"], "--precision half: use one of auto, fp32, tf32, bf16"),
        (["table2", "--scale", "short", "--precision", "tf32", "--dry-run"], "precision=tf32: only CUDA"),
        (
            ["table2", "--dry-run"],
            "tiny20_5 trains on your own images: give --data DIR with train/CLASS and val/CLASS of 20",
        ),
        (["table3", "--scale", "short", "--steps", "10"], "--steps 10: no rows with so many at --scale short; use 5"),
        (["table2", "--steps", "3"], "--steps 3: no rows with so many at --scale cpu; use 5 or 10"),
        (["table2", "--seeds", "0"], "--seeds 0: a number of runs must be at least 1"),
        (["table2", "--seeds", "20260101"], 'one seed alone is written "20260101,"'),
        (["table2", "--seeds", "a"], "--seeds a: give a number of runs, such as 3, or the seeds with commas"),
        (["table2", "--seeds", "0,2,0"], "--seeds 0,2,0: a seed stands there twice"),
        (
            ["table2", "--seeds", "5000000000,"],
            "seed=5000000000: must be an integer of at least 0 and below 4294967296",
        ),
        (["table2", "--jobs", "0"], "--jobs"),
        (["table2", "--jobs", "many"], "--jobs"),
        (["table2", "--dry-run", "--data", "/nowhere"], "/nowhere"),
        (["table2", "--scale", "paper"], "fastil download cifar100"),
        (["table2", "--scale", "short"], "fastil download cifar100"),
    ],
)
def test_a_mistake_is_one_line(arguments, line, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["fastil", "reproduce", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert line in said
    assert said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_an_out_that_cannot_be_written_is_one_line(tmp_path):
    table = tables.table_of(CONTENT, "small", "cpu")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="choose another --out"):
        reproduce.reproduce(table, table.entries, [0], tmp_path / "file", None)


def test_only_takes_rows_by_name_or_beginning():
    table = tables.table_of(tables.read_tables(), "table3", "cpu")
    assert {e.row for e in tables.only(table, ["meta"])} == {"meta"}  # a whole name wins over its being a beginning
    assert {e.row for e in tables.only(table, ["meta_"])} == {"meta_r5", "meta_r10", "meta_r50"}
    assert [e.row for e in tables.only(table, ["meta", "meta"])] == ["meta"]
    assert len(tables.only(table, [])) == 14
    assert [e.row for e in tables.only(table, ["softmax, R = 5, meta_r5"])] == ["softmax_r5", "meta_r5"]  # a label
    with pytest.raises(UserError, match="no such row"):
        tables.only(table, ["lucir"])


@pytest.mark.parametrize(
    ("name", "scale", "wanted", "rows"),
    [
        ("table1", "paper", ["il-baseline w/ balanceds-ce"], ["balanced 5", "balanced 10"]),
        ("table1", "paper", ["cifar100_il_baseline_5,cifar100_lucir_10"], ["softmax 5", "lucir 10"]),
        ("table1", "short", ["cifar100_meta_5", "cifar100_bic_5"], ["bic 5", "meta 5"]),  # at its own schedule
        ("table2", "cpu", ["tiny20_10"], ["balanced 10"]),  # which the recipe is, as it stands
        ("table4", "cpu", ["tiny20_5"], ["balanced 5"]),
        ("table2", "short", ["alpha_0.5-s1"], ["alpha_0.5 5", "alpha_0.5 10"]),
        ("table2", "short", ["cifar100_balanced_10/alpha_0.5-s1, meta-s1"], ["meta 5", "alpha_0.5 10", "meta 10"]),
    ],
)
def test_only_takes_what_tables_and_dry_runs_print(name, scale, wanted, rows):
    table = tables.table_of(tables.read_tables(), name, scale)
    assert list(dict.fromkeys(f"{e.row} {e.steps}" for e in tables.only(table, wanted))) == rows
    assert tables.seed_of(wanted) == (1 if "-s1" in wanted[0] else None)


def test_every_run_that_a_dry_run_prints_is_a_name_for_only(tmp_path):
    for scale in ("short", "cpu"):
        table = tables.table_of(tables.read_tables(), "table3", scale)
        for entry in table.entries:
            folder = entry.folder(tmp_path, 3)
            printed = f"{folder.parent.name}/{folder.name}"
            assert tables.only(table, [printed]) == [entry]
            assert tables.seed_of([printed]) == 3


@pytest.mark.parametrize("scale", ["cpu", "paper"])
@pytest.mark.parametrize("name", ["table2", "table3", "table4"])
def test_every_row_of_the_tables_is_a_recipe(name, scale):
    table = tables.table_of(tables.read_tables(), name, scale)
    for entry in table.entries:
        loaded = recipe_file.load(entry.recipe, entry.overrides)
        assert f"{entry.steps} x" in loaded.description
        if entry.against is not None:
            reference = next(e for e in table.entries if (e.row, e.steps) == (entry.against, entry.steps))
            other = recipe_file.load(reference.recipe, reference.overrides)
            assert other.memory == loaded.memory
            assert other.train == loaded.train


def test_published_numbers_are_the_papers():
    """Typed from Tables 2, 3 and 4 of arXiv 2103.12532 once more: average, final base, final."""
    content = tables.read_tables()

    def published(name, key="average"):
        return [entry.published.get(key) for entry in tables.only(tables.table_of(content, name, "paper"), [])]

    assert published("table2") == [62.68, 64.09, 63.80, 62.22, 64.11, 57.68, 59.40, 59.52, 58.32, 60.08]
    assert published("table2", "base") == [68.38, 63.99, 58.78, 52.08, 61.20, 63.43, 60.28, 56.48, 51.01, 60.39]
    assert published("table2", "final") == [51.54, 54.88, 55.44, 54.55, 55.21, 44.71, 47.86, 49.62, 49.57, 49.65]
    softmax, balanced = [24.83, 30.59, 37.27, 43.80, 52.99], [51.55, 56.93, 60.11, 62.22, 64.44]
    assert published("table3") == [*softmax, *balanced, 62.13, 63.02, 64.11, 65.60]
    assert published("table4") == [43.80, 49.75, 55.95, 57.01, 59.46, 61.21, 62.22, 64.11]
