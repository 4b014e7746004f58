"""The paper's tables as work lists, and what their runs came to, beside the published numbers."""

import csv
import io
import statistics
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from fastil import recipe
from fastil.errors import UserError
from fastil.report import Run, new_figure, read_run, save_figure, spread
from fastil.statistics import Predictions, paired_interval
from fastil.summary import format_table

HEADER = (
    "steps", "row", "seeds", "published average", "average incremental", "difference", "95 % interval",
    "base step", "final", "published final", "final base", "published base", "final old", "final new",
)  # fmt: skip


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

    def folder(self, out: Path, seed: int) -> Path:
        return out / self.recipe / f"{self.row}-s{seed}"


@dataclass(frozen=True)
class Table:
    name: str
    title: str
    scale: str
    seeds: int  # unless asked for otherwise
    entries: list[Entry]


def read_tables() -> dict[str, Any]:
    """recipes/tables.yaml."""
    content: dict[str, Any] = yaml.safe_load(resources.files("fastil.recipes").joinpath("tables.yaml").read_text())
    return content


def table_of(content: dict[str, Any], name: str, scale: str) -> Table:
    """A table at a scale, "cpu" or "paper"."""
    if name not in content["tables"]:
        raise UserError(f"unknown table {name}: use one of {', '.join(content['tables'])}")
    if scale not in content["scales"]:
        raise UserError(f"--scale {scale}: unknown; use one of {', '.join(content['scales'])}")
    recipes, rows = content["scales"][scale], content["rows"]
    entries = [
        Entry(
            row=line["row"],
            recipe=recipes[line["steps"]],
            overrides=tuple(f"{key}={value}" for key, value in rows[line["row"]].items()),
            steps=line["steps"],
            label=line["label"],
            against=line.get("against"),
            published={key: line[key] for key in ("average", "base", "final") if key in line},
        )
        for line in content["tables"][name]["entries"]
    ]
    return Table(name, content["tables"][name]["title"], scale, content["seeds"][scale], entries)


def only(table: Table, wanted: list[str]) -> list[Entry]:
    """The entries of the rows whose names are, or begin with, one of `wanted`; all of them without any."""
    rows = list(dict.fromkeys(entry.row for entry in table.entries))
    chosen: list[str] = []
    for name in wanted:
        found = [name] if name in rows else [row for row in rows if row.startswith(name)]
        if not found:
            raise UserError(f"--only {name}: no such row in {table.name}; its rows are {', '.join(rows)}")
        chosen += found
    return [entry for entry in table.entries if entry.row in chosen or not wanted]


def is_finished(folder: Path) -> bool:
    """Whether the run of this directory went through all of its steps."""
    if not (folder / "results.json").exists():
        return False
    run = read_run(folder)
    return len(run.curve) == run.total_steps


def finished_runs(entry: Entry, out: Path) -> dict[int, Run]:
    """By seed."""
    folders = (out / entry.recipe).glob(f"{entry.row}-s*")
    runs = [read_run(folder) for folder in folders if folder.is_dir() and is_finished(folder)]
    return {run.results["seed"]: run for run in sorted(runs, key=lambda run: int(run.results["seed"]))}


def predictions(run: Run) -> Predictions:
    try:
        return [np.load(run.path / f"predictions/step_{step}.npy") for step in range(len(run.curve))]
    except (OSError, ValueError):
        raise UserError(f"{run.path}/predictions: missing or damaged; train this row again in a new --out") from None


def rows_of(table: Table, out: Path) -> list[tuple[str, ...]]:
    """A line per entry; "-" where nothing has run or was published."""
    by_row = {(entry.row, entry.steps): entry for entry in table.entries}
    lines: list[tuple[str, ...]] = []
    for entry in table.entries:
        runs, published = finished_runs(entry, out), entry.published
        last = [run.results["steps"][-1] for run in runs.values()]
        averages = [run.results["average_incremental_accuracy"] for run in runs.values()]
        difference = interval = ""
        if entry.against is not None:
            others = finished_runs(by_row[entry.against, entry.steps], out)
            seeds = [seed for seed in runs if seed in others]
            if seeds:
                gains = [
                    runs[s].results["average_incremental_accuracy"] - others[s].results["average_incremental_accuracy"]
                    for s in seeds
                ]
                difference = f"{statistics.mean(gains):+.2f}"
                low, high = paired_interval(
                    [predictions(runs[s]) for s in seeds], [predictions(others[s]) for s in seeds]
                )
                interval = f"{low:+.2f} to {high:+.2f}"
        known = [f"{published[key]:.2f}" if key in published else "-" for key in ("average", "final", "base")]
        lines.append(
            (
                str(entry.steps), entry.label, str(len(runs)), known[0], spread(averages) or "-",
                difference or "-", interval or "-", spread([run.curve[0] for run in runs.values()]) or "-",
                spread([step["top1"] for step in last]) or "-", known[1],
                spread([step["top1_base"] for step in last]) or "-", known[2],
                spread([step["top1_old"] for step in last]) or "-", spread([step["top1_new"] for step in last]) or "-",
            )
        )  # fmt: skip
    return lines


def write(table: Table, out: Path) -> str:
    """TABLE-SCALE.md, .csv and .png in `out`; returns the text."""
    rows = rows_of(table, out)
    shown = [i for i in range(len(HEADER)) if any(row[i] != "-" for row in rows)]  # no columns of dashes
    header, rows = tuple(HEADER[i] for i in shown), [tuple(row[i] for i in shown) for row in rows]
    references = {entry.against for entry in table.entries if entry.against}
    labels = list(dict.fromkeys(e.label for e in table.entries if e.row in references))
    notes = [
        f'{table.name}: {table.title}. Top-1 in percent, mean ± standard deviation over seeds; "average incremental" '
        'takes in the base step, "final" is the last step, over all classes and over those of the base step, of all '
        "earlier steps and of the last one.",
        f'"difference" is the average incremental accuracy minus that of {" / ".join(labels)} with the same seeds (and '
        "steps and memory), with a 95 % bootstrap interval over seeds and test images. Two or three seeds say little "
        "about the spread between seeds.",
    ]
    if table.scale != "paper":
        shape = recipe.load(table.entries[0].recipe)
        notes.append(
            f'Scale "{table.scale}": {shape.description}. This is not the paper\'s data set nor its schedule; its '
            "numbers stand beside ours for their order only."
        )
    text = "\n\n".join([*notes, format_table(header, rows)])
    stem = out / f"{table.name}-{table.scale}"
    try:
        out.mkdir(parents=True, exist_ok=True)
        stem.with_suffix(".md").write_text(text + "\n")
        content = io.StringIO()
        csv.writer(content, lineterminator="\n").writerows([header, *rows])
        stem.with_suffix(".csv").write_text(content.getvalue())
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); choose another --out") from None
    draw(table, out, stem.with_suffix(".png"))
    return text + f"\n\nwritten: {stem}.md, .csv, .png"


def draw(table: Table, out: Path, path: Path) -> None:
    """Bars of our average incremental accuracy with a line per seed's range, and the published numbers as marks."""
    groups = sorted({entry.steps for entry in table.entries})
    figure, axes = new_figure(len(groups))
    for axis, steps in zip(axes, groups, strict=True):
        entries = [entry for entry in table.entries if entry.steps == steps]
        for place, entry in enumerate(reversed(entries)):
            values = [run.results["average_incremental_accuracy"] for run in finished_runs(entry, out).values()]
            if values:
                axis.barh(place, statistics.mean(values), color="tab:blue", alpha=0.8)
                axis.plot([min(values), max(values)], [place, place], color="black", linewidth=2)
            if "average" in entry.published:
                axis.plot(entry.published["average"], place, "D", color="tab:orange")
        axis.set_yticks(range(len(entries)), [entry.label for entry in reversed(entries)])
        axis.plot(
            [], [], "D", color="tab:orange", label="published" + ("" if table.scale == "paper" else " (CIFAR-100)")
        )
        axis.set(xlabel="average incremental accuracy (%)", title=f"{steps} incremental steps", xlim=(0, 75))
        axis.grid(alpha=0.3, axis="x")
        axis.legend(fontsize="small", loc="lower right")
    save_figure(figure, path)
