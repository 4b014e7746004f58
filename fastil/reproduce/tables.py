"""The paper's tables as work lists, and what their runs came to, beside the published numbers."""

import csv
import io
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from fastil import recipe
from fastil.device import Precision
from fastil.errors import UserError
from fastil.fidelity import on_published_data
from fastil.recipe import Recipe
from fastil.reporting.figures import new_figure, save_figure
from fastil.reporting.rows import spread
from fastil.reporting.runs import Run, read_run
from fastil.reproduce.bootstrap import Predictions, paired_interval
from fastil.text import format_table

HEADER = (
    "steps", "row", "seeds", "published average", "average incremental", "minus published", "difference",
    "95 % interval",
    "base step", "final", "published final", "final base", "published base", "final old", "final new",
)  # fmt: skip

AVERAGE = "average_incremental_accuracy"
# What the paper publishes of a row, and where a run has it.
METRICS: dict[str, tuple[str, Callable[[Run], float]]] = {
    "average": ("average incremental accuracy", lambda run: run.results[AVERAGE]),
    "base": ("final, base classes", lambda run: run.results["steps"][-1]["top1_base"]),
    "final": ("final, all classes", lambda run: run.results["steps"][-1]["top1"]),
}


@dataclass(frozen=True)
class Entry:
    """A line of a table. published: "average", "base" (final top-1 on the base classes) and "final", percent."""

    row: str
    recipe: str
    overrides: tuple[str, ...]
    steps: int  # incremental ones
    label: str
    against: str | None  # the row that the paired difference is taken from
    published: dict[str, float]
    scale_folder: str = ""  # of the runs of its scale, in `out`; older scales have none

    def folder(self, out: Path, seed: int) -> Path:
        return out / self.scale_folder / self.recipe / f"{self.row}-s{seed}"

    def load(self, seed: int, data: str | None = None) -> Recipe:
        return recipe.load(self.recipe, [*self.overrides, f"seed={seed}"], data=data)


@dataclass(frozen=True)
class Table:
    name: str
    title: str
    scale: str
    seeds: int  # unless asked for otherwise
    over: str | None  # the key that the figure draws curves over; None: bars
    on_paper_data: bool  # whether this scale is meant to be trained on the images of the paper
    theirs: str | None  # what the published numbers are of, where that is not what this scale trains
    note: str | None  # what this scale trains and how the published numbers are to be read there
    entries: list[Entry]


Found = dict[tuple[str, int], dict[int, Run]]  # finished runs by seed, by row and number of steps


def read_tables() -> dict[str, Any]:
    """recipes/tables.yaml."""
    content: dict[str, Any] = yaml.safe_load(resources.files("fastil.recipes").joinpath("tables.yaml").read_text())
    return content


def table_of(content: dict[str, Any], name: str, scale: str) -> Table:
    """A table at one of the scales of `content`."""
    if name not in content["tables"]:
        raise UserError(f"unknown table {name}: use one of {', '.join(content['tables'])}")
    if scale not in content["scales"]:
        raise UserError(f"--scale {scale}: unknown; use one of {', '.join(content['scales'])}")
    lines_of = content["scales"][scale].get("like", scale)
    settings = content["scales"][lines_of] | content["scales"][scale]
    rows, methods = content["rows"], content.get("methods", {})

    def trained(row: str, steps: int) -> tuple[str, tuple[str, ...]]:
        """Recipe and overrides."""
        own = row in methods and "own_recipes" in settings
        name = settings["own_recipes"].format(row=row, steps=steps) if own else settings["recipes"][steps]
        keys = {} if own else (rows | methods)[row]
        keys = keys | settings.get("overrides", {}) | settings.get("row_overrides", {}).get(row, {})
        return name, tuple(f"{key}={value}" for key, value in keys.items())

    entries = [
        Entry(
            row=line["row"],
            recipe=trained(line["row"], line["steps"])[0],
            overrides=trained(line["row"], line["steps"])[1],
            steps=line["steps"],
            label=line["label"],
            against=line.get("against"),
            published={key: line[key] for key in ("average", "base", "final") if key in line},
            scale_folder=settings.get("folder", ""),
        )
        for line in content["tables"][name]["entries"]
        if lines_of in line.get("scales", [lines_of])
    ]
    head = content["tables"][name]
    return Table(
        name=name,
        title=head["title"],
        scale=scale,
        seeds=settings["seeds"],
        over=head.get("over"),
        on_paper_data=lines_of == "paper",
        theirs=settings.get("theirs"),
        note=settings.get("note"),
        entries=entries,
    )


def only(table: Table, wanted: list[str], steps: int | None = None) -> list[Entry]:
    """The entries of the rows whose names are, or begin with, one of `wanted`, with so many incremental steps; all of
    them where neither is given."""
    entries = [entry for entry in table.entries if steps in (None, entry.steps)]
    if not entries:
        there = " or ".join(str(number) for number in sorted({entry.steps for entry in table.entries}))
        raise UserError(f"--steps {steps}: no rows with so many at --scale {table.scale}; use {there}")
    rows = list(dict.fromkeys(entry.row for entry in entries))
    chosen: list[str] = []
    for name in wanted:
        found = [name] if name in rows else [row for row in rows if row.startswith(name)]
        if not found or not name:
            raise UserError(f"--only {name}: no such row in {table.name}; its rows are {', '.join(rows)}")
        if wanted.count(name) > 1:
            raise UserError(f"--only {name}: given twice; leave one out")
        chosen += found
    return [entry for entry in entries if entry.row in chosen or not wanted]


def finished_run(folder: Path, wanted: Recipe) -> Run | None:
    """The run of this directory, if it went through all of its steps with the settings of `wanted`."""
    if not (folder / "results.json").exists():
        return None
    run = read_run(folder)
    if wanted.train.precision == "auto":  # it took what its machine had
        wanted = wanted.in_precision(run.recipe.precision)
    return run if len(run.curve) == run.total_steps and run.recipe.identity() == wanted.identity() else None


def precision_of(entries: Sequence[Entry], out: Path) -> Precision | None:
    """The precision of the runs of these entries that are in `out`, finished or not; None where there is none. Raises
    UserError where they have several, for what a table compares must differ in its rows alone. Runs of other settings
    do not count, as they do not in the table."""
    first: tuple[Path, Precision] | None = None
    for entry in entries:
        for path in sorted(entry.folder(out, 0).parent.glob(f"{entry.row}-s*/recipe.yaml")):
            loaded = recipe.read_effective(path)
            precision = loaded.precision
            if loaded.identity(seed=False) != entry.load(0).in_precision(precision).identity(seed=False):
                continue
            if first is not None and precision != first[1]:
                raise UserError(
                    f"{first[0].parent} computes in {first[1]} and {path.parent} in {precision}, which one table "
                    "cannot hold; move one set of runs to another --out"
                )
            first = first or (path, precision)
    return None if first is None else first[1]


def finished_runs(table: Table, out: Path) -> Found:
    """The finished runs of every entry, by seed."""
    found: Found = {}
    for entry in table.entries:
        folders = {path.name.rpartition("-s")[2]: path for path in entry.folder(out, 0).parent.glob(f"{entry.row}-s*")}
        runs = {
            int(seed): finished_run(path, entry.load(int(seed)))
            for seed, path in folders.items()
            if seed.isdecimal() and path.is_dir()
        }
        found[entry.row, entry.steps] = {seed: run for seed, run in sorted(runs.items()) if run is not None}
    precision_of(table.entries, out)
    everything = [run for of_row in found.values() for run in of_row.values()]
    for run in everything:
        if run.images != everything[0].images:
            raise UserError(
                f"{run.path} and {everything[0].path} were trained on different images, which one table cannot hold; "
                f"move one set of runs to another --out"
            )
    return found


def predictions(run: Run) -> Predictions:
    try:
        return [np.load(run.path / f"predictions/step_{step}.npy") for step in range(len(run.curve))]
    except (OSError, ValueError):
        raise UserError(f"{run.path}/predictions: missing or damaged; train this row again in a new --out") from None


def difference(ours: dict[int, Run], theirs: dict[int, Run]) -> tuple[str, str, int]:
    """Average incremental accuracy of the runs with a counterpart minus theirs, its interval, and how many they are."""
    pairs = [(ours[s], theirs[s]) for s in ours if s in theirs]
    if not pairs:
        return "-", "-", 0
    gains = [a.results[AVERAGE] - b.results[AVERAGE] for a, b in pairs]
    low, high = paired_interval([predictions(a) for a, _ in pairs], [predictions(b) for _, b in pairs])
    return f"{statistics.mean(gains):+.2f}", f"{low:+.2f} to {high:+.2f}", len(pairs)


def rows_of(table: Table, found: Found) -> tuple[list[tuple[str, ...]], set[int]]:
    """A line per entry, "-" where nothing has run or was published; over how many seeds the intervals are."""
    lines: list[tuple[str, ...]] = []
    paired: set[int] = set()
    for entry in table.entries:
        runs, published = found[entry.row, entry.steps], entry.published
        last = [run.results["steps"][-1] for run in runs.values()]
        averages = [run.results[AVERAGE] for run in runs.values()]
        gain, interval = "-", "-"
        if entry.against is not None:
            gain, interval, pairs = difference(runs, found[entry.against, entry.steps])
            paired |= {pairs} - {0}
        distance = "-"
        comparable = table.scale == "paper" and all(on_paper_data(run) for run in runs.values())
        if comparable and averages and "average" in published:
            distance = f"{statistics.mean(averages) - published['average']:+.2f}"
        known = [f"{published[key]:.2f}" if key in published else "-" for key in ("average", "final", "base")]
        lines.append(
            (
                str(entry.steps), entry.label, str(len(runs)), known[0], spread(averages) or "-", distance, gain,
                interval, spread([run.curve[0] for run in runs.values()]) or "-",
                spread([step["top1"] for step in last]) or "-", known[1],
                spread([step["top1_base"] for step in last]) or "-", known[2],
                spread([step["top1_old"] for step in last]) or "-", spread([step["top1_new"] for step in last]) or "-",
            )
        )  # fmt: skip
    return lines, paired


def write(table: Table, out: Path) -> str:
    """TABLE-SCALE.md, .csv and .png in `out`; returns the text."""
    found = finished_runs(table, out)
    rows, paired = rows_of(table, found)
    shown = [i for i in range(len(HEADER)) if any(row[i] != "-" for row in rows)]  # no columns of dashes
    header, rows = tuple(HEADER[i] for i in shown), [tuple(row[i] for i in shown) for row in rows]
    theirs = all(on_paper_data(run) for of_row in found.values() for run in of_row.values())
    text = "\n\n".join([*notes(table, paired, theirs), format_table(header, rows)])
    stem = out / f"{table.name}-{table.scale}"
    try:
        out.mkdir(parents=True, exist_ok=True)
        stem.with_suffix(".md").write_text(text + "\n")
        content = io.StringIO()
        csv.writer(content, lineterminator="\n").writerows([header, *rows])
        stem.with_suffix(".csv").write_text(content.getvalue())
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); choose another --out") from None
    draw(table, found, stem.with_suffix(".png"))
    return text + f"\n\nwritten: {stem}.md, .csv, .png"


def on_paper_data(run: Run) -> bool:
    """Whether the images of a run are those of the paper's tables."""
    return on_published_data("cifar100", run.protocol)


def notes(table: Table, paired: set[int], paper_data: bool = True) -> list[str]:
    """What the columns mean, and what they do not say. paper_data: all runs are on the images of the paper's tables."""
    references = {entry.against for entry in table.entries if entry.against}
    labels = list(dict.fromkeys(e.label.partition(",")[0] for e in table.entries if e.row in references))
    lines = [
        f'{table.name}: {table.title}. Top-1 in percent, mean ± standard deviation over seeds; "average incremental" '
        'takes in the base step, "final" is the last step, over all classes and over those of the base step, of all '
        "earlier steps and of the last one."
    ]
    if paired:
        drawn = "test images" if paired == {1} else "seeds and test images"
        lines.append(
            f'"difference" is the average incremental accuracy minus that of {" / ".join(labels)} with the same seeds '
            f"(and steps and memory), with a 95 % bootstrap interval over {drawn}. "
            + ("Two or three seeds say little about the spread between seeds." if paired != {1} else "")
            + (" Where there is one seed only test images are drawn: that spread is left out." if 1 in paired else "")
        )
    if table.note is not None:
        lines.append(f'Scale "{table.scale}": {table.note}')
    if not paper_data and table.on_paper_data:
        lines.append(
            "The images are not known to be CIFAR-100 as published: the paper's numbers are of other data and stand "
            "beside ours for their order only."
        )
    return lines


def draw(table: Table, found: Found, path: Path) -> None:
    """Ours, the mean over seeds with their range, beside the published numbers; a panel per number of steps."""
    groups = sorted({entry.steps for entry in table.entries})
    figure, axes = new_figure(len(groups))
    on_theirs = all(on_paper_data(run) for of_row in found.values() for run in of_row.values())
    other_data = None if on_theirs or not table.on_paper_data else "CIFAR-100"
    theirs = ", ".join(filter(None, (other_data, table.theirs))) or None
    theirs = "published" if theirs is None else f"published ({theirs})"
    for axis, steps in zip(axes, groups, strict=True):
        entries = [entry for entry in table.entries if entry.steps == steps]
        runs = {entry.row: list(found[entry.row, steps].values()) for entry in entries}
        if table.over is None:
            draw_bars(axis, entries, runs, theirs)
        else:
            draw_curves(axis, entries, runs, theirs, table.over)
        axis.plot([], [], color="grey", linewidth=3, alpha=0.5, label="range over seeds")
        axis.set_title(f"{steps} incremental steps")
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small", loc="best")
    save_figure(figure, path)


def draw_bars(axis: Any, entries: list[Entry], runs: dict[str, list[Run]], theirs: str) -> None:
    """The average incremental accuracy of each row."""
    for place, entry in enumerate(reversed(entries)):
        values = [METRICS["average"][1](run) for run in runs[entry.row]]
        if values:
            axis.barh(place, statistics.mean(values), color="tab:blue", alpha=0.8)
            axis.plot([min(values), max(values)], [place, place], color="black", linewidth=3, alpha=0.5)
        if "average" in entry.published:
            axis.plot(entry.published["average"], place, "D", color="tab:orange")
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
