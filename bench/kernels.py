"""The kernels against their peers: time, launches, waits, bytes and memory of one call.

python -m bench.kernels [--kernel NAME ...] [--shape BxW[xCLASSES] ...] [--dtype fp32|bf16 ...] [--peer NAME ...]
                        [--rounds N]

By default every kernel in its own shapes and dtypes against all peers that are installed. What B and W are is each
kernel's own matter; --help says it. A kernel leaves out peers that it has not, and has one dtype or several.
kernels.json, kernels.csv and kernels.png go to bench/results, for a GPU to bench/results/gpu_NAME, or to the folder
FASTIL_RESULTS.

On a GPU: microseconds (median, 20th and 80th percentile) per call in CUDA graphs with a warm and a cleared L2 and from
a Python loop, GB/s on the bytes that a call must move and their share of what a copy reaches in the same run, waits,
launches and peak memory. Inputs are random, eight sets take turns, and every contestant is first checked against the
formula (the loss in float64, other kernels in plain torch), in a poisoned output and again in a replayed graph.

Without a GPU nothing is timed. `bench.launch_counts` counts launches, waits and bytes of the same selection, and from
these a model estimates times; `measured` is false then. The model, for an H100: a launch in a CUDA graph takes 1.2 us
plus its bytes over the bandwidth, and at least 2.0 us; the bandwidth is 5.5 TB/s where what a call must move fits 40 MB
of L2, else 3.0 TB/s of HBM. Arithmetic, temporaries of the peers and waits are not held against anybody.
"""

import argparse
import contextlib
import functools
import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.cases import DTYPES, Case, read_shape
from bench.contestants import COMPILED, FASTIL, KERNELS, LIGER, PEERS, Contestant, entrants, peers_here
from bench.gpu_timing import MODES, copy_gb_per_s, graph_of, launches, measure, peak_bytes, poisoned, waits
from bench.harness import save
from bench.kernel_results import ESTIMATE, draw, entry, estimated_us, with_rates, write_csv
from fastil.device import device_name, pick_device
from fastil.errors import UserError
from fastil.text import format_table

Entries = list[dict[str, Any]]


def versions() -> dict[str, str]:
    """Return the versions of what the contestants run on."""
    found = {}
    for package in ("triton", "liger-kernel"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def write(device: torch.device, content: dict[str, Any]) -> Path:
    """Write the three result files. Returns the path of the JSON."""
    path = save("kernels", device, {"versions": versions()} | content)
    write_csv(path.with_suffix(".csv"), content["entries"])
    measured = device.type == "cuda"
    title = (
        f"{device_name(device)}, median time of a call"
        if measured
        else "H100, ESTIMATED from counts: no time was measured"
    )
    draw(path.with_suffix(".png"), content["entries"], title)
    return path


def count(part: str, cases: Sequence[Case], peers: Sequence[str]) -> list[dict[str, Any]] | str:
    """Return the counts of one part, from a process of its own, or why there are none."""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    if part == "compiled":
        del environment["TRITON_INTERPRET"]
    command = [sys.executable, "-W", "ignore", "-m", "bench.launch_counts", part]
    wanted = json.dumps({"cases": [asdict(case) for case in cases], "peers": [*peers]})
    done = subprocess.run(command, env=environment, input=wanted, capture_output=True, text=True)
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["it was killed"])[-1]
    counts: list[dict[str, Any]] = json.loads(done.stdout)
    return counts


def estimate(case: Case, counts: dict[str, Any]) -> Entries:
    """Return what there is to say of a case by the counts of `bench.launch_counts`."""
    entries = []
    for name, found in counts.items():
        if "failed" in found:
            entries.append(entry(case, name, measured=False, failed=found["failed"]))
            continue
        moved = found["bytes"]
        times = {ESTIMATE: {"median": estimated_us(moved, case)}}
        counted = {"launches": len(moved), "host_waits": found["waits"], "moved_bytes": round(sum(moved))}
        entries.append(entry(case, name, measured=False, **counted, times=times))
    return entries


def on_paper(device: torch.device, cases: Sequence[Case], peers: tuple[str, ...]) -> list[str]:
    """Count and estimate without a GPU, and write the result files. Returns what went wrong."""
    print("NO TIME WAS MEASURED: there is no GPU. Counts follow, and estimates that a model makes of them.", flush=True)
    counts: list[dict[str, Any]] = [{} for _ in cases]
    missing = {}
    for part in ("interpreted", *(["compiled"] if COMPILED in peers else [])):
        print(f"counting ({part}, minutes for all kernels) ...", flush=True)
        answer = count(part, cases, peers)
        if isinstance(answer, str):
            missing[part] = answer
            continue
        for into, more in zip(counts, answer, strict=True):
            into |= more
    entries = [found for case, of_case in zip(cases, counts, strict=True) for found in estimate(case, of_case)]
    header = ("kernel", "shape", "dtype", "contestant", "launches", "waits", "bytes moved", "us (model, not measured)")
    print(format_table(header, [_cells(found) for found in entries]))
    note = "no time was measured; the times are what the model in bench/kernels.py makes of the counts"
    print(f"written to {write(device, {'note': note, 'not_counted': missing, 'entries': entries})}, and .csv and .png")
    return [f"{part}: {why}" for part, why in missing.items()]


def _cells(found: dict[str, Any]) -> tuple[str, ...]:
    """Return an estimate as a row of the table."""
    named = (found["kernel"], found["shape"], found["dtype"], found["contestant"])
    if "failed" in found:
        return (*named, "-", "-", "-", f"failed: {found['failed']}"[:80])
    counts = (f"{found[key]:,}" for key in ("launches", "host_waits", "moved_bytes"))
    return (*named, *counts, f"{found['times'][ESTIMATE]['median']:.1f}")


def relative_error(result: Tensor, reference: Tensor) -> float:
    """Return the norm of the difference over the norm of what is wanted, where that is not 0."""
    difference = torch.linalg.vector_norm(result.detach().double() - reference)
    size = torch.linalg.vector_norm(reference)
    return float(torch.where(size == 0, difference, difference / size))


def check(result: Any, call: Any, case: Case, where: str) -> float | None:
    """Return the largest relative error of a contestant's results, None where there is nothing to compare them with.
    Raises ValueError if it is too large."""
    kernel = KERNELS[case.kernel]
    if kernel.reference is None or kernel.tolerance is None:
        return None
    pairs = zip(*(torch.utils._pytree.tree_leaves(v) for v in (result, kernel.reference(call))), strict=True)
    error = max(relative_error(a, b.double()) for a, b in pairs)
    if not error <= kernel.tolerance[case.dtype]:
        raise ValueError(f"{case.label}: relative error {error:.1e} {where}")
    return error


def time_contestant(
    contestant: Contestant, calls: list[Any], case: Case, copy_rate: float, rounds: int
) -> dict[str, Any]:
    """Check a contestant and return its error, times, launches, waits and peak memory."""
    works = [functools.partial(contestant, call) for call in calls]
    found: dict[str, Any] = {"relative_error": check(poisoned(works[0]), calls[0], case, "in a poisoned output")}
    found |= {"launches": launches(works[0]), "host_waits": waits(works[0]), "peak_bytes": peak_bytes(works[0])}
    if found["relative_error"] is not None and not found["host_waits"]:
        graph, replayed = graph_of(works[0])
        for part in torch.utils._pytree.tree_leaves(replayed):
            part.detach().fill_(torch.nan if part.is_floating_point() else -1)
        graph.replay()
        check(replayed, calls[0], case, "in a replayed graph")
        del graph, replayed
    return found | {"times": with_rates(measure(works, rounds), case, copy_rate)}


def time_case(case: Case, peers: tuple[str, ...], device: torch.device, copy_rate: float, rounds: int) -> Entries:
    """Return what was measured of all contestants on a case. What fails says why in its place."""
    torch.compiler.reset()  # else the ninth shape would run uncompiled
    kernel = KERNELS[case.kernel]
    calls = [kernel.make(case, device, seed) for seed in range(kernel.sets)]
    entries = []
    for name, contestant in entrants(kernel, peers, functools.partial(torch.compile, dynamic=False)).items():
        try:
            found = time_contestant(contestant, calls, case, copy_rate, rounds)
            times = found["times"]
            shown = [f"{t['median']:9.2f}" if isinstance(t := times[mode], dict) else f"{'-':>9}" for mode in MODES]
            rest = "  ".join(f"{key} {value:.3g}" for key, value in found.items() if isinstance(value, int | float))
        except Exception as error:
            found = {"failed": (str(error).splitlines() or [type(error).__name__])[0]}
            shown, rest = [], f"failed: {found['failed']}"
        print(f"{case.label:<40}{name:<17}{' '.join(shown)}  {rest}", flush=True)
        entries.append(entry(case, name, measured=True, **found))
    return entries


def on_gpu(device: torch.device, cases: Sequence[Case], peers: tuple[str, ...], rounds: int) -> list[str]:
    """Time everything on the GPU and write the result files after each case. Returns where fastil failed."""
    copy = copy_gb_per_s(rounds)
    print(
        f"{device_name(device)}: a copy reaches {copy['median']:.0f} GB/s; median us in {', '.join(MODES)}", flush=True
    )
    entries: Entries = []
    for case in cases:
        entries += time_case(case, peers, device, copy["median"], rounds)
        path = write(device, {"rounds": rounds, "copy_gb_per_s": copy, "entries": entries})
        torch.cuda.empty_cache()
    print(f"written to {path}, and .csv and .png")
    # A peer's trouble does not fail the bench.
    return [
        f"{f['kernel']} {f['shape']} {f['dtype']}: {f['failed']}"
        for f in entries
        if "failed" in f and f["contestant"] == FASTIL
    ]


def chosen(option: str, given: Sequence[str] | None, there: Sequence[str]) -> tuple[str, ...]:
    """Return what was given, each once, or all that is there. Raises UserError for what is not there."""
    for name in given or ():
        if name not in there:
            raise UserError(f"{option} {name}: there is no such one; use {', '.join(there)}")
    return tuple(dict.fromkeys(given or there))


def select(arguments: argparse.Namespace) -> tuple[list[Case], tuple[str, ...]]:
    """Return the cases and the peers that the options ask for. Raises UserError where they do not fit."""
    kernels = chosen("--kernel", arguments.kernel, [*KERNELS])
    wanted = chosen("--dtype", arguments.dtype, [*DTYPES])
    here = peers_here()
    peers = chosen("--peer", arguments.peer or here, PEERS)
    if LIGER in peers and LIGER not in here:
        raise UserError(f"--peer {LIGER}: it is not installed; pip install liger-kernel, or carry it (make wheels)")
    if arguments.rounds < 1:
        raise UserError(f"--rounds {arguments.rounds}: must be at least 1")
    shapes = [read_shape(text) for text in arguments.shape or ()]
    cases = []
    for name in kernels:
        kernel = KERNELS[name]
        dtypes = [dtype for dtype in kernel.dtypes if dtype in wanted]
        if not dtypes and arguments.kernel:
            raise UserError(f"--dtype {', '.join(wanted)}: {name} works in {', '.join(kernel.dtypes)}")
        cases += [Case(*shape, dtype, name) for shape in shapes or kernel.shapes for dtype in dtypes]
    if not cases:
        raise UserError(f"--dtype {', '.join(wanted)}: no kernel works in it")
    return cases, peers


def main(words: Sequence[str] | None = None) -> None:
    """Run the bench. Exits with 2 for what cannot be chosen, with 1 if fastil failed or something was not counted."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0] if __doc__ else "",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="B and W:\n" + "\n".join(f"  {name:<20}{kernel.axes}" for name, kernel in KERNELS.items()),
    )
    parser.add_argument("--kernel", action="append", help=f"some of {', '.join(KERNELS)}")
    parser.add_argument("--shape", action="append", help="BxW or BxWxCLASSES, of every chosen kernel")
    parser.add_argument("--dtype", action="append", help=f"some of {', '.join(DTYPES)}")
    parser.add_argument("--peer", action="append", help=f"some of {', '.join(PEERS)}; fastil always takes part")
    parser.add_argument("--rounds", type=int, default=20, help="of every time, on a GPU")
    arguments = parser.parse_args(words)
    try:
        cases, peers = select(arguments)
    except UserError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
    device = pick_device("auto")
    wrong = on_gpu(device, cases, peers, arguments.rounds) if device.type == "cuda" else on_paper(device, cases, peers)
    if wrong:
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    main()
