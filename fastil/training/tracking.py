"""What trackers are told of a run: TensorBoard, W&B, csv files, or a function of the user's own.

A tracker is a function of one record, a dictionary. Whenever a run begins or goes on it is told "begin" and then all
that the run's own files hold, so that it never has to find out where it had stopped: it starts its own record again.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from fastil import ranks
from fastil.errors import UserError
from fastil.recipe import Recipe
from fastil.reporting.run_files import read_metrics
from fastil.reporting.runs import Run
from fastil.text import one_line
from fastil.training.trackers import Callback, Record, built


class Tracking:
    """Tells the trackers of a run, in its first process, of its epochs and steps. Entered for as long as the run lasts.

    run: its directory. names: the value of the key `track`. callback: a function that is told the same. A tracker that
    fails is told nothing more, and `say` says so. Raises UserError for a package that is missing, and for a callback
    that cannot be called.
    """

    def __init__(self, run: Path, names: Sequence[str], callback: Callback | None, say: Callable[[str], None]) -> None:
        self.run, self.say = run, say
        self.told = built(names)
        if callback is not None:
            if not callable(callback):
                raise UserError("callback: must be a function of one record, which is a dictionary")
            self.told["callback"] = callback
        if not ranks.first():
            self.told.clear()
        self.records = self.epochs = 0  # so far

    def begin(self, recipe: Recipe, protocol: str, finished: int) -> None:
        """Tell everything from the beginning on. protocol: what is trained, as text. finished: so many steps."""
        self._tell(self._history(recipe, protocol, finished))

    def epoch(self, line: Mapping[str, Any]) -> None:
        """Tell a line of metrics.jsonl."""
        self._tell([self._of_epoch(line)])

    def step(self) -> None:
        """Tell the last step of results.json."""
        self._tell(self._of_steps(slice(-1, None)))

    def __enter__(self) -> "Tracking":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        figures = sorted(self.run.glob("figures/*.png")) if kind is None else ()
        if self.records:
            shown = {path.stem: str(path) for path in figures}
            self._tell([{"kind": "end", "finished": kind is None, "figures": shown}])

    def _history(self, recipe: Recipe, protocol: str, finished: int) -> Iterator[Record]:
        lines = [line.model_dump(exclude_unset=True) for line in read_metrics(self.run)]
        steps = list(self._of_steps(slice(finished))) if finished else []
        self.records = self.epochs = 0
        yield {"kind": "begin", "run": str(self.run), "settings": recipe.keys(), "protocol": protocol}
        for step in range(finished + 1):
            yield from (self._of_epoch(line) for line in lines if line["step"] == step)
            yield from steps[step : step + 1]

    def _of_epoch(self, line: Mapping[str, Any]) -> Record:
        self.epochs += 1
        scalars = {"run_epoch": self.epochs} | _scalars(line)
        return {"kind": "epoch", "phase": line["phase"], "x": self.epochs, "scalars": scalars}

    def _of_steps(self, which: slice) -> Iterator[Record]:
        run = Run(self.run)
        results = run.results.steps
        measures: dict[str, list[Any]] = {}
        with contextlib.suppress(UserError):  # predictions that were not kept; results.json has the rest
            measures = {name: values for name, values in run.measures.dump().items() if name != "groups"}
        for result in results[which]:
            curve = run.curve[: result.step + 1]
            scalars = {"average_incremental_accuracy": sum(curve) / len(curve)}
            scalars = asdict(result) | scalars | {name: values[result.step] for name, values in measures.items()}
            yield {"kind": "step", "phase": "test", "x": result.classes_seen, "scalars": _scalars(scalars)}

    def _tell(self, records: Iterable[Record]) -> None:
        if not self.told:
            return
        try:
            for record in records:
                self._tell_all({"index": self.records} | record)
                self.records += 1
        except Exception as error:  # of the run's own files; whatever it is, training goes on
            self.told.clear()
            self.say(f"nothing is tracked any more: {one_line(str(error))}")

    def _tell_all(self, record: Record) -> None:
        # At the end, when all files of the run are there, a tracker may wait for its server, and Ctrl-C gives that up.
        caught = (Exception, KeyboardInterrupt) if record["kind"] == "end" else Exception
        for name, tracker in list(self.told.items()):
            try:
                tracker(record)
            except caught as error:
                del self.told[name]
                found = one_line(f"{type(error).__name__}{f': {error}' if str(error) else ''}")
                self.say(f"{name} failed ({found}); the run goes on without it, and --resume tells it everything again")


def _scalars(values: Mapping[str, Any]) -> dict[str, float]:
    """The numbers among these values; of a list each one, under its place in it."""
    found: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, list):
            found |= _scalars({f"{name}/{place}": part for place, part in enumerate(value)})
        elif isinstance(value, int | float):
            found[name] = value
    return found
