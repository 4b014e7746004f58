"""A table as text and numbers: rows, paired differences with intervals, what they are compared with."""

import csv
import io
import json
import statistics
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fastil.device import Precision
from fastil.errors import UserError
from fastil.reporting.figures import draw_accuracy
from fastil.reporting.rows import deviation, readable_measures, spread
from fastil.reporting.runs import Run
from fastil.reproduce.bootstrap import Predictions, paired_interval
from fastil.reproduce.table_figures import draw
from fastil.reproduce.tables import (
    Entry,
    Found,
    Table,
    finished_runs,
    modified,
    on_paper_data,
    only,
    precision_of,
    published_of,
)
from fastil.text import format_table

HEADER = (
    "steps", "row", "seeds", "published average", "average incremental", "minus published", "difference",
    "95 % interval",
    "base step", "final", "published final", "final base", "published base", "final old", "final new", "final not base",
    "forgetting",
)  # fmt: skip


ONE_ORDER = " All seeds have one class order: how much another order would change is in neither ± nor interval."


@dataclass(frozen=True)
class Gain:
    """What the runs of a row add to those of another one with the same seeds: the mean difference in average
    incremental accuracy and its interval, in points."""

    mean: float
    interval: tuple[float, float]
    seeds: int


@dataclass(frozen=True)
class Row:
    """A line of a table as numbers. measured: by seed, then by heading, of its finished runs."""

    entry: Entry
    measured: dict[int, dict[str, float | None]]
    gain: Gain | None

    def over_seeds(self) -> dict[str, list[float]]:
        """The values of each heading."""
        of_seeds = list(self.measured.values())
        headings = dict.fromkeys(heading for values in of_seeds for heading in values)
        known = {heading: [values.get(heading) for values in of_seeds] for heading in headings}
        return {heading: [v for v in values if v is not None] for heading, values in known.items()}


def predictions(run: Run, order: Sequence[int] | None = None) -> Predictions:
    """The predictions of each step. order: of the classes whose places stand for them, by default the run's own, which
    may be another one for each seed."""
    own = run.protocol.class_order
    places = np.array([(order or own).index(c) for c in own])
    return [places[run.predictions(step)] for step in range(len(run.curve))]


def difference(ours: dict[int, Run], theirs: dict[int, Run]) -> Gain | None:
    """What the runs with a counterpart gain over theirs. None: there are no such runs, or their classes come in other
    steps, so that their test images cannot be paired; or each seed has other classes."""
    pairs = [(ours[s], theirs[s]) for s in ours if s in theirs]
    if not pairs or any(a.protocol.steps != b.protocol.steps for a, b in pairs):
        return None
    order = pairs[0][0].protocol.class_order
    if any(set(a.protocol.class_order) != set(order) for a, _ in pairs):
        return None
    gains = [a.results.average_incremental_accuracy - b.results.average_incremental_accuracy for a, b in pairs]
    interval = paired_interval([predictions(a, order) for a, _ in pairs], [predictions(b, order) for _, b in pairs])
    return Gain(statistics.mean(gains), interval, len(pairs))


def measured(run: Run) -> dict[str, float | None]:
    """What a table says of a run, by heading. Percent, or points."""
    last = run.results.steps[-1]
    found = {
        "average incremental": run.results.average_incremental_accuracy, "base step": run.curve[0],
        "final": last.top1, "final base": last.top1_base, "final old": last.top1_old, "final new": last.top1_new,
    }  # fmt: skip
    for measures in readable_measures([run])[0]:
        found |= {"final not base": measures.non_base[-1], "forgetting": measures.forgetting[-1]}
    return found


def rows_of(table: Table, found: Found) -> list[Row]:
    """A row per entry."""
    rows = []
    for entry in table.entries:
        runs = found[entry.row, entry.steps]
        gain = None if entry.against is None else difference(runs, found[entry.against, entry.steps])
        rows.append(Row(entry, {seed: measured(run) for seed, run in runs.items()}, gain))
    return rows


def cells_of(row: Row, comparable: bool) -> dict[str, str]:
    """The cells of a row by heading; "-" where nothing has run or was published. comparable: the published numbers are
    of the same images and schedule."""
    published, values = row.entry.published, row.over_seeds()
    cells = dict.fromkeys(HEADER, "-") | {"row": row.entry.label}
    cells |= {heading: text for heading, known in values.items() if (text := spread(known))}
    cells |= {f"published {key}": f"{value:.2f}" for key, value in published.items()}
    if row.entry.steps:
        cells["steps"] = str(row.entry.steps)
    if row.measured:
        cells["seeds"] = str(len(row.measured))
    if comparable and row.measured and "average" in published and not row.entry.quoted:
        cells["minus published"] = f"{statistics.mean(values['average incremental']) - published['average']:+.2f}"
    if row.gain is not None:
        cells["difference"] = f"{row.gain.mean:+.2f}"
        cells["95 % interval"] = "{:+.2f} to {:+.2f}".format(*row.gain.interval)
    return cells


def numbers_of(row: Row) -> dict[str, Any]:
    """A row for other programs: by heading the value of each seed, mean and standard deviation, not rounded."""
    values = row.over_seeds()
    return {
        "row": row.entry.label,
        "recipe": row.entry.recipe,
        "settings": row.entry.overrides,
        "seeds": row.measured,
        "mean": {heading: statistics.mean(known) for heading, known in values.items() if known},
        "deviation": {heading: statistics.stdev(known) for heading, known in values.items() if len(known) > 1},
        "difference": None if row.gain is None else row.gain.mean,
        "95 % interval": None if row.gain is None else row.gain.interval,
    }


def write(table: Table, out: Path, asked: Sequence[Entry] | None = None) -> str:
    """The files of a table in `out`: .md, .csv, .json and .png; returns the text. asked: the entries that were asked
    for, by default all but the reference lines; others stand there where they have runs."""
    found, precision = finished_runs(table, out), precision_of(table.entries, out)
    asked = only(table, ()) if asked is None else asked
    left_out = [e for e in table.entries if e not in asked and not found[e.row, e.steps]]
    table = replace(table, entries=[entry for entry in table.entries if entry not in left_out])
    runs_of = [found[entry.row, entry.steps].values() for entry in table.entries]
    on_theirs = [all(map(on_paper_data, runs)) for runs in runs_of]
    rows = rows_of(table, found)
    texts = [cells_of(row, table.scale == "paper" and same) for row, same in zip(rows, on_theirs, strict=True)]
    shown = [heading for heading in HEADER if any(text[heading] != "-" for text in texts)]  # no columns of dashes
    of_what = published_of(table, found)
    header = tuple(f"{heading}{of_what if heading.startswith('published') else ''}" for heading in shown)
    cells = [tuple(text[heading] for heading in shown) for text in texts]
    above = notes(table, {row.gain.seeds for row in rows if row.gain}, all(on_theirs), precision, runs_of)
    text = "\n\n".join([*above, format_table(header, cells), *remarks(rows, found, left_out)])
    stem = out / table.stem
    if not any(runs_of) and stem.with_suffix(".md").exists():  # of runs of other settings, which are worth keeping
        return text + f"\n\n{stem}.md, .csv, .json stay as they were"
    of_runs = ("precision",) if table.scale is None else ("precision", "fidelity")
    lines = [(*header, *of_runs)]
    for entry, runs, line in zip(table.entries, runs_of, cells, strict=True):
        told = (str(precision), modified(table, entry, runs)) if runs else ("-", "-")
        lines.append((*line, *told[: len(of_runs)]))
    try:
        out.mkdir(parents=True, exist_ok=True)
        stem.with_suffix(".md").write_text(text + "\n")
        content = io.StringIO()
        csv.writer(content, lineterminator="\n").writerows(lines)
        stem.with_suffix(".csv").write_text(content.getvalue())
        numbers = {"table": table.title, "precision": precision, "rows": list(map(numbers_of, rows))}
        stem.with_suffix(".json").write_text(json.dumps(numbers, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); choose another --out") from None
    figure = stem.with_suffix(".png")
    if table.scale is not None:
        draw(table, found, figure)
    elif any(runs_of):
        groups = {row.entry.label: list(runs) for row, runs in zip(rows, runs_of, strict=True) if runs}
        draw_accuracy(groups, figure, "run the same command again")
    return text + f"\n\nwritten: {stem}.md, .csv, .json" + (", .png" if figure.exists() else "")


def remarks(rows: Sequence[Row], found: Found, left_out: Sequence[Entry]) -> list[str]:
    """What the cells leave open. left_out: entries without a row."""
    lines = []
    if not all(row.measured for row in rows):
        some = any(row.measured for row in rows)
        lines.append('"-" under seeds: no finished run yet.' if some else "No run is finished yet.")
    if left_out:
        steps: dict[str, list[str]] = {}
        for entry in left_out:
            steps.setdefault(entry.label, []).append(str(entry.steps))
        names = [f"{label} ({' and '.join(numbers)} steps)" for label, numbers in steps.items()]
        lines.append(f"Not asked for, and without a finished run: {'; '.join(names)}.")
    unpaired = [
        row.entry.label
        for row in rows
        if row.entry.against and not row.gain and row.measured.keys() & found[row.entry.against, row.entry.steps].keys()
    ]
    if unpaired:
        lines.append(f"No difference where classes are others, or come in other steps: {'; '.join(unpaired)}.")
    return lines


def notes(
    table: Table,
    paired: set[int],
    paper_data: bool = True,
    precision: Precision | None = None,
    runs: Sequence[Collection[Run]] = (),
) -> list[str]:
    """What the columns mean, and what they do not say. paper_data: all runs are on the images of the paper's tables;
    runs: of each row."""
    references = {entry.against for entry in table.entries if entry.against}
    labels = list(dict.fromkeys(e.label.partition(", ")[0] for e in table.entries if e.row in references))
    own_orders = any(len({tuple(run.protocol.class_order) for run in of_row}) > 1 for of_row in runs)
    alike = " (and steps and memory)" if table.scale is not None else ""
    lines = [
        f'{table.name}: {table.title}. Top-1 in percent, {deviation(runs)}; "average incremental" '
        'takes in the base step, "final" is the last step, over all classes and over those of the base step, of all '
        'earlier steps, of the last one, and of all but those of the base step; "forgetting" is in points '
        "(docs/measures.md)."
    ]
    if precision is not None and any(runs):
        lines.append(f"All runs were trained in {precision}.")
    if paired:
        drawn = "test images" if paired == {1} else "seeds and test images"
        lines.append(
            f'"difference" is the average incremental accuracy minus that of {" / ".join(labels)} with the same seeds'
            f"{alike}, with a 95 % bootstrap interval over {drawn}. "
            + ("Two or three seeds say little about the spread between seeds." if paired != {1} else "")
            + (" Each seed has a class order of its own, the same in every row." if own_orders else ONE_ORDER)
            + (" Where there is one seed only test images are drawn: that spread is left out." if 1 in paired else "")
        )
    if table.note is not None:
        lines.append(table.note if table.scale is None else f'Scale "{table.scale}": {table.note}')
    if not paper_data and table.on_paper_data:
        lines.append(
            "The images are not known to be CIFAR-100 as published: the paper's numbers are of other data and stand "
            "next to ours for their order only."
        )
    return lines
