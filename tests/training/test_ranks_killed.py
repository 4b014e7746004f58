"""Processes of one run that are killed or asked to stop under torchrun, and go on in any number."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
from conftest import SOAK, environment

from fastil import UserError, run

SETTINGS = ["classes=7", "epochs=8", "base_epochs=12", "batch_size=64", "precision=fp32", "checkpoint_every=1"]
WAYS = ("kill one", "kill all", "stop one", "stop torchrun")
CASES = [(way, ranks, after) for way in WAYS for ranks, after in ((2, 2), (3, 3), (2, 3), (3, 2), (3, 1))]


def torchrun(ranks, out, *options, restarts=0):
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)),
        *("--max-restarts", str(restarts), "-m", "fastil", "run", "digits", *SETTINGS, "--out", str(out), *options),
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


@pytest.mark.skipif(not SOAK, reason="the short form is the next test")
@pytest.mark.parametrize(("way", "ranks", "after"), CASES)
def test_a_run_that_was_stopped_goes_on_in_any_number_of_processes(way, ranks, after, undisturbed, tmp_path):
    out, whole = tmp_path / "run", undisturbed(ranks)
    launcher = subprocess.Popen(
        torchrun(ranks, out), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline, epochs = time.monotonic() + 120, random.Random(repr((way, ranks, after))).randint(1, 20)  # of 28
    while not (out / "checkpoints/last.pt").exists() or (out / "metrics.jsonl").read_text().count("\n") < epochs:
        assert launcher.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
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
    went_on = finish(after, out, "--resume")
    assert (f"ranks: {ranks} before the stop and {after} from here on" in went_on) == (after != ranks)
    for name in before:
        assert (out / "memory" / name).read_bytes() == (whole / "memory" / name).read_bytes()
    assert json.loads((out / "protocol.json").read_text())["ranks"] == after
    if after == ranks:
        for name in ("results.json", "metrics.jsonl", "memory/step_2.json"):
            assert (out / name).read_bytes() == (whole / name).read_bytes(), name


def test_a_rank_that_died_is_started_again_and_one_that_is_told_to_stop_stops_all(undisturbed, tmp_path):
    out = tmp_path / "run"
    launcher = subprocess.Popen(
        torchrun(2, out, restarts=1), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    first = wait_for_checkpoint(launcher, out)
    os.kill(first[0], signal.SIGKILL)
    while not set(workers_of(launcher.pid)).isdisjoint(first):
        time.sleep(0.1)
    began = (out / "checkpoints/last.pt").stat().st_mtime
    while (out / "checkpoints/last.pt").stat().st_mtime == began:
        assert launcher.poll() is None
        time.sleep(0.1)
    os.kill(workers_of(launcher.pid)[1], signal.SIGTERM)
    said, errors = launcher.communicate(timeout=60)
    assert launcher.returncode == 0, errors[-3000:]
    assert "going on at step" in said  # without --resume, for this torchrun has begun it
    assert "--resume goes on" in errors
    assert "from here on" not in finish(2, out, "--resume")
    for name in ("results.json", "metrics.jsonl", "memory/step_2.json"):
        assert (out / name).read_bytes() == (undisturbed(2) / name).read_bytes(), name


def wait_for_checkpoint(launcher, out):
    """Return the processes of a launcher, once they have written one."""
    while not (out / "checkpoints/last.pt").exists():
        assert launcher.poll() is None
        time.sleep(0.1)
    return workers_of(launcher.pid)


def test_a_run_that_another_launcher_began_is_not_gone_on_with_after_a_restart(undisturbed, tmp_path):
    """The mistake of a user is said by the first process, once for each attempt."""
    out = shutil.copytree(undisturbed(2), tmp_path / "run")
    lock = (out / "lock").read_bytes()
    done = subprocess.run(torchrun(2, out, restarts=1), env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if line.startswith("fastil:")]
    assert lines == [f"fastil: {out}: exists already; go on with --resume, or choose another --out"] * 2
    assert "rank 1" not in done.stderr + done.stdout
    assert "UserError" not in done.stderr
    assert done.stdout == ""
    assert (out / "lock").read_bytes() == lock


def test_a_mistake_in_the_command_is_said_once(tmp_path):
    done = subprocess.run(
        torchrun(2, tmp_path / "run", "classes=many"), env=environment(), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    said = [line for line in done.stderr.splitlines() if line.startswith("fastil")]
    assert [line for line in said if "classes=many" in line] == said[:1]
    assert "exitcode  : 2 " in done.stderr  # as torchrun sees the first that ended
    assert not (tmp_path / "run").exists()


def test_a_base_step_is_that_of_as_many_processes(undisturbed, tmp_path):
    with pytest.raises(UserError, match=r"bn is local in 2 processes there and by whole batches here"):
        run("digits", out=tmp_path / "run", base=undisturbed(2), classes=7, batch_size=64, precision="fp32",
            base_epochs=12)  # fmt: skip
    assert not (tmp_path / "run").exists()


def agent(number, port, out, *options):
    """One of two machines, here on the loopback; the first hosts the rendezvous."""
    host = "is_host=1" if number == 0 else "is_host=0"
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "1:2", "--nproc-per-node", "1"),
        *("--max-restarts", "3", "--rdzv-backend", "c10d", "--rdzv-id", f"job{port}", "--local-addr", "localhost"),
        *("--rdzv-endpoint", f"localhost:{port}", "--rdzv-conf", f"{host},join_timeout=120,last_call_timeout=5"),
        *("-m", "fastil", "run", "digits", *SETTINGS, "--out", str(out), *options),
    ]
    variables = environment() | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # without which none can come later
    return subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.skipif(not SOAK, reason="takes a minute")
@pytest.mark.parametrize("lost", [False, True])
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


@pytest.mark.skipif(not SOAK, reason="takes a minute")
def test_a_machine_that_joins_later_goes_on_with_the_run_without_resume(tmp_path):
    out, port = tmp_path / "run", free_port()
    agents = [agent(0, port, out, "epochs=60", "base_epochs=60")]
    wait_for_checkpoint(agents[0], out)
    agents.append(agent(1, port, out, "epochs=60", "base_epochs=60"))
    said, errors = zip(*(each.communicate(timeout=600) for each in agents), strict=True)
    assert [each.returncode for each in agents] == [0, 0], errors
    assert "going on at step" in "".join(said)
    assert "ranks: 1 before the stop and 2 from here on" in "".join(said)
    assert json.loads((out / "protocol.json").read_text())["ranks"] == 2
