"""What trackers are told: each line of metrics.jsonl and each step once, whatever happened to the run."""

import csv
import json
import shutil
import signal
import struct
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import assert_user_error, environment
from forks import NO_FIGURES
from PIL import Image

import fastil as front
from fastil import ranks
from fastil.errors import UserError
from fastil.recipe_file import load
from fastil.training import trackers
from fastil.training.experiment import Experiment
from fastil.training.trackers import TensorBoard, WeightsAndBiases
from fastil.training.tracking import Tracking

SETTINGS = [
    "digits", "classes=4", "base_classes=2", "increment=1", "epochs=2", "base_epochs=2", "batch_size=64",
    "exemplars_per_class=3", "precision=fp32", "correction=balanced_finetuning", "finetune_epochs=1",
]  # fmt: skip
ALL = "track=tensorboard,wandb,csv"

# fastil, which is killed after the first epoch of step 1, before a checkpoint has it.
KILLED = """
import os, signal
from pathlib import Path
from fastil.training.trainer import Trainer
from fastil.cli import main

train_step = Trainer.train_step

def killed(*arguments):
    if Path("run/metrics.jsonl").read_text().count("\\n") == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    train_step(*arguments)

Trainer.train_step = killed
main()
"""


@pytest.fixture
def figures(request):
    """Whether the runs of a test draw figures, which takes them a second."""
    return getattr(request, "param", False)


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")


@pytest.fixture(scope="module")
def plain(forks, tmp_path_factory):
    """A run that nobody tracks and nothing happens to."""
    folder = tmp_path_factory.mktemp("plain")
    done = forks.run(["-m", "fastil.cli", "run", *SETTINGS, "--out", "run"], folder, environment() | {NO_FIGURES: "1"})
    assert done.returncode == 0, done.stderr
    return folder / "run"


def lines_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def expected(run):
    """All points of a run by name, as (x, value), of its own files."""
    points = {}
    for number, line in enumerate(lines_of(run), 1):
        phase = line.pop("phase")
        for name, value in (line | {"run_epoch": number}).items():
            points.setdefault(f"{phase}/{name}", []).append((number, value))
    steps = json.loads((run / "results.json").read_text())["steps"]
    measures = json.loads((run / "measures.json").read_text())
    del measures["groups"]
    for number, step in enumerate(steps):
        average = float(np.mean([step["top1"] for step in steps[: number + 1]]))
        values = step | {"average_incremental_accuracy": average} | {k: v[number] for k, v in measures.items()}
        for name, value in values.items():
            if value is not None:
                points.setdefault(f"test/{name}", []).append((step["classes_seen"], value))
    return points


def assert_same_points(found, wanted):
    assert found.keys() == wanted.keys()
    for name, points in wanted.items():
        assert [x for x, _ in found[name]] == [x for x, _ in points], name
        np.testing.assert_allclose([v for _, v in found[name]], [v for _, v in points], rtol=1e-6, err_msg=name)


def curves(points, *axes):
    """The points without those that say where a record stands, and without axes that the viewer has of its own."""
    places = {
        f"{phase}/{name}" for phase in ("train", "correct", "test") for name in ("step", "epoch", "epochs", "images")
    }
    assert places & points.keys()
    return {name: found for name, found in points.items() if name not in places | set(axes)}


AXES = ["train/run_epoch", "correct/run_epoch", "test/classes_seen"]


def of_csv(run):
    """The points of epochs.csv and steps.csv."""
    points = {}
    for file, axis in (("epochs.csv", "run_epoch"), ("steps.csv", "classes_seen")):
        for row in csv.DictReader((run / file).read_text().splitlines()):
            for name, text in row.items():
                if name != "phase" and text:
                    points.setdefault(f"{row['phase']}/{name}", []).append((int(row[axis]), float(text)))
    return points


def accumulated(folder):
    """The event files of a folder as TensorBoard reads them."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    return accumulator.EventAccumulator(str(folder), dict.fromkeys(("scalars", "images", "tensors"), 0)).Reload()


def of_tensorboard(events):
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def wandb_records(path):
    """The records of W&B's offline file: LevelDB's log format after a header of seven bytes, each a protobuf."""
    record = pytest.importorskip("wandb.proto.wandb_internal_pb2").Record
    data, at, content = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        room = 32768 - at % 32768
        if room < 7:  # of a block, too little for another header
            at += room
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        content = (b"" if kind in (1, 2) else content) + data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or its last part
            yield record.FromString(content)


def of_wandb(run):
    """The points and the run record of the one offline run in its folder."""
    (path,) = run.glob("wandb/offline-run-*/*.wandb")
    points, indices, about = {}, [], None
    for record in wandb_records(path):
        if record.WhichOneof("record_type") == "run":
            about = record.run
        if record.WhichOneof("record_type") != "history":
            continue
        row = {item.nested_key[0] if item.nested_key else item.key: json.loads(item.value_json)
               for item in record.history.item}  # fmt: skip
        indices.append(row.pop("_step"))
        row = {name: value for name, value in row.items() if not name.startswith("_")}
        (phase,) = {name.split("/")[0] for name in row}
        x = row.get(f"{phase}/run_epoch", row.get(f"{phase}/classes_seen"))
        for name, value in row.items():
            points.setdefault(name, []).append((x, value))
    assert indices == list(range(1, len(indices) + 1))
    return points, about


@pytest.mark.parametrize("figures", [True], indirect=True)
def test_after_a_kill_and_a_resume_trackers_hold_everything_once_and_the_run_is_the_same(
    forks, fastil, tmp_path, plain
):
    pytest.importorskip("wandb")
    killed = forks.run(["-c", KILLED, "run", *SETTINGS, ALL, "--out", "run"], tmp_path, environment())
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    run = tmp_path / "run"
    first = next(run.glob("wandb/offline-run-*"))
    told = of_csv(run)["train/loss"]
    assert [x for x, _ in told] == [1, 2, 3]
    assert torch.load(run / "checkpoints/last.pt", weights_only=True)["position"] == [1, "train", 0, 0]
    resumed = fastil("run", *SETTINGS, ALL, "--out", "run", "--resume")
    assert resumed.returncode == 0, resumed.stderr
    wanted = expected(run)
    assert len(lines_of(run)) == 2 + 2 * (2 + 1)
    assert_same_points(of_csv(run), wanted)

    events = accumulated(run / "tensorboard")
    assert_same_points(of_tensorboard(events), curves(wanted, *AXES))
    pictures = {path.stem: path for path in (run / "figures").glob("*.png")}
    assert set(events.Tags()["images"]) == {f"figures/{name}" for name in pictures}
    (image,) = events.Images("figures/accuracy")
    with Image.open(pictures["accuracy"]) as drawn:
        assert (image.width, image.height) == drawn.size
    (text,) = events.Tensors("settings/text_summary")
    assert b"loss: balanced" in text.tensor_proto.string_val[0]
    (text,) = events.Tensors("protocol/text_summary")
    assert b"step  classes  new images " in text.tensor_proto.string_val[0]

    points, about = of_wandb(run)
    assert not first.exists()
    media = {name: points.pop(name) for name in list(points) if name.startswith("figures/")}
    assert set(media) == {f"figures/{name}" for name in pictures}
    assert_same_points(points, curves(wanted))
    config = {update.key: json.loads(update.value_json) for update in about.config.update}
    recipe = load(SETTINGS[0], SETTINGS[1:]).keys()
    assert all(config[key] == recipe[key] for key in ("loss", "epochs", "exemplars_per_class", "milestones"))
    assert about.run_id == first.name.rsplit("-", 1)[1]
    assert not about.resume, "a sync would append it to what was synced before"

    for name in ("results.json", "metrics.jsonl", "measures.json", "memory/step_2.json"):
        assert (run / name).read_bytes() == (plain / name).read_bytes(), name
    for step in range(3):
        ours, theirs = (torch.load(f / f"checkpoints/step_{step}.pt", weights_only=True) for f in (run, plain))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_finished_run_is_told_to_a_tracker_that_it_did_not_have(fastil, tmp_path, plain):
    shutil.copytree(plain, tmp_path / "run")
    done = fastil("run", "run", "track=[csv,tensorboard]", "--resume")
    assert done.returncode == 0, done.stderr
    wanted = expected(plain)
    assert_same_points(of_csv(tmp_path / "run"), wanted)
    assert_same_points(of_tensorboard(accumulated(tmp_path / "run/tensorboard")), curves(wanted, *AXES))


def test_a_base_step_that_is_taken_over_is_told(fastil, tmp_path, plain):
    done = fastil("run", *SETTINGS, "exemplars_per_class=2", "--base", plain, "track=csv", "--out", "run")
    assert done.returncode == 0, done.stderr
    assert "base step taken" in done.stdout
    assert_same_points(of_csv(tmp_path / "run"), expected(tmp_path / "run"))


def test_a_stop_by_a_signal_ends_the_record(start, tmp_path):
    pytest.importorskip("wandb")
    settings = [*SETTINGS, "epochs=40", "track=csv,wandb", "--out", "run"]
    process, metrics = start("run", *settings), tmp_path / "run/metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") >= 3):
        time.sleep(0.01)
    process.terminate()
    assert process.wait() == 128 + signal.SIGTERM, process.communicate()
    run = tmp_path / "run"
    ends = [r.exit.exit_code for r in wandb_records(next(run.glob("wandb/offline-run-*/*.wandb")))
            if r.WhichOneof("record_type") == "exit"]  # fmt: skip
    assert ends == [1] * len(ends) != []
    assert {len(points) for name, points in of_csv(run).items() if name == "train/loss"} == {
        sum(line["phase"] == "train" for line in lines_of(run))
    }


@pytest.fixture
def copied(tmp_path, plain):
    """A finished run, to be told again in this process."""
    return shutil.copytree(plain, tmp_path / "run")


def told_again(run, callback, monkeypatch, **settings):
    monkeypatch.setattr("fastil.training.run_directory.figures.draw_run", lambda path: None)
    return front.run(run, resume=True, callback=callback, **settings)


def test_a_callback_is_told_the_same(copied, monkeypatch):
    records = []
    (copied / "figures/accuracy.png").touch()
    told_again(copied, records.append, monkeypatch)
    assert [record["index"] for record in records] == list(range(len(records)))
    begin, *middle, end = records
    assert (begin["kind"], begin["run"], begin["settings"]["loss"]) == ("begin", str(copied), "balanced")
    assert begin["protocol"] == json.loads(json.dumps(begin))["protocol"]
    assert (end["kind"], end["finished"]) == ("end", True)
    assert end["figures"] == {"accuracy": str(copied / "figures/accuracy.png")}
    points = {}
    for record in middle:
        for name, value in record["scalars"].items():
            points.setdefault(f"{record['phase']}/{name}", []).append((record["x"], value))
    assert_same_points(points, expected(copied))
    order = [(record["kind"], record["scalars"]["step"]) for record in middle]
    assert order == [(k, s) for s in range(3) for k in ["epoch"] * (2 if s == 0 else 3) + ["step"]]


def test_a_tracker_that_fails_is_left_out_and_the_run_goes_on(tmp_path, monkeypatch, capsys, plain):
    """While it trains; the other tracker is told everything."""
    monkeypatch.setattr("fastil.training.run_directory.figures.draw_run", lambda path: None)
    told = []

    def failing(record):
        told.append(record["kind"])
        if len(told) == 4:
            raise OSError("no route\nto host")

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the run it is compared with
    settings = dict(part.split("=") for part in [*SETTINGS[1:], "track=csv"])
    settings = {key: int(value) if value.isdecimal() else value for key, value in settings.items()}
    run = front.run("digits", out=tmp_path / "run", callback=failing, **settings)
    torch.set_num_threads(threads)
    assert told == ["begin", "epoch", "epoch", "step"]
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("callback failed")]
    assert len(said) == 1
    assert "OSError: no route to host" in said[0]
    assert_same_points(of_csv(run.path), expected(run.path))
    assert (run.path / "results.json").read_bytes() == (plain / "results.json").read_bytes()


def test_a_damaged_record_of_the_run_is_said_and_nothing_is_told(copied, monkeypatch, capsys):
    with open(copied / "metrics.jsonl", "r+b") as file:
        file.write(b"{oops")
    told = []
    told_again(copied, told.append, monkeypatch)
    assert told == []
    assert "nothing is tracked any more: " in capsys.readouterr().out


def test_what_cannot_be_is_refused_before_a_directory_is_made(fastil, tmp_path, monkeypatch):
    assert_user_error(fastil("run", *SETTINGS, "track=mlflow"), "track=mlflow", "'csv', 'tensorboard' or 'wandb'")
    assert_user_error(fastil("run", *SETTINGS, "track=csv,"), "several of them with commas")
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^track=wandb: needs wandb; pip install 'fastil\[track\]'"):
        Experiment(load("digits", ["track=wandb"]), tmp_path / "run", resume=False)
    with pytest.raises(UserError, match=r"^callback: must be a function"):
        front.run("digits", out=tmp_path / "run", callback=[print])
    assert not list(tmp_path.iterdir())


def test_a_run_that_fails_before_its_first_checkpoint_leaves_nothing_behind(fastil, tmp_path):
    done = fastil("run", *SETTINGS, "lr=1e30", "track=csv,tensorboard", "--out", "run")
    assert_user_error(done, "training diverged")
    assert not list(tmp_path.iterdir())


def test_names_are_a_list_or_text_with_commas_and_each_counts_once():
    recipe = load("digits", ["track=csv,tensorboard,csv"])
    assert recipe.identity() == load("digits").identity()
    assert recipe.train.track == load("digits", {"track": ["csv", "tensorboard", "csv"]}).train.track
    assert list(trackers.built(recipe.train.track)) == ["track=csv", "track=tensorboard"]
    assert load("digits", ["track=[]"]).train.track == load("digits").train.track == []


def test_only_the_first_process_tells(monkeypatch, tmp_path):
    monkeypatch.setattr(ranks, "first", lambda: False)
    assert not Tracking(tmp_path, ["csv"], print, print).told


def epochs(count):
    return [{"index": n, "kind": "epoch", "phase": "train", "x": n, "scalars": {"run_epoch": n, "loss": 1 / n}}
            for n in range(1, count + 1)]  # fmt: skip


def begin_of(run):
    return {"index": 0, "kind": "begin", "run": str(run), "settings": {"lr": 0.1}, "protocol": "| step |\n| 0 |"}


def test_a_list_is_told_by_its_places_and_a_new_column_of_csv_is_empty_before(tmp_path):
    tracking = Tracking(tmp_path, ["csv"], None, print)
    (write,) = tracking.told.values()
    write(begin_of(tmp_path))
    tracking.epoch({"phase": "train", "loss": 2.5})
    tracking.epoch({"phase": "train", "loss": 1.5, "alpha": [0.25, 4.0], "note": None})
    rows = list(csv.reader((tmp_path / "epochs.csv").read_text().splitlines()))
    assert rows == [
        ["phase", "run_epoch", "loss", "alpha/0", "alpha/1"],
        ["train", "1", "2.5", "", ""],
        ["train", "2", "1.5", "0.25", "4.0"],
    ]


def test_a_tensorboard_that_has_read_the_file_before_shows_no_point_twice(tmp_path):
    """As one that is open has, when a run goes on."""
    pytest.importorskip("tensorboard")
    write, folder = TensorBoard(), tmp_path / "tensorboard"
    for record in [begin_of(tmp_path), *epochs(3)]:
        write(record)
    write.writer.close()
    (before,) = folder.iterdir()
    before.rename(tmp_path / "events.out.tfevents.0000000000.before")
    again = TensorBoard()
    for record in [begin_of(tmp_path), *epochs(4), {"index": 5, "kind": "end", "finished": True, "figures": {}}]:
        again(record)
    assert len(list(folder.iterdir())) == 1
    (tmp_path / "events.out.tfevents.0000000000.before").rename(folder / "events.out.tfevents.0000000000.before")
    assert [e.step for e in accumulated(folder).Scalars("train/loss")] == [1, 2, 3, 4]


def test_online_wandb_goes_on_with_the_run_of_its_id_and_sends_what_it_lacks(tmp_path, monkeypatch):
    """Against a stand-in of W&B's client, as there is no server: it has the run up to index 2."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setattr(wandb, "setup", lambda: SimpleNamespace(settings=SimpleNamespace(mode="online", project=None)))
    begun, logged = [], []
    stub = SimpleNamespace(
        starting_step=3, log=lambda content, step, commit: logged.append((step, commit, content)),
        define_metric=lambda *names, **more: None, finish=lambda exit_code: logged.append(exit_code),
    )  # fmt: skip
    monkeypatch.setattr(wandb, "init", lambda **given: begun.append(given) or stub)
    for _ in range(2):
        write = WeightsAndBiases()
        for record in [begin_of(tmp_path), *epochs(4), {"index": 5, "kind": "end", "finished": False, "figures": {}}]:
            write(record)
    sent = [(n, True, {"train/run_epoch": n, "train/loss": 1 / n}) for n in (3, 4)]
    assert logged == [*sent, 1] * 2
    assert {given["resume"] for given in begun} == {"allow"}
    assert len({given["id"] for given in begun}) == 1
    assert begun[0]["project"] == "fastil"
