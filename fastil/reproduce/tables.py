"""Tables of runs as work lists, those of the paper among them, and the finished runs of their rows."""

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from fastil.device import Precision
from fastil.errors import UserError
from fastil.recipe import Recipe
from fastil.recipe_file import load, names, read_effective
from fastil.reporting.fidelity import MODIFIED, on_published_data
from fastil.reporting.runs import Run, one_precision
from fastil.settings import shown

RUN = re.compile(r".*-s([0-9]{1,10})")  # a run as a dry run prints it


@dataclass(frozen=True)
class Entry:
    """A line of a table. steps: 0 where they are not told. published: "average", "base" (final top-1 on the base
    classes) and "final", percent. scaled: the overrides that are the scale's and not the row's. place: the folder of
    its runs inside `out`; those of rows that may share base steps lie in one folder."""

    row: str
    recipe: str
    overrides: tuple[str, ...]
    steps: int  # incremental ones
    label: str
    against: str | None  # the row that the paired difference is taken from
    published: dict[str, float]
    scaled: tuple[str, ...] = ()
    quoted: bool = False  # the published numbers are of another protocol
    reference: bool = False  # a line that is not in the paper; trained only where it is named
    place: str = ""

    def folder(self, out: Path, seed: int) -> Path:
        return out / self.place / f"{self.row}-s{seed}"

    def folders(self, out: Path) -> dict[int, Path]:
        """The folders in `out` that are called as its runs are, by seed."""
        of_seed = re.compile(f"{re.escape(self.row)}-s([0-9]{{1,10}})")
        named = {path: of_seed.fullmatch(path.name) for path in (out / self.place).glob("*-s*") if path.is_dir()}
        return {int(seed[1]): path for path, seed in sorted(named.items()) if seed}

    def load(self, seed: int, data: str | None = None) -> Recipe:
        return load(self.recipe, [*self.overrides, f"seed={seed}"], data=data)


@dataclass(frozen=True)
class Table:
    name: str
    title: str
    stem: str  # of its files
    scale: str | None  # None: of no paper, so that the command takes settings
    seeds: Sequence[int]  # unless asked for otherwise
    over: str | None  # the key that the figure draws curves over; None: bars
    on_paper_data: bool  # whether this scale is meant to be trained on the images of the paper
    theirs: str | None  # what the published numbers are of, where that is not what this scale trains
    note: str | None  # what this scale trains and how the published numbers are to be read there
    entries: list[Entry]


Found = dict[tuple[str, int], dict[int, Run]]  # finished runs by seed, by row and number of steps


def read_tables() -> dict[str, Any]:
    """recipes/tables.yaml."""
    text = resources.files("fastil.recipes").joinpath("tables.yaml").read_text("utf-8")
    content: dict[str, Any] = yaml.safe_load(text)
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

    def of_scale(row: str) -> dict[str, Any]:
        """The overrides of the scale."""
        found: dict[str, Any] = settings.get("overrides", {}) | settings.get("row_overrides", {}).get(row, {})
        return found

    def trained(row: str, steps: int) -> tuple[str, tuple[str, ...]]:
        """Recipe and overrides."""
        own = row in methods and "own_recipes" in settings
        name = settings["own_recipes"].format(row=row, steps=steps) if own else settings["recipes"][steps]
        keys = {} if own else (rows | methods)[row]
        return name, tuple(f"{key}={value}" for key, value in (keys | of_scale(row)).items())

    entries = [
        Entry(
            row=line["row"],
            recipe=trained(line["row"], line["steps"])[0],
            overrides=trained(line["row"], line["steps"])[1],
            steps=line["steps"],
            label=line["label"],
            against=line.get("against"),
            published={key: line[key] for key in ("average", "base", "final") if key in line},
            scaled=tuple(f"{key}={value}" for key, value in of_scale(line["row"]).items()),
            quoted=line.get("quoted", False),
            place=f"{settings.get('folder', '.')}/{trained(line['row'], line['steps'])[0]}",
        )
        for line in content["tables"][name]["entries"]
        if lines_of in line.get("scales", [lines_of])
    ]
    head = content["tables"][name]
    for steps in sorted({entry.steps for entry in entries}):
        for row, label in content.get("references", {}).items():
            recipe, overrides = trained(row, steps)
            scaled = tuple(f"{key}={value}" for key, value in of_scale(row).items())
            place = f"{settings.get('folder', '.')}/{recipe}"
            entries.append(Entry(row, recipe, overrides, steps, label, None, {}, scaled, reference=True, place=place))
    return Table(
        name=name,
        title=head["title"],
        stem=f"{name}-{scale}",
        scale=scale,
        seeds=range(settings["seeds"]),
        over=head.get("over"),
        on_paper_data=lines_of == "paper",
        theirs=settings.get("theirs"),
        note=settings.get("note"),
        entries=entries,
    )


def only(table: Table, wanted: Sequence[str], steps: int | None = None) -> list[Entry]:
    """The entries that `wanted` names, with so many incremental steps; all but the reference lines where neither is
    given. A text of `wanted` holds one name (see `_named`) or several with commas."""
    entries = [entry for entry in table.entries if steps in (None, entry.steps)]
    if not entries:
        there = " or ".join(str(number) for number in sorted({entry.steps for entry in table.entries}))
        raise UserError(f"--steps {steps}: no rows with so many at --scale {table.scale}; use {there}")
    chosen: list[Entry] = []
    for text in wanted:
        parts = text.split(",")
        while parts:
            # The longest one first, for labels have commas: "softmax, R = 5".
            names = [(count, ",".join(parts[:count]).strip()) for count in range(len(parts), 0, -1)]
            count, found = next(((n, f) for n, name in names if (f := _named(entries, name))), (0, []))
            if not found:
                raise UserError(_unknown(table, entries, parts[0].strip()))
            chosen += found
            parts = parts[count:]
    return [entry for entry in entries if entry in chosen or not (wanted or entry.reference)]


def seed_of(wanted: Sequence[str]) -> int | None:
    """The seed of the runs that `wanted` names as a dry run prints them; None where it names rows."""
    seeds = {int(found[1]) for text in wanted for part in text.split(",") if (found := RUN.fullmatch(part.strip()))}
    if len(seeds) > 1:
        raise UserError("--only names runs of several seeds; name rows, and the seeds by --seeds, such as --seeds 0,1")
    return next(iter(seeds), None)


def _named(entries: Sequence[Entry], name: str) -> list[Entry]:
    """The entries of this row, label, run ("alpha_0.5-s0", with or without the folder that is printed before it) or
    recipe, or else of the rows that begin so."""
    run = RUN.fullmatch(name)
    row = (run[0].rpartition("-s")[0] if run else name).casefold()
    found = [e for e in entries if row in (e.row.casefold(), f"{e.recipe}/{e.row}".casefold(), e.label.casefold())]
    if not found and name in names():
        found = [e for e in entries if _trains(e, name)] or [e for e in entries if e.recipe == name]
    return found or [e for e in entries if row and e.row.casefold().startswith(row)]


def _trains(entry: Entry, name: str) -> bool:
    """Whether a row is this recipe, at the scale's own schedule."""
    try:
        return load(name, entry.scaled).identity(seed=False) == entry.load(0).identity(seed=False)
    except UserError:  # a setting of the scale that the recipe does not read
        return False


def _unknown(table: Table, entries: Sequence[Entry], name: str) -> str:
    rows = list(dict.fromkeys(f"{entry.row} ({entry.label})" for entry in entries))
    known = {text.casefold(): text for entry in entries for text in (entry.recipe, entry.label, entry.row)}
    near = difflib.get_close_matches(name.casefold(), known, n=1)
    hint = f"did you mean {known[near[0]]}? Its" if near else "its"
    return f"--only {shown(name)}: no such row in {table.name}; {hint} rows are {', '.join(rows)}"


def finished_run(folder: Path, wanted: Recipe) -> Run | None:
    """The run of this directory, if it went through all of its steps with the settings of `wanted`."""
    if not (folder / "results.json").exists():
        return None
    run = Run(folder)
    if wanted.train.precision == "auto":  # it took what its machine had
        wanted = wanted.in_precision(run.recipe.precision)
    return run if len(run.curve) == run.total_steps and run.recipe.identity() == wanted.identity() else None


def precision_of(entries: Sequence[Entry], out: Path) -> Precision | None:
    """The precision of the runs of these entries that are in `out`, finished or not; None where there is none. Raises
    UserError where they have several, for what a table compares must differ in its rows alone. Runs of other settings
    do not count, as they do not in the table."""
    found: list[tuple[Path, Precision]] = []
    for entry in entries:
        for folder in entry.folders(out).values():
            if not (folder / "recipe.yaml").exists():
                continue
            loaded = read_effective(folder / "recipe.yaml")
            precision = loaded.precision
            if loaded.identity(seed=False) == entry.load(0).in_precision(precision).identity(seed=False):
                found.append((folder, precision))
    return one_precision(found, "move one set of runs to another --out")


def finished_runs(table: Table, out: Path) -> Found:
    """The finished runs of every entry, by seed."""
    found: Found = {}
    for entry in table.entries:
        runs = {seed: finished_run(path, entry.load(seed)) for seed, path in entry.folders(out).items()}
        found[entry.row, entry.steps] = {seed: run for seed, run in sorted(runs.items()) if run is not None}
    everything = [run for of_row in found.values() for run in of_row.values()]
    for run in everything:
        if run.image_hashes != everything[0].image_hashes:
            raise UserError(
                f"{run.path} and {everything[0].path} were trained on different images, which one table cannot hold; "
                f"move one set of runs to another --out"
            )
    return found


def on_paper_data(run: Run) -> bool:
    """Whether the images of a run are those of the paper's tables."""
    return on_published_data("cifar100", run.protocol)


def published_of(table: Table, found: Found) -> str:
    """What the published numbers of a table are of, in brackets, where that is not what its runs trained; or ""."""
    on_theirs = all(on_paper_data(run) for of_row in found.values() for run in of_row.values())
    other_data = None if on_theirs or not table.on_paper_data else "CIFAR-100"
    theirs = ", ".join(filter(None, (other_data, table.theirs)))
    return f" ({theirs})" if theirs else ""


def modified(table: Table, entry: Entry, runs: Iterable[Run]) -> str:
    """What sets the runs of a row apart from those that its published number is of; "unchanged" where nothing does."""
    if entry.reference:
        return "not in the paper"
    changes = [*entry.scaled, *([] if table.on_paper_data else ["another protocol and schedule"])]
    if not all(on_paper_data(run) for run in runs):
        changes.append("other data")
    return MODIFIED + ", ".join(changes) if changes else "unchanged"
