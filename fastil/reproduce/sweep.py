"""`fastil sweep`, a table of every combination of some values, and `fastil run --seeds`, one row of it."""

import hashlib
import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fastil import settings
from fastil.errors import UserError
from fastil.recipe import RUNTIME_KEYS, Recipe
from fastil.recipe_file import load
from fastil.reporting.fidelity import remark_of
from fastil.reporting.rows import spread
from fastil.reporting.runs import Run
from fastil.reproduce.scheduler import complete
from fastil.reproduce.tables import Entry, Table
from fastil.reproduce.worklist import WorkList
from fastil.settings import shown

LONGEST = 80  # characters of the name of a file
BY_OPTION = {"seed": "the seeds are given by --seeds, such as --seeds 0,1,2", "precision": "give --precision instead"}
NOTE = (
    "Each interval is of its row by itself: of twenty rows that differ in nothing, one is expected to exclude 0. All "
    "numbers are of the test images, so a row that is chosen by them looks better here than it is."
)


def table_of(recipe: str, given: Sequence[str], data: str | None = None) -> Table:
    """The table of a sweep: a row for every combination of the values in `given`, each KEY=A,B,C. The first row is what
    the others are compared with. Raises UserError, before anything is trained, for settings that cannot be."""
    values = _values(given)
    swept = [key for key, texts in values.items() if len(texts) > 1]
    if not swept:
        raise UserError(
            "nothing to sweep: give a key several values, such as lr=0.1,0.03; several seeds of one row are "
            "fastil run RECIPE --seeds 3"
        )
    entries: list[Entry] = []
    for texts in itertools.product(*values.values()):
        parts = [canonical(key, text) for key, text in zip(values, texts, strict=True) if key in swept]
        entries.append(
            Entry(
                row=file_name(",".join(parts)),
                recipe=recipe,
                overrides=tuple(f"{key}={text}" for key, text in zip(values, texts, strict=True)),
                steps=0,
                label=" ".join(parts),
                against=entries[0].row if entries else None,
                published={},
            )
        )
    first = _checked(entries, data)
    return Table(
        name="sweep",
        title=" ".join([first.name, *given]),
        stem="table",
        scale=None,
        seeds=[first.train.seed],
        over=None,
        on_paper_data=False,
        theirs=None,
        note=NOTE,
        entries=[replace(entry, place=first.name) for entry in entries],
    )


def default_out(table: Table, given: Sequence[str]) -> Path:
    """Where a sweep goes unless told otherwise: a folder called by the recipe and the keys with several values, so that
    it can be resumed, and go on with more values. A hash keeps sweeps apart whose keys with one value differ."""
    values = _values(given)
    swept = [key for key, texts in values.items() if len(texts) > 1]
    fixed = sorted(canonical(key, values[key][0]) for key in values if key not in RUNTIME_KEYS and key not in swept)
    apart = f"-{_hash(' '.join(fixed))}" if fixed else ""
    return Path("runs") / file_name(f"sweep-{table.entries[0].place}-{','.join(swept)}{apart}")


def run_seeds(
    recipe: str,
    overrides: Sequence[str],
    seeds: Sequence[int],
    out: Path,
    data: str | None = None,
    jobs: int | None = None,
) -> tuple[str, int]:
    """Train a recipe with each of these seeds, into the folders in `out` that `fastil run` names them by. jobs: runs at
    once. Returns what came of it, as a text, and an exit status."""
    if any(text.startswith("seed=") for text in overrides):
        raise UserError("seed= and --seeds: leave one of them out")
    name = load(recipe, overrides, data=data).name
    work = WorkList([Entry(name, recipe, tuple(overrides), 0, name, None, {})], seeds, out, data)
    remarks, status = complete(work, out, jobs)
    runs = [Run(job.folder) for job in work.jobs if job.finished]
    if not runs:
        return remarks.strip(), status
    average = spread([run.results.average_incremental_accuracy for run in runs])
    final = spread([run.results.final_top1 for run in runs])
    numbers = ", ".join(str(run.results.seed) for run in runs)
    over = f"mean ± standard deviation over seeds {numbers}" if len(runs) > 1 else f"seed {numbers}"
    lines = [
        f"average incremental accuracy {average}, final top-1 {final}; {over}",
        remark_of(runs[0].recipe),
        f"results, figures and checkpoints: {', '.join(str(run.path) for run in runs)}",
    ]
    return "\n".join(line for line in lines if line is not None) + remarks, status


def canonical(key: str, text: str) -> str:
    """A setting as text, the same for every way to write its value."""
    _, value = settings.parse_override(f"{key}={text}")
    written = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"), ensure_ascii=False)
    return f"{key}={written}"


def file_name(text: str) -> str:
    """A short name for a file or a folder: the text itself where it may be one, otherwise with a hash of it."""
    name = re.sub(r"[^\w.=,+-]+", "_", text, flags=re.ASCII)
    if name == text and len(name) <= LONGEST:
        return name
    return f"{name[:LONGEST]}-{_hash(text)}"


def _hash(text: str) -> str:
    """A few characters that are the same for the same text only, but for chance."""
    return hashlib.sha256(text.encode(errors="backslashreplace")).hexdigest()[:6]


def _values(given: Sequence[str]) -> dict[str, list[str]]:
    """The texts of the values of each key."""
    values: dict[str, list[str]] = {}
    for text in given:
        key, sign, several = text.partition("=")
        if not sign or not key:
            settings.parse_override(text)  # raises
        if key in BY_OPTION:
            raise UserError(f"{shown(text)}: {BY_OPTION[key]}")
        if key in values:
            raise UserError(f"{shown(text)}: {key} is given twice; write its values in one, {key}=A,B")
        if sign and "," in several and not all(part.strip() for part in several.split(",")):
            raise UserError(f"{shown(text)}: a value is empty; write {key}=A,B")
        # Rows that differ in how fast they run are none, and these values may have commas: track=csv,wandb.
        values[key] = [several] if key in RUNTIME_KEYS else settings.split_values(several)
    return values


def _checked(entries: Sequence[Entry], data: str | None) -> Recipe:
    """The recipe of the first row. Raises UserError where one cannot be trained, or two would train the same."""
    refused: list[tuple[str, UserError]] = []
    loaded: list[tuple[Entry, Recipe]] = []
    for entry in entries:
        try:
            loaded.append((entry, load(entry.recipe, entry.overrides, data=data)))
        except UserError as error:
            refused.append((entry.label, error))
    if refused:
        label, fault = refused[0]
        named, _, reason = str(fault).partition(": ")
        if not loaded or named == label:  # it is of no combination
            raise fault
        reason = reason if named in label.split() else str(fault)  # which the label names already
        raise UserError(
            f"{label}: {reason}; every combination is trained, so values that do not go together need a sweep each"
        )
    first: dict[str, Entry] = {}
    for entry, recipe in loaded:
        twin = first.setdefault(repr(recipe.identity()), entry)
        if twin is not entry:
            one, other = (  # as they were written
                " ".join(text for text in e.overrides if any(text not in row.overrides for row in entries))
                or e.label  # a value that is given twice
                for e in (twin, entry)
            )
            raise UserError(f"{one} and {other} are the same experiment; leave one of them out")
    return loaded[0][1]
