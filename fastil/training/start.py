"""Train one run: what `fastil run` and `fastil.run` do."""

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastil import ranks
from fastil.device import keep_freed_memory, pick_device
from fastil.errors import UserError
from fastil.recipe_file import load, run_named
from fastil.reporting.runs import PathLike, Run
from fastil.text import say
from fastil.training.experiment import Experiment
from fastil.training.trackers import Callback
from fastil.training.trainer import Stopped

IN_PYTHON = {"--resume": "resume=True", "--out": "out", "--data": "data", "--val": "val", "--base": "base"}


class Interrupted(KeyboardInterrupt):
    """SIGINT, SIGTERM or SIGHUP ended a run, with a checkpoint written, or came when it was finished. number: of the
    signal."""

    def __init__(self, number: int, path: Path, finished: bool) -> None:
        state = "finished" if finished else "stopped; the same command with --resume goes on"
        super().__init__(f"{state} ({path})")
        self.number = number


def run(
    recipe: PathLike,
    data: PathLike | None = None,
    out: PathLike | None = None,
    resume: bool = False,
    *,
    base: PathLike | None = None,
    callback: Callback | None = None,
    **settings: Any,
) -> Run:
    """Train one recipe and return the run: what `fastil run` does, from Python.

    recipe: a name (`fastil recipes` lists them), the path of a YAML file, or a run directory, whose settings are taken.
    data: the data set. out: the run directory, by default runs/RECIPE-sSEED. base: a run to take the base step from.
    callback: a function that is told of every epoch and step (docs/tracking.md).
    settings: keys of the recipe, such as `epochs=30`; `method` may be a subclass of `fastil.Method` and `model` a
    function that returns a backbone.

    Raises fastil.UserError for a mistake, in one line; KeyboardInterrupt after SIGINT or SIGTERM, with a checkpoint
    written, from which `resume=True` goes on.
    """
    settings = {key: os.fspath(v) if isinstance(v, os.PathLike) else v for key, v in settings.items()}
    try:
        data = None if data is None else os.fspath(data)
        return train(os.fspath(recipe), settings, out, resume, base, callback, data=data)
    except UserError as error:
        raise UserError(_in_python(str(error))) from None
    except Interrupted as error:
        error.args = (_in_python(str(error)),)
        raise


def train(
    name: str,
    settings: Iterable[str] | dict[str, Any] = (),
    out: PathLike | None = None,
    resume: bool = False,
    base: PathLike | None = None,
    callback: Callback | None = None,
    **paths: str | None,
) -> Run:
    """Train a recipe, or with `resume` go on with it where a run directory stands in its place. settings, paths: as
    `load` has them. Raises Interrupted after a signal, also where it came too late to stop anything."""
    recipe = load(name, settings, **paths)
    if out is None and resume:
        out = run_named(name)
    path = Path("runs") / f"{recipe.name}-s{recipe.train.seed}" if out is None else Path(out)
    keep_freed_memory()
    finished = False
    with ranks.together(pick_device(recipe.train.device)):
        if not ranks.first() and ranks.on_this_machine()[0] == 0:  # else this machine would show nothing
            say(f"rank {ranks.rank()} of {ranks.count()}; what there is to say is said by rank 0")
        experiment = Experiment(recipe, path, resume, None if base is None else Path(base), callback)
        try:
            experiment.run()
            finished = True
        except Stopped:
            pass
        finally:
            experiment.close()
    if experiment.interrupt.number is not None:
        raise Interrupted(experiment.interrupt.number, path, finished)
    code = recipe.code
    return Run(path, method=code.get(recipe.method.method), model=code.get(recipe.model.model))


def _in_python(message: str) -> str:
    """A message in which the options of the command are the arguments of `run`."""
    message = message.replace("the same command with --resume", "--resume")
    return re.sub("|".join(IN_PYTHON), lambda option: IN_PYTHON[option[0]], message)
