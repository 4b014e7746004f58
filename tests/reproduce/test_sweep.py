"""`fastil sweep` and `fastil run --seeds` on digits, with real runs that are killed."""

import csv
import itertools
import json
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import SOAK, make_folder
from hypothesis import given
from hypothesis import strategies as st

from fastil.cli import main
from fastil.errors import UserError
from fastil.reproduce import scheduler, sweep, tables

SHORT = ["classes=4", "base_classes=2", "increment=2", "epochs=1", "base_epochs=2", "batch_size=64", "precision=fp32"]
LOSSES, EXEMPLARS, SEEDS = ["softmax", "balanced"], [1, 2], [0, 1]
SWEEP = ["loss=softmax,balanced", "exemplars_per_class=1,2", *SHORT[:-1]]
OPTIONS = ["--seeds", "0,1", "--precision", "fp32", "--jobs", "1"]

pytestmark = pytest.mark.usefixtures("forked_runs")


def command(*arguments):
    """The exit status of `fastil ...` in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["fastil", *map(str, arguments)])
        patch.setattr(scheduler, "POLL", 0.1)
        with pytest.raises(SystemExit) as stopped:
            main()
    return stopped.value.code


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A sweep of 2 x 2 rows with 2 seeds that nothing disturbed."""
    out = tmp_path_factory.mktemp("sweep")
    assert command("sweep", "digits", *SWEEP, *OPTIONS, "--out", out) == 0
    return out


def run_of(out, loss, exemplars, seed):
    return out / f"digits/loss={loss},exemplars_per_class={exemplars}-s{seed}"


def results_of(folder):
    return json.loads((folder / "results.json").read_text())


def test_the_table_has_a_row_for_every_combination(swept):
    header, *lines = csv.reader((swept / "table.csv").read_text().splitlines())
    rows = [dict(zip(header, line, strict=True)) for line in lines]
    numbers = json.loads((swept / "table.json").read_text())["rows"]
    average = {
        key: results_of(run_of(swept, *key))["average_incremental_accuracy"]
        for key in itertools.product(LOSSES, EXEMPLARS, SEEDS)
    }
    expected = list(itertools.product(LOSSES, EXEMPLARS))
    assert [row["row"] for row in rows] == [f"loss={loss} exemplars_per_class={count}" for loss, count in expected]
    first = np.array([average[*expected[0], seed] for seed in SEEDS])
    for (loss, count), row, full in zip(expected, rows, numbers, strict=True):
        values = np.array([average[loss, count, seed] for seed in SEEDS])
        assert row["average incremental"] == f"{values.mean():.2f} ± {values.std(ddof=1):.2f}"
        assert [full["seeds"][str(seed)]["average incremental"] for seed in SEEDS] == list(values)
        assert full["mean"]["average incremental"] == pytest.approx(values.mean())
        assert full["deviation"]["average incremental"] == pytest.approx(values.std(ddof=1))
        assert {f"loss={loss}", f"exemplars_per_class={count}", "epochs=1"} <= set(full["settings"])
        if full is numbers[0]:
            assert full["difference"] is full["95 % interval"] is None
        else:
            assert full["difference"] == pytest.approx((values - first).mean())
            low, high = full["95 % interval"]
            assert low <= full["difference"] <= high
    assert not [heading for heading in header if "published" in heading or heading in ("fidelity", "steps")]
    text = (swept / "table.md").read_text()
    assert "minus that of loss=softmax exemplars_per_class=1 with the same seeds, with a 95 % bootstrap" in text
    assert "CIFAR" not in text
    assert (swept / "table.png").read_bytes().startswith(b"\x89PNG")


def test_rows_share_the_base_step_where_it_is_the_same(swept):
    """Digits are unequal, so it is within a loss."""
    for loss, seed in itertools.product(LOSSES, SEEDS):
        one, two = (run_of(swept, loss, count, seed) for count in EXEMPLARS)
        assert json.loads((one / "timings.json").read_text())["base_step_of"] is None
        assert json.loads((two / "timings.json").read_text())["base_step_of"] == str(one)


def children(pid):
    """The processes that a process has started."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = path.read_text().rpartition(")")[2].split()[1]
        except OSError:  # it has ended
            continue
        if int(parent) == pid:
            found.append(int(path.parent.name))
    return found


def until(holds):
    """Wait for it, and return what it gives."""
    deadline = time.monotonic() + 300
    while not (found := holds()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def test_a_sweep_that_was_killed_twice_ends_in_the_same_bytes(swept, start, tmp_path):
    """The first time its run is left behind, which the next command must leave alone and wait for. Seed 1 is finished
    already, but in the soak."""
    for run in () if SOAK else (swept / "digits").glob("*-s1"):
        shutil.copytree(run, tmp_path / "again/digits" / run.name)
    arguments = ["sweep", "digits", *SWEEP, *OPTIONS, "--out", "again"]
    process = start(*arguments)
    (left,) = until(lambda: children(process.pid))
    os.kill(left, signal.SIGSTOP)  # before it holds its run directory
    process.kill()
    process.wait()
    process = start(*arguments)
    until(lambda: "a process of an earlier command goes on with it" in Path(process.outputs[0]).read_text())
    os.kill(left, signal.SIGCONT)
    until((run_of(tmp_path / "again", "softmax", 1, 0) / "results.json").exists)
    until((run_of(tmp_path / "again", "balanced", 1, 0) / "checkpoints/last.pt").exists)
    started = children(process.pid)
    process.kill()
    process.wait()
    for pid in started:
        os.kill(pid, signal.SIGKILL)
    assert not (tmp_path / "again/table.md").exists()
    assert command("sweep", "digits", *SWEEP, *OPTIONS, "--out", tmp_path / "again") == 0
    for name in ("table.md", "table.csv", "table.json"):
        assert (tmp_path / "again" / name).read_bytes() == (swept / name).read_bytes(), name
    for key in itertools.product(LOSSES, EXEMPLARS, SEEDS):
        for name in ("results.json", "metrics.jsonl", "predictions/step_1.npy"):
            assert (run_of(tmp_path / "again", *key) / name).read_bytes() == (run_of(swept, *key) / name).read_bytes()


def test_a_finished_sweep_trains_only_what_is_added(swept, tmp_path, monkeypatch, capsys):
    shutil.copytree(swept, tmp_path / "sweep")
    with monkeypatch.context() as patch:
        patch.setattr(scheduler, "subprocess", None)  # any start would raise
        assert command("sweep", "digits", *SWEEP, *OPTIONS, "--out", tmp_path / "sweep") == 0
    assert (tmp_path / "sweep/table.md").read_bytes() == (swept / "table.md").read_bytes()
    more = ["loss=softmax,balanced,rescaled", "exemplars_per_class=1,2", *SHORT[:-1], "--dry-run"]
    capsys.readouterr()
    assert command("sweep", "digits", *more, "--seeds", "0,", "--out", tmp_path / "sweep") in (0, None)
    said = capsys.readouterr().out
    assert "2 of 6 runs to train" in said
    assert "digits/loss=rescaled,exemplars_per_class=2-s0" in said


def test_run_takes_several_seeds(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    settings = [*SHORT, "loss=softmax", "exemplars_per_class=1"]
    assert command("run", "digits", *settings, "--seeds", "2,0") == 0
    results = [results_of(tmp_path / f"runs/digits-s{seed}") for seed in (2, 0)]
    average = np.array([result["average_incremental_accuracy"] for result in results])
    final = np.array([result["final_top1"] for result in results])
    said = capsys.readouterr().out
    assert f"average incremental accuracy {average.mean():.2f} ± {average.std(ddof=1):.2f}, " in said
    assert f"final top-1 {final.mean():.2f} ± {final.std(ddof=1):.2f}; " in said
    assert "over seeds 2, 0\nmodified: " in said
    assert said.endswith("results, figures and checkpoints: runs/digits-s2, runs/digits-s0\n")
    monkeypatch.setattr(scheduler, "subprocess", None)  # any start would raise
    assert command("run", "digits", *settings, "--seeds", "0,", "--out", "runs") == 0
    assert f"average incremental accuracy {average[1]:.2f}, final top-1 {final[1]:.2f}; seed 0\n" in (
        capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("name", "arguments", "line"),
    [
        ("sweep", [], "nothing to sweep: give a key several values, such as lr=0.1,0.03"),
        ("sweep", ["lr=0.1", "order=[1,0,2,3,4,5,6,7,8,9]"], "nothing to sweep"),
        ("sweep", ["loss=softmax,balanced", "alpha=0.5"], "loss=softmax: alpha=0.5: only loss=balanced reads it"),
        ("sweep", ["loss=balanced,softmax", "alpha=0.5,1"], "loss=softmax alpha=0.5: only loss=balanced"),
        ("sweep", ["lr=0.1,fast"], "lr=fast: must be a number above 0"),
        ("sweep", ["lr=slow,fast"], "lr=slow: must be a number above 0"),
        ("sweep", ["lr=0.1,0.2", "precision=bf16"], "precision=bf16: give --precision instead"),
        ("sweep", ["lr=0.1,0.1"], "lr=0.1 and lr=0.1 are the same experiment; leave one of them out"),
        ("sweep", ["lr=0.1,,0.2"], "lr=0.1,,0.2: a value is empty; write lr=A,B"),
        ("sweep", ["lr=0.1,"], "lr=0.1,: a value is empty; write lr=A,B"),
        ("sweep", ["lr=0.1,1e-1"], "lr=0.1 and lr=1e-1 are the same experiment; leave one of them out"),
        ("sweep", ["lr=0.1,0.2", "compile=true,false"], "compile=true,false: must be"),
        ("sweep", ["track=csv,tensorboard"], "nothing to sweep"),
        ("sweep", ["seed=0,1"], "seed=0,1: the seeds are given by --seeds"),
        ("sweep", ["lr=0.1,0.2", "lr=0.3"], "lr=0.3: lr is given twice; write its values in one, lr=A,B"),
        ("sweep", ["rate=0.1,0.2"], "unknown key rate"),
        ("sweep", ["loss"], "loss: settings are written KEY=VALUE"),
        ("sweep", ["increment=5,3"], "increment=3"),
        ("sweep", ["lr=0.1,0.2", "--seeds", "1,1"], "--seeds 1,1: a seed stands there twice"),
        ("sweep", ["lr=0.1,0.2", "--data", "/nowhere"], "digits come with scikit-learn"),
        ("run", ["seed=1", "--seeds", "2"], "seed= and --seeds: leave one of them out"),
        ("run", ["--seeds", "2", "--base", "runs/x"], "--base and --seeds: a base step is of one seed"),
        ("run", ["--jobs", "2"], "--jobs 2: one run is trained; several are given by --seeds"),
        ("run", ["--seeds", "two"], "--seeds two: give a number of runs"),
        ("run", ["lr=fast", "--seeds", "2"], "lr=fast: must be a number above 0"),
    ],
)
def test_a_mistake_is_one_line(name, arguments, line, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert command(name, "digits", *arguments) == 2
    said = capsys.readouterr().err
    assert line in said
    assert said.count("\n") == 1
    assert all(said.count(text) <= 1 for text in ("lr=fast", "alpha=0.5"))  # named once, not once more as a row
    assert list(tmp_path.iterdir()) == []


def test_torchrun_is_refused(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    for arguments in (["sweep", "digits", "lr=0.1,0.2"], ["run", "digits", "--seeds", "2"]):
        assert command(*arguments) == 2
        assert "call it without torchrun" in capsys.readouterr().err


def test_rows_on_other_images_are_refused_before_any_is_trained(tmp_path, capsys):
    data = make_folder(tmp_path / "data")
    settings = ["size=8,12", "model=resnet8", "base_classes=2", "increment=1", "exemplars_per_class=2"]
    assert command("sweep", "folder", *settings, "--data", data, "--out", tmp_path / "sweep") == 2
    assert "folder/size=12-s0 would be trained on other images than folder/size=8-s0" in capsys.readouterr().err
    assert not (tmp_path / "sweep").exists()
    assert command("sweep", "folder", *settings[1:], "lr=0.1,0.2", "--out", tmp_path / "sweep") == 2
    assert "dataset=folder needs --data PATH" in capsys.readouterr().err


def test_values_may_be_lists_and_rows_are_called_alike_however_they_are_written():
    table = sweep.table_of("digits", ["increment=[3,1,1],[1, 4]", "lr=1e-1,0.03", "classes=10"])
    assert [entry.label for entry in table.entries] == [
        f"increment={steps} lr={rate}" for steps in ("[3,1,1]", "[1,4]") for rate in ("0.1", "0.03")
    ]
    assert table.entries[1].load(7).protocol.increment == [3, 1, 1]
    assert table.entries[3].load(7).train.lr == 0.03
    assert len({entry.row for entry in table.entries}) == 4
    again = sweep.table_of("digits", ["increment=[3, 1, 1],[1,4]", "lr=0.1,0.03", "classes=10"])
    assert [e.row for e in again.entries] == [e.row for e in table.entries]
    assert [e.against for e in table.entries] == [None, *[table.entries[0].row] * 3]


def test_a_sweep_goes_where_the_same_keys_and_settings_went_before_and_nowhere_else():
    table = sweep.table_of("digits", ["lr=0.1,0.2"])
    assert sweep.default_out(table, ["lr=0.1,0.2", "compile=false"]) == Path("runs/sweep-digits-lr")

    def place(*given):
        return sweep.default_out(table, given).name

    alone = place("lr=0.1,0.2", "classes=10", "epochs=3")
    assert re.fullmatch("sweep-digits-lr-[0-9a-f]{6}", alone)
    assert alone == place("epochs=3", "lr=0.1,0.2,0.3", "classes=10")  # more values, another order
    others = [place("lr=0.1,0.2", *more) for more in ([], ["classes=10"], ["classes=10", "epochs=30"], ["epochs=3"])]
    assert len({alone, *others, place("lr=0.1,0.2", "epochs=3,4", "classes=10")}) == 6


@given(st.text(), st.text())
def test_names_of_files_are_safe_short_and_differ_as_the_texts_do(one, other):
    names = [sweep.file_name(text) for text in (one, other)]
    assert (names[0] == names[1]) == (one == other)
    for text, name in zip((one, other), names, strict=True):
        assert len(name) < 100
        assert re.fullmatch(r"[A-Za-z0-9_.=,+-]*", name)
        assert name or not text


def test_the_folders_of_a_row_are_not_those_of_one_that_is_called_alike(tmp_path):
    for name in ("order=seed1-s0", "order=seed1-s12", "order=seed1-s0-s3", "order=seed1-s5.log", "order=seed10-s0"):
        (tmp_path / "digits" / name).mkdir(parents=True)
    entry = tables.Entry("order=seed1", "digits", (), 0, "", None, {}, place="digits")
    assert {seed: path.name for seed, path in entry.folders(tmp_path).items()} == {
        0: "order=seed1-s0", 12: "order=seed1-s12"
    }  # fmt: skip


def test_a_combination_that_cannot_be_says_what_to_do():
    with pytest.raises(UserError, match=r"; every combination is trained, so values that do not go together need a sw"):
        sweep.table_of("digits", ["loss=softmax,balanced", "alpha=0.5,1"])
