"""What every bench shares: contestants that take turns, medians and ratios, one result file with the machine in it."""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.first_contact import gpu_folder
from fastil.device import device_name, processor_name

RESULTS = Path(__file__).parent / "results"


def take_turns(contestants: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Return the figures of all contestants, which run once per round in an order that rotates; each call returns
    one."""
    figures: dict[str, list[float]] = {name: [] for name in contestants}
    names = list(contestants)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            figures[name].append(contestants[name]())
            print(f"  round {turn + 1}/{rounds}  {name:<28}{figures[name][-1]:10.2f}", flush=True)
    return figures


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Return the wall time of one call, the device's queue included."""
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def spread(values: list[float]) -> dict[str, float]:
    """Return median, minimum and maximum."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratio(figures: dict[str, list[float]], over: str, under: str) -> dict[str, float]:
    """Return the spread of the ratios of two contestants, round by round, so that a change of the machine's speed
    touches both."""
    return spread([a / b for a, b in zip(figures[over], figures[under], strict=True)])


def save(name: str, device: torch.device, content: dict[str, Any]) -> Path:
    """Write NAME.json, with the machine in it, into bench/results, for a GPU into its own folder there, or into the
    folder FASTIL_RESULTS. Returns its path."""
    machine = {
        "device": device_name(device),
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    default = RESULTS / gpu_folder(device_name(device)) if device.type == "cuda" else RESULTS
    folder = Path(os.environ.get("FASTIL_RESULTS", default))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"machine": machine} | content, indent=1) + "\n")
    return path


def show(label: str, values: dict[str, float], unit: str = "") -> None:
    """Print a label and a spread."""
    print(f"{label:<46}{values['median']:10.3f} {unit}  ({values['min']:.3f} to {values['max']:.3f})")


def digits_at(size: int, count: int) -> Any:
    """Return `count` real images, scikit-learn's digits enlarged to size x size, in 10 classes."""
    import numpy as np

    from fastil.data import DataConfig, Split, load_dataset

    train = load_dataset(DataConfig("digits")).train
    assert isinstance(train, Split)
    rows = np.arange(count) % len(train.labels)
    scale = size // 8
    images = train.images[rows].repeat(scale, axis=1).repeat(scale, axis=2)
    return Split(np.ascontiguousarray(images), train.labels[rows])
