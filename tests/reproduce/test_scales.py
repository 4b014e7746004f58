"""`fastil reproduce --scale`: what a scale makes of the rows, where its runs lie, and what they are said to cost."""

import json
import random
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_folder
from test_reproduce import CONTENT

from fastil import recipe_file
from fastil.cli import main
from fastil.data import Dataset, Split
from fastil.reproduce import preview, scheduler, tables, worklist
from fastil.reproduce.worklist import WorkList
from fastil.text import duration
from fastil.training import speed
from fastil.training.speed import Rates, Speeds

TABLES = ["table1", "table2", "table3", "table4"]


def pairs(name):
    """The lines of a table at the short scale, next to those at the paper's, with their recipes."""
    short, paper = (tables.only(tables.table_of(tables.read_tables(), name, s), []) for s in ("short", "paper"))
    loaded = [[recipe_file.load(entry.recipe, entry.overrides) for entry in entries] for entries in (short, paper)]
    return list(zip(short, paper, *loaded, strict=True))


@pytest.mark.parametrize("name", TABLES)
def test_the_short_scale_is_the_papers_with_every_schedule_in_proportion(name):
    for line, published, ours, theirs in pairs(name):
        assert (line.row, line.steps, line.label, line.against, line.published, line.recipe) == (
            published.row, published.steps, published.label, published.against, published.published, published.recipe,
        )  # fmt: skip
        full = theirs.train.epochs
        assert full == (250 if theirs.method.method in ("il_baseline", "bic") else 160)
        wanted = theirs.identity() | {"epochs": 30}
        for key in ("finetune_epochs", "mnemonics_epochs", "mnemonics_halving"):
            if wanted[key] is not None:
                wanted[key] = round(wanted[key] * 30 / full)
        if theirs.loss.loss == "meta_balanced":
            wanted["meta_lr"] = pytest.approx(250 / 30, rel=1e-3)
        assert ours.identity() == wanted


def test_the_schedules_of_the_short_scale_in_epochs():
    """Drops, and PODNet's and Mnemonics' own epochs, worked out by hand from those of 250 and 160."""
    rows = {line.row: ours for line, _, ours, _ in pairs("table1")}
    for row, drops in {"balanced": (12, 18, 24), "bic": (12, 18, 24), "lucir": (15, 22), "icarl": (15, 22)}.items():
        train = rows[row].train
        rates = [train.learning_rate(epoch, train.epochs_of(0)) for epoch in range(30)]
        assert [e for e in range(1, 30) if rates[e] < 0.5 * rates[e - 1]] == list(drops), row
    assert rows["podnet"].correction.finetune_epochs == 4
    assert (rows["mnemonics"].keys()["mnemonics_epochs"], rows["mnemonics"].keys()["mnemonics_halving"]) == (9, 2)


def test_alpha_can_move_as_far_at_the_short_scale():
    """Its updates move it by meta_lr times the network's learning rate; every epoch has the same number of them."""
    for _, _, ours, theirs in pairs("table3"):
        if ours.loss.loss == "meta_balanced":
            far = [
                sum(r.meta.meta_lr * r.train.learning_rate(epoch, r.train.epochs) for epoch in range(r.train.epochs))
                for r in (ours, theirs)
            ]
            assert far[0] == pytest.approx(far[1], rel=0.01)


def test_runs_lie_where_they_always_did_and_those_of_the_short_scale_apart(tmp_path):
    content = tables.read_tables()
    folders = {
        scale: [str(e.folder(tmp_path, 2).relative_to(tmp_path)) for e in tables.table_of(content, name, scale).entries]
        for name in TABLES[:1]
        for scale in ("paper", "short", "cpu")
    }
    assert "cifar100_balanced_5/balanced-s2" in folders["paper"]
    assert "cifar100_podnet_10/podnet-s2" in folders["paper"]
    assert "tiny20_5/balanced_drops-s2" in folders["cpu"]
    assert folders["short"] == [f"short/{folder}" for folder in folders["paper"]]


@pytest.fixture
def known_speeds(monkeypatch):
    """100 and 50 images a second without and with a teacher, on two cores."""
    monkeypatch.setattr(speed, "speeds", lambda recipe, size: Speeds(Rates(100.0, 50.0)))
    monkeypatch.setattr(preview, "usual_jobs", lambda work: 2)


def of_cifar100(config):
    """So many images as CIFAR-100 has."""
    train, val = (
        Split(np.zeros((100 * n, 32, 32, 3), np.uint8), np.repeat(np.arange(100), n)) for n in (500, 100)
    )  # fmt: skip
    return Dataset("CIFAR-100", [f"class {c}" for c in range(100)], train, val)


@pytest.mark.parametrize("with_data", [False, True])
def test_the_hours_of_the_short_scale(with_data, known_speeds, tmp_path, monkeypatch):
    """By hand: 30 epochs of 25,000 images, then of 5,000 new ones and 20 exemplars of each of 50 to 90 classes."""
    if with_data:
        monkeypatch.setattr(worklist, "load_dataset", of_cifar100)
    table = tables.table_of(tables.read_tables(), "table1", "short")
    entries = tables.only(table, ["balanced", "meta", "podnet"], steps=5)
    data = str(tmp_path) if with_data else None
    base, images = 30 * 25_000, [5_000 + 20 * (50 + 10 * k) for k in range(5)]
    held_out = [2 * (60 + 10 * k) for k in range(5)]
    finetuned = 4 * sum(20 * (60 + 10 * k) for k in range(5))
    updates = 30 * sum(np.subtract(images, held_out))
    seconds = {
        "balanced": base / 100 + 30 * sum(images) / 50,
        "meta": updates * 1.31 / 50,  # shares the base step; 3.1 steps more for every tenth
        "podnet": base / 100 + (30 * sum(images) + finetuned) / 50,
    }
    total = sum(seconds.values())
    # Two at once: podnet and balanced, then meta in the place of balanced. Three: meta once balanced has its base step,
    # and the three share two cores until the first is done.
    left = [seconds["meta"], *(seconds[row] - base / 100 for row in ("balanced", "podnet"))]
    of_three = base / 100 + 1.5 * min(left) + max(left) - min(left)
    of_two = max(seconds["podnet"], seconds["balanced"] + seconds["meta"])
    for jobs, spent in ((None, of_two), (1, total), (3, of_three)):
        work = WorkList(entries, [0], tmp_path, data, preview=True)
        text = preview.preview(work, jobs)
        said = {line.split("/")[1].split("-s0")[0]: line for line in text.splitlines() if "-s0" in line}
        assert set(said) == set(seconds)
        for row, line in said.items():
            assert line.split("|")[-2].strip() == duration(seconds[row])
        costs = [preview._cost(work, job, Rates(100.0, 50.0)) for job in work.jobs]
        assert preview.makespan(work, costs, jobs or 2, 2) == pytest.approx(spent, rel=1e-9)
        assert f"about {duration(spent)} with {jobs or 2} at once" in text
        assert f"{duration(total)} one by one" in text
        assert ("(2 by default: one per core" in text) == (jobs == 3)


def test_one_long_run_is_not_halved_by_two_cores(known_speeds, tmp_path):
    table = tables.table_of(tables.read_tables(), "table1", "short")
    work = WorkList(tables.only(table, ["lucir"], steps=5), [0], tmp_path, None, preview=True)
    assert len(work.jobs) == 1  # two lines of the table, one run
    text = preview.preview(work, jobs=2)
    assert "hours with 1 at once" in text


def test_the_hours_of_a_schedule_are_those_of_going_through_it_tick_by_tick():
    """Random runs in groups that share a base step, each on a core of its own."""
    draw = random.Random(3)
    for _ in range(50):
        at_once, runs = (
            draw.randint(1, 4),
            [(draw.randint(0, 3), draw.randint(1, 9)) for _ in range(draw.randint(1, 9))],
        )
        bases = {group: draw.randint(1, 9) for group, _ in runs}
        firsts = [[group for group, _ in runs].index(group) == i for i, (group, _) in enumerate(runs)]
        costs = [(bases[group] if first else 0, rest) for (group, rest), first in zip(runs, firsts, strict=True)]
        jobs = [
            SimpleNamespace(base_group=group, waits=not first) for (group, _), first in zip(runs, firsts, strict=True)
        ]
        work = SimpleNamespace(missing=jobs, waits=lambda job: job.waits)
        done, begun, ticks = [0] * len(runs), [], 0
        while any(done[i] < sum(costs[i]) for i in range(len(runs))):
            for i, (group, _) in enumerate(runs):
                first = next(k for k, (other, _) in enumerate(runs) if other == group)
                busy = sum(done[k] < sum(costs[k]) for k in begun)
                if i not in begun and busy < at_once and (firsts[i] or done[first] >= bases[group]):
                    begun.append(i)
            for i in begun:
                done[i] += 1
            ticks += 1
        assert preview.makespan(work, costs, at_once, 4) == pytest.approx(ticks)


def test_a_dry_run_on_a_busy_machine_says_what_it_would_be_on_a_quiet_one(tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "speeds", lambda *_: Speeds(Rates(100.0, 50.0), Rates(400.0, 200.0), 0.75))
    table = tables.table_of(tables.read_tables(), "table1", "short")
    work = WorkList(tables.only(table, ["lucir"], steps=5), [0], tmp_path, None, preview=True)
    seconds = sum(preview._cost(work, work.jobs[0], Rates(100.0, 50.0)))
    text = preview.preview(work)
    assert f"about {duration(seconds)} with" in text
    assert "other programs took 75 % of the processors while this was timed" in text
    assert f"on a quiet machine about {duration(seconds / 4)}" in text
    monkeypatch.setattr(speed, "speeds", lambda *_: Speeds(Rates(100.0, 50.0)))
    assert "other programs" not in preview.preview(work)


@pytest.mark.parametrize(
    ("text", "wanted"), [("1", [0]), ("3", [0, 1, 2]), ("0,2", [0, 2]), ("7,", [7]), ("2,1,0", [2, 1, 0])]
)
def test_seeds_are_a_number_of_runs_or_named(text, wanted):
    assert scheduler.seeds_of(text) == wanted


@pytest.mark.parametrize(("jobs", "threads"), [(1, "3"), (2, "1")])
def test_several_runs_at_once_have_one_thread_each(jobs, threads, tmp_path, monkeypatch):
    started = []

    class Process:
        returncode = 1

        def __init__(self, command, env, **options):
            started.append(env["OMP_NUM_THREADS"])

        def poll(self):
            return 1

        def wait(self):
            return 1

    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setattr(subprocess, "Popen", Process)
    monkeypatch.setattr(scheduler, "POLL", 0)
    table = tables.table_of(CONTENT, "small", "cpu")
    scheduler.Scheduler(WorkList(table.entries, [0], tmp_path, None), jobs).run()
    assert started == [threads] * 3


@pytest.mark.usefixtures("forked_runs")
def test_a_scale_from_the_command_line_to_the_table(tmp_path, monkeypatch, capsys):
    """One run at a scale that overrides its rows, of one seed by name, next to another scale's folder of that name."""
    monkeypatch.setattr(tables, "read_tables", lambda: CONTENT)
    (tmp_path / "digits/softmax-s4").mkdir(parents=True)
    arguments = ["small", "--scale", "short", "--only", "softmax", "--seeds", "4,", "--jobs", "1", "--out", tmp_path]
    monkeypatch.setattr(sys, "argv", ["fastil", "reproduce", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    said = capsys.readouterr().out
    assert stopped.value.code == 0, said
    assert "1 of 1 runs to train, 1 at once" in said
    assert 'Scale "short": Shorter.' in said
    assert list((tmp_path / "digits/softmax-s4").iterdir()) == []
    run = tmp_path / "short/digits/softmax-s4"
    assert len(json.loads((run / "results.json").read_text())["steps"]) == 2
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["epochs"]) for line in lines] == [(0, 2), (0, 2), (1, 1)]
    assert (tmp_path / "small-short.md").exists()
    assert torch.load(run / "checkpoints/step_1.pt", weights_only=True)
    for scale, base in (("short", run), ("cpu", None)):  # for a row of another table
        work = WorkList(tables.table_of(CONTENT, "more", scale).entries, [4], tmp_path, None)
        assert work.donor(work.jobs[0]) == base


def test_other_images_are_refused_with_a_command_that_takes_them(tmp_path, monkeypatch, capsys):
    """verify=false was named, which is no setting of a table."""
    data = make_folder(tmp_path / "my data", classes=3, train=2, val=1)
    (data / "train/class1/0.png").write_bytes(b"damaged")
    refused = {"on_corrupt=skip verify=false": "0.png", "verify=false": "3 classes instead of 100"}
    for settings, why in refused.items():
        command = f"train on these apart from it: fastil run cifar100_balanced_5 --data '{data}' {settings}"
        arguments = ["table1", "--scale", "short", "--steps", "5", "--only", "balanced", "--data", str(data)]
        monkeypatch.setattr(sys, "argv", ["fastil", "reproduce", *arguments, "--out", str(tmp_path / "out")])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr().err
        assert ended.value.code == 2
        assert why in said
        assert said.endswith(f"{command}\n")
        (data / "train/class1/0.png").unlink(missing_ok=True)
