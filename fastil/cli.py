"""The commands: parse, call, print."""

import io
import os
import re
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from fastil import cli_data, cli_tables
from fastil.cli_options import LOADING, AsJson, Data, Jobs, Overrides, RecipeName, Val, seeds_option
from fastil.errors import UserError
from fastil.text import one_line, passing, say

# Seconds that a process among others waits with what another one may be about to say: torchrun ends all on a machine as
# soon as one has ended with an error.
OTHERS_FIRST = 10

app = typer.Typer(
    name="fastil",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def say_version(asked: bool) -> None:
    if asked:
        import fastil

        say(f"fastil {fastil.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=say_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Class-incremental learning with the Balanced Softmax: train, compare, report."""


# Everything below is imported inside its command: torch takes seconds to load, and `fastil --help` should not.


def run(
    recipe: RecipeName,
    overrides: Overrides = None,
    data: Data = None,
    val: Val = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Run directory; with --seeds, the folder of the run directories.",
            show_default="runs/RECIPE-sSEED; with --seeds, runs",
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on exactly where the run in this directory stopped.")
    ] = False,
    base: Annotated[
        Path | None,
        typer.Option(help="Take the base step from this run, where it would be the same.", show_default=False),
    ] = None,
    seeds: Annotated[str | None, seeds_option("the recipe's own seed")] = None,
    jobs: Jobs = None,
) -> None:
    """Train one recipe. With --seeds several runs of it that differ in nothing else."""
    if seeds is not None:
        if base is not None:
            raise UserError("--base and --seeds: a base step is of one seed; leave one of them out")
        cli_tables.run_seeds(recipe, overrides or [], seeds, out, data, val, jobs)
        return
    if jobs is not None:
        raise UserError(f"--jobs {jobs}: one run is trained; several are given by --seeds, such as --seeds 3")
    rank = int(os.environ.get("RANK", "0"))
    if rank == 0:
        passing(LOADING)
    from fastil.reporting.fidelity import remark_of
    from fastil.training.start import Interrupted, train

    if rank == 0:
        passing("reading the recipe and the images")
    try:
        done = train(recipe, overrides or [], out, resume, base, data=data, val=val)
    except Interrupted as stop:
        if rank == 0:
            say(str(stop), sys.stderr)
        # To torchrun anything but 0 is a failure, after which it starts the processes again.
        raise typer.Exit(0 if "TORCHELASTIC_RUN_ID" in os.environ else 128 + stop.number) from None
    if rank:
        return
    average, final = done.results.average_incremental_accuracy, done.results.final_top1
    say(f"average incremental accuracy {average:.2f}, final top-1 {final:.2f}")
    remark = remark_of(done.recipe)
    if remark is not None:
        say(remark)
    say(f"results, figures and checkpoints: {done.path}")


def plan(recipe: RecipeName, overrides: Overrides = None, data: Data = None, val: Val = None) -> None:
    """Print what a recipe would do, without training."""
    passing(LOADING)
    from fastil.recipe_file import load
    from fastil.training.estimate import plan_text

    loaded = load(recipe, overrides or [], data=data, val=val)
    passing("reading the images and timing a few steps")
    say(plan_text(loaded))


def recipes(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME",
            help="A recipe, a YAML file or a run directory: print all its keys instead, as a YAML file.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """List the recipes, or print all keys of one."""
    passing(LOADING)
    from fastil.reporting.recipe_list import all_keys, catalogue

    say(catalogue() if name is None else all_keys(name))


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN_DIR", help="Run directories.")],
    out: Annotated[Path | None, typer.Option(help="Folder for report.md and the figures.", show_default=False)] = None,
    html: Annotated[bool, typer.Option("--html", help="Also one self-contained page, report.html, in --out.")] = False,
) -> None:
    """Put runs side by side, and next to published numbers. Those stand where a recipe has them. Exit status 1 if a run
    cannot be read and is left out."""
    from fastil.reporting.report import write_report

    text, whole = write_report(runs, out, html)
    say(text)
    raise typer.Exit(0 if whole else 1)


RunDir = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Run directory.")]
Step = Annotated[int, typer.Option(help="By the network after this step.", show_default="the last one")]
OwnMethod = Annotated[
    str | None, typer.Option(help="module:Class, where the run's method is your own.", show_default=False)
]
OwnModel = Annotated[
    str | None, typer.Option(help="module:factory, where the run's network is your own.", show_default=False)
]


def predict(
    run: RunDir,
    images: Annotated[
        list[Path], typer.Argument(metavar="IMAGE|FOLDER", help="Image files, and folders of any depth.")
    ],
    step: Step = -1,
    method: OwnMethod = None,
    model: OwnModel = None,
    as_json: AsJson = False,
) -> None:
    """Name the likeliest classes of images, by a run's network. Five of each; exit status 1 if one cannot be read."""
    from fastil.reporting.prediction import write_predictions
    from fastil.reporting.runs import Run

    network = Run(run, method=method, model=model).network(step)
    raise typer.Exit(0 if write_predictions(network, images, as_json) else 1)


def export_model(
    run: RunDir,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Ends in .pt2 (torch.export), .onnx or .safetensors.")],
    step: Step = -1,
    method: OwnMethod = None,
    model: OwnModel = None,
) -> None:
    """Write a run's network for programs without fastil. A model card goes next to it."""
    from fastil.reporting import export_model as exporting
    from fastil.reporting.runs import Run

    exporting.export_model(Run(run, method=method, model=model), file, step)
    say(f"{file}, and next to it {exporting.CONFIG} and {exporting.CARD}")


def doctor() -> None:
    """Say what is installed and missing, and how to install it."""
    from fastil.doctor import diagnose

    say(diagnose())


# In the order of `fastil --help`.
for command in (
    run, plan, recipes, cli_tables.sweep, cli_tables.reproduce, report, predict, export_model, cli_data.download,
    cli_data.convert, cli_data.verify, cli_data.info, cli_data.export, doctor,
):  # fmt: skip
    app.command()(command)


def main() -> None:
    """Entry point: a user's mistake is one line and exit status 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # the ± of a table must not end a run in an ASCII locale
    # Typer carries its own copy of click or uses the installed one; this is the base of its usage errors either way.
    usage_error: type[Exception] = typer.BadParameter.__mro__[1]
    try:
        sys.exit(app(sys.argv[1:] or ["--help"], standalone_mode=False))
    except UserError as error:
        message = str(error)
    except usage_error as error:
        takes_settings = sys.argv[1:2] in (["run"], ["plan"], ["sweep"])
        settings = " Settings are written KEY=VALUE, such as epochs=2." if takes_settings else ""
        found = error.format_message().removesuffix(".")  # type: ignore[attr-defined]
        option = re.match(r"No such option: (--[\w-]+)", found)
        if takes_settings and option:
            from fastil import advice
            from fastil.recipe_file import load

            said = advice.on_option(option[1], load("digits").keys())
            found, settings = f"No such option: {option[1]}", f" Settings are written KEY=VALUE: {said}."
        message = f"{found}.{settings} See fastil --help."
    except RuntimeError as error:
        if any(name in str(error) for name in ("gloo", "NCCL")):  # another process has ended, and will say why
            time.sleep(2 * OTHERS_FIRST)
        raise
    finally:
        passing("")  # Ctrl-C while PyTorch loads
    rank = os.environ.get("RANK", "0")
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(OTHERS_FIRST)  # the first process on the machine says what all of them find
    say(f"fastil{'' if rank == '0' else f' (rank {rank})'}: {one_line(message)}", sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
