"""First contact with a GPU: stages that each show something, ten minutes in all, no network and no installation.

python -m bench.first_contact [--only STAGE,...] [--device cpu] [--out FOLDER]        (make gpu)

Every stage is a process with a share of the ten minutes, to which the time is added that those before it left over. Its
log, its figures and what became of it are written at once: what fails or hangs costs itself only. Results go to
bench/results/gpu_NAME, without a GPU to build/first_contact. --device cpu runs all of it on the CPU, on small sizes.
What this Python lacks is taken from build/wheels, which `make wheels` fills on a machine with a registry. This file and
bench.wheels need nothing but Python.
"""

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from bench.wheels import (
    ALONE,
    NEEDED,
    PEERS,
    PYTHON,
    ROOT,
    SITE,
    WHEELS,
    WITH_REQUIREMENTS,
    environment,
    missing,
    unzip,
    wheels_for,
)

ALTOGETHER = 590.0  # seconds, from the start of this process to its last line
SLOWER = 4  # a CPU may take longer by this factor
# How a stage ends (bench.stages), besides 0 and whatever means that it failed.
SKIPPED, NO_DEVICE = 77, 78
ENDED = re.compile(r"^\[gw\d+\] \[ *\d+%\] (PASSED|FAILED|ERROR|SKIPPED) (.+)$")  # a line of pytest -vv with xdist
TAIL = 60  # lines of the log that the result file holds


@dataclass(frozen=True)
class Stage:
    """share: seconds of ALTOGETHER. shows: what it is for."""

    name: str
    share: float
    shows: str


STAGES = (
    Stage("machine", 25, "versions, compilers, and what fastil chooses here"),
    Stage("kernel_tests", 150, "the tests of the kernels"),
    Stage("trainer_tests", 105, "every method in bf16; captured, compiled, resumed, streamed"),
    Stage("step", 110, "a training step eager, compiled and captured; launches; idle share"),
    Stage("streaming", 50, "the loaders to the GPU, alone and while training"),
    Stage("cifar100", 80, "a short row of CIFAR-100"),
    Stage("sanitizer", 30, "compute-sanitizer's memcheck on a launch of each kernel"),
    Stage("kernel_times", 40, "the incremental loss against its peers, the other kernels against plain torch"),
)


def ends(stages: Sequence[Stage], total: float) -> list[float]:
    """Return when each stage must have ended, in seconds from the start, so that all have ended at `total`: the time is
    divided in the proportion of the shares, and what a stage leaves over is there for the next."""
    whole = sum(stage.share for stage in stages)
    return [total * until / whole for until in accumulate(stage.share for stage in stages)]


def run_stage(command: Sequence[str], env: dict[str, str], log: Path, limit: float) -> tuple[int | None, float]:
    """Run a command with everything it starts. Returns its exit status, None where it ran out of time, and seconds."""
    began = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            status = None
        finally:  # also what it left behind, and after Ctrl-C
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):  # a driver that hangs keeps even a killed process
                process.wait(5)
    return status, time.monotonic() - began


def outcome(status: int | None) -> str:
    """Return in words how a stage ended."""
    known = {None: "timed out", 0: "passed", SKIPPED: "skipped", NO_DEVICE: "no CUDA device"}
    return known.get(status, "failed")


def counts_of(report: Path) -> dict[str, Any] | None:
    """Return the counts of a JUnit file and the first line of each failure, if there is such a file."""
    if not report.exists():
        return None
    try:
        suites = list(ElementTree.parse(report).getroot().iter("testsuite"))
    except ElementTree.ParseError:
        return None
    counts = {
        key: sum(int(suite.get(key, 0)) for suite in suites) for key in ("tests", "failures", "errors", "skipped")
    }
    failed = {}
    for case in (case for suite in suites for case in suite.iter("testcase")):
        for problem in (*case.findall("failure"), *case.findall("error")):
            failed[f"{case.get('classname')}::{case.get('name')}"] = (problem.get("message") or "").split("\n")[0]
    return counts | {"failed": failed}


def counts_in_log(lines: Sequence[str]) -> dict[str, Any] | None:
    """Return the same of tests that were cut off, and so left no such file, by the lines of those that had ended."""
    found = [match.groups() for line in lines if (match := ENDED.search(line))]
    if not found:
        return None
    kinds = Counter(kind for kind, _ in found)
    counts = {"failures": kinds["FAILED"], "errors": kinds["ERROR"], "skipped": kinds["SKIPPED"]}
    failed = {name: "see the log" for kind, name in found if kind in ("FAILED", "ERROR")}
    return {"tests": len(found)} | counts | {"failed": failed}


def summary_of(name: str, result: str, lines: list[str], tests: dict[str, Any] | None) -> str:
    """Return a few words for the table: counts of tests, or the last line of what did not pass."""
    if tests is not None and tests["tests"]:
        bad = tests["failures"] + tests["errors"]
        return f"{tests['tests'] - bad - tests['skipped']} tests passed, {bad} failed, {tests['skipped']} skipped"
    return lines[-1][:110] if lines and (result != "passed" or name in ("step", "cifar100")) else ""


def name_of_device() -> str | None:
    """Return the name of the GPU that torch sees, if there is one."""
    code = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        return None
    return done.stdout.strip() or None


def gpu_folder(name: str) -> str:
    """Return the name of a GPU's folder of results."""
    return "gpu_" + re.sub(r"[^A-Za-z0-9]+", "_", name)


def lacking(path: str) -> str | None:
    """Return in lines what this Python lacks and what to do about it; None where nothing is."""
    names = missing(path)
    if not names:
        return None
    carried = sorted({*NEEDED.values()} & {*names})
    lines = [f"this Python ({sys.executable}) lacks {', '.join(names)}"]
    here = f"{sys.version_info[0]}.{sys.version_info[1]}"
    if carried:
        every = ", ".join([*WITH_REQUIREMENTS.values(), *ALONE.values(), *PEERS.values()])
        command = "make wheels" if here == PYTHON else f'make wheels ARGS="--python {here}"'
        if wheels_for() not in (None, here):
            lines.append(f"the wheels in {WHEELS.relative_to(ROOT)} are for Python {wheels_for()}")
        lines.append(
            f"`{command}` on a machine with a registry puts {every} into {WHEELS.relative_to(ROOT)}: carry it here"
        )
    if set(names) - set(carried):
        lines.append("the others are expected on a GPU machine: use a python3 that has them (make gpu PYTHON=...)")
    return "\n".join(lines)


def one_row(stage: Stage, limit: float, out: Path, env: dict[str, str]) -> tuple[str, str, str, str]:
    """Run a stage for at most `limit` seconds and write its result file. Returns its row of the table."""
    log, report = out / f"{stage.name}.log", out / f"{stage.name}.xml"
    report.unlink(missing_ok=True)
    status, seconds, result, lines = None, 0.0, "not started", ["no time left"]
    if limit > 1:
        print(f"{stage.name}: {stage.shows} (at most {limit:.0f} s) ...", flush=True)
        status, seconds = run_stage([sys.executable, "-m", "bench.stages", stage.name], env, log, limit)
        result = outcome(status)
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    tests = counts_of(report) or counts_in_log(lines)
    content = {
        "stage": stage.name, "result": result, "exit_status": status, "seconds": round(seconds, 1),
        "limit": round(limit, 1), "tests": tests, "log_tail": lines[-TAIL:],
    }  # fmt: skip
    (out / f"{stage.name}.result.json").write_text(json.dumps(content, indent=1) + "\n")
    return stage.name, result, f"{seconds:.0f} s", summary_of(stage.name, result, lines, tests)


def main() -> None:
    """Run the stages. Exits with 1 if any of them failed, 2 if none can run."""
    began = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--only", help=f"some of {','.join(stage.name for stage in STAGES)}")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    names = [stage.name for stage in STAGES]
    wanted = arguments.only.split(",") if arguments.only else names
    unknown = [name for name in wanted if name not in names]
    if unknown:
        parser.error(f"--only {','.join(unknown)}: no such stage; there are {', '.join(names)}")

    path = str(ROOT)
    if missing(path):  # else the machine's own packages, whatever the wheels are
        unzip()
        path = f"{SITE}{os.pathsep}{ROOT}"
    problem = lacking(path)
    if problem is not None:
        print(problem, file=sys.stderr)
        raise SystemExit(2)
    device = name_of_device() if arguments.device == "cuda" else None
    folder = "build/first_contact" if device is None else f"bench/results/{gpu_folder(device)}"
    out: Path = (arguments.out or ROOT / folder).absolute()
    out.mkdir(parents=True, exist_ok=True)
    env = environment(path) | {"FASTIL_DEVICE": arguments.device, "FASTIL_RESULTS": str(out)}
    if arguments.device == "cpu":
        env["CUDA_VISIBLE_DEVICES"] = ""
        env.setdefault("OMP_NUM_THREADS", "1")  # several wait for each other where another program has a core
    print(f"{device or ('CPU' if arguments.device == 'cpu' else 'no CUDA device')}; results in {out}", flush=True)

    total = ALTOGETHER * (SLOWER if arguments.device == "cpu" else 1)
    stages = [stage for stage in STAGES if stage.name in wanted]
    rows = []
    for stage, end in zip(stages, ends(stages, total), strict=True):
        rows.append(one_row(stage, end - (time.monotonic() - began), out, env))
        print("  " + "  ".join(rows[-1][1:]), flush=True)
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    print()
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, (*widths, 0), strict=True)).rstrip())
    print(f"{time.monotonic() - began:.0f} s in all; logs and figures in {out}")
    raise SystemExit(int(any(row[1] not in ("passed", "skipped") for row in rows)))


if __name__ == "__main__":
    main()
