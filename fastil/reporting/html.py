"""The report as one HTML page that needs no other file, no network and no script.

What it says is collected here as text and numbers. All the markup is in templates/page.html, which escapes every value.
"""

import base64
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jinja2
import numpy as np
from numpy.typing import NDArray

from fastil.errors import UserError
from fastil.reporting.chart import WIDTH, Axis, Chart, Series, Style, chart, log_axis
from fastil.reporting.rows import MEASURED, heading, measured, readable_measures, rows, seed_spread, spread
from fastil.reporting.run_files import Timings, read_timings
from fastil.reporting.runs import Run, alpha_paths, geometric_mean, reference_lines
from fastil.text import plain

COLOURS = ("#3b7fd0", "#d9701e", "#2a9a58", "#d1495b", "#8d63c8", "#93705c", "#cf5ba6", "#7d848d", "#8f9022", "#1f98a8")
DASHES = ("", "7 4", "2 3")  # of the lines beyond the tenth, and beyond the twentieth
LINES = {"joint": Style("#888888", "9 3"), "finetune": Style("#888888", "2 3")}  # of the reference lines
CURVES = {"top1": "All classes seen", "top1_old": "Classes of earlier steps", "top1_new": "Classes of this step"}

TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("fastil.reporting"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
TEMPLATES.filters["px"] = "{:.1f}".format


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
    """Charts, by title, and values of the runs on one data set. styles: by label."""

    name: str
    styles: dict[str, Style]
    charts: dict[str, Chart]
    values: Table


class Matrix(NamedTuple):
    """The confusion matrix of a step. most: images of its largest cell. png: one pixel per cell, base64."""

    classes: int
    top1: str
    most: str
    png: str


class Triangle(NamedTuple):
    """Accuracy of each group of classes, percent, mean over seeds: a row for each step, a cell for each group that has
    come by then. measures: what stands after each step in the other columns."""

    rows: list[list[float]]
    header: Sequence[str]
    measures: list[list[str]]


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


def page(groups: dict[str, list[Run]], notes: Sequence[str]) -> str:
    """The whole document. groups: runs that differ in the seed only, by label; notes: lines of plain text below the
    table. Raises UserError for a damaged file."""
    parts = by_images(groups)
    styles = {
        label: Style(COLOURS[i % 10], DASHES[i // 10 % 3])
        for of_dataset in parts.values()
        for i, label in enumerate(of_dataset)
    }
    for of_dataset in parts.values():
        styles |= {label: LINES[kind] for label, kind in reference_lines(of_dataset).items()}
    alphas = {label: {run.results.seed: alpha_paths(run) for run in runs} for label, runs in groups.items()}
    document = TEMPLATES.get_template("page.html").render(
        heading=heading(groups),
        summary=Table(*rows(groups)),
        notes=notes,
        datasets=[accuracy(dataset, of_dataset, styles) for dataset, of_dataset in parts.items()],
        alphas=alpha_charts(alphas, styles),
        measured=MEASURED,
        measures=Table(*measured(groups)[:2]),
        triangles={label: found for label, runs in groups.items() if (found := triangle(runs))},
        confusions={label: confusions(runs) for label, runs in groups.items()},
        protocols=[protocol(label, runs) for label, runs in groups.items()],
    )
    return plain(document)  # names could turn the direction of the text around them


def by_images(groups: dict[str, list[Run]]) -> dict[str, dict[str, list[Run]]]:
    """The groups apart by what they were run on: accuracies on other images have no place in one chart."""
    found: dict[tuple[str, ...], dict[str, list[Run]]] = {}
    for label, runs in groups.items():
        found.setdefault(runs[0].image_hashes, {})[label] = runs
    names = [next(iter(part.values()))[0].dataset_name for part in found.values()]
    return {
        name if names.count(name) == 1 else f"{name} (sha256 of its images {images[0][:6]}, {images[1][:6]})": part
        for name, (images, part) in zip(names, found.items(), strict=True)
    }


def accuracy(dataset: str, groups: dict[str, list[Run]], styles: dict[str, Style]) -> Accuracy:
    """Accuracy over the classes seen, of all, earlier and new classes."""
    seen = sorted({step.classes_seen for runs in groups.values() for run in runs for step in run.results.steps})
    charts, lines = {}, []
    for key, title in CURVES.items():
        series, highest = [], 1.0
        for label, runs in groups.items():
            # zip: as far as the shortest run is.
            steps = list(zip(*(run.results.steps for run in runs), strict=False))
            values = {step[0].classes_seen: [getattr(result, key) for result in step] for step in steps}
            values = {classes: of_seeds for classes, of_seeds in values.items() if None not in of_seeds}
            lines.append([f"{label}: {title.lower()}", *(spread(values.get(classes, [])) for classes in seen)])
            if values:
                means, bands = zip(*map(seed_spread, values.values()), strict=True)
                highest = max(highest, *map(sum, zip(means, bands, strict=True)))
                titles = [f"{label}: {spread(v)} % at {classes} classes" for classes, v in values.items()]
                series.append(Series(styles[label], list(values), means, titles, bands))
        x = Axis("classes seen", (seen[0], seen[-1]), [(c, str(c)) for c in seen])
        top = min(100, 20 * math.ceil(highest / 20))
        y = Axis("top-1 (%)", (0, top), [(v, str(v)) for v in range(0, top + 1, 10 if top <= 60 else 20)])
        charts[title] = chart(f"{title}: top-1 after each step", series, x, y)
    table = Table([f"Top-1 (%) at … classes of {dataset}", *map(str, seen)], lines)
    return Accuracy(dataset, {label: styles[label] for label in groups}, charts, table)


def triangle(runs: Sequence[Run]) -> Triangle | None:
    """The groups of the runs whose predictions can be read; None where there are none, or one step only."""
    found, _ = readable_measures(runs)  # the notes have the others
    steps = min((len(measures.groups) for measures in found), default=0)
    if steps < 2:
        return None
    rows = [np.mean([measures.groups[k] for measures in found], axis=0).tolist() for k in range(steps)]
    columns = ("average_over_groups", "non_base", "forgetting", "backward_transfer")
    lines = [[spread([getattr(measures, key)[k] for measures in found]) for key in columns] for k in range(steps)]
    return Triangle(rows, [key.replace("_", " ") for key in columns], lines)


def alpha_charts(
    alphas: dict[str, dict[int, dict[int, NDArray[np.float64]]]], styles: dict[str, Style]
) -> dict[str, Chart]:
    """A chart for each group that learned alpha, by label, all on one scale. alphas: by label, seed and step."""
    learned = {label: {seed: path for seed, path in seeds.items() if path} for label, seeds in alphas.items()}
    learned = {label: seeds for label, seeds in learned.items() if seeds}
    if not learned:
        return {}
    everything = [values for seeds in learned.values() for path in seeds.values() for values in path.values()]
    y = log_axis("alpha", min(v.min() for v in everything), max(v.max() for v in everything))
    return {label: alpha_chart(label, seeds, styles[label], y) for label, seeds in learned.items()}


def alpha_chart(label: str, seeds: dict[int, dict[int, NDArray[np.float64]]], style: Style, y: Axis) -> Chart:
    """Steps begin at the same epoch for every seed: where the longest path has them."""
    lengths: dict[int, int] = {}
    for path in seeds.values():
        lengths |= {step: max(len(values), lengths.get(step, 0)) for step, values in path.items()}
    begins, total = {}, 0
    for step, length in sorted(lengths.items()):
        begins[step] = total
        total += length
    series = []
    for seed, path in seeds.items():
        classes = max(values.shape[1] for values in path.values())
        xs: list[float] = []
        means: list[float | None] = []
        titles: list[str] = []
        thin: list[list[float | None]] = [[] for _ in range(classes if classes > 1 else 0)]
        for step, values in path.items():
            mean = geometric_mean(values)
            # Not more points than pixels; always the last one, and a break after it.
            kept = sorted({*range(0, len(values), max(1, total // WIDTH)), len(values) - 1})
            xs += [begins[step] + epoch + 1 for epoch in [*kept, len(values) - 1]]
            means += [*(math.log10(mean[epoch]) for epoch in kept), None]
            title = f"seed {seed}, step {step}, epoch {len(values)}: {mean[-1]:.3g}"
            titles += [*([""] * (len(kept) - 1)), title, ""]
            for c, line in enumerate(thin):
                known = c < values.shape[1]
                line += [*(math.log10(values[epoch, c]) if known else None for epoch in kept), None]
        series.append(Series(style, xs, means, titles, thin=thin))
    every = max(1, total // 6)
    nice = next(n * 10**e for e in range(9) for n in (1, 2, 5) if n * 10**e >= every)
    x = Axis("epoch of the incremental steps", (0, total), [(e, f"{e:g}") for e in range(0, total + 1, nice)])
    return chart(f"alpha of {label}", series, x, y, [(begin, f"step {step}") for step, begin in begins.items()])


def confusions(runs: Sequence[Run]) -> list[Matrix]:
    """The matrices of a group, summed over its seeds: one for each step that all of them have finished."""
    found = []
    for step in range(min(len(run.curve) for run in runs)):
        matrix = np.sum([run.confusion(step) for run in runs], axis=0)
        top1 = spread([run.curve[step] for run in runs])
        found.append(Matrix(len(matrix), top1, f"{matrix.max():,}", as_png(matrix)))
    return found


def as_png(matrix: NDArray[np.int64]) -> str:
    """One pixel per cell, log(1 + images), 256 shades of viridis from 0 to the largest cell; base64."""
    from matplotlib import colormaps
    from PIL import Image

    shades = np.log1p(matrix) / max(float(np.log1p(matrix.max())), 1e-9)
    image = Image.fromarray((shades * 255).round().astype(np.uint8))
    image.putpalette(colormaps["viridis"](np.arange(256), bytes=True)[:, :3].tobytes())
    file = io.BytesIO()
    image.save(file, format="PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


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
