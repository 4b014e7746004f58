"""Interrupted, killed, out of disk, started twice: nothing is lost, and a resumed run is the same run.

Short counts here; FASTIL_SOAK=1 (make soak) kills many times at random moments.
"""

import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import SOAK, TINY, assert_user_error, environment, make_folder

from fastil import files
from fastil.errors import UserError
from fastil.recipe_file import load
from fastil.training.experiment import Experiment

SETTINGS = [
    "digits", "base_classes=6", "increment=2", "epochs=3", "base_epochs=3", "batch_size=32", "checkpoint_every=1",
    "exemplars_per_class=3", "precision=fp32",
]  # fmt: skip
STEPS, EPOCHS = 3, 9  # of the whole run
KILLS = 25 if SOAK else 2
SAME = ["results.json", "metrics.jsonl", "protocol.json", *(f"memory/step_{k}.json" for k in range(STEPS))]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The files of a run that nothing happened to. Its process is no fork, so that the hashes of strings are others
    than in those it is compared with."""
    folder = tmp_path_factory.mktemp("undisturbed")
    command = [sys.executable, "-m", "fastil.cli", "run", *SETTINGS, "--out", "run"]
    process = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True)
    assert (process.returncode, process.stderr) == (0, "")
    return folder / "run"


def assert_same(run, undisturbed):
    for name in SAME:
        assert (run / name).read_bytes() == (undisturbed / name).read_bytes(), name
    for step in range(STEPS):
        name = f"checkpoints/step_{step}.pt"
        ours, theirs = (torch.load(folder / name, weights_only=True) for folder in (run, undisturbed))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs), name


def wait_for(process, run, lines):
    """Until metrics.jsonl has so many lines or the process is over."""
    metrics = run / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") >= lines):
        time.sleep(0.002)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_stops_at_the_next_batch_and_resume_ends_in_the_same_files(
    start, fastil, tmp_path, undisturbed, number
):
    run = tmp_path / "run"
    process = start("run", *SETTINGS, "--out", "run")
    wait_for(process, run, 4)
    process.send_signal(number)
    output = process.communicate()[0]
    assert process.returncode == 128 + number, output
    assert "--resume" in output
    assert "Traceback" not in output
    assert not (run / "results.json").exists() or json.loads((run / "results.json").read_text()) != json.loads(
        (undisturbed / "results.json").read_text()
    )
    finished = fastil("run", *SETTINGS, "--out", "run", "--resume")
    assert finished.returncode == 0, finished.stderr
    assert "going on at step" in finished.stdout
    assert_same(run, undisturbed)


def test_killed_at_any_moment_resume_ends_in_the_same_files(start, fastil, tmp_path, undisturbed):
    run, moments = tmp_path / "run", random.Random(0)
    for _ in range(KILLS):
        process = start("run", *SETTINGS, "--out", "run", "--resume")
        lines = (run / "metrics.jsonl").read_text().count("\n") if (run / "metrics.jsonl").exists() else 0
        wait_for(process, run, min(lines + 1 + 6 // KILLS, EPOCHS - 1))
        time.sleep(moments.random() * 0.3)
        process.kill()
        process.wait()
        for path in run.rglob("*.json"):
            json.loads(path.read_text())  # whole or absent
        for path in (run / "checkpoints").glob("*.pt"):
            torch.load(path, weights_only=True)
    finished = fastil("run", *SETTINGS, "--out", "run", "--resume")
    assert finished.returncode == 0, finished.stderr
    assert_same(run, undisturbed)


TIMED = """
import os, signal, sys, time, types
from fastil.training import trainer
from fastil.cli import main

seconds, train_step, updates = iter(range(0, 10**9, 60)), trainer.Trainer.train_step, []
trainer.time = types.SimpleNamespace(perf_counter=time.perf_counter, monotonic=lambda: float(next(seconds)))

def killed(*arguments):
    updates.append(1)
    if len(updates) == 42:
        os.kill(os.getpid(), signal.SIGKILL)
    train_step(*arguments)

trainer.Trainer.train_step = killed
main()
"""


def test_killed_after_a_checkpoint_by_time_resume_goes_on_there(fastil, tmp_path, undisturbed):
    """A clock that says a minute later whenever it is read, no checkpoint by epochs: one by time after ten batches."""
    settings = [*SETTINGS, "checkpoint_every=100", "checkpoint_minutes=10", "--out", "run"]
    command = [sys.executable, "-c", TIMED, "run", *settings]
    process = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert process.returncode == -signal.SIGKILL, process.stderr
    state = torch.load(tmp_path / "run/checkpoints/last.pt", weights_only=True)
    # Read as training begins, before every batch and after a checkpoint: so before batches 9, 19, ... of the run.
    images = json.loads((undisturbed / "metrics.jsonl").read_text().splitlines()[0])["images"]
    epoch, batch = divmod(39, -(-images // 32))
    assert epoch == 1
    assert batch > 0
    assert state["position"] == [0, "train", epoch, batch]
    trained, waited = state["trainer"]["clock"][1:]
    assert 0 < waited < trained < 60
    finished = fastil("run", *settings, "--resume")
    assert finished.returncode == 0, finished.stderr
    assert f"going on at step 0, phase train, epoch {epoch + 1}, batch {batch + 1}" in finished.stdout
    assert_same(tmp_path / "run", undisturbed)


def test_resuming_a_finished_run_changes_nothing(fastil, tmp_path, undisturbed):
    shutil.copytree(undisturbed, tmp_path / "run")
    process = fastil("run", *SETTINGS, "--out", "run", "--resume")
    assert process.returncode == 0, process.stderr
    assert_same(tmp_path / "run", undisturbed)
    assert "average incremental accuracy" in process.stdout


def test_an_existing_directory_another_recipe_and_other_images_are_refused(fastil, tmp_path, undisturbed):
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    assert_user_error(fastil("run", *SETTINGS, "--out", "run"), "exists already", "--resume")
    other = [*SETTINGS, "lr=0.05", "--out", "run", "--resume"]
    assert_user_error(fastil("run", *other), "another recipe", "lr was 0.03, now 0.05")
    protocol = json.loads((run / "protocol.json").read_text())
    protocol["dataset"]["train"] |= {"sha256": "0" * 64, "identity": "other"}
    (run / "protocol.json").write_text(json.dumps(protocol))
    assert_user_error(fastil("run", *SETTINGS, "--out", "run", "--resume"), "other images", "--data")
    (run / "protocol.json").write_text("{")
    assert_user_error(fastil("run", *SETTINGS, "--out", "run", "--resume"), "protocol.json: damaged", "new --out")
    assert (run / "results.json").read_bytes() == (undisturbed / "results.json").read_bytes()
    (run / "recipe.yaml").unlink()
    assert_user_error(fastil("run", *SETTINGS, "--out", "run", "--resume"), "recipe.yaml", "missing")


def test_a_second_process_on_the_same_directory_is_refused(start, fastil, tmp_path):
    process = start("run", *SETTINGS, "epochs=500", "--out", "run")
    wait_for(process, tmp_path / "run", 1)
    assert_user_error(fastil("run", *SETTINGS, "epochs=500", "--out", "run", "--resume"), "another process")
    assert process.poll() is None


def test_a_damaged_checkpoint_is_named(fastil, tmp_path, undisturbed):
    shutil.copytree(undisturbed, tmp_path / "run")
    last = tmp_path / "run/checkpoints/last.pt"
    last.write_bytes(last.read_bytes()[:1000])
    for state in last.parent.glob("state_*.pt"):  # else the run goes on from there
        state.unlink()
    words = "last.pt: not a whole checkpoint", "choose another --out, where --base run takes over the base step"
    assert_user_error(fastil("run", *SETTINGS, "--out", "run", "--resume"), *words)


def test_resume_never_takes_over_a_folder_that_is_no_run(fastil, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/metrics.jsonl").write_text("precious")
    assert_user_error(fastil("run", *SETTINGS, "--out", "mine", "--resume"), "not a run directory")
    assert (tmp_path / "mine/metrics.jsonl").read_text() == "precious"
    assert len(list((tmp_path / "mine").iterdir())) == 1


def test_a_folder_that_was_moved_resumes_and_other_images_do_not(fastil, tmp_path):
    data = make_folder(tmp_path / "here")
    settings = ["folder", "epochs=1", "base_epochs=1", "batch_size=8", "size=12", "model=resnet8", "base_classes=2"]
    settings += ["increment=1", "exemplars_per_class=2", "precision=fp32", "--out", "run"]
    assert fastil("run", *settings, "--data", data).returncode == 0
    data.rename(tmp_path / "there")
    assert fastil("run", *settings, "--data", tmp_path / "there", "--resume").returncode == 0
    other = make_folder(tmp_path / "other", train=7)
    assert_user_error(fastil("run", *settings, "--data", other, "--resume"), "other images")
    image = next((tmp_path / "there/train/class0").iterdir())
    image.rename(image.with_name("zz.png"))
    resumed = fastil("run", *settings, "--data", tmp_path / "there", "--resume")
    assert_user_error(resumed, "the same images in another order")
    resumed = fastil("run", *settings[:-1], "based", "--data", tmp_path / "there", "--base", "run")
    assert_user_error(resumed, "the same images in another order")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_leaves_the_last_checkpoint_and_resume_goes_on(fastil, tmp_path, monkeypatch, number, undisturbed):
    """The third checkpoint meets a full disk in the middle of its file."""
    calls, real = [0], os.fsync

    def full(descriptor):
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith("last.pt.partial"):
            calls[0] += 1
            if calls[0] == 3:
                raise OSError(number, os.strerror(number))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the processes it is compared with
    recipe = load(SETTINGS[0], SETTINGS[1:])
    with pytest.raises(UserError, match=r"disk full.*--resume"):
        Experiment(recipe, tmp_path / "run", resume=False).run()
    torch.set_num_threads(threads)
    assert not list((tmp_path / "run").rglob("*.partial"))
    state = torch.load(tmp_path / "run/checkpoints/last.pt", weights_only=True)
    assert state["position"] == [0, "train", 2, 0]
    monkeypatch.undo()
    finished = fastil("run", *SETTINGS, "--out", "run", "--resume")
    assert finished.returncode == 0, finished.stderr
    assert_same(tmp_path / "run", undisturbed)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_torch_reports_a_full_disk_in_a_way_that_is_recognised(tmp_path):
    """torch.save hides the cause of a failed write in a RuntimeError; the message must still say what it was."""
    (tmp_path / "x.pt.partial").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"disk full"):
        files.save(tmp_path / "x.pt", {"x": torch.zeros(10_000)})
    assert not (tmp_path / "x.pt").exists()


def test_a_write_is_whole_or_absent(tmp_path):
    path = tmp_path / "file.json"
    files.write_json(path, {"old": 1})

    def half(file):
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.write_atomically(path, half)
    assert json.loads(path.read_text()) == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["file.json"]


def test_every_line_of_a_plain_log_is_plain(fastil):
    """Where there is no terminal: no carriage returns, no escape codes."""
    process = fastil("run", "digits", *TINY, "increment=5")
    assert process.returncode == 0
    assert not re.search(r"[\r\x1b]", process.stdout + process.stderr)
    assert "step 1: 10 classes, top-1" in process.stdout
