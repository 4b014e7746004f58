"""The commands on data sets: fetch, convert, check, look into."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from fastil.cli_options import AsJson
from fastil.text import plain, say

# All else is imported inside its command, see fastil.cli.


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


Workers = Annotated[int | None, typer.Option(help="Processes that decode.", show_default="one per core")]
BetonFile = Annotated[Path, typer.Argument(metavar="FILE.beton", help="A data set file, by fastil or by FFCV.")]


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
    """Write a data set as .beton files with manifests. After a stop the same command goes on."""
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


def verify(
    paths: Annotated[list[Path], typer.Argument(metavar="FILE.beton", help="Data set files, by fastil or by FFCV.")],
    sample: Annotated[
        int | None, typer.Option(help="Look into so many images only; no checksum of the file.", show_default="all")
    ] = None,
    workers: Workers = None,
    as_json: AsJson = False,
) -> None:
    """Check structure, checksums and images of data set files. Exit status 1 if anything is wrong."""
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


def info(path: BetonFile, as_json: AsJson = False) -> None:
    """Say what is in a data set file."""
    import json

    from fastil.tools.export import as_text
    from fastil.tools.export import info as info_of

    found = info_of(path)
    say(json.dumps(found) if as_json else as_text(found))


def export(
    path: BetonFile,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where the images go, a folder per class.")],
    of_class: Annotated[list[str] | None, typer.Option("--class", help="Only this class (repeatable).")] = None,
    ids: Annotated[list[int] | None, typer.Option("--id", help="Only this sample (repeatable).")] = None,
) -> None:
    """Write images of a data set file back out. JPEGs byte for byte, pixels as PNG."""
    from fastil.tools.export import export as export_images

    say(f"{export_images(path, folder, of_class or [], ids or [])} images in {folder}")
