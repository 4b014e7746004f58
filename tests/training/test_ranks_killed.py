"""Processes of one run that are killed or asked to stop under torchrun, and go on in any number."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time

import pytest
from conftest import SOAK, environment

SETTINGS = ["classes=7", "epochs=8", "base_epochs=12", "batch_size=64", "precision=fp32", "checkpoint_every=1"]
WAYS = ("kill one", "kill all", "stop one", "stop torchrun")
CASES = [(way, ranks, after) for way in WAYS for ranks, after in ((2, 2), (3, 3), (2, 3), (3, 2), (3, 1))]
FEW = [("kill one", 2, 2), ("stop one", 3, 2)]


def torchrun(ranks, out, *options):
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)),
        *("-m", "fastil", "run", "digits", *SETTINGS, "--out", str(out), *options),
    ]


def finish(ranks, out, *options):
    done = subprocess.run(
        torchrun(ranks, out, *options), env=environment(), capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def workers_of(launcher):
    found = subprocess.run(["pgrep", "-P", str(launcher)], capture_output=True, text=True)
    return [int(pid) for pid in found.stdout.split()]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The folders of runs that were let alone, by their number of processes."""
    folder, made = tmp_path_factory.mktemp("undisturbed"), {}

    def of(ranks):
        if ranks not in made:
            made[ranks] = folder / str(ranks)
            finish(ranks, made[ranks])
        return made[ranks]

    return of


@pytest.mark.parametrize(("way", "ranks", "after"), CASES if SOAK else FEW)
def test_a_run_that_was_stopped_goes_on_in_any_number_of_processes(way, ranks, after, undisturbed, tmp_path):
    out, whole = tmp_path / "run", undisturbed(ranks)
    launcher = subprocess.Popen(
        torchrun(ranks, out), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not (out / "checkpoints/last.pt").exists():
        assert launcher.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(random.Random(repr((way, ranks, after))).uniform(0, 4))
    processes = workers_of(launcher.pid)
    assert len(processes) == ranks
    hit, number = {
        "kill one": (processes[-1:], signal.SIGKILL),
        "kill all": ([launcher.pid, *processes], signal.SIGKILL),
        "stop one": (processes[-1:], signal.SIGTERM),
        "stop torchrun": ([launcher.pid], signal.SIGTERM),
    }[way]
    began = time.monotonic()
    for process in hit:
        os.kill(process, number)
    said, errors = launcher.communicate(timeout=60)  # nothing hangs
    assert time.monotonic() - began < 60
    if way == "stop one":  # what was asked for is no failure
        assert launcher.returncode == 0, errors[-2000:]
        assert "--resume goes on" in said + errors
        assert "Traceback" not in errors
    if way == "kill one":
        assert "SIGKILL" in errors  # torchrun names the one that died
    before = sorted(path.name for path in (out / "memory").glob("*.json"))
    finish(after, out, "--resume")
    for name in before:
        assert (out / "memory" / name).read_bytes() == (whole / "memory" / name).read_bytes()
    assert json.loads((out / "protocol.json").read_text())["ranks"] == after
    if after == ranks:
        for name in ("results.json", "metrics.jsonl", "memory/step_2.json"):
            assert (out / name).read_bytes() == (whole / name).read_bytes(), name


def test_torchrun_starts_a_rank_that_failed_again_from_the_checkpoint(undisturbed, tmp_path):
    out = tmp_path / "run"
    command = torchrun(2, out)
    command.insert(command.index("--standalone") + 1, "--max-restarts=1")
    launcher = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (out / "checkpoints/last.pt").exists():
        assert launcher.poll() is None
        time.sleep(0.1)
    time.sleep(1)
    os.kill(workers_of(launcher.pid)[0], signal.SIGKILL)
    said, errors = launcher.communicate(timeout=300)
    assert launcher.returncode == 0, errors[-3000:]
    assert "going on at step" in said
    for name in ("results.json", "metrics.jsonl", "memory/step_2.json"):
        assert (out / name).read_bytes() == (undisturbed(2) / name).read_bytes(), name


def agent(number, port, out):
    """One of two machines, here on the loopback; the first hosts the rendezvous."""
    host = "is_host=1" if number == 0 else "is_host=0"
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "1:2", "--nproc-per-node", "1"),
        *("--max-restarts", "3", "--rdzv-backend", "c10d", "--rdzv-id", f"job{port}", "--local-addr", "localhost"),
        *("--rdzv-endpoint", f"localhost:{port}", "--rdzv-conf", f"{host},join_timeout=120,last_call_timeout=5"),
        *("-m", "fastil", "run", "digits", *SETTINGS, "--out", str(out), "--resume"),
    ]
    return subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("lost", [False, True] if SOAK else [True])
def test_two_machines_train_a_run_and_one_goes_on_alone(lost, undisturbed, tmp_path):
    out, port = tmp_path / "run", free_port()
    agents = [agent(number, port, out) for number in (0, 1)]
    if lost:
        while not (out / "checkpoints/last.pt").exists():
            assert agents[0].poll() is None
            time.sleep(0.1)
        time.sleep(1)
        for process in (agents[1].pid, *workers_of(agents[1].pid)):
            os.kill(process, signal.SIGKILL)
    said, errors = agents[0].communicate(timeout=600)
    others, _ = agents[1].communicate(timeout=60)
    assert agents[0].returncode == 0, errors[-3000:]
    assert "2 processes" in said + others  # whichever was rank 0
    assert ("going on at step" in said) == lost
    assert json.loads((out / "protocol.json").read_text())["ranks"] == (1 if lost else 2)
    if not lost:
        assert (out / "results.json").read_bytes() == (undisturbed(2) / "results.json").read_bytes()
