"""Train one run: what `fastil run` and `fastil.run` do."""

import os
from pathlib import Path
from typing import Any

from fastil.methods import register
from fastil.models import add_factory
from fastil.recipe import Recipe, load
from fastil.reporting.runs import Run
from fastil.training.experiment import Experiment
from fastil.training.trainer import Stopped

PathLike = str | os.PathLike[str]


def run(
    recipe: PathLike,
    data: PathLike | None = None,
    out: PathLike | None = None,
    resume: bool = False,
    *,
    base: PathLike | None = None,
    **settings: Any,
) -> Run:
    """Train one recipe and return the run: what `fastil run` does, from Python.

    recipe: a name (`fastil recipes` lists them) or the path of a YAML file. data: the data set. out: the run directory,
    by default runs/RECIPE-sSEED. base: a run to take the base step from. settings: keys of the recipe, such as
    `epochs=30`; `method` may be a subclass of `fastil.Method` and `model` a function that returns a backbone.

    Raises fastil.errors.UserError for a mistake, in one line; KeyboardInterrupt after SIGINT or SIGTERM, with a
    checkpoint written, from which `resume=True` goes on.
    """
    if isinstance(settings.get("method"), type):
        settings["method"] = register(settings["method"]).name
    if not isinstance(settings.get("model", ""), str):
        settings["model"] = add_factory(settings["model"])
    loaded = load(os.fspath(recipe), settings, data=None if data is None else os.fspath(data))
    experiment = Experiment(loaded, out_of(loaded, out), resume, None if base is None else Path(base))
    try:
        experiment.run()
    except Stopped:
        raise KeyboardInterrupt(f"stopped; resume=True goes on ({experiment.directory.path})") from None
    finally:
        experiment.close()
    return Run(experiment.directory.path)


def out_of(recipe: Recipe, out: PathLike | None) -> Path:
    """Where a run goes."""
    return Path("runs") / f"{recipe.name}-s{recipe.train.seed}" if out is None else Path(out)
