"""First contact with a GPU: what a stage costs that fails or hangs, what is said of it and of missing packages."""

import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest

from bench import carry, first_contact, gpu_step, stages, wheels
from bench.first_contact import (
    ALTOGETHER,
    NO_DEVICE,
    SKIPPED,
    STAGES,
    Interrupted,
    Stage,
    counts_of,
    ends,
    outcome,
    run_stage,
)


def is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_stage_that_hangs_is_ended_with_all_that_it_started(tmp_path):
    code = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(600)"
    )
    status, seconds = run_stage([sys.executable, "-c", code], {**os.environ}, tmp_path / "log", 2)
    assert outcome(status) == "timed out"
    assert seconds >= 2
    child = int((tmp_path / "log").read_text())
    for _ in range(500):
        if not is_running(child):
            break
        time.sleep(0.02)
    assert not is_running(child)


@pytest.mark.parametrize(
    ("status", "result"),
    [(0, "passed"), (1, "failed"), (-11, "failed"), (SKIPPED, "skipped"), (NO_DEVICE, "no CUDA device")],
)
def test_how_a_stage_ended_is_told_by_its_status(tmp_path, status, result):
    code = f"import os; os.kill(os.getpid(), {-status})" if status < 0 else f"raise SystemExit({status})"
    found, _ = run_stage([sys.executable, "-S", "-c", code], {**os.environ}, tmp_path / "log", 60)
    assert found == status
    assert outcome(found) == result


def alone_in(folder, monkeypatch):
    """Nothing is missing, nothing was carried, and what is unzipped goes to that folder."""
    monkeypatch.setattr(first_contact, "complete", lambda site: str(wheels.ROOT))
    monkeypatch.setattr(first_contact, "scratch", lambda out: folder)
    monkeypatch.setattr(first_contact, "CARRIED", folder / "carried")


@pytest.fixture
def contact(monkeypatch, tmp_path, capsys):
    """Run stages that only pretend: exit status by name; others pass. Returns exit status, results and output."""

    def run(statuses, *arguments, took=lambda name, limit: None):
        def pretend(command, env, log, limit):
            name = command[-1]
            took(name, limit)
            log.write_text(f"first line\nlast line of {name}\n\n")
            return statuses.get(name, 0), 1.0

        alone_in(tmp_path, monkeypatch)
        monkeypatch.setattr(first_contact, "name_of_device", lambda: ("NVIDIA H100 80GB HBM3", ""))
        monkeypatch.setattr(first_contact, "run_stage", pretend)
        monkeypatch.setattr(sys, "argv", ["first_contact", "--out", str(tmp_path), *arguments])
        with pytest.raises(SystemExit) as stopped:
            first_contact.main()
        results = {path.name.split(".")[0]: json.loads(path.read_text()) for path in tmp_path.glob("*.result.json")}
        return stopped.value.code, results, capsys.readouterr()

    return run


def test_what_fails_costs_itself_only(contact):
    code, results, output = contact({"kernel_tests": 1, "step": None, "sanitizer": SKIPPED})
    assert code == 1
    assert {name: found["result"] for name, found in results.items()} == {
        stage.name: {"kernel_tests": "failed", "step": "timed out", "sanitizer": "skipped"}.get(stage.name, "passed")
        for stage in STAGES
    }
    assert results["kernel_tests"]["log_tail"] == ["first line", "last line of kernel_tests"]
    assert "last line of kernel_tests" in output.out.split("in all")[0]


def test_a_skipped_stage_is_no_failure_and_only_chooses(contact):
    code, results, _ = contact({"sanitizer": SKIPPED}, "--only", "sanitizer,machine")
    assert code == 0
    assert set(results) == {"machine", "sanitizer"}
    code, _, output = contact({}, "--only", "machine,speed")
    assert code == 2
    assert "--only speed: no such stage; there are machine, kernel_tests" in output.err
    code, results, output = contact({}, "--only=")
    assert code == 2
    assert "no such stage" in output.err
    assert set(results) == {"machine", "sanitizer"}  # of before


def test_of_a_stage_that_is_begun_nothing_old_is_left(contact, tmp_path):
    (tmp_path / "other_kernels").mkdir()
    old = ["step.xml", "train_step.json", "kernels.json", "other_kernels/kernels.json", "streaming.xml"]
    for name in old:
        (tmp_path / name).touch()
    there = {}

    def took(name, limit):
        there[name] = [path for path in old if (tmp_path / path).exists()]
        assert json.loads((tmp_path / f"{name}.result.json").read_text())["result"] == "interrupted"

    contact({}, "--only", "step,kernel_times", took=took)
    assert there == {"step": old[2:], "kernel_times": ["streaming.xml"]}
    contact({"step": 1}, "--only", "step")
    summary = (tmp_path / "summary.txt").read_text()
    assert "H100" in summary
    assert "step  failed" in summary
    assert "kernel_times" not in summary


def test_two_at_once_do_not_share_their_files(contact, tmp_path):
    with first_contact.alone(tmp_path):
        code, results, output = contact({})
    assert (code, results) == (2, {})
    assert output.err == f"{tmp_path}: another `make gpu` is running here; wait for it\n"


def test_results_that_cannot_be_written_are_one_line(contact, tmp_path):
    (tmp_path / "file").touch()
    code, _, output = contact({}, "--out", str(tmp_path / "file/folder"))
    assert code == 2
    assert output.err.startswith(f"{tmp_path}/file/folder: ")
    assert output.err.count("\n") == 1


def test_what_was_carried_is_checked_before_the_first_stage(contact, tmp_path):
    (tmp_path / "x.tar").write_bytes(bytes(1000))
    carry.pack([tmp_path / "x.tar"], tmp_path / "carried", 600)
    assert contact({})[0] == 0
    (tmp_path / "carried/x.tar.001").unlink()
    for path, text in (("x.tar.001", "x.tar.001 is missing; carry it again"), ("manifest.json", "missing; carry it")):
        (tmp_path / "carried" / path).unlink(missing_ok=True)
        code, _, output = contact({})
        assert code == 2
        assert text in output.err
        assert "step: " not in output.out
        without = output.err.split('ARGS="')[1].split('"')[0].split()
        assert contact({}, *without)[0] == 0


def test_why_there_is_no_gpu_is_the_first_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "torch.py").write_text(
        "class cuda:\n    is_available = staticmethod(lambda: False)\n"
        "class version: cuda = None\n__version__ = '9.9+cpu'"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert first_contact.name_of_device() == (None, "torch 9.9+cpu is built without CUDA")
    (tmp_path / "torch.py").write_text("raise OSError('libcudart.so.13: cannot open')")
    assert first_contact.name_of_device() == (None, "OSError: libcudart.so.13: cannot open")
    alone_in(tmp_path, monkeypatch)
    monkeypatch.setattr(first_contact, "run_stage", lambda *words: (NO_DEVICE, 0.0) if words[2].touch() is None else 0)
    monkeypatch.setattr(sys, "argv", ["first_contact", "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit):
        first_contact.main()
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith("no CUDA device: OSError: libcudart.so.13: cannot open (on the CPU: make gpu ARGS=")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_stage_too_and_leaves_a_table(tmp_path, number):
    """As a process, on a checkout that is a folder of links, with a stage that hangs and ignores signals."""
    for name in ("bench", "fastil"):
        (tmp_path / name).mkdir()
    for name in ("__init__", "first_contact", "wheels", "carry", "claims"):
        (tmp_path / f"bench/{name}.py").write_bytes((wheels.ROOT / f"bench/{name}.py").read_bytes())
    (tmp_path / "bench/stages.py").write_text(
        "import os, signal, sys, time\n"
        "if sys.argv[1] == 'machine': raise SystemExit(0)\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "print(os.getpid(), flush=True)\ntime.sleep(600)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.first_contact", "--device", "cpu", "--out", "out"],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    log = tmp_path / "out/kernel_tests.log"
    while process.poll() is None and not (log.exists() and log.read_text().endswith("\n")):
        time.sleep(0.02)
    os.killpg(process.pid, number)
    out, err = process.communicate()
    assert (process.returncode, err) == (128 + number, "")
    assert not is_running(int(log.read_text()))
    summary = (tmp_path / "out/summary.txt").read_text()
    assert summary.split("\n\n")[1] in out
    rows = [line.split()[:2] for line in summary.split("\n\n")[1].splitlines()]
    assert rows == [["machine", "passed"], ["kernel_tests", "interrupted"]]
    assert json.loads((tmp_path / "out/kernel_tests.result.json").read_text())["result"] == "interrupted"


def test_without_a_gpu_every_stage_says_so(contact):
    code, results, _ = contact({stage.name: NO_DEVICE for stage in STAGES})
    assert code == 1
    assert {found["result"] for found in results.values()} == {"no CUDA device"}


def test_after_ten_minutes_nothing_is_started(contact, monkeypatch):
    monkeypatch.setattr(first_contact, "ALTOGETHER", 0.0)
    code, results, output = contact({})
    assert code == 1
    assert {found["result"] for found in results.values()} == {"not started"}
    assert output.out.count("no time left") == 2 * len(STAGES)  # as it comes to it, and in the table


def test_the_shares_of_the_chosen_stages_make_up_the_ten_minutes():
    random = np.random.default_rng(0)
    assert sum(stage.share for stage in STAGES) == ALTOGETHER < 600
    for _ in range(20):
        chosen = [stage for stage in STAGES if random.random() < 0.5] or [*STAGES[:1]]
        found = ends(chosen, 100.0)
        assert found[-1] == pytest.approx(100.0)
        lengths = np.diff([0.0, *found])
        assert lengths / lengths[0] == pytest.approx([stage.share / chosen[0].share for stage in chosen])


def test_a_stage_gets_its_share_and_what_those_before_left_over(contact, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(first_contact, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    limits = {}

    def took(name, limit):
        limits[name] = limit
        clock[0] += limit if name == "kernel_tests" else 10.0  # it hangs, and is ended at its limit

    code, results, _ = contact({"kernel_tests": None}, took=took)
    assert code == 1
    before = 0.0
    for stage, end in zip(STAGES, ends(STAGES, ALTOGETHER), strict=True):
        assert limits[stage.name] == pytest.approx(end - before)
        assert limits[stage.name] >= stage.share
        before += limits[stage.name] if stage.name == "kernel_tests" else 10.0
    assert results["step"]["result"] == "passed"
    assert clock[0] < ALTOGETHER


def test_a_stage_that_hangs_costs_its_share_and_the_results_of_the_others_are_there(tmp_path, monkeypatch):
    """Real processes: one hangs, one is killed, and the last passes. The runner is stopped in the middle of another."""
    stages = [Stage("hangs", 1.5, ""), Stage("killed", 1, ""), Stage("passes", 1, ""), Stage("stops", 1, "")]
    codes = {
        "hangs": "import time; print('begun', flush=True); time.sleep(600)",
        "killed": "import os; os.kill(os.getpid(), 9)",
        "passes": "print('done')",
    }
    real = first_contact.run_stage

    def run(command, env, log, limit):
        if command[-1] == "stops":
            raise Interrupted(signal.SIGINT)
        return real([sys.executable, "-S", "-c", codes[command[-1]]], env, log, limit)

    monkeypatch.setattr(first_contact, "STAGES", stages)
    monkeypatch.setattr(first_contact, "ALTOGETHER", 9.0)
    alone_in(tmp_path, monkeypatch)
    monkeypatch.setattr(first_contact, "name_of_device", lambda: (None, "none is there"))
    monkeypatch.setattr(first_contact, "run_stage", run)
    monkeypatch.setattr(sys, "argv", ["first_contact", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        first_contact.main()
    assert stopped.value.code == 130
    results = {path.name.split(".")[0]: json.loads(path.read_text()) for path in tmp_path.glob("*.result.json")}
    assert {name: found["result"] for name, found in results.items()} == {
        "hangs": "timed out", "killed": "failed", "passes": "passed", "stops": "interrupted",
    }  # fmt: skip
    assert results["hangs"]["log_tail"] == ["begun"]


def test_the_table_of_stages_is_whole():
    assert [stage.name for stage in STAGES] == list(stages.STAGES)
    for _, needs in stages.STAGES.values():
        assert all((wheels.ROOT / need).exists() for need in needs if need.startswith("tests/"))


def test_the_row_of_cifar100_refuses_parts_without_a_manifest(tmp_path):
    """Which it once took for none, and trained on digits."""
    (tmp_path / "build/carried").mkdir(parents=True)
    (tmp_path / "build/carried/first30.tar.000").touch()
    code = (
        "from pathlib import Path; from bench import stages\n"
        f"stages.CARRIED = Path({str(tmp_path / 'build/carried')!r})\n"
        f"stages.scratch = lambda out: Path({str(tmp_path)!r})\n"
        "stages.cifar100(small=True)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=wheels.ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == f"{tmp_path}/build/carried/manifest.json: missing; carry it with the parts\n"


@pytest.mark.parametrize("carried", ["nothing", "all of it", "the first classes"])
def test_the_row_of_cifar100_trains_on_what_was_carried(carried, tmp_path, monkeypatch, capsys):
    commands = []
    results = {"average_incremental_accuracy": 71.234, "final_top1": 60.5}
    timings = {"steps": {"0": {"images_per_second": 1.0}, "1": {"images_per_second": 51234.5}}}
    (tmp_path / "out/run").mkdir(parents=True)
    for name, content in (("results", results), ("timings", timings)):
        (tmp_path / f"out/run/{name}.json").write_text(json.dumps(content))
    monkeypatch.setattr(stages, "python", lambda *words: commands.append(words))
    monkeypatch.setattr(stages, "scratch", lambda out: tmp_path / "build")
    monkeypatch.setattr(stages, "OUT", tmp_path / "out")
    folder = tmp_path / "build/cifar100"
    names = {"nothing": [], "all of it": ["x.val.beton", "x.beton"], "the first classes": ["first9.tar", "first9.yaml"]}
    if names[carried]:
        folder.mkdir(parents=True)
    for name in names[carried]:
        (folder / name).touch()
    monkeypatch.setattr(stages, "CARRIED", tmp_path / "build/carried")
    stages.cifar100(small=True)
    run, out = commands[0][3:], capsys.readouterr().out
    assert out.endswith(": average incremental 71.23, final 60.50, 51,234 img/s in its last step\n")
    if carried == "nothing":
        assert run[0] == "digits"
        assert "CIFAR-100 is not here" in out
    else:
        whole = carried == "all of it"
        recipe, source = ("cifar100_balanced_5", "x.beton") if whole else (str(folder / "first9.yaml"), "first9.tar")
        assert run[:5] == (recipe, "base_epochs=1", "epochs=1", "--data", str(folder / source))


def test_a_report_of_tests_is_counted(tmp_path):
    assert counts_of(tmp_path / "none.xml") is None
    report = tmp_path / "x.xml"
    report.write_text("<testsuites>")  # cut off
    assert counts_of(report) is None
    report.write_text(
        '<testsuites><testsuite tests="4" failures="1" errors="1" skipped="1">'
        '<testcase classname="a" name="b"><failure message="assert 1 == 2&#10;more">...</failure></testcase>'
        '<testcase classname="a" name="c"><error message="boom"/></testcase></testsuite></testsuites>'
    )
    expected = {"tests": 4, "failures": 1, "errors": 1, "skipped": 1}
    assert counts_of(report) == expected | {"failed": {"a::b": "assert 1 == 2", "a::c": "boom"}}


def test_tests_that_were_cut_off_are_counted_by_their_lines():
    lines = [
        "8 workers [61 items]", "tests/a.py::test[x] ", "[gw1] [  1%] PASSED tests/a.py::test[x y] ",
        "[gw0] [  3%] FAILED tests/a.py::other", "[gw0] [100%] SKIPPED tests/b.py::third",
        "FAILED tests/a.py::other - assert 1 == 2",
    ]  # fmt: skip
    expected = {"tests": 3, "failures": 1, "errors": 0, "skipped": 1, "failed": {"tests/a.py::other": "see the log"}}
    assert first_contact.counts_in_log(lines) == expected
    assert first_contact.counts_in_log(["no CUDA device"]) is None


def test_of_a_progress_bar_the_last_state_counts(tmp_path):
    (tmp_path / "log").write_bytes(b"one\r\n\n10 %\r20 %\r      \rdone\n 30 %\r 40 %\r\n50 %\r60 %\r")
    assert first_contact.lines_of(tmp_path / "log") == ["one", "done", " 40 %", "60 %"]


def test_the_idle_share_is_that_of_every_microsecond():
    random = np.random.default_rng(0)
    for _ in range(50):
        starts = random.integers(0, 60, random.integers(1, 12))
        spans = [
            (float(start), float(start + length))
            for start, length in zip(starts, random.integers(1, 9, 12), strict=False)
        ]
        busy = np.zeros(100, dtype=bool)
        for start, end in spans:
            busy[int(start) : int(end)] = True
        first, last = int(min(a for a, _ in spans)), int(max(b for _, b in spans))
        assert gpu_step.idle_share(spans) == pytest.approx(1 - busy[first:last].mean())
