"""The commands that train several runs and compare them in a table."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastil.cli_options import LOADING, Data, DryRun, Jobs, Precision, RecipeName, seeds_option
from fastil.errors import UserError
from fastil.text import passing, say

if TYPE_CHECKING:
    from fastil.reproduce.tables import Entry, Table

# All else is imported inside its command, see fastil.cli.


def sweep(
    recipe: RecipeName,
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=A,B,...",
            help="Keys with their values: every combination is a row. A key with one value has it in all rows.",
        ),
    ] = None,
    seeds: Annotated[str | None, seeds_option("the recipe's own seed")] = None,
    jobs: Jobs = None,
    precision: Precision = "auto",
    data: Data = None,
    out: Annotated[
        Path | None, typer.Option(help="Where runs and table go.", show_default="runs/sweep-RECIPE-KEYS")
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Train a recipe with every combination of some values. The runs are compared in a table; after a stop the same
    command goes on."""
    alone("fastil sweep")
    from fastil.reproduce import sweep as sweeping
    from fastil.reproduce.scheduler import seeds_of

    table = sweeping.table_of(recipe, settings or [], data)
    numbers = table.seeds if seeds is None else seeds_of(seeds)
    out = sweeping.default_out(table, settings or []) if out is None else out
    train(table, table.entries, numbers, out, data, jobs, precision, dry_run)


def reproduce(
    table: Annotated[str, typer.Argument(metavar="TABLE", help="table1, table2, table3 or table4.")],
    scale: Annotated[
        str,
        typer.Option(
            help="cpu: a small protocol for two cores; short: CIFAR-100 with 30 epochs a step; paper: CIFAR-100."
        ),
    ] = "cpu",
    seeds: Annotated[str | None, seeds_option("2 for cpu, 1 for short, 3 for paper")] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ROW,...",
            help="Rows to train, by label, recipe, or a run as --dry-run prints it; the beginning of a row will do.",
            show_default="all",
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Only rows with so many incremental steps, 5 or 10.", show_default="all")
    ] = None,
    jobs: Jobs = None,
    precision: Precision = "auto",
    data: Data = None,
    out: Annotated[Path, typer.Option(help="Where runs and tables go.")] = Path("runs/tables"),
    dry_run: DryRun = False,
) -> None:
    """Train the runs that a table of the paper needs. Then write the table; after a stop the same command goes on."""
    alone("fastil reproduce")
    from fastil.reproduce import tables
    from fastil.reproduce.scheduler import seeds_of

    chosen = tables.table_of(tables.read_tables(), table, scale)
    entries = tables.only(chosen, only or [], steps)
    numbers = chosen.seeds if seeds is None else seeds_of(seeds)
    named = tables.seed_of(only or [])
    if named is not None:
        if seeds is not None and numbers != [named]:
            raise UserError(f"--seeds {seeds}: --only names a run of seed {named}; leave one of them out")
        numbers = [named]
    train(chosen, entries, numbers, out, data, jobs, precision, dry_run)


def train(
    table: "Table", entries: Sequence["Entry"], seeds: Sequence[int], out: Path, data: str | None, jobs: int | None,
    precision: str, dry_run: bool,
) -> None:  # fmt: skip
    """Train these entries of a table and write it, or say what that costs."""
    from fastil.reproduce.preview import preview
    from fastil.reproduce.scheduler import reproduce
    from fastil.reproduce.worklist import WorkList

    if dry_run:
        passing("reading the images and timing a few steps")
        work = WorkList(entries, seeds, out, data, preview=True, table=table, wanted=precision)
        say(preview(work, jobs))
        return
    text, status = reproduce(table, entries, seeds, out, data, jobs, precision)
    say(text)
    raise typer.Exit(status)


def run_seeds(
    recipe: str, overrides: list[str], seeds: str, out: Path | None, data: str | None, val: str | None, jobs: int | None
) -> None:
    """Train a recipe with several seeds: `fastil run --seeds`."""
    alone("fastil run --seeds")
    from fastil.reproduce import sweep as sweeping
    from fastil.reproduce.scheduler import seeds_of

    given = overrides if val is None else [*overrides, f"val={json.dumps(val, ensure_ascii=False)}"]
    text, status = sweeping.run_seeds(recipe, given, seeds_of(seeds), out or Path("runs"), data, jobs)
    say(text)
    raise typer.Exit(status)


def alone(command: str) -> None:
    """Raise UserError where torchrun has started this process. What comes next is PyTorch's import."""
    passing(LOADING)
    from fastil import ranks

    if ranks.launched():
        raise UserError(f"{command} starts a process for each run itself; call it without torchrun")
