"""The kernels: the incremental loss against its peers, each other kernel against its plain form, and a whole step.

python -m bench.kernels [--rounds N] [--case LABEL ...]

On a GPU: microseconds (median, 20th and 80th percentile) per call in CUDA graphs with a warm and a cleared L2 and from
a Python loop, GB/s on the bytes that the loss must move and their share of what a copy reaches in the same run, waits,
launches and peak memory. Inputs are random, eight sets take turns, and every contestant is first checked against the
formula in float64, in a poisoned output and again in a replayed graph. --case chooses among the shapes of the loss,
such as "128 x 104 fp32". Results go to bench/results/gpu_NAME/kernels.json.

Without a GPU nothing is timed. `bench.launch_counts` counts launches, waits and bytes, and from these a model estimates
times, written to bench/results/kernels_cpu.json. The model, for an H100: a launch in a CUDA graph takes 1.2 us plus its
bytes over the bandwidth, and at least 2.0 us; the bandwidth is 5.5 TB/s where logits, teacher and gradient together
fit 40 MB of L2, else 3.0 TB/s of HBM. Temporaries of the peers are not held against them, nor are waits.
"""

import argparse
import contextlib
import functools
import importlib
import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bench.gpu_timing import copy_gb_per_s, graph_of, launches, measure, peak_bytes, poisoned, waits
from bench.harness import save
from bench.loss_contestants import (
    AUTOGRAD,
    CASES,
    DTYPES,
    FASTIL,
    TEMPERATURE,
    Call,
    Case,
    contestants,
    gradient_in_float64,
    make_call,
    scalars_of,
)
from fastil.device import device_name, pick_device
from fastil.kernels import incremental_loss_grad
from fastil.losses import balanced_cross_entropy, distillation
from fastil.models import ModelConfig, build_network

SETS = 8  # of inputs, taken in turn
TOLERANCE = {"fp32": 1e-5, "bf16": 1e-2}  # relative, against float64: whoever is off by more computes something else
NODE_US, FIXED_US, HBM_TB_PER_S, L2_TB_PER_S, L2_BYTES = 2.0, 1.2, 3.0, 5.5, 40e6
MODES = ("graph_warm", "graph_cleared", "stream")


def label(case: Case) -> str:
    """Return the name of a case."""
    return f"{case.batch} x {case.width} {case.dtype}"


def model_bytes(case: Case) -> int:
    """Return the bytes that the loss must move: the logits in, the gradient out, and the teacher's old columns in."""
    return case.batch * (2 * case.width + case.num_old) * DTYPES[case.dtype].itemsize


def estimated_us(launch_bytes: Sequence[float], case: Case) -> float:
    """Return microseconds by the model of the module's docstring."""
    fits = 3 * case.batch * case.width * DTYPES[case.dtype].itemsize <= L2_BYTES
    per_us = (L2_TB_PER_S if fits else HBM_TB_PER_S) * 1e6
    return sum(max(NODE_US, FIXED_US + moved / per_us) for moved in launch_bytes)


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a table with columns as wide as their widest cell; numbers to the right."""
    cells = [[f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    right = [all(isinstance(row[i], int | float) for row in rows) for i in range(len(header))]
    return "\n".join(
        "  ".join(cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(row, widths, right, strict=True)).rstrip()
        for row in cells
    )


def with_rates(times: dict[str, Any], must_move: int, copy_rate: float) -> dict[str, Any]:
    """Add to each mode's times GB/s on the bytes that must move, and percent of the copy's rate."""
    rated = {}
    for mode, spread in times.items():
        rated[mode] = spread
        if isinstance(spread, dict):
            rate = must_move / spread["median"] / 1e3
            rated[mode] = spread | {"gb_per_s": rate, "percent_of_copy": 100 * rate / copy_rate}
    return rated


def paper_rows(counts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row per case and contestant from the counts of `bench.launch_counts`."""
    rows = []
    for case, entrants in zip(CASES, counts, strict=True):
        for name, count in entrants.items():
            moved = count["bytes"]
            rows.append(
                {
                    "case": label(case),
                    "contestant": name,
                    "launches": len(moved),
                    "host_waits": count["waits"],
                    "bytes_per_logit": sum(moved) / (case.batch * case.width),
                    "estimated_us": estimated_us(moved, case),
                }
            )
    return rows


def count(part: str) -> list[dict[str, Any]] | str:
    """Return the counts of one part, from a process of its own, or why there are none."""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    if part == "compiled":
        del environment["TRITON_INTERPRET"]
    command = [sys.executable, "-W", "ignore", "-m", "bench.launch_counts", part]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        return done.stderr.strip().splitlines()[-1]
    counts: list[dict[str, Any]] = json.loads(done.stdout)
    return counts


def versions() -> dict[str, str]:
    """Return the versions of what the contestants run on."""
    found = {}
    for package in ("triton", "liger-kernel"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def on_paper(device: torch.device) -> None:
    """Count and estimate without a GPU, and write the result file."""
    print("NO TIME WAS MEASURED: there is no GPU. Counts follow, and estimates that a model makes of them.", flush=True)
    counts: list[dict[str, Any]] = [{} for _ in CASES]
    missing = {}
    for part in ("interpreted", "compiled"):
        print(f"counting ({part}, about two minutes) ...", flush=True)
        answer = count(part)
        if isinstance(answer, str):
            missing[part] = answer
            continue
        for into, more in zip(counts, answer, strict=True):
            into |= more
    rows = paper_rows(counts)
    header = ("B x W", "contestant", "launches", "host waits", "bytes/logit", "estimated us (model, not measured)")
    print(table(header, [list(row.values()) for row in rows]))
    note = "no time was measured; estimated_us is what the model in bench/kernels.py makes of the counts"
    content = {"note": note, "versions": versions(), "not_counted": missing, "loss": rows}
    print(f"written to {save('kernels_cpu', device, content)}")
    if missing:
        raise SystemExit(f"not counted: {missing}")


def relative_error(result: Tensor, reference: Tensor) -> float:
    """Return the norm of the difference over the norm of what is wanted."""
    difference = torch.linalg.vector_norm(result.detach().double() - reference)
    return float(difference / torch.linalg.vector_norm(reference))


def check(name: str, contestant: Callable[[Call], Tensor], call: Call, case: Case) -> float:
    """Return the relative error of a contestant against the formula in float64. Raises ValueError if it is too
    large."""
    error = relative_error(poisoned(lambda: contestant(call), call.logits.detach()), gradient_in_float64(call))
    if not error <= TOLERANCE[case.dtype]:
        raise ValueError(f"{name} at {label(case)}: relative error {error:.1e} against float64")
    return error


def time_contestant(
    name: str, contestant: Callable[[Call], Tensor], calls: list[Call], case: Case, copy_rate: float, rounds: int
) -> dict[str, Any]:
    """Check a contestant and return its error, times, launches, waits and peak memory."""
    works = [functools.partial(contestant, call) for call in calls]
    result: dict[str, Any] = {"relative_error": check(name, contestant, calls[0], case)}
    result |= {"launches": launches(works[0]), "host_waits": waits(works[0]), "peak_bytes": peak_bytes(works[0])}
    if not result["host_waits"]:
        graph, replayed = graph_of(works[0])
        replayed.detach().fill_(torch.nan)
        graph.replay()
        error = relative_error(replayed, gradient_in_float64(calls[0]))
        if not error <= TOLERANCE[case.dtype]:
            raise ValueError(f"{name} at {label(case)}: relative error {error:.1e} in a replayed graph")
        del graph, replayed
    times = measure(works, rounds)
    shown = [f"{t['median']:9.2f}" if isinstance(t := times[mode], dict) else f"{'-':>9}" for mode in MODES]
    rest = "  ".join(f"{key} {value:.3g}" for key, value in result.items() if value is not None)
    print(f"{label(case):<18}{name:<17}{' '.join(shown)}  {rest}", flush=True)
    return result | with_rates(times, model_bytes(case), copy_rate)


def time_loss(case: Case, device: torch.device, copy_rate: float, rounds: int) -> dict[str, Any]:
    """Return the times of all contestants on a case."""
    torch.compiler.reset()  # else the ninth shape would run uncompiled
    calls = [make_call(case, device, seed) for seed in range(SETS)]
    results = {}
    for name, contestant in contestants().items():
        try:
            results[name] = time_contestant(name, contestant, calls, case, copy_rate, rounds)
        except Exception as error:
            if name in (FASTIL, AUTOGRAD):
                raise
            results[name] = {"failed": str(error).splitlines()[0]}  # a peer's trouble does not end the bench
            print(f"{label(case):<18}{name:<17}failed: {results[name]['failed']}", flush=True)
    return results


def other_kernels(device: torch.device) -> dict[str, Callable[[], list[Any]]]:
    """Return the arguments of one call of each other kernel, by the name that operator, file and plain form share."""

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device)

    def augment() -> list[Any]:
        images = torch.randint(0, 256, (50_000, 32, 32, 3), dtype=torch.uint8, device=device)
        boxes = torch.cat((torch.randint(-4, 5, (128, 2)), torch.full((128, 2), 32)), 1).to(device)
        ids, flips = torch.randint(0, 50_000, (128,), device=device), torch.rand(128, device=device) < 0.5
        mean, std = torch.full((3,), 0.5, device=device), torch.full((3,), 0.25, device=device)
        return [images, ids, boxes, flips, mean, std, torch.float32, 32, 32]

    def herd() -> list[Any]:
        features = torch.nn.functional.normalize(rand(50, 500, 64).double() + 1, dim=2)
        return [features @ features.mT, torch.full((50,), 500, device=device), 20, 1000, 1e-9]

    def pod_spatial() -> list[Any]:
        return [rand(128, 64, 8, 8).contiguous(memory_format=torch.channels_last) for _ in range(2)] + [1]

    def alpha_hypergradient() -> list[Any]:
        target, prior = torch.randint(0, 100, (128,), device=device), torch.zeros(104, device=device)
        return [
            rand(128, 104),
            rand(128, 104),
            target,
            prior,
            *(torch.tensor(v, device=device) for v in (50, 100, 0.5)),
        ]

    return {
        "augment": augment,
        "herd": herd,
        "pod_spatial": pod_spatial,
        "less_forget": lambda: [rand(128, 64), rand(128, 64)],
        "cosine_head": lambda: [rand(128, 64), rand(104, 10, 64), torch.ones((), device=device), 1.0],
        "alpha_hypergradient": alpha_hypergradient,
    }


def time_other(name: str, arguments: list[Any], rounds: int) -> dict[str, Any]:
    """Return the times of another kernel and of its plain form."""
    plain = importlib.import_module(f"fastil.kernels.{name}").plain  # its import registers the operator
    operator = getattr(torch.ops.fastil, name)
    with torch.no_grad():
        pair = [torch.utils._pytree.tree_leaves(form(*arguments)) for form in (operator, plain)]
        errors = [relative_error(a, b.double()) for a, b in zip(*pair, strict=True) if b.any()]
        if not max(errors) <= (0 if name in ("herd", "augment") else 1e-4):  # exact, and of two float32 results
            raise ValueError(f"{name}: relative difference {max(errors):.1e} between its forms")
        forms = {"triton": lambda: operator(*arguments), "plain": lambda: plain(*arguments)}
        results = {form: measure([work], rounds) | {"launches": launches(work)} for form, work in forms.items()}
    print(name, f"relative difference {max(errors):.1e}", json.dumps(results), flush=True)
    return results | {"relative_difference": max(errors)}


def whole_step(device: torch.device, rounds: int, batch: int = 128) -> dict[str, Any]:
    """Return the times of a training step with the kernel and with the formulas: ResNet-32, bfloat16 autocast, a
    teacher, SGD."""
    results = {}
    images = torch.randn(batch, 3, 32, 32, device=device).contiguous(memory_format=torch.channels_last)
    call = make_call(Case(batch, 104, 100, "fp32"), device, 0)
    for name in ("kernel", "formulas"):
        student, teacher = (build_network(ModelConfig("resnet32"), 104, seed).to(device) for seed in (0, 1))
        teacher.eval()
        optimizer = torch.optim.SGD(student.parameters(), lr=0.01, momentum=0.9, weight_decay=2e-4)

        def step(name: str = name, student: Any = student, teacher: Any = teacher, optimizer: Any = optimizer) -> None:
            optimizer.zero_grad()
            with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
                logits = student(images).logits
                with torch.no_grad():
                    teacher_logits = teacher(images).logits
            if name == "kernel":
                fixed = scalars_of(call) | {"meter": call.meter}
                gradient = incremental_loss_grad(logits, call.target, call.prior, teacher_logits, **fixed)
                logits.backward(gradient)
            else:
                ce = balanced_cross_entropy(logits, call.target, call.prior)
                kd = distillation(logits, teacher_logits, call.num_old, TEMPERATURE)
                (call.ce_weight * ce + call.kd_weight * kd).backward()  # type: ignore[no-untyped-call]
            optimizer.step()

        results[name] = measure([step], rounds)
        print("whole step,", name, json.dumps(results[name]), flush=True)
    return results


def on_gpu(device: torch.device, rounds: int, cases: Sequence[Case]) -> None:
    """Time everything on the GPU and write the result file."""
    copy = copy_gb_per_s(rounds)
    print(
        f"{device_name(device)}: a copy reaches {copy['median']:.0f} GB/s; median us in {', '.join(MODES)}", flush=True
    )
    content: dict[str, Any] = {
        "versions": versions(),
        "rounds": rounds,
        "copy_gb_per_s": copy,
        "loss": {},
        "others": {},
    }
    name = "kernels"
    for case in cases:
        content["loss"][label(case)] = time_loss(case, device, copy["median"], rounds)
        save(name, device, content)  # what is measured stays, whatever comes after
        torch.cuda.empty_cache()
    content["whole_step"] = whole_step(device, rounds)
    for kernel, arguments in other_kernels(device).items():
        content["others"][kernel] = time_other(kernel, arguments(), rounds)
        save(name, device, content)
    print(f"written to {save(name, device, content)}")


def main() -> None:
    """Run the bench."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=20)
    labels = {label(case): case for case in CASES}
    parser.add_argument("--case", action="append", choices=labels, help="of the loss; default: all (on a GPU)")
    arguments = parser.parse_args()
    rounds, cases = arguments.rounds, [labels[name] for name in arguments.case or labels]
    device = pick_device("auto")
    if device.type == "cuda":
        on_gpu(device, rounds, cases)
    else:
        on_paper(device)


if __name__ == "__main__":
    main()
