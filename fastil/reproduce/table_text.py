"""A table of the paper as text: rows, paired differences with intervals, what they are compared with."""

import csv
import io
import statistics
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

from fastil.device import Precision
from fastil.errors import UserError
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


def predictions(run: Run) -> Predictions:
    return [run.predictions(step) for step in range(len(run.curve))]


def difference(ours: dict[int, Run], theirs: dict[int, Run]) -> tuple[str, str, int]:
    """Average incremental accuracy of the runs with a counterpart minus theirs, its interval, and how many they are."""
    pairs = [(ours[s], theirs[s]) for s in ours if s in theirs]
    if not pairs:
        return "-", "-", 0
    gains = [a.results.average_incremental_accuracy - b.results.average_incremental_accuracy for a, b in pairs]
    low, high = paired_interval([predictions(a) for a, _ in pairs], [predictions(b) for _, b in pairs])
    return f"{statistics.mean(gains):+.2f}", f"{low:+.2f} to {high:+.2f}", len(pairs)


def rows_of(table: Table, found: Found) -> tuple[list[tuple[str, ...]], set[int]]:
    """A line per entry, "-" where nothing has run or was published; over how many seeds the intervals are."""
    lines: list[tuple[str, ...]] = []
    paired: set[int] = set()
    for entry in table.entries:
        runs, published = found[entry.row, entry.steps], entry.published
        last = [run.results.steps[-1] for run in runs.values()]
        measures, _ = readable_measures(runs.values())
        averages = [run.results.average_incremental_accuracy for run in runs.values()]
        gain, interval = "-", "-"
        if entry.against is not None:
            gain, interval, pairs = difference(runs, found[entry.against, entry.steps])
            paired |= {pairs} - {0}
        distance = "-"
        comparable = table.scale == "paper" and all(on_paper_data(run) for run in runs.values())
        if comparable and averages and "average" in published and not entry.quoted:
            distance = f"{statistics.mean(averages) - published['average']:+.2f}"
        known = [f"{published[key]:.2f}" if key in published else "-" for key in ("average", "final", "base")]
        lines.append(
            (
                str(entry.steps), entry.label, str(len(runs) or "-"), known[0], spread(averages) or "-", distance, gain,
                interval, spread([run.curve[0] for run in runs.values()]) or "-",
                spread([step.top1 for step in last]) or "-", known[1],
                spread([step.top1_base for step in last]) or "-", known[2],
                spread([step.top1_old for step in last]) or "-", spread([step.top1_new for step in last]) or "-",
                spread([m.non_base[-1] for m in measures]) or "-", spread([m.forgetting[-1] for m in measures]) or "-",
            )
        )  # fmt: skip
    return lines, paired


def write(table: Table, out: Path, asked: Sequence[Entry] | None = None) -> str:
    """TABLE-SCALE.md, .csv and .png in `out`; returns the text. asked: the entries that were asked for, by default all
    but the reference lines; others stand there where they have runs."""
    found, precision = finished_runs(table, out), precision_of(table.entries, out)
    asked = only(table, ()) if asked is None else asked
    left_out = [e for e in table.entries if e not in asked and not found[e.row, e.steps]]
    table = replace(table, entries=[entry for entry in table.entries if entry not in left_out])
    rows, paired = rows_of(table, found)
    shown = [i for i in range(len(HEADER)) if any(row[i] != "-" for row in rows)]  # no columns of dashes
    of_what = published_of(table, found)
    headings = [f"{heading}{of_what if heading.startswith('published') else ''}" for heading in HEADER]
    header, cells = tuple(headings[i] for i in shown), [tuple(row[i] for i in shown) for row in rows]
    runs_of = [found[entry.row, entry.steps].values() for entry in table.entries]
    theirs = all(on_paper_data(run) for runs in runs_of for run in runs)
    below = (
        [] if all(runs_of) else ['"-" under seeds: no finished run yet.' if any(runs_of) else "No run is finished yet."]
    )
    if left_out:
        steps: dict[str, list[str]] = {}
        for entry in left_out:
            steps.setdefault(entry.label, []).append(str(entry.steps))
        names = [f"{label} ({' and '.join(numbers)} steps)" for label, numbers in steps.items()]
        below.append(f"Not asked for, and without a finished run: {'; '.join(names)}.")
    text = "\n\n".join([*notes(table, paired, theirs, precision, runs_of), format_table(header, cells), *below])
    stem = out / f"{table.name}-{table.scale}"
    try:
        out.mkdir(parents=True, exist_ok=True)
        stem.with_suffix(".md").write_text(text + "\n")
        content = io.StringIO()
        of_rows = [
            (precision, modified(table, entry, runs)) if runs else ("-", "-")
            for entry, runs in zip(table.entries, runs_of, strict=True)
        ]
        lines = [(*row, *of_row) for row, of_row in zip(cells, of_rows, strict=True)]
        csv.writer(content, lineterminator="\n").writerows([(*header, "precision", "fidelity"), *lines])
        stem.with_suffix(".csv").write_text(content.getvalue())
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); choose another --out") from None
    draw(table, found, stem.with_suffix(".png"))
    return text + f"\n\nwritten: {stem}.md, .csv, .png"


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
    labels = list(dict.fromkeys(e.label.partition(",")[0] for e in table.entries if e.row in references))
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
            f'"difference" is the average incremental accuracy minus that of {" / ".join(labels)} with the same seeds '
            f"(and steps and memory), with a 95 % bootstrap interval over {drawn}. "
            + ("Two or three seeds say little about the spread between seeds." if paired != {1} else "")
            + " All seeds have one class order: how much another order would change is in neither ± nor interval."
            + (" Where there is one seed only test images are drawn: that spread is left out." if 1 in paired else "")
        )
    if table.note is not None:
        lines.append(f'Scale "{table.scale}": {table.note}')
    if not paper_data and table.on_paper_data:
        lines.append(
            "The images are not known to be CIFAR-100 as published: the paper's numbers are of other data and stand "
            "next to ours for their order only."
        )
    return lines
