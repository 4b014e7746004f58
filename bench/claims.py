"""What docs/performance.md claims of an H100 SXM, against what was measured on a GPU.

python -m bench.claims FOLDER      with the results of a GPU, as bench/results/gpu_NAME

`make gpu` ends with it. Figures of train_step.json are of bf16; needs nothing but Python.
"""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

CAPTURED, COMPILED, EAGER = "compiled, captured", "compiled", "eager"
INFINITE = float("inf")
Figure = Callable[[dict[str, Any]], float]
R32, R18, STREAMED = "train_step.json", "train_step_resnet18.json", "streamed.json"


def of(mode: str, key: str, teacher: str = "with") -> Figure:
    """Return a figure of a mode."""
    return lambda found: found["results"][f"bf16, {teacher} a teacher"][mode][key]


def ceiling(found: dict[str, Any]) -> float:
    """Return the images per second of the captured step's kernels alone."""
    return found["results"]["bf16, with a teacher"]["ceiling, images per second"]  # type: ignore[no-any-return]


def faster(mode: str, than: str | Figure) -> Figure:
    """Return how many times as fast a mode is."""
    rate, other = of(mode, "median"), of(than, "median") if isinstance(than, str) else than
    return lambda found: rate(found) / other(found)


# What is claimed, by which estimate, the file and figure that show it, and between which it holds.
CLAIMS: list[tuple[str, str, str, Figure, float, float]] = [
    ("launches without a teacher", "373", R32, of(CAPTURED, "launches_a_step", "without"), 358, 388),
    ("launches with a teacher", "438", R32, of(CAPTURED, "launches_a_step"), 423, 453),
    ("captured: idle share", "0.35 to 0.37", R32, of(CAPTURED, "idle_share"), 0.2, 0.5),
    ("the loop / its ceiling", "1", R32, faster(CAPTURED, ceiling), 0.9, INFINITE),
    ("ceiling with a teacher, images/s", "51,000 to 90,000", R32, ceiling, 51_000, 90_000),
    ("compiled: idle share", "0.58 to 0.62", R32, of(COMPILED, "idle_share"), 0.45, 1),
    ("captured / compiled", "1.5 to 1.6", R32, faster(CAPTURED, COMPILED), 1.2, INFINITE),
    ("compiled / eager", "1.3", R32, faster(COMPILED, EAGER), 1, INFINITE),
    ("ResNet-18: captured / compiled", "1", R18, faster(CAPTURED, COMPILED), 0, 1.1),
    ("ResNet-18: idle share", "0.04", R18, of(CAPTURED, "idle_share"), 0, 0.1),
    ("ResNet-18 waits for 16 cores to decode", "0.3 to 0.6", STREAMED,
     lambda found: found["waits"]["stride 2, data"]["median"], 0.1, 1),
]  # fmt: skip


def verdicts(folder: Path) -> list[tuple[str, str, str, str]]:
    """Return claim, estimate, what was measured, and whether the claim holds."""
    rows = []
    for claim, estimate, file, figure, low, high in CLAIMS:
        try:
            content = json.loads((folder / file).read_text())
            if content.get("machine", {}).get("device", "").startswith("CPU"):
                raise ValueError("no GPU was measured")
            found = figure(content)
            measured, verdict = f"{found:,.4g}", "holds" if low <= found <= high else "refuted"
        except (OSError, KeyError, TypeError, ValueError, ZeroDivisionError):  # it failed, did not run, or on a CPU
            measured, verdict = "", f"not measured: {file}"
        rows.append((claim, estimate, measured, verdict))
    return rows


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as lines with their columns in line."""
    widths = [max(map(len, column)) for column in list(zip(*rows, strict=True))[:-1]]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, (*widths, 0), strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


if __name__ == "__main__":
    print(aligned([("claim", "estimate", "measured", ""), *verdicts(Path(sys.argv[1]))]))
