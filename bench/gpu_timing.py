"""Times of short GPU work: in CUDA graphs with the caches warm and cleared, and call by call from Python.

A graph replays launches with no host in between. "Warm" repeats a call on the same inputs, so what fits the L2 comes
from there; "cleared" overwrites more than the L2 before every call, outside of the time taken.
"Stream" is the wall time per call as a Python loop sees it, the queue's end included.
"""

import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

WARM_CALLS = 20  # per graph
CLEAR_BYTES = 2**28  # five times the L2 of an H100
MODES = ("graph_warm", "graph_cleared", "stream")
Work = Callable[[], Any]


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Return median, 20th and 80th percentile."""
    p20, median, p80 = np.percentile(values, (20, 50, 80))
    return {"median": float(median), "p20": float(p20), "p80": float(p80)}


def graph_of(work: Work) -> tuple[torch.cuda.CUDAGraph, Any]:
    """Return the work captured as a graph, after the warm-up that torch asks for, and its result, which every replay
    overwrites."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = work()
    graph.replay()
    torch.cuda.synchronize()
    return graph, result


def replay_us(graph: torch.cuda.CUDAGraph) -> float:
    """Return the microseconds of a replay."""
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    began.record()
    graph.replay()
    ended.record()
    ended.synchronize()
    return float(began.elapsed_time(ended)) * 1e3


def warm_us(works: Sequence[Work], rounds: int) -> list[float]:
    """Return microseconds per call, for each of `works` (the same call on other inputs) in turn."""

    def repeated(work: Work) -> Work:
        def run() -> None:
            for _ in range(WARM_CALLS):
                work()

        return run

    graphs = [graph_of(repeated(work))[0] for work in works]
    return [replay_us(graph) / WARM_CALLS for _ in range(rounds) for graph in graphs]


def cleared_us(works: Sequence[Work], rounds: int) -> list[float]:
    """Return microseconds per call on a cleared L2, between two events around the replay of a graph of one call. The
    fill that clears takes longer than the host needs to queue what follows, so no wait for the host is included; the
    events and the start of a graph are, a microsecond or two."""
    junk = torch.empty(CLEAR_BYTES, dtype=torch.uint8, device="cuda")
    graphs = [graph_of(work)[0] for work in works]

    def replay(graph: torch.cuda.CUDAGraph) -> float:
        junk.zero_()
        return replay_us(graph)

    return [replay(graph) for _ in range(rounds) for graph in graphs]


def stream_us(works: Sequence[Work], rounds: int) -> list[float]:
    """Return wall microseconds per call, one round through `works` at a time."""
    for work in works:
        work()
    times = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for work in works:
            work()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - began) / len(works) * 1e6)
    return times


def copy_gb_per_s(rounds: int) -> dict[str, float]:
    """Return the GB/s of a copy, read and written bytes together."""
    source, target = (torch.ones(2**29, dtype=torch.uint8, device="cuda") for _ in range(2))
    times = warm_us([lambda: target.copy_(source)], rounds)
    return percentiles([2 * source.numel() / us / 1e3 for us in times])


def peak_bytes(work: Work) -> int:
    """Return how much memory the call takes at its peak beyond what was there before, its result included."""
    work()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    return torch.cuda.max_memory_allocated() - before


def launches(work: Work) -> int | None:
    """Return the kernels, copies and fills of one call by the profiler; None if it sees none."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        work()
        torch.cuda.synchronize()
    seen = [event for event in profile.events() if event.device_type.name == "CUDA"]
    return sum(not event.is_user_annotation for event in seen) or None  # annotations span launches, and are none


def waits(work: Work) -> int:
    """Return how often the host waits for the device in one call."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(warning.message) for warning in caught)


def poisoned(work: Work) -> Any:
    """Return the call's results, in memory that the allocator just got back full of NaN, of integers full of -1."""
    results = [part for part in torch.utils._pytree.tree_leaves(work()) if isinstance(part, Tensor)]
    value = [torch.nan if part.is_floating_point() else -1 for part in results]
    poison = [torch.full_like(part, v) for part, v in zip(results, value, strict=True) for _ in range(4)]
    del poison, results
    return work()


def measure(works: Sequence[Work], rounds: int) -> dict[str, dict[str, float] | str]:
    """Return percentiles of microseconds per call: graph_warm, graph_cleared, stream. For a call that waits for the
    device, and cannot be captured, the reason stands in place of its times."""
    times: dict[str, dict[str, float] | str] = {"stream": percentiles(stream_us(works, rounds))}
    waiting = waits(works[0])
    for name, timed in (("graph_warm", warm_us), ("graph_cleared", cleared_us)):
        if waiting:
            times[name] = f"cannot be captured: the host waits for the device {waiting} times"
            continue
        try:
            times[name] = percentiles(timed(works, rounds))
        except RuntimeError as error:
            times[name] = f"cannot be captured: {str(error).splitlines()[0]}"
    return times
