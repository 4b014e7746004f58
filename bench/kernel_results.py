"""What `bench.kernels` found, as rows of a CSV and as a plot; and the model that estimates times without a GPU.

A row is one kernel, shape, dtype, contestant and mode. Times in microseconds: median, 20th and 80th percentile.
"""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.cases import Case
from bench.contestants import KERNELS

NODE_US, FIXED_US, HBM_TB_PER_S, L2_TB_PER_S, L2_BYTES = 2.0, 1.2, 3.0, 5.5, 40e6
ESTIMATE = "estimate"  # the mode of what was not measured
COLUMNS = (
    "kernel", "shape", "dtype", "contestant", "mode", "measured", "median_us", "p20_us", "p80_us", "gb_per_s",
    "percent_of_copy", "launches", "host_waits", "moved_bytes", "peak_bytes", "relative_error", "note",
)  # fmt: skip
ABREAST = 3  # panels of the plot
SHOWN = (ESTIMATE, "graph_warm", "stream")  # the plot shows the first that a contestant has


def must_move(case: Case) -> int | None:
    """Return the bytes that a call must at least read and write; None for a whole step."""
    bytes_of = KERNELS[case.kernel].must_move
    return None if bytes_of is None else bytes_of(case)


def estimated_us(launch_bytes: Sequence[float], case: Case) -> float:
    """Return microseconds by the model that the docstring of bench.kernels states."""
    fits = (must_move(case) or sum(launch_bytes)) <= L2_BYTES
    per_us = (L2_TB_PER_S if fits else HBM_TB_PER_S) * 1e6
    return sum(max(NODE_US, FIXED_US + moved / per_us) for moved in launch_bytes)


def entry(case: Case, contestant: str, *, measured: bool, **found: Any) -> dict[str, Any]:
    """Return what the JSON holds of a case and contestant."""
    named = {"kernel": case.kernel, "shape": case.shape, "dtype": case.dtype, "contestant": contestant}
    return named | {"measured": measured} | found


def with_rates(times: dict[str, Any], case: Case, copy_rate: float) -> dict[str, Any]:
    """Add to each mode's times GB/s on the bytes that must move, and percent of the copy's rate in GB/s."""
    bytes_of_call = must_move(case)
    if bytes_of_call is None:
        return times
    rated = {}
    for mode, spread in times.items():
        rated[mode] = spread
        if isinstance(spread, dict):
            rate = bytes_of_call / spread["median"] / 1e3
            rated[mode] = spread | {"gb_per_s": rate, "percent_of_copy": 100 * rate / copy_rate}
    return rated


def rows_of(entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of the CSV: one for each mode, and one that says why for a contestant without times."""
    rows = []
    for found in entries:
        shared = {key: value for key, value in found.items() if key in COLUMNS}
        if "failed" in found:
            rows.append(shared | {"note": f"failed: {found['failed']}"})
        for mode, spread in found.get("times", {}).items():
            row = shared | {"mode": mode}
            if isinstance(spread, dict):
                row |= {f"{key}_us": spread[key] for key in ("median", "p20", "p80") if key in spread}
                row |= {key: spread[key] for key in ("gb_per_s", "percent_of_copy") if key in spread}
            else:
                row["note"] = spread
            rows.append(row)
    return rows


def write_csv(path: Path, entries: Sequence[dict[str, Any]]) -> None:
    """Write the rows; what there is none of stays empty."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for row in rows_of(entries):
            told = {key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()}
            writer.writerow(told | {"measured": str(row["measured"]).lower()})


def _panels(entries: Sequence[dict[str, Any]]) -> dict[tuple[str, ...], dict[str, dict[int, dict[str, float]]]]:
    """Return what is drawn: by kernel, dtype and B, of each contestant the spread of its times by W."""
    panels: dict[tuple[str, ...], dict[str, dict[int, dict[str, float]]]] = {}
    for found in entries:
        times = found.get("times", {})
        mode = next((mode for mode in SHOWN if isinstance(times.get(mode), dict)), None)
        if mode is None:
            continue
        batch, width = found["shape"].split("x")[:2]
        name = found["contestant"] + (" (from Python)" if mode == "stream" else "")
        panel = panels.setdefault((found["kernel"], found["dtype"], batch), {})
        panel.setdefault(name, {})[int(width)] = times[mode]
    return panels


def draw(path: Path, entries: Sequence[dict[str, Any]], title: str) -> None:
    """Draw time against width, a panel for each kernel, dtype and B: lines where there are several widths, else bars.
    Draws nothing where nothing was found."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
    from matplotlib.ticker import NullFormatter, NullLocator

    panels = _panels(entries)
    if not panels:
        return
    rows = -(-len(panels) // ABREAST)
    figure = Figure((5.2 * min(ABREAST, len(panels)), 3.4 * rows + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    names = list(dict.fromkeys(name for panel in panels.values() for name in panel))
    color = {name: f"C{i}" for i, name in enumerate(names)}
    for place, ((kernel, dtype, batch), panel) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(rows, min(ABREAST, len(panels)), place)
        axes.set_title(f"{kernel}, {dtype}, B = {batch}", fontsize="medium")
        widths = sorted({width for spreads in panel.values() for width in spreads})
        if len(widths) == 1:
            _bars(axes, {name: spreads[widths[0]] for name, spreads in panel.items()}, color)
            axes.set(xlabel=f"us at W = {widths[0]}", xscale="log")
            axes.xaxis.set_minor_formatter(NullFormatter())
            continue
        for name, spreads in panel.items():
            at = sorted(spreads)
            axes.plot(at, [spreads[w]["median"] for w in at], marker="o", color=color[name], label=name)
            low, high = ([spreads[w].get(key, spreads[w]["median"]) for w in at] for key in ("p20", "p80"))
            axes.fill_between(at, low, high, color=color[name], alpha=0.2)
        axes.set(xlabel="W", ylabel="us", xscale="log", yscale="log")
        axes.set_xticks(widths, [f"{width:,}" for width in widths])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.grid(alpha=0.3)
    patches = [Patch(color=color[name], label=name) for name in names]
    figure.legend(
        handles=patches, loc="outside upper center", ncols=3, frameon=False, title=title, title_fontsize="large"
    )
    figure.savefig(path, dpi=110)


def _bars(axes: Any, spreads: dict[str, dict[str, float]], color: dict[str, str]) -> None:
    """Draw a bar per contestant, with its time next to it, the first one on top."""
    medians = [spread["median"] for spread in spreads.values()]
    bars = axes.barh(range(len(spreads)), medians, color=[color[name] for name in spreads])
    axes.bar_label(bars, [f"{median:,.1f}" for median in medians], padding=3, fontsize="small")
    axes.set_yticks(range(len(spreads)), list(spreads))
    axes.invert_yaxis()
    axes.set_xlim(min(medians) / 3, max(medians) * 3)
