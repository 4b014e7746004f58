"""The commands: parse, call, print."""

import io
import os
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from fastil.errors import UserError
from fastil.text import one_line, plain, say

# Seconds that a process among others waits with what another one may be about to say: torchrun ends all on a machine as
# soon as one has ended with an error.
OTHERS_FIRST = 10

app = typer.Typer(
    name="fastil",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

RecipeName = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE",
        help="Name of a recipe (see `fastil recipes`), path of a YAML file, or a run directory: the same settings.",
    ),
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings that replace the recipe's.")
]
Data = Annotated[str | None, typer.Option(help="Path of the data set.", show_default=False)]
Val = Annotated[
    str | None, typer.Option(help="Path of the test images of a folder, if not DATA/val.", show_default=False)
]


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


@app.command()
def run(
    recipe: RecipeName,
    overrides: Overrides = None,
    data: Data = None,
    val: Val = None,
    out: Annotated[Path | None, typer.Option(help="Run directory.", show_default="runs/RECIPE-sSEED")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on exactly where the run in this directory stopped.")
    ] = False,
    base: Annotated[
        Path | None,
        typer.Option(help="Take the base step from this run, where it would be the same.", show_default=False),
    ] = None,
) -> None:
    """Train one recipe."""
    from fastil.reporting.fidelity import remark_of
    from fastil.training.start import Interrupted, train

    rank = int(os.environ.get("RANK", "0"))
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


@app.command()
def plan(recipe: RecipeName, overrides: Overrides = None, data: Data = None, val: Val = None) -> None:
    """Print what a recipe would do, without training."""
    from fastil.recipe_file import load
    from fastil.training.estimate import plan_text

    loaded = load(recipe, overrides or [], data=data, val=val)
    if sys.stderr.isatty():
        say("reading the images and timing a few steps", sys.stderr)
    say(plan_text(loaded))


@app.command()
def recipes() -> None:
    """List the recipes with the published accuracy and how faithful they are."""
    from fastil.reporting.recipe_list import catalogue

    say(catalogue())


@app.command()
def download(
    name: Annotated[str, typer.Argument(metavar="NAME", help="cifar10 or cifar100.")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where to put it.")],
    url: Annotated[str | None, typer.Option(help="A mirror of the archive.", show_default=False)] = None,
) -> None:
    """Fetch a public data set, with progress, resume and checksum."""
    from fastil.data.formats.download import download as fetch
    from fastil.data.formats.download import kept

    try:
        say(f"ready: {fetch(name, folder, url)}; train with --data {folder}")
    except KeyboardInterrupt:
        say(f"stopped; {kept(name, folder)}the same command goes on", sys.stderr)
        raise typer.Exit(130) from None


AsJson = Annotated[bool, typer.Option("--json", help="One JSON object per line instead of text.")]
Workers = Annotated[int | None, typer.Option(help="Processes that decode.", show_default="one per core")]
BetonFile = Annotated[Path, typer.Argument(metavar="FILE.beton", help="A data set file, by fastil or by FFCV.")]


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="Folder, archive or file of a data set.")],
    out: Annotated[Path, typer.Argument(metavar="OUT.beton", help="Training images; the others go to OUT.val.beton.")],
    kind: Annotated[
        str | None,
        typer.Option(
            help="What SOURCE is, if it is not found out; md5 sums are not compared then.", show_default=False
        ),
    ] = None,
    val: Annotated[
        str | None,
        typer.Option(
            help="Validation images elsewhere, in the same kind of layout, or `same`: a smoke test.", show_default=False
        ),
    ] = None,
    classes: Annotated[
        str | None,
        typer.Option(
            help="The first N, names with commas, a file of names, lucir or first100; in SOURCE's order.",
            show_default=False,
        ),
    ] = None,
    per_class: Annotated[int | None, typer.Option(help="Training images of each class.", show_default="all")] = None,
    mode: Annotated[
        str,
        typer.Option(
            help="jpeg: keep the bytes of JPEGs, encode the others; reencode: all; raw: pixels.",
            show_default="jpeg, or raw for a source of pixels (CIFAR, idx) or of small lossless images",
        ),
    ] = "auto",
    max_side: Annotated[int | None, typer.Option(help="Longest side in pixels.", show_default="as it is")] = None,
    squash: Annotated[
        int | None, typer.Option(help="Width and height of all images, whatever their shape.", show_default="as it is")
    ] = None,
    quality: Annotated[int, typer.Option(help="Of JPEGs that are encoded.")] = 95,
    image_column: Annotated[str | None, typer.Option(help="Of parquet files.", show_default="image or img")] = None,
    label_column: Annotated[
        str | None,
        typer.Option(help="Of parquet files: numbers or names.", show_default="label, fine_label or labels"),
    ] = None,
    exif: Annotated[
        str, typer.Option(help="upright: images are turned as their camera's tag says; ignore: they are not.")
    ] = "upright",
    max_pixels: Annotated[
        int, typer.Option(help="An image with more is refused, for a small file can claim to be huge.")
    ] = 100_000_000,
    on_corrupt: Annotated[str, typer.Option(help="fail or skip: what an image that cannot be read means.")] = "fail",
    check: Annotated[bool, typer.Option("--check/--no-check", help="Decode the JPEGs whose bytes are kept.")] = True,
    workers: Workers = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what is there and what it costs; write nothing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write a data set as .beton files with manifests; after a stop the same command goes on."""
    try:
        from fastil.tools.convert import convert as convert_source
        from fastil.tools.convert import options_of
        from fastil.tools.reporting import Reporter

        options = options_of(
            kind=kind, val=val, classes=classes, per_class=per_class, mode=mode, max_side=max_side, squash=squash,
            quality=quality, on_corrupt=on_corrupt, check=check, workers=workers, image_column=image_column,
            label_column=label_column, exif=exif, max_pixels=max_pixels,
        )  # fmt: skip
        convert_source(source, out, options, Reporter(as_json), dry_run)
    except KeyboardInterrupt:
        say("stopped; the same command goes on", sys.stderr)
        raise typer.Exit(130) from None


@app.command()
def verify(
    paths: Annotated[
        list[Path], typer.Argument(metavar="FILE.beton ...", help="Data set files, by fastil or by FFCV.")
    ],
    sample: Annotated[
        int | None, typer.Option(help="Look into so many images only; no checksum of the file.", show_default="all")
    ] = None,
    workers: Workers = None,
    as_json: AsJson = False,
) -> None:
    """Check structure, checksums, images and counts of data set files; exit status 1 if anything is wrong."""
    from fastil import machine
    from fastil.tools.reporting import Reporter
    from fastil.tools.verify import verify as verify_file

    reporter, good = Reporter(as_json), True
    for path in paths:
        problems = verify_file(path, sample, machine.cores() if workers is None else workers, reporter)
        for problem in problems:
            named = problem if plain(str(path)) in problem else f"{path}: {problem}"
            reporter.say(named, "problem", problem=problem)
        state = "FAILED" if problems else "good"
        scope = "" if sample is None else f", as far as a sample of {sample} tells"
        reporter.say(f"{path}: {state}{scope}", "verified", file=str(path), good=not problems)
        good = good and not problems
    raise typer.Exit(0 if good else 1)


@app.command()
def info(path: BetonFile, as_json: AsJson = False) -> None:
    """Say what is in a data set file."""
    import json

    from fastil.tools.export import as_text
    from fastil.tools.export import info as info_of

    found = info_of(path)
    say(json.dumps(found) if as_json else as_text(found))


@app.command()
def export(
    path: BetonFile,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where the images go, a folder per class.")],
    of_class: Annotated[list[str] | None, typer.Option("--class", help="Only this class (repeatable).")] = None,
    ids: Annotated[list[int] | None, typer.Option("--id", help="Only this sample (repeatable).")] = None,
) -> None:
    """Write images of a data set file back out: JPEGs byte for byte, pixels as PNG."""
    from fastil.tools.export import export as export_images

    say(f"{export_images(path, folder, of_class or [], ids or [])} images in {folder}")


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN_DIR...", help="Run directories.")],
    out: Annotated[Path | None, typer.Option(help="Folder for report.md and the figures.", show_default=False)] = None,
    html: Annotated[bool, typer.Option("--html", help="Also one self-contained page, report.html, in --out.")] = False,
) -> None:
    """Put runs side by side, with the published numbers where a recipe has them; exit status 1 if a run cannot be read
    and is left out."""
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


@app.command()
def predict(
    run: RunDir,
    images: Annotated[
        list[Path], typer.Argument(metavar="IMAGE|FOLDER...", help="Image files, and folders of any depth.")
    ],
    step: Step = -1,
    method: OwnMethod = None,
    model: OwnModel = None,
    as_json: AsJson = False,
) -> None:
    """Name the five likeliest classes of images, by the network of a run; exit status 1 if one cannot be read."""
    from fastil.reporting.prediction import write_predictions
    from fastil.reporting.runs import Run

    network = Run(run, method=method, model=model).network(step)
    raise typer.Exit(0 if write_predictions(network, images, as_json) else 1)


@app.command()
def export_model(
    run: RunDir,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Ends in .pt2 (torch.export), .onnx or .safetensors.")],
    step: Step = -1,
    method: OwnMethod = None,
    model: OwnModel = None,
) -> None:
    """Write the network of a run for programs without fastil, with a model card next to it."""
    from fastil.reporting import export_model as exporting
    from fastil.reporting.runs import Run

    exporting.export_model(Run(run, method=method, model=model), file, step)
    say(f"{file}, and next to it {exporting.CONFIG} and {exporting.CARD}")


@app.command()
def reproduce(
    table: Annotated[str, typer.Argument(metavar="TABLE", help="table1, table2, table3 or table4.")],
    scale: Annotated[
        str,
        typer.Option(
            help="cpu: a small protocol for two cores; short: CIFAR-100 with 30 epochs a step; paper: CIFAR-100."
        ),
    ] = "cpu",
    seeds: Annotated[
        str | None,
        typer.Option(
            metavar="N|A,B,...",
            help="Runs per row (3: seeds 0, 1 and 2), or the seeds with commas (0,2; one alone: 2,).",
            show_default="2 for cpu, 1 for short, 3 for paper",
        ),
    ] = None,
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
    jobs: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Runs at once; if several, with one thread each, and spread over the GPUs.",
            show_default="one per core; on each GPU one, or two of a small network",
        ),
    ] = None,
    precision: Annotated[
        str,
        typer.Option(
            help="auto (that of the runs in --out, or else what is fast on this machine), fp32, tf32 or bf16."
        ),
    ] = "auto",
    data: Data = None,
    out: Annotated[Path, typer.Option(help="Where runs and tables go.")] = Path("runs/tables"),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the runs and their cost; train nothing.")] = False,
) -> None:
    """Train the runs that a table of the paper needs, and write it."""
    from fastil import ranks
    from fastil.reproduce import scheduler as reproduction
    from fastil.reproduce import tables
    from fastil.reproduce.preview import preview
    from fastil.reproduce.worklist import WorkList

    if ranks.launched():
        raise UserError("fastil reproduce starts a process for each run itself; call it without torchrun")
    chosen = tables.table_of(tables.read_tables(), table, scale)
    entries = tables.only(chosen, only or [], steps)
    numbers = reproduction.seeds_of(str(chosen.seeds) if seeds is None else seeds)
    named = tables.seed_of(only or [])
    if named is not None:
        if seeds is not None and numbers != [named]:
            raise UserError(f"--seeds {seeds}: --only names a run of seed {named}; leave one of them out")
        numbers = [named]
    if dry_run:
        if sys.stderr.isatty():
            say("reading the images and timing a few steps", sys.stderr)
        work = WorkList(entries, numbers, out, data, preview=True, table=chosen.entries, wanted=precision)
        say(preview(work, jobs))
        return
    text, status = reproduction.reproduce(chosen, entries, numbers, out, data, jobs, precision)
    say(text)
    raise typer.Exit(status)


@app.command()
def doctor() -> None:
    """Say what is installed, what is missing, and the command that installs it."""
    from fastil.doctor import diagnose

    say(diagnose())


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
        settings = " Settings are written KEY=VALUE, such as epochs=2." if sys.argv[1:2] in (["run"], ["plan"]) else ""
        found = error.format_message().removesuffix(".")  # type: ignore[attr-defined]
        message = f"{found}.{settings} See fastil --help."
    except RuntimeError as error:
        if any(name in str(error) for name in ("gloo", "NCCL")):  # another process has ended, and will say why
            time.sleep(2 * OTHERS_FIRST)
        raise
    rank = os.environ.get("RANK", "0")
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(OTHERS_FIRST)  # the first process on the machine says what all of them find
    say(f"fastil{'' if rank == '0' else f' (rank {rank})'}: {one_line(message)}", sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
