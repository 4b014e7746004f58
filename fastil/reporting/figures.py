"""Figures of runs, as PNG: accuracy over the classes seen, confusion matrices, accuracy by group of classes, alpha."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastil import files
from fastil.reporting import curves
from fastil.reporting.drawing import COLOURS, HEIGHT, WIDTH, Style, legend_below, new_figure, save_figure, settings
from fastil.reporting.heatmaps import (
    Confusion,
    Triangle,
    confusion_of,
    draw_confusion,
    draw_counts,
    draw_triangle,
)
from fastil.reporting.runs import Run, alpha_paths, by_images, group_runs


@settings()
def draw_run(path: Path) -> None:
    """The figures of one run directory: accuracy.png, confusion_step_K.png and, where alpha was learned, alpha.png."""
    run = Run(path)
    groups = group_runs([run])
    (label,) = groups
    draw_accuracy(groups, path / "figures/accuracy.png")
    for step in run.results.steps:
        title = f"{run.recipe.name}: {label}, step {step.step}, top-1 {step.top1:.2f} %"
        confusion = confusion_of([run], step.step)
        draw_confusions({title: confusion}, path / f"figures/confusion_step_{step.step}.png")
    alphas = alpha_paths(run)
    if alphas:
        figure, axes = new_figure(1, width=6.4, height=4.2)
        of_seed = {run.results.seed: alphas}
        curves.draw_alpha(axes[0], of_seed, COLOURS[0], curves.range_of([of_seed]))
        save_figure(figure, path / "figures/alpha.png")


@settings()
def draw_accuracy(
    groups: dict[str, list[Run]], path: Path, then: str = files.RESUME, notes: Sequence[str] = ()
) -> None:
    """Top-1 over the classes seen, mean over seeds with a band of one standard deviation: a panel per data set, all on
    one scale. notes: lines of text below."""
    parts = by_images(groups)
    figure, axes = new_figure(len(parts), *((6.4, 4.2) if len(parts) == 1 else (WIDTH, HEIGHT)))
    top, styles = curves.top_of(groups, ["top1"]), curves.styles_of(parts)
    entries: dict[str, Style] = {}
    for axis, (dataset, of_dataset) in zip(axes, parts.items(), strict=True):
        curves.draw_accuracy(axis, of_dataset, styles, top)
        axis.set(title=textwrap.fill(dataset, 60))
        entries |= curves.legend_of(of_dataset, styles)
    title = "average incremental accuracy in brackets"
    legend_below(figure, {words: handle(style) for words, style in entries.items()}, title, notes)
    save_figure(figure, path, then)


def handle(style: Style) -> Any:
    """What stands for a line in a legend."""
    from matplotlib.lines import Line2D

    return Line2D([], [], color=style.colour, linestyle=style.line, linewidth=1.2 if style.line == "-." else 2)


@settings()
def draw_last_confusions(groups: dict[str, list[Run]], path: Path, then: str, notes: Sequence[str]) -> None:
    """The last confusion matrix of each group, mean over its seeds, on one scale. notes: lines of text below."""
    panels = {label: confusion_of(runs, min(len(run.curve) for run in runs) - 1) for label, runs in groups.items()}
    draw_confusions({f"{label}: top-1 {found.top1} %": found for label, found in panels.items()}, path, then, notes)


def draw_confusions(
    panels: dict[str, Confusion], path: Path, then: str = files.RESUME, notes: Sequence[str] = ()
) -> None:
    """Confusion matrices, by title."""
    figure, axes = new_figure(len(panels), width=5.2, height=4.8)
    most = max(float(confusion.images.max()) for confusion in panels.values())
    for axis, (title, confusion) in zip(axes, panels.items(), strict=True):
        draw_confusion(axis, confusion, most)
        axis.set_title(textwrap.fill(title, 56))
    draw_counts(figure, panels.values(), most, ax=list(axes), shrink=0.8, aspect=30)
    legend_below(figure, {}, notes=notes)
    save_figure(figure, path, then)


@settings()
def draw_triangles(triangles: dict[str, Triangle], path: Path, then: str, notes: Sequence[str]) -> None:
    """The accuracy of each group of classes after each step, by label. notes: lines of text below."""
    figure, axes = new_figure(len(triangles), width=4.8, height=4.4)
    for axis, (label, triangle) in zip(axes, triangles.items(), strict=True):
        image = draw_triangle(axis, triangle.rows)
        axis.set_title(textwrap.fill(label, 52))
    figure.colorbar(image, ax=list(axes), shrink=0.8, aspect=30, label="top-1 on the test images of a group (%)")
    legend_below(figure, {}, notes=notes)
    save_figure(figure, path, then)
