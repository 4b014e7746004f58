"""`fastil reproduce` on GPUs that torch only claims to see: which run is started where, and what is said of it."""

import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import environment
from test_reproduce import CONTENT

from fastil import machine, recipe_file
from fastil.reproduce import gpus, preview, scheduler, tables
from fastil.reproduce.worklist import WorkList
from fastil.text import duration
from fastil.training import speed
from fastil.training.speed import Rates, Speeds

# Trains its base step at once, says what it was started with, and waits until it is told how to end.
JOB = """
import json, os, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
def stop(*_):
    (folder / "stopped").touch()
    sys.exit(1)
signal.signal(signal.SIGTERM, stop)
(folder / "checkpoints").mkdir(parents=True)
(folder / "checkpoints/step_0.pt").touch()
(folder / "started.part").write_text(json.dumps(dict(os.environ)))
(folder / "started.part").rename(folder / "started")
print("told to fail")
while not (folder / "end").exists():
    time.sleep(0.01)
sys.exit(int((folder / "end").read_text()))
"""


@pytest.fixture
def see(monkeypatch):
    """Have torch claim so many GPUs, on a machine of 16 cores."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(machine, "cores", lambda: 16)

    def claim(count):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)

    return claim


class Spread:
    """A scheduler of jobs that do as they are told. acts: one is called after each round of starts."""

    def __init__(self, work, at_once, *acts):
        self.work, self.acts = work, iter(acts)
        self.scheduler = scheduler.Scheduler(work, at_once)
        self.scheduler.show = lambda: next(self.acts, self.end_all)()

    def job(self, name):
        return next(job for job in self.work.jobs if job.folder.name == name)

    def environment(self, name):
        """What a job that was started has."""
        path, deadline = self.job(name).folder / "started", time.monotonic() + 60
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        return json.loads(path.read_text())

    def places(self):
        """Which GPU each job that runs now was given."""
        running = [job.folder.name for job in self.work.jobs if job.running]
        return {name: self.environment(name).get("CUDA_VISIBLE_DEVICES") for name in running}

    def end(self, name, status=0):
        self.environment(name)
        told = self.job(name).folder / "end.part"  # renamed, for the job may look at any moment
        told.write_text(str(status))
        told.rename(told.with_name("end"))
        self.job(name).process.wait()

    def end_all(self):
        for name in self.places():
            self.end(name)


@pytest.fixture
def jobs_as_told(monkeypatch):
    monkeypatch.setattr(WorkList, "command", lambda work, job: [sys.executable, "-S", "-c", JOB, str(job.folder)])
    results = SimpleNamespace(results=SimpleNamespace(average_incremental_accuracy=50.0))
    monkeypatch.setattr(scheduler, "Run", lambda folder: results)
    monkeypatch.setattr(scheduler, "POLL", 0)


def small_table(rows=("softmax", "balanced", "alpha_0.5"), **keys):
    """Rows of digits, with keys that one of them has more: row=dict."""
    content = CONTENT | {"rows": {row: CONTENT["rows"][row] | keys.get(row, {}) for row in rows}}
    content["tables"] = {"small": {"title": "", "entries": [{"row": r, "steps": 5, "label": r} for r in rows]}}
    return tables.table_of(content, "small", "cpu").entries


@pytest.mark.usefixtures("jobs_as_told")
@pytest.mark.parametrize(
    ("visible", "names"),
    [
        (None, ["0", "1", "2"]),
        ("4, 7,2", ["4", "7", "2"]),
        ("5,6,7,99", ["5", "6", "7"]),  # torch counts three
        ("GPU-8f2c,GPU-11aa,GPU-52e0", ["GPU-8f2c", "GPU-11aa", "GPU-52e0"]),
    ],
)
def test_a_run_is_started_on_the_first_gpu_of_those_with_the_fewest(visible, names, see, tmp_path, monkeypatch, capsys):
    see(3)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    a, b, c = names

    def first():  # alpha 0.5 waits for the base step of balanced, which is there as soon as that has begun
        started = {"softmax-s0": a, "balanced-s0": b, "softmax-s1": c, "balanced-s1": a, "softmax-s2": b}
        assert spread.places() == started
        spread.end("balanced-s0")

    def second():  # b and c had one each
        assert spread.places() == {
            "softmax-s0": a, "alpha_0.5-s0": b, "softmax-s1": c, "balanced-s1": a, "softmax-s2": b
        }  # fmt: skip
        spread.end("softmax-s0", status=1)
        spread.end("balanced-s1")

    def third():  # a had none, then as many as c; the failure of a run is no reason to leave its GPU out
        assert spread.places() == {
            "alpha_0.5-s0": b, "softmax-s1": c, "alpha_0.5-s1": a, "softmax-s2": b, "balanced-s2": a
        }  # fmt: skip
        capsys.readouterr()
        monkeypatch.setattr(scheduler, "LINE_EVERY", 0)
        scheduler.Scheduler.show(spread.scheduler)
        title = f"GPU {c}" if c.isdigit() else c
        assert f"5 running (digits/alpha_0.5-s0 on {gpus.title(b)}, digits/softmax-s1 on {title}, " in (
            capsys.readouterr().out
        )

    spread = Spread(WorkList(small_table(), range(3), tmp_path, None), 5, first, second, third)
    spread.scheduler.bar = None
    spread.scheduler.run()
    assert [job.folder.name for job in spread.work.missing] == ["softmax-s0"]
    assert spread.job("softmax-s0").failure == "told to fail"


@pytest.mark.parametrize("visible", ["3", "4, 7,2", " 1,0", "0,1,-1,2", "GPU-8f2c,GPU-11aa", "GPU-8f2c, GPU-11aa"])
def test_a_name_alone_means_the_gpu_that_it_means_among_others(visible, see, monkeypatch):
    """As torch reads CUDA_VISIBLE_DEVICES."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    among_others = torch.cuda._parse_visible_devices()
    see(len(among_others))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    alone = []
    for name in gpus.choice(torch.device("cuda")):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", name)
        alone += torch.cuda._parse_visible_devices()
    assert alone == among_others


@pytest.mark.usefixtures("jobs_as_told")
def test_a_gpu_that_a_recipe_names_is_left_to_it_and_counts_as_taken(see, tmp_path, monkeypatch):
    see(2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "6,7")
    entries = small_table(softmax={"device": "cuda:0"})

    def check():
        assert spread.places() == {"softmax-s0": "6,7", "balanced-s0": "7"}

    spread = Spread(WorkList(entries, [0], tmp_path, None), 2, check)
    spread.scheduler.run()
    assert spread.work.missing == []
    assert scheduler.usual_jobs(spread.work) == gpus.TOGETHER  # on that one


@pytest.mark.usefixtures("jobs_as_told")
def test_a_stop_reaches_the_runs_of_every_gpu(see, tmp_path):
    see(2)

    def stop():
        assert sorted(spread.places().values()) == ["0", "0", "1"]
        os.kill(os.getpid(), signal.SIGTERM)

    spread = Spread(WorkList(small_table(), range(2), tmp_path, None), 3, stop)
    spread.scheduler.run()
    assert spread.scheduler.interrupt.number == signal.SIGTERM
    began = {job.folder.name for job in spread.work.jobs if job.process is not None}
    assert began == {path.parent.name for path in tmp_path.glob("digits/*/stopped")}
    assert len(began) == 3
    assert not any(job.running or job.failure for job in spread.work.jobs)


@pytest.mark.usefixtures("jobs_as_told")
def test_without_a_gpu_nothing_is_chosen(see, tmp_path, capsys):
    see(0)
    spread = Spread(WorkList(small_table(), [0], tmp_path, None), 2, lambda: None)
    spread.scheduler.run()
    assert "CUDA_VISIBLE_DEVICES" not in spread.environment("softmax-s0")
    assert "softmax-s0: started\n" in capsys.readouterr().out
    assert scheduler.usual_jobs(spread.work) == 16
    assert scheduler.crowd(spread.work, 16, 16) == "16 at once"


@pytest.mark.usefixtures("jobs_as_told")
def test_a_run_does_not_take_itself_for_one_of_torchruns(see, tmp_path, monkeypatch):
    """Every variable that torchrun adds is kept from the runs, and no other."""
    see(0)
    script = "import json, os, sys; json.dump(dict(os.environ), open(sys.argv[1], 'w'))"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--no-python", sys.executable, "-S", "-c", script]
    before = environment()
    subprocess.run([sys.executable, *torchrun, tmp_path / "seen"], env=before, check=True, capture_output=True)
    seen = json.loads((tmp_path / "seen").read_text())
    added = seen.keys() - before.keys()
    assert {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR"} <= added
    for name in added | {"MY_RANK"}:
        monkeypatch.setenv(name, seen.get(name, "1"))
    spread = Spread(WorkList(small_table(["softmax"]), [0], tmp_path, None), 1)
    spread.scheduler.run()
    found = spread.environment("softmax-s0")
    assert not added & found.keys()
    assert os.environ.items() <= (found | {name: os.environ[name] for name in added}).items()


@pytest.mark.parametrize(
    ("recipe", "size", "expected"),
    [("cifar100_balanced_5", (32, 32), True), ("imagenet_balanced_5", (224, 224), False)],
)
def test_small_networks_are_bound_by_their_launches(recipe, size, expected):
    assert gpus.launch_bound(recipe_file.load(recipe, []), size) is expected


@pytest.mark.parametrize(
    ("count", "cores", "bound", "usual", "said"),
    [
        (4, 16, True, 8, "4 GPUs, 2 runs on each at once"),
        (4, 16, False, 4, "4 GPUs, 1 run on each at once"),
        (4, 7, True, 4, "4 GPUs, 1 run on each at once"),  # no core for a second one
        (4, 2, True, 4, "4 GPUs, 1 run on each at once"),
        (1, 16, True, 2, "1 GPU, 2 runs on it at once"),
        (1, 1, True, 1, "1 GPU, 1 run on it at once"),
    ],
)
def test_as_many_runs_at_once_as_the_gpus_have_use_for(count, cores, bound, usual, said, see, tmp_path, monkeypatch):
    see(count)
    monkeypatch.setattr(machine, "cores", lambda: cores)
    monkeypatch.setattr(gpus, "launch_bound", lambda recipe, size: bound)
    work = WorkList(small_table(), [0], tmp_path, None)
    assert scheduler.usual_jobs(work) == usual
    assert scheduler.crowd(work, usual, usual) == said


def test_one_row_that_fills_a_gpu_is_enough_to_give_each_run_one(see, tmp_path):
    see(2)
    for batch_size, usual in ((64, 4), (10**6, 2)):
        entries = small_table(("softmax", "balanced"), balanced={"batch_size": batch_size})
        assert scheduler.usual_jobs(WorkList(entries, [0], tmp_path, None)) == usual


def test_a_dry_run_tells_the_gpus_and_the_hours_on_them(see, tmp_path, monkeypatch):
    """Nine equal runs: three times a run's hours with four at once, five times with two. Eight where four would be
    usual are half as fast each, and the ninth follows: three times again."""
    see(2)
    monkeypatch.setattr(speed, "speeds", lambda recipe, size: Speeds(Rates(0.05, 0.05)))
    work = WorkList(small_table(["softmax"]), range(9), tmp_path, None)
    alone = sum(work.jobs[0].visits) / 0.05
    for jobs, hours, said in (
        (None, 3 * alone, "2 GPUs, 2 runs on each at once"),
        (2, 5 * alone, "2 at once on 2 GPUs"),
        (8, 3 * alone, "8 at once on 2 GPUs (4 by default: 2 runs on each)"),
    ):
        text = preview.preview(work, jobs)
        assert f"about {duration(hours)} with {said}, {duration(9 * alone)} one by one" in text
