"""Arguments and options that several commands have."""

from typing import Annotated

import typer

LOADING = "loading PyTorch"  # which takes seconds

RecipeName = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE",
        help="Name of a recipe (see `fastil recipes`), path of a YAML file, or a run directory: the same settings.",
    ),
]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings that replace the recipe's.")]
Data = Annotated[str | None, typer.Option(help="Path of the data set.", show_default=False)]
Val = Annotated[
    str | None, typer.Option(help="Path of the test images of a folder, if not DATA/val.", show_default=False)
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object per line instead of text.")]
Jobs = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Runs at once; if several, with one thread each, and spread over the GPUs.",
        show_default="one per core; on each GPU one, or two of a small network",
    ),
]
Precision = Annotated[
    str,
    typer.Option(help="auto (that of the runs in --out, or else what is fast on this machine), fp32, tf32 or bf16."),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the runs and their cost; train nothing.")]


def seeds_option(default: str | bool) -> typer.models.OptionInfo:
    """--seeds. default: what it is where it is not given, in words."""
    info: typer.models.OptionInfo = typer.Option(
        metavar="N|A,B,...",
        help="Number of seeds (3: 0, 1 and 2), or the seeds with commas (0,2; one alone: 2,).",
        show_default=default,
    )
    return info
