"""Matrices of runs, drawn onto the axes of a figure: confusion, and the accuracy of each group of classes."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastil.reporting.drawing import spaced, text
from fastil.reporting.rows import readable_measures, spread
from fastil.reporting.runs import Run

COLOUR_MAP = "Blues"  # light: what is rare stays readable, on paper too
PIXELS = 400  # about those of a side of a matrix in a figure
NAMED = 20  # classes at most that are named
LETTERS = 14  # of a class name, at most
NUMBERED = 11  # groups at most whose accuracies are written into their cells
MEASURES = ("average_over_groups", "non_base", "forgetting", "backward_transfer")


@dataclass(frozen=True)
class Confusion:
    """Confusion of a group of runs after a step. images: float64 [seen, seen], mean over seeds, rows are true classes
    in incremental order. ends: classes seen after each step so far. names: of the classes, where all seeds have the
    same order. top1: as text. seeds: how many there are."""

    images: NDArray[np.float64]
    ends: list[int]
    names: list[str] | None
    top1: str
    seeds: int = 1


@dataclass(frozen=True)
class Triangle:
    """Accuracy of each group of classes, percent, mean over seeds: a row for each step, a cell for each group that has
    come by then. header, measures: what stands after each step in further columns, as text."""

    rows: list[list[float]]
    header: Sequence[str]
    measures: list[list[str]]


def confusion_of(runs: Sequence[Run], step: int) -> Confusion:
    """Return the confusion after a step that all the runs have finished."""
    protocol = runs[0].protocol
    members = protocol.steps[: step + 1]
    orders = {tuple(run.protocol.class_order) for run in runs}
    return Confusion(
        images=np.mean([run.confusion(step) for run in runs], axis=0),
        ends=list(accumulate(map(len, members))),
        names=[protocol.class_names[c] for classes in members for c in classes] if len(orders) == 1 else None,
        top1=spread([run.curve[step] for run in runs]),
        seeds=len(runs),
    )


def scale_of(most: float) -> Any:
    """The colours of log(1 + images), "for better visibility" (Figure 2), from 0 to `most` images."""
    from matplotlib.colors import FuncNorm

    return FuncNorm((np.log1p, np.expm1), vmin=0, vmax=max(most, 1))


def as_pixels(images: NDArray[np.float64]) -> tuple[NDArray[np.float64], int]:
    """Return a matrix of at most PIXELS rows and columns, and how many cells of `images` a side of its own cells
    holds: the largest value of each square, so that none is lost between two pixels."""
    cells = -(-len(images) // PIXELS)
    padded = np.pad(images, (0, -len(images) % cells))
    largest: NDArray[np.float64] = padded.reshape(len(padded) // cells, cells, -1, cells).max(axis=(1, 3))
    return largest, cells


def draw_confusion(axis: Any, confusion: Confusion, most: float) -> None:
    """Draw a confusion matrix with thin lines between the steps, and names of classes where they fit. most: images at
    the end of the scale."""
    classes = len(confusion.images)
    pixels, cells = as_pixels(confusion.images)
    end = len(pixels) * cells - 0.5
    axis.imshow(pixels, cmap=COLOUR_MAP, norm=scale_of(most), interpolation="none", extent=(-0.5, end, end, -0.5))
    axis.set(xlim=(-0.5, classes - 0.5), ylim=(classes - 0.5, -0.5))
    for end in confusion.ends[:-1]:
        axis.axvline(end - 0.5, color="0.4", linewidth=0.5)
        axis.axhline(end - 0.5, color="0.4", linewidth=0.5)
    if confusion.names is not None and classes <= NAMED:
        names = [text(name) for name in confusion.names]
        names = [name if len(name) <= LETTERS else name[: LETTERS - 1] + "…" for name in names]
        size = 8 if classes <= 12 else 6.5
        upright = max(map(len, names)) > 2
        axis.set_xticks(range(classes), names, rotation=90 if upright else 0, fontsize=size)
        axis.set_yticks(range(classes), names, fontsize=size)
        axis.set(xlabel="predicted class", ylabel="true class")
    else:
        ends = spaced([0, *confusion.ends], classes, 12)
        axis.set_xticks([end - 0.5 for end in ends], [f"{end:g}" for end in ends])
        axis.set_yticks([end - 0.5 for end in ends], [f"{end:g}" for end in ends])
        axis.set(xlabel="predicted class, in the order learned", ylabel="true class, in the order learned")


def draw_counts(figure: Any, confusions: Iterable[Confusion], most: float, **place: Any) -> None:
    """Draw the colour bar of confusion matrices: images, on a logarithmic scale that ends at `most`. place: arguments
    of `colorbar`."""
    from matplotlib.cm import ScalarMappable

    ticks = [0, *(10**power for power in range(10) if 10**power <= most)]
    if most >= 2 * ticks[-1]:
        ticks.append(most)
    bar = figure.colorbar(
        ScalarMappable(scale_of(most), COLOUR_MAP), ticks=ticks, format="{x:,.0f}",
        label="test images, mean over seeds" if any(of.seeds > 1 for of in confusions) else "test images", **place,
    )  # fmt: skip
    bar.ax.minorticks_off()


def triangle_of(runs: Sequence[Run]) -> Triangle | None:
    """The groups of the runs whose predictions can be read; None where there are none, or one step only."""
    found, _ = readable_measures(runs)  # the notes have the others
    steps = min((len(measures.groups) for measures in found), default=0)
    if steps < 2:
        return None
    rows = [np.mean([measures.groups[k] for measures in found], axis=0).tolist() for k in range(steps)]
    lines = [[spread([getattr(measures, key)[k] for measures in found]) for key in MEASURES] for k in range(steps)]
    return Triangle(rows, [key.replace("_", " ") for key in MEASURES], lines)


def draw_triangle(axis: Any, rows: Sequence[Sequence[float]]) -> Any:
    """Draw the accuracy of each group of classes after each step, with numbers where they fit. Returns the image, for
    a colour bar."""
    from matplotlib import colormaps

    cells = np.full((len(rows), len(rows)), np.nan)
    for step, row in enumerate(rows):
        cells[step, : len(row)] = row
    colours = colormaps[COLOUR_MAP].with_extremes(bad="0.9")
    image = axis.imshow(cells, cmap=colours, vmin=0, vmax=100, interpolation="none")
    for step, row in enumerate(rows if len(rows) <= NUMBERED else ()):
        for group, value in enumerate(row):
            colour = "white" if value > 60 else "#111111"
            axis.text(group, step, f"{value:.0f}", ha="center", va="center", color=colour, fontsize=8)
    ticks = spaced(range(len(rows)), len(rows), NUMBERED)
    axis.set_xticks(ticks)
    axis.set_yticks(ticks)
    axis.set(xlabel="group: the classes that came in step", ylabel="after step")
    return image
