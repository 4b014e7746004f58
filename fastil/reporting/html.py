"""The report as one HTML page that needs no other file, no network and no script.

What it says is collected here as text and numbers. All the markup is in templates/page.html, which escapes every value.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup

from fastil.errors import UserError
from fastil.reporting import curves, heatmaps
from fastil.reporting.drawing import COLOURS, Style, as_svg, new_figure, settings
from fastil.reporting.heatmaps import Triangle, triangle_of
from fastil.reporting.rows import MEASURED, heading, measured, rows
from fastil.reporting.run_files import Timings, read_timings
from fastil.reporting.runs import Run, alpha_paths, by_images
from fastil.text import plain

CURVES = {"top1": "All classes seen", "top1_old": "Classes of earlier steps", "top1_new": "Classes of this step"}

TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("fastil.reporting"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


class Table(NamedTuple):
    """Cells are text; the first of a line is its heading."""

    header: Sequence[str]
    lines: Sequence[Sequence[str]]

    @property
    def wide(self) -> bool:
        """Whether headings are so long that they want to be wrapped."""
        return any(len(line[0]) > 20 for line in self.lines)


@dataclass(frozen=True)
class Accuracy:
    """Charts, by title, and values of the runs on one data set. legend: what the lines are."""

    name: str
    legend: dict[str, Style]
    charts: dict[str, Markup]
    values: Table


class Forgotten(NamedTuple):
    """Accuracy by group of classes of some runs, as a chart and as numbers."""

    chart: Markup
    values: Table


class Matrix(NamedTuple):
    """The confusion matrix of a step."""

    classes: int
    top1: str
    chart: Markup


@dataclass(frozen=True)
class Protocol:
    """What a group of runs was trained on, step by step, and how long it took. plan: None where nothing is known.
    classes: for each class order, the seeds that have it, if there are several, and the names by step."""

    label: str
    dataset: str
    class_list_hash: str
    seeds: list[int]
    plan: Table | None
    classes: list[tuple[str, list[list[str]]]]
    recipe: str
    timings: Table
    machines: list[str]


@settings()
def page(groups: dict[str, list[Run]], notes: Sequence[str]) -> str:
    """The whole document. groups: runs that differ in the seed only, by label; notes: lines of plain text below the
    table. Raises UserError for a damaged file."""
    document = TEMPLATES.get_template("page.html").render(
        heading=heading(groups),
        summary=Table(*rows(groups)),
        notes=notes,
        datasets=accuracies(groups),
        alphas=alpha_charts(groups),
        measured=MEASURED,
        measures=Table(*measured(groups)[:2]),
        triangles={
            label: forgotten(f"groups{i}", label, found)
            for i, (label, runs) in enumerate(groups.items())
            if (found := triangle_of(runs))
        },
        **confusions(groups),
        protocols=[protocol(label, runs) for label, runs in groups.items()],
    )
    return plain(document)  # names could turn the direction of the text around them


def svg(figure: Any, name: str, label: str, titles: dict[str, list[str]] | None = None) -> Markup:
    """A figure as an element of the page; `as_svg` has escaped what it says."""
    return Markup(as_svg(figure, name, label, titles))  # noqa: S704


def accuracies(groups: dict[str, list[Run]]) -> list[Accuracy]:
    """Accuracy over the classes seen, of all, earlier and new classes: for each data set, all on one scale."""
    parts, found = by_images(groups), []
    top, styles = curves.top_of(groups, [*CURVES]), curves.styles_of(parts)
    for i, (dataset, of_dataset) in enumerate(parts.items()):
        charts, lines = {}, []
        seen = sorted({step.classes_seen for runs in of_dataset.values() for run in runs for step in run.results.steps})
        for key, title in CURVES.items():
            figure, axes = new_figure(1)
            titles = curves.draw_accuracy(axes[0], of_dataset, styles, top, key)
            charts[title] = svg(figure, f"{key}-{i}", f"{title}: top-1 after each step", titles)
            for label, runs in of_dataset.items():
                curve = curves.curve_of(runs, key)
                texts = dict(zip(curve.classes, curve.texts, strict=True))
                lines.append([f"{label}: {title.lower()}", *(texts.get(classes, "") for classes in seen)])
        table = Table([f"Top-1 (%) at … classes of {dataset}", *map(str, seen)], lines)
        found.append(Accuracy(dataset, curves.legend_of(of_dataset, styles), charts, table))
    return found


def forgotten(name: str, label: str, triangle: Triangle) -> Forgotten:
    """The accuracy of each group of classes after each step."""
    figure, axes = new_figure(1, height=3.9)
    heatmaps.draw_triangle(axes[0], triangle.rows)
    steps = range(len(triangle.rows))
    lines = [
        [str(k), *triangle.measures[k], *(f"{value:.1f}" for value in triangle.rows[k]), *("" for _ in steps[k + 1 :])]
        for k in steps
    ]
    table = Table(["step", *triangle.header, *(f"group {k}" for k in steps)], lines)
    return Forgotten(svg(figure, name, f"accuracy of each group of classes after each step: {label}"), table)


def alpha_charts(groups: dict[str, list[Run]]) -> dict[str, Markup]:
    """A chart for each group that learned alpha, by label, all on one scale."""
    learned = {label: {run.results.seed: alpha_paths(run) for run in runs} for label, runs in groups.items()}
    learned = {label: {seed: path for seed, path in seeds.items() if path} for label, seeds in learned.items()}
    learned = {label: seeds for label, seeds in learned.items() if seeds}
    charts = {}
    for i, (label, seeds) in enumerate(learned.items()):
        figure, axes = new_figure(1)
        titles = curves.draw_alpha(axes[0], seeds, COLOURS[0], curves.range_of(learned.values()))
        charts[label] = svg(figure, f"alpha{i}", f"alpha of {label}", titles)
    return charts


def confusions(groups: dict[str, list[Run]]) -> dict[str, Any]:
    """The matrices of each group, a mean over its seeds for each step that all of them have finished, and the colour
    bar that they share."""
    found = {
        label: [heatmaps.confusion_of(runs, step) for step in range(min(len(run.curve) for run in runs))]
        for label, runs in groups.items()
    }
    most = max(float(confusion.images.max()) for steps in found.values() for confusion in steps)
    matrices: dict[str, list[Matrix]] = {}
    for i, (label, steps) in enumerate(found.items()):
        matrices[label] = []
        for k, confusion in enumerate(steps):
            figure, axes = new_figure(1, height=4.2)
            heatmaps.draw_confusion(axes[0], confusion, most)
            chart = svg(figure, f"confusion{i}-{k}", f"confusion matrix of step {k}")
            matrices[label].append(Matrix(len(confusion.images), confusion.top1, chart))
    figure, axes = new_figure(1, height=0.7)
    heatmaps.draw_counts(figure, itertools.chain(*found.values()), most, cax=axes[0], orientation="horizontal")
    return {"confusions": matrices, "counts": svg(figure, "counts", "colours of the confusion matrices")}


def protocol(label: str, runs: Sequence[Run]) -> Protocol:
    described = runs[0].protocol
    orders: dict[tuple[int, ...], list[Run]] = {}  # several with order=per_seed
    for run in runs:
        orders.setdefault(tuple(run.protocol.class_order), []).append(run)
    lines = [[shown(value) for value in step.values()] for step in described.effective]
    return Protocol(
        label,
        runs[0].dataset_name,
        ", ".join(of_order[0].protocol.class_list_hash for of_order in orders.values()),
        [run.results.seed for run in runs],
        Table(headings(described.effective[0]), lines) if lines else None,
        [(_of_seeds(of_order) if len(orders) > 1 else "", _names(of_order[0])) for of_order in orders.values()],
        runs[0].recipe.dump(),
        *timings(runs),
    )


def _of_seeds(runs: Sequence[Run]) -> str:
    return ", ".join(f"seed {run.results.seed}" for run in runs)


def _names(run: Run) -> list[list[str]]:
    """The names of the classes that each step adds."""
    return [[run.protocol.class_names[c] for c in members] for members in run.protocol.steps]


def timings(runs: Sequence[Run]) -> tuple[Table, list[str]]:
    """Seconds per step of the runs whose timings.json can be read; and a note per run: versions and machine."""
    known: list[tuple[int, Timings]] = []
    notes: list[str] = []
    for run in runs:
        seed = run.results.seed
        try:
            content = read_timings(run.path)
        except UserError:
            notes.append(f"seed {seed}: timings.json is missing or damaged")
            continue
        known.append((seed, content))
        notes.append(f"seed {seed}: " + ", ".join(f"{k} {v}" for k, v in (content.versions | content.machine).items()))
    header = ["seed and step", *headings(next(iter(known[-1][1].steps.values())))] if known else []
    lines = [
        [f"{seed}, step {k}", *map(shown, step.values())]
        for seed, content in known
        for k, step in content.steps.items()
    ]
    return Table(header, lines), notes


def headings(keys: Iterable[str]) -> list[str]:
    return [key.replace("_", " ") for key in keys]


def shown(value: Any) -> str:
    """A value of protocol.json or timings.json as text."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.1f}" if abs(value) >= 10 else f"{value:.3g}"
    return f"{value:,}" if type(value) is int else str(value)
