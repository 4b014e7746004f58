"""Curves of runs, drawn onto the axes of a figure: accuracy over the classes seen, and alpha."""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastil.reporting.drawing import COLOURS, LINES, Line, Style, spaced
from fastil.reporting.rows import seed_spread, spread
from fastil.reporting.runs import Run, geometric_mean, reference_lines

POINTS = 200  # of a line of alpha: not more than can be told apart
Alphas = dict[int, dict[int, NDArray[np.float64]]]  # of a group: by seed and step, as alpha_paths has them


@dataclass(frozen=True)
class Curve:
    """One measure of a group after each step: mean over its seeds, a band of one standard deviation, and as text."""

    classes: list[int]
    mean: list[float]
    band: list[float]
    texts: list[str]


def curve_of(runs: Sequence[Run], key: str = "top1") -> Curve:
    """Return the curve of top1, top1_old or top1_new, as far as the shortest of the runs is."""
    steps = list(zip(*(run.results.steps for run in runs), strict=False))
    values = {step[0].classes_seen: [getattr(result, key) for result in step] for step in steps}
    values = {classes: of_seeds for classes, of_seeds in values.items() if None not in of_seeds}
    spreads = [seed_spread(of_seeds) for of_seeds in values.values()]
    return Curve([*values], [m for m, _ in spreads], [b for _, b in spreads], [spread(v) for v in values.values()])


def styles_of(parts: dict[str, dict[str, list[Run]]]) -> dict[str, Style]:
    """How the curves of all groups look, by label; reference lines are grey. parts: the groups of each data set."""
    kinds: tuple[Line, ...] = ("-", "--", ":")
    usual = itertools.cycle([Style(colour, line) for line in kinds for colour in COLOURS])
    styles: dict[str, Style] = {}
    for groups in parts.values():
        lines = reference_lines(groups)
        styles |= {label: Style("grey", LINES[lines[label]]) if label in lines else next(usual) for label in groups}
    return styles


def published_of(groups: dict[str, list[Run]]) -> dict[str, float]:
    """The average incremental accuracy that was published of a group, percent, by label; unfinished ones have none."""
    return {
        label: runs[0].recipe.published
        for label, runs in groups.items()
        if runs[0].recipe.published is not None and all(run.finished for run in runs)
    }


def legend_of(groups: dict[str, list[Run]], styles: dict[str, Style]) -> dict[str, Style]:
    """What the lines of draw_accuracy are, by the text of a legend."""
    averages = {
        label: np.mean([run.results.average_incremental_accuracy for run in runs]) for label, runs in groups.items()
    }
    lines = reference_lines(groups)
    entries = {
        f"{label} ({averages[label]:.1f}{'; reference line' if label in lines else ''})": styles[label]
        for label in groups
    }
    published = {
        f"paper's average of {label} ({value:.1f})": Style(styles[label].colour, "-.")
        for label, value in published_of(groups).items()
    }
    return entries | published


def top_of(groups: dict[str, list[Run]], keys: Sequence[str]) -> int:
    """Where the axis of all these curves ends, percent."""
    curves = [curve_of(runs, key) for runs in groups.values() for key in keys]
    ends = [mean + band for curve in curves for mean, band in zip(curve.mean, curve.band, strict=True)]
    highest = max([*ends, *published_of(groups).values(), 1.0])
    return min(100, 20 * math.ceil(highest / 20))


def draw_accuracy(
    axis: Any, groups: dict[str, list[Run]], styles: dict[str, Style], top: int, key: str = "top1"
) -> dict[str, list[str]]:
    """Draw a curve per group, runs on one data set, and the published averages. Return what each marker says, by the
    id of its line. top: end of the y axis, percent."""
    seen = sorted({step.classes_seen for runs in groups.values() for run in runs for step in run.results.steps})
    titles = {}
    for i, (label, runs) in enumerate(groups.items()):
        curve, style = curve_of(runs, key), styles[label]
        if not curve.classes:
            continue
        marker = {"marker": "o", "markersize": 4.5} if style.colour != "grey" else {"marker": ".", "markersize": 7}
        axis.plot(
            curve.classes,
            curve.mean,
            color=style.colour,
            linestyle=style.line,
            linewidth=2,
            gid=f"curve{i}",
            clip_on=False,
            zorder=3 if style.colour == "grey" else 2,  # a reference line is not hidden
            **marker,
        )
        lower, upper = (np.add(curve.mean, np.multiply(sign, curve.band)) for sign in (-1, 1))
        if any(curve.band):
            axis.fill_between(curve.classes, lower, upper, alpha=0.15, color=style.colour, linewidth=0)
        titles[f"curve{i}"] = [
            f"{label}: {said} % at {classes} classes" for said, classes in zip(curve.texts, curve.classes, strict=True)
        ]
    for label, value in published_of(groups).items() if key == "top1" else ():
        axis.axhline(value, color=styles[label].colour, linestyle="-.", linewidth=1.2)
    margin = 0.03 * (seen[-1] - seen[0]) or 0.5
    axis.set_xticks(spaced(seen, seen[-1] - seen[0]))
    axis.set(xlabel="classes seen", ylabel="top-1 (%)", xlim=(seen[0] - margin, seen[-1] + margin), ylim=(0, top))
    axis.grid(alpha=0.3)
    return titles


def range_of(groups: Iterable[Alphas]) -> tuple[float, float]:
    """The lowest and the highest alpha of several groups, with room around them."""
    everything = [values for alphas in groups for path in alphas.values() for values in path.values()]
    return min(float(v.min()) for v in everything) / 1.05, max(float(v.max()) for v in everything) * 1.05


def draw_alpha(axis: Any, alphas: Alphas, colour: str, limits: tuple[float, float]) -> dict[str, list[str]]:
    """Draw alpha (eq. 5) after each epoch of the incremental steps on a logarithmic axis, a line per seed; a dotted
    line where a step begins. With an alpha per class, thin lines and their geometric mean. limits: of the
    axis. Return what the marker at the end of each step says, by its id."""
    from matplotlib.collections import LineCollection
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    lengths: dict[int, int] = {}  # steps begin at the same epoch for every seed: where the longest path has them
    for path in alphas.values():
        lengths |= {step: max(len(values), lengths.get(step, 0)) for step, values in path.items()}
    begins = {step: sum(length for other, length in lengths.items() if other < step) for step in lengths}
    total, titles = sum(lengths.values()), {}
    for seed, path in alphas.items():
        for step, values in path.items():
            # Not more points than can be seen; always the last one.
            kept = sorted({*range(0, len(values), max(1, total // POINTS)), len(values) - 1})
            epochs, means = begins[step] + 1 + np.array(kept), geometric_mean(values)
            if values.shape[1] > 1:
                thin = [np.column_stack((epochs, of_class)) for of_class in values[kept].T]
                opacity, gid = min(0.35, 10 / len(thin)), f"thin{seed}-{step}"
                axis.add_collection(LineCollection(thin, colors=colour, linewidths=0.6, alpha=opacity, gid=gid))
            axis.plot(epochs, means[kept], color=colour, linewidth=2)
            axis.plot(epochs[-1:], means[-1:], "o", color=colour, markersize=4.5, gid=f"alpha{seed}-{step}")
            titles[f"alpha{seed}-{step}"] = [f"seed {seed}, step {step}, epoch {len(values)}: {means[-1]:.3g}"]
    shown = spaced(sorted(begins.values()), total)
    for step, begin in begins.items():
        axis.axvline(begin + 0.5, color="grey", linestyle=":", linewidth=1)
        if begin in shown:
            axis.text(begin + 0.5, 1.01, f"step {step}", transform=axis.get_xaxis_transform(), fontsize=7)
    classes = any(values.shape[1] > 1 for path in alphas.values() for values in path.values())
    label = "alpha: per class, and their geometric mean" if classes else "alpha"
    axis.set(xlabel="epoch of the incremental steps", ylabel=label, yscale="log", ylim=limits)
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    wide = limits[1] > 5 * limits[0]
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if wide else MaxNLocator(6))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.grid(alpha=0.3)
    return titles
