"""A table of the paper as a figure: bars, or curves over a key."""

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastil.reporting.drawing import LINES, legend_below, new_figure, save_figure, settings
from fastil.reporting.runs import Run
from fastil.reproduce.tables import Entry, Found, Table, published_of

# What the paper publishes of a row, and where a run has it.
METRICS: dict[str, tuple[str, Callable[[Run], float]]] = {
    "average": ("average incremental accuracy", lambda run: run.results.average_incremental_accuracy),
    "base": ("final, base classes", lambda run: run.results.steps[-1].top1_base),
    "final": ("final, all classes", lambda run: run.results.steps[-1].top1),
}


@settings()
def draw(table: Table, found: Found, path: Path) -> None:
    """Ours, the mean over seeds with their range, next to the published numbers; a panel per number of steps."""
    groups = sorted({entry.steps for entry in table.entries})
    figure, axes = new_figure(len(groups), width=5.2, height=4.4)
    legend: dict[str, Any] = {}
    theirs = f"published{published_of(table, found)}"
    for axis, steps in zip(axes, groups, strict=True):
        of_steps = [entry for entry in table.entries if entry.steps == steps]
        entries = [entry for entry in of_steps if not entry.reference]
        runs = {entry.row: list(found[entry.row, steps].values()) for entry in of_steps}
        if table.over is None:
            draw_bars(axis, entries, runs, theirs)
        else:
            draw_curves(axis, entries, runs, theirs, table.over)
        for entry in of_steps:
            if entry.reference and runs[entry.row]:
                draw_line = axis.axvline if table.over is None else axis.axhline
                mean = statistics.mean(METRICS["average"][1](run) for run in runs[entry.row])
                draw_line(mean, color="grey", linestyle=LINES[entry.row], label=entry.label)
        axis.plot([], [], color="grey", linewidth=3, alpha=0.5, label="range over seeds")
        axis.set_title(f"{steps} incremental steps")
        axis.grid(alpha=0.3)
        handles, labels = axis.get_legend_handles_labels()
        legend |= dict(zip(labels, handles, strict=True))
    for axis in axes:  # one scale
        if table.over is None:
            axis.set_xlim(0, max(other.get_xlim()[1] for other in axes))
        else:
            axis.set_ylim(min(o.get_ylim()[0] for o in axes), max(o.get_ylim()[1] for o in axes))
    legend_below(figure, legend)
    save_figure(figure, path, "run the same command again")


def draw_bars(axis: Any, entries: list[Entry], runs: dict[str, list[Run]], theirs: str) -> None:
    """The average incremental accuracy of each row."""
    for place, entry in enumerate(reversed(entries)):
        values = [METRICS["average"][1](run) for run in runs[entry.row]]
        if values:
            axis.barh(place, statistics.mean(values), color="tab:blue", alpha=0.8)
            axis.plot([min(values), max(values)], [place, place], color="black", linewidth=3, alpha=0.5)
        if "average" in entry.published:
            axis.plot(entry.published["average"], place, "D", color="tab:orange")
    axis.plot([], [], "s", color="tab:blue", alpha=0.8, label="ours, mean over seeds")
    axis.plot([], [], "D", color="tab:orange", label=theirs)
    axis.set_yticks(range(len(entries)), [entry.label for entry in reversed(entries)])
    axis.set(xlabel="average incremental accuracy (%)", xlim=(0, None))


def draw_curves(axis: Any, entries: list[Entry], runs: dict[str, list[Run]], theirs: str, over: str) -> None:
    """Every published metric over a key of the recipe, log x, a curve per loss; a loss of one row stands apart."""
    keys = {entry.row: entry.load(0).keys() for entry in entries}
    metrics = [metric for metric in METRICS if any(metric in entry.published for entry in entries)] or ["average"]
    losses = list(dict.fromkeys(keys[entry.row]["loss"] for entry in entries))
    ticks = {float(keys[entry.row][over]): f"{keys[entry.row][over]:g}" for entry in entries}
    beyond = 2 * max(ticks)
    for i, loss in enumerate(losses):
        curve = [entry for entry in entries if keys[entry.row]["loss"] == loss]
        xs = [float(keys[entry.row][over]) for entry in curve]
        if len(curve) == 1 < len(entries):
            xs, ticks[beyond] = [beyond], curve[0].label
        for j, metric in enumerate(metrics):
            colour, label = f"C{i}", curve[0].label.partition(",")[0]
            if len(metrics) > 1:
                colour, label = f"C{j}", METRICS[metric][0] if i == 0 else ""
            ours = [(x, [METRICS[metric][1](run) for run in runs[e.row]]) for x, e in zip(xs, curve, strict=True)]
            ours = [(x, values) for x, values in ours if values]
            means = [statistics.mean(values) for _, values in ours]
            axis.plot([x for x, _ in ours], means, "o-", color=colour, markersize=4)
            axis.plot([], [], "o-", color=colour, markersize=4, label=label or None)
            for x, values in ours:
                axis.plot([x, x], [min(values), max(values)], color=colour, linewidth=3, alpha=0.5)
            known = [(x, e.published[metric]) for x, e in zip(xs, curve, strict=True) if metric in e.published]
            axis.plot([x for x, _ in known], [y for _, y in known], "D:", color=colour, fillstyle="none", alpha=0.7)
    axis.plot([], [], "D:", color="grey", fillstyle="none", label=theirs)
    axis.set_xscale("log", base=2)
    axis.set_xticks(list(ticks), list(ticks.values()))
    axis.set_xticks([], minor=True)
    axis.set(
        xlabel=over.replace("_", " "), ylabel=f"{METRICS['average'][0] if len(metrics) == 1 else 'top-1 accuracy'} (%)"
    )
