"""What bfloat16 costs in accuracy: the same runs in float32 and in bfloat16, paired over seeds and test images.

python -m bench.precision RECIPE [KEY=VALUE ...] [--data PATH] [--seeds N] [--jobs N] [--out DIR]

IL-Baseline, BalancedS-CE and LUCIR with the recipe's own schedule. A finished run is not trained again, a
stopped one goes on. The interval is that of `fastil reproduce`: a bootstrap over seeds and test images.
"""

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from bench.harness import save
from fastil.reporting.run_files import read_timings
from fastil.reporting.runs import Run
from fastil.reproduce.bootstrap import average_accuracy, paired_interval
from fastil.reproduce.table_text import predictions

METHODS = {
    "IL-Baseline": ["loss=softmax"],
    "BalancedS-CE": ["loss=balanced"],
    "LUCIR": ["method=lucir", "loss=softmax", "head=cosine", "last_relu=false"],
}
PRECISIONS = ("fp32", "bf16")


def train(command: list[str], out: Path) -> None:
    """Run one training in a process of its own; a finished one returns at once."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out.with_suffix(".log"), "a") as log:
        done = subprocess.run(
            [sys.executable, "-m", "fastil.cli", "run", *command, "--out", str(out), "--resume"],
            stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{out} failed; see {log.name}")


def machine_of(folders: Iterable[Path]) -> dict[str, Any]:
    """Return the machine, with its versions, that timings.json of all these runs name. Raises SystemExit if they
    differ."""
    first, *others = folders
    ours = read_timings(first)
    for folder in others:
        theirs = read_timings(folder)
        if (theirs.machine, theirs.versions) != (ours.machine, ours.versions):
            raise SystemExit(
                f"{first} ran on {ours.machine | ours.versions} and {folder} on {theirs.machine | theirs.versions}: a "
                "difference between machines is not one between precisions; train all in another --out"
            )
    return ours.machine | ours.versions


def main() -> None:
    """Run the bench and write its result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--data")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/precision"))
    given = parser.parse_intermixed_args()
    name = Path(given.recipe).stem
    seeds, data = range(given.seeds), ["--data", given.data] if given.data else []
    # All rows of a seed first, so that a comparison that is stopped has whole seeds.
    runs = [(seed, method, precision) for seed in seeds for method in METHODS for precision in PRECISIONS]
    folders = {run: given.out / name / "{1}-s{0}-{2}".format(*run) for run in runs}
    commands = [
        [given.recipe, *METHODS[method], *given.overrides, f"seed={seed}", f"precision={precision}", *data]
        for seed, method, precision in runs
    ]
    with ThreadPoolExecutor(given.jobs) as pool:
        list(pool.map(train, commands, folders.values()))
    machine, results = machine_of(folders.values()), {}
    for method in METHODS:
        half, single = ([predictions(Run(folders[s, method, p])) for s in seeds] for p in ("bf16", "fp32"))
        pairs = [(average_accuracy(ours), average_accuracy(theirs)) for ours, theirs in zip(half, single, strict=True)]
        difference = statistics.mean(ours - theirs for ours, theirs in pairs)
        low, high = paired_interval(half, single)
        results[method] = {"pairs": pairs, "difference": difference, "interval": [low, high]}
        print(f"{method:<14} bf16 minus fp32 {difference:+.2f} points ({low:+.2f} to {high:+.2f}), {len(pairs)} seeds")
    content = {
        "machine": machine,
        "recipe": given.recipe,
        "overrides": given.overrides,
        "seeds": given.seeds,
        "results": results,
    }
    print(f"written to {save(f'precision_{name}', torch.device('cpu'), content)}")


if __name__ == "__main__":
    main()
