"""Figures of runs, as PNG: accuracy over the classes seen, confusion matrices, alpha."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastil import files
from fastil.reporting.runs import Run, alpha_paths, geometric_mean, reference_lines
from fastil.text import plain

LINES = {"joint": "--", "finetune": ":"}  # of the reference lines


def draw_run(path: Path) -> None:
    """The figures of one run directory: accuracy.png, confusion_step_K.png and, where alpha was learned, alpha.png."""
    run = Run(path)
    groups = {f"{run.recipe.name}, {run.results.loss}": [run]}
    draw_accuracy(groups, path / "figures/accuracy.png")
    for step in run.results.steps:
        matrix = run.confusion(step.step)
        title = f"{run.recipe.name}, {run.results.loss}, step {step.step}: top-1 {step.top1:.2f} %"
        draw_confusions([(title, matrix)], path / f"figures/confusion_step_{step.step}.png")
    alphas = alpha_paths(run)
    if alphas:
        draw_alpha(alphas, path / "figures/alpha.png")


def draw_accuracy(groups: dict[str, list[Run]], path: Path, then: str = files.RESUME) -> None:
    """Top-1 over the classes seen, mean over seeds, with a band of one standard deviation."""
    figure, axes = new_figure(1)
    lines = reference_lines(groups)
    for i, (label, runs) in enumerate(groups.items()):
        length = min(len(run.curve) for run in runs)
        curves = np.array([run.curve[:length] for run in runs])
        classes = [step.classes_seen for step in runs[0].results.steps[:length]]
        mean = curves.mean(axis=0)
        shown = textwrap.fill(f"{label} ({curves.mean():.1f})", 60)  # all that was modified can be long
        look: dict[str, Any] = {"marker": "o", "linestyle": ("-", "--", ":")[i // 10 % 3]}
        if label in lines:
            look = {"color": "grey", "marker": ".", "linestyle": LINES[lines[label]]}
        (line,) = axes[0].plot(classes, mean, label=shown, **look)
        if len(runs) > 1:
            deviation = curves.std(axis=0, ddof=1)
            axes[0].fill_between(classes, mean - deviation, mean + deviation, alpha=0.2, color=line.get_color())
    axes[0].set_xticks(sorted({step.classes_seen for group in groups.values() for step in group[0].results.steps}))
    axes[0].set(xlabel="classes seen", ylabel="top-1 accuracy (%)", ylim=(0, 100))
    axes[0].grid(alpha=0.3)
    place, where = axes[0], "best"
    if len(groups) > 5:  # would hide the curves
        figure.set_size_inches(11, 4.8)
        place, where = figure, "outside right upper"
    place.legend(loc=where, title="average incremental accuracy in brackets", fontsize="small", title_fontsize="small")
    save_figure(figure, path, then)


def draw_alpha(steps: dict[int, NDArray[np.float64]], path: Path) -> None:
    """Alpha after each epoch of the incremental steps, as alpha_paths has it; a dotted line where a step begins. With
    an alpha per class, thin lines and their geometric mean."""
    from matplotlib.ticker import LogLocator, NullFormatter

    figure, axes = new_figure(1)
    begin = 0
    for step, alphas in steps.items():
        epochs = range(begin + 1, begin + len(alphas) + 1)
        if alphas.shape[1] > 1:
            axes[0].plot(epochs, alphas, color="tab:blue", linewidth=0.5, alpha=0.4)
        axes[0].plot(epochs, geometric_mean(alphas), color="tab:blue", linewidth=2)
        axes[0].axvline(begin + 0.5, color="grey", linestyle=":")
        axes[0].text(begin + 1, 1.01, f"step {step}", transform=axes[0].get_xaxis_transform(), fontsize="small")
        begin += len(alphas)
    several = ": per class, and their geometric mean" if any(a.shape[1] > 1 for a in steps.values()) else ""
    axes[0].set(xlabel="epoch of the incremental steps", ylabel=f"alpha{several}", yscale="log")
    axes[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
    axes[0].yaxis.set_major_formatter("{x:g}")
    axes[0].yaxis.set_minor_formatter(NullFormatter())
    axes[0].grid(alpha=0.3)
    save_figure(figure, path)


def draw_last_confusions(groups: dict[str, list[Run]], path: Path, then: str) -> None:
    """The last confusion matrix of each group, summed over its seeds, side by side."""
    panels = []
    for label, runs in groups.items():
        last = min(len(run.curve) for run in runs) - 1
        panels.append((label, np.sum([run.confusion(last) for run in runs], axis=0)))
    draw_confusions(panels, path, then)


def draw_confusions(panels: Sequence[tuple[str, NDArray[np.int64]]], path: Path, then: str = files.RESUME) -> None:
    """Confusion matrices as log(1 + x), "for better visibility" (Figure 2), classes in incremental order."""
    figure, axes = new_figure(len(panels))
    for axis, (title, matrix) in zip(axes, panels, strict=True):
        image = axis.imshow(np.log1p(matrix), cmap="viridis")
        axis.set(title=textwrap.fill(title, 48), xlabel="predicted class", ylabel="true class")
        axis.title.set_fontsize("small")
        figure.colorbar(image, ax=axis, shrink=0.8, label="log(1 + images)")
    save_figure(figure, path, then)


def save_figure(figure: Any, path: Path, then: str = files.RESUME) -> None:
    """Write it as PNG. Names that stand in it are text: no control characters, and no formulas between dollar signs.
    then: what to do once it can be written."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_text(plain(text.get_text()))
        text.set_parse_math(False)
    files.write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120), then)


def new_figure(panels: int) -> tuple[Any, Any]:
    """A figure of panels, four to a row, and its axes, outside pyplot's registry, so that nothing has to be closed and
    no display is asked for."""
    from matplotlib.figure import Figure

    across, rows = min(panels, 4), -(-panels // 4)
    figure = Figure(figsize=(6.4 * across, 4.8 * rows), layout="constrained")
    axes = figure.subplots(rows, across, squeeze=False).ravel()
    for axis in axes[panels:]:
        axis.set_visible(False)
    return figure, axes[:panels]
