"""First contact with a GPU: stages that each show something, ten minutes in all, no network and no installation.

python -m bench.first_contact [--only STAGE,...] [--device cpu] [--out FOLDER]        (make gpu)

Every stage is a process with a share of the ten minutes, to which the time is added that those before it left over. Its
log, its figures and what became of it are written at once: what fails or hangs costs itself only. Results go to
bench/results/gpu_NAME, without a GPU to build/first_contact. --device cpu runs all of it on the CPU, on small sizes.
What this Python lacks is taken from build/wheels, which `make wheels` fills on a machine with a package registry. What
was carried is checked first. This file, bench.wheels, bench.carry and bench.claims need nothing but Python.
"""

import argparse
import contextlib
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from types import FrameType
from typing import Any
from xml.etree import ElementTree

from bench import carry
from bench.claims import aligned, verdicts
from bench.wheels import ROOT, complete, environment, scratch, shown

ALTOGETHER = 590.0  # seconds, from the start of this process to its last line
SLOWER = 4  # a CPU may take longer by this factor
# How a stage ends (bench.stages), besides 0 and whatever means that it failed.
SKIPPED, NO_DEVICE = 77, 78
ENDED = re.compile(r"^\[gw\d+\] \[ *\d+%\] (PASSED|FAILED|ERROR|SKIPPED) (.+)$")  # a line of pytest -vv with xdist
CARRIED = ROOT / "build/carried"  # CIFAR-100 in parts, by bench.carry
TAIL = 60  # lines of the log that the result file holds


@dataclass(frozen=True)
class Stage:
    """share: seconds of ALTOGETHER. shows: what it is for. writes: its figures, besides log and result."""

    name: str
    share: float
    shows: str
    writes: tuple[str, ...] = ()


STAGES = (
    Stage("machine", 25, "versions, compilers, and what fastil chooses here"),
    Stage("kernel_tests", 150, "the tests of the kernels"),
    Stage("trainer_tests", 105, "every method in bf16; captured, compiled, resumed, streamed"),
    Stage("step", 110, "a training step eager, compiled and captured; launches; idle share", ("train_step.json",)),
    Stage("streaming", 50, "the loaders to the GPU, alone and while training", ("loaders.json", "streamed.json")),
    Stage("cifar100", 80, "a short row of CIFAR-100", ("run",)),
    Stage("sanitizer", 30, "compute-sanitizer's memcheck on a launch of each kernel"),
    Stage(
        "kernel_times", 40, "the incremental loss against its peers, the other kernels against plain torch",
        ("kernels.json", "kernels.csv", "kernels.png", "other_kernels"),
    ),
)  # fmt: skip


class Interrupted(BaseException):
    """This process was told to end, by a signal of this number."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def interrupt(number: int, frame: FrameType | None) -> None:
    """Raise Interrupted: the handler of a signal."""
    raise Interrupted(number)


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
        finally:  # also what it left behind, and when interrupted
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
    return lines[-1][:110] if lines and (result != "passed" or name == "cifar100") else ""


DEVICE = """
import torch
if torch.cuda.is_available():
    print(torch.cuda.get_device_name())
elif torch.version.cuda is None:
    raise SystemExit(f"torch {torch.__version__} is built without CUDA")
else:
    torch.cuda.init()  # raises with the reason
"""


def name_of_device() -> tuple[str | None, str]:
    """Return the name of the GPU that torch sees, or None and the reason."""
    try:
        done = subprocess.run([sys.executable, "-c", DEVICE], capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        return None, "torch did not answer within 60 s"
    return done.stdout.strip() or None, (done.stderr.strip() or "torch does not say why").splitlines()[-1]


def gpu_folder(name: str) -> str:
    """Return the name of a GPU's folder of results."""
    return "gpu_" + re.sub(r"[^A-Za-z0-9]+", "_", name)


def lines_of(log: Path) -> list[str]:
    """Return what a terminal would show of a log: the lines that are not blank, a progress bar in its last state."""
    lines = log.read_bytes().decode(errors="replace").split("\n")
    return [line for line in (line.rstrip("\r").rsplit("\r", 1)[-1] for line in lines) if line.strip()]


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def one_row(stage: Stage, limit: float, out: Path, env: dict[str, str]) -> tuple[str, str, str, str]:
    """Run a stage for at most `limit` seconds and write its result file. Returns its row of the table."""
    log, report, written = (out / f"{stage.name}.{kind}" for kind in ("log", "xml", "result.json"))
    for old in (log, report, *(out / name for name in stage.writes)):
        remove(old)
    content: dict[str, Any] = {"stage": stage.name, "result": "interrupted", "limit": round(limit, 1)}
    written.write_text(json.dumps(content) + "\n")  # until it has ended
    status, seconds, result, lines = None, 0.0, "not started", ["no time left"]
    if limit > 1:
        print(f"{stage.name}: {stage.shows} (at most {limit:.0f} s) ...", flush=True)
        status, seconds = run_stage([sys.executable, "-m", "bench.stages", stage.name], env, log, limit)
        result, lines = outcome(status), lines_of(log)
    tests = counts_of(report) or counts_in_log(lines)
    content |= {"result": result, "exit_status": status, "seconds": round(seconds, 1), "tests": tests}
    written.write_text(json.dumps(content | {"log_tail": lines[-TAIL:]}, indent=1) + "\n")
    return stage.name, result, f"{seconds:.0f} s", summary_of(stage.name, result, lines, tests)


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold a folder for this process. Raises ValueError if another one does."""
    with (folder / "first_contact.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{shown(folder)}: another `make gpu` is running here; wait for it") from None
        except OSError:  # a file system without locks
            pass
        yield


def chosen(only: str | None, parser: argparse.ArgumentParser) -> list[Stage]:
    """Return the stages that --only names, all without it."""
    names = [stage.name for stage in STAGES]
    wanted = names if only is None else only.split(",")
    unknown = [name for name in wanted if name not in names]
    if unknown:
        parser.error(f"--only {','.join(unknown)}: no such stage; there are {', '.join(names)}")
    return [stage for stage in STAGES if stage.name in wanted]


def ready(stages: Sequence[Stage], site: Path) -> str:
    """Unzip the wheels and check the parts. Returns the PYTHONPATH of the stages. Raises ValueError that names all that
    is missing or damaged."""
    path, wrong = "", []
    try:
        path = complete(site)
    except ValueError as error:
        wrong.append(str(error))
    try:
        if any(stage.name == "cifar100" for stage in stages) and CARRIED.is_dir() and any(CARRIED.iterdir()):
            carry.check(CARRIED)
    except ValueError as error:
        others = ",".join(stage.name for stage in STAGES if stage.name != "cifar100")
        wrong.append(f'{error}\nwithout it: make gpu ARGS="--only {others}"')
    if wrong:
        raise ValueError("\n".join(wrong))
    return path


def run(stages: Sequence[Stage], on_cpu: bool, out: Path | None, began: float) -> int:
    """Run the stages. Returns the exit status. Raises ValueError or OSError where they cannot be run."""
    device, reason = (None, "") if on_cpu else name_of_device()
    default = "build/first_contact" if device is None else f"bench/results/{gpu_folder(device)}"
    out = (out or ROOT / default).absolute()
    summary = out / "summary.txt"
    try:
        out.mkdir(parents=True, exist_ok=True)
        summary.touch()
    except OSError as error:
        raise ValueError(f'{out}: {error.strerror}; make gpu ARGS="--out FOLDER" takes another folder') from None
    what = device or ("CPU" if on_cpu else f'no CUDA device: {reason} (on the CPU: make gpu ARGS="--device cpu")')
    print(f"{what}; results in {shown(out)}", flush=True)
    site = scratch(out) / "packages"
    with alone(site.parent):
        path = ready(stages, site)
        env = environment(path) | {"FASTIL_DEVICE": "cpu" if on_cpu else "cuda", "FASTIL_RESULTS": str(out)}
        if on_cpu:
            env["CUDA_VISIBLE_DEVICES"] = ""
            env.setdefault("OMP_NUM_THREADS", "1")  # several wait for each other where another program has a core
        rows, code = [], 0
        try:
            prepared = time.monotonic()
            total = ALTOGETHER * (SLOWER if on_cpu else 1) - (prepared - began)
            for stage, end in zip(stages, ends(stages, total), strict=True):
                rows.append(one_row(stage, end - (time.monotonic() - prepared), out, env))
                print("  " + "  ".join(rows[-1][1:]), flush=True)
                code |= rows[-1][1] not in ("passed", "skipped")
        except Interrupted as error:
            rows.append((stage.name, "interrupted", "", ""))
            code = 128 + error.number
        lines = ["", aligned(rows)]
        claims = verdicts(out)
        if any(measured for _, _, measured, _ in claims):
            lines += ["", aligned([("docs/performance.md", "H100 SXM", "measured", ""), *claims])]
        lines += ["", f"{time.monotonic() - began:.0f} s in all; logs, figures and this table are in {shown(out)}"]
        if path != str(ROOT):
            lines.append(f"a bench by itself: PYTHONPATH={shown(site)}:. {sys.executable} -m bench.train_step")
        summary.write_text("\n".join([what, *lines, ""]))
        print("\n".join(lines))
    return code


def main() -> None:
    """Run the stages. Exits with 1 if any of them failed, 2 if none can run, as a signal does if it ends them."""
    began = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--only", metavar="STAGE,...", help=f"some of {','.join(stage.name for stage in STAGES)}")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="for the results")
    arguments = parser.parse_args()
    try:
        code = run(chosen(arguments.only, parser), arguments.device == "cpu", arguments.out, began)
    except Interrupted as error:  # before the first stage
        code = 128 + error.number
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        code = 2
    raise SystemExit(code)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has it
            signal.signal(number, interrupt)
    main()
