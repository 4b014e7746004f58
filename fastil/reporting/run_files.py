"""What the files of a run directory hold that are read again, and the one place that reads them; the .pt files are in
`checkpoints`, and `fastil.recipe_file` reads recipe.yaml.

A key that this version does not know is no error, and only what older runs lack may be missing. What a damaged file
raises is a UserError that names the file, the field and the fix.
"""

import json
import re
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
import pydantic
from numpy.typing import NDArray
from pydantic import Field, JsonValue, StrictFloat

from fastil import files
from fastil.evaluation import Count, Percent, StepResult
from fastil.files import Damaged

AGAIN = "train this run again in a new --out"
Row = Annotated[dict[str, JsonValue], Field(min_length=1)]  # of a table that is shown as it is, whatever its columns
Alpha = Annotated[StrictFloat, Field(gt=0)]


class _Content(pydantic.BaseModel):
    """A file, or a part of one."""

    model_config = pydantic.ConfigDict(frozen=True, allow_inf_nan=False)


class Results(_Content):
    """results.json: what is reproducible, after each finished step."""

    recipe: str
    method: str
    loss: str
    seed: Count
    steps: list[StepResult] = Field(min_length=1)
    average_incremental_accuracy: Percent
    final_top1: Percent

    @pydantic.field_validator("steps")
    @classmethod
    def in_order(cls, steps: list[StepResult]) -> list[StepResult]:
        """Raise ValueError unless the steps are numbered from 0 on."""
        if [result.step for result in steps] != list(range(len(steps))):
            raise ValueError("not numbered from 0 on")
        return steps


class DescribedSplit(_Content):
    """The images of a split. bytes, counts: of the image files of the source, and images of each class, where a .beton
    of them is streamed."""

    sha256: str
    images: Count
    identity: str | None = None  # runs from before identities have none
    bytes: Count | None = None
    counts: list[Count] | None = None

    def same_in_another_order(self, other: "DescribedSplit") -> bool:
        """Whether both hold the same images, but not with the same ids."""
        return self.identity is not None and self.identity == other.identity and self.sha256 != other.sha256


class DescribedDataset(_Content):
    """What a run is trained and tested on. size: height and width of what the network is shown; read_by: the loaders
    that have read its images so far, where they are streamed."""

    name: str
    size: tuple[Count, Count] | None = None  # runs from before `Run.network` do not say it
    train: DescribedSplit
    val: DescribedSplit
    read_by: list[str] = []


class ProtocolFile(_Content):
    """protocol.json: which classes come when, of which images. Classes are ids, places in class_names;
    class_names_by_step: `steps` by name; effective: the step plan, a row per step, shown as the version that wrote it
    has it."""

    class_order: list[Count]
    class_names: list[str]
    class_list_hash: str = "of an earlier version"
    steps: list[list[Count]] = Field(min_length=1)
    class_names_by_step: list[list[str]] = []  # older runs have none
    dataset: DescribedDataset
    effective: list[Row] = []
    precision: str | None = None  # older runs have none of these
    bn: str | None = None
    ranks: Count = 1  # processes that trained together, the last time it was begun or went on
    ranks_so_far: list[Count] = []  # all the numbers of them that have trained it; runs without have `ranks` alone

    @property
    def all_ranks(self) -> list[int]:
        """The numbers of processes that have trained it, each once, in the order in which they came."""
        return list(dict.fromkeys([*self.ranks_so_far, self.ranks]))

    @pydantic.model_validator(mode="after")
    def named(self) -> "ProtocolFile":
        """Raise ValueError unless every class has a name."""
        learned = [c for classes in self.steps for c in classes]
        for key, classes in (("class_order", self.class_order), ("steps", learned)):
            nameless = {c for c in classes if c >= len(self.class_names)}
            if nameless:
                raise ValueError(f"{key}: class {min(nameless)} has no name in class_names")
        if self.class_order != learned or len(set(learned)) < len(learned):
            raise ValueError("class_order: not the classes of steps, each once")
        return self


class MetricsLine(_Content):
    """A line of metrics.jsonl: an epoch."""

    model_config = pydantic.ConfigDict(extra="allow")  # a base step is taken over with all that its lines say

    step: Count
    phase: str  # "train" or "correct"
    epoch: Count
    epochs: Count
    lr: StrictFloat
    loss: StrictFloat
    train_top1: Percent
    images: Count
    scale: StrictFloat | None = None  # of a cosine head
    alpha: Alpha | Annotated[list[Alpha], Field(min_length=1)] | None = None  # of Meta: one, or one per old class


class Timings(_Content):
    """timings.json: seconds of each step by phase, and what ran on what."""

    steps: dict[str, Row] = Field(min_length=1)
    versions: dict[str, JsonValue]
    machine: dict[str, JsonValue]


Content = TypeVar("Content", bound=_Content)


def read_results(run: Path) -> Results:
    """Return results.json. Raises UserError if it is missing or damaged."""
    return _read(run / "results.json", Results, "run again with --resume")


def read_protocol(run: Path, fix: str = AGAIN) -> ProtocolFile:
    """Return protocol.json. Raises UserError if it is missing or damaged."""
    return _read(run / "protocol.json", ProtocolFile, fix)


def read_timings(run: Path) -> Timings:
    """Return timings.json. Raises UserError if it is missing or damaged."""
    return _read(run / "timings.json", Timings, "run again with --resume")


def read_metrics(run: Path, fix: str = AGAIN) -> list[MetricsLine]:
    """The lines of metrics.jsonl but for a last one that is half written."""
    path = run / "metrics.jsonl"
    lines = files.read(path, fix).split(b"\n")[:-1]
    return [_parsed(line, MetricsLine, path, fix, f"line {number}, ") for number, line in enumerate(lines, 1)]


def read_confusion(run: Path, step: int, classes: int) -> NDArray[np.int64]:
    """The confusion matrix of a step, int64 [classes, classes]; rows are true classes in incremental order."""
    path = run / f"confusion/step_{step}.npy"
    return _array(path, np.dtype(np.int64), (classes, classes), None, "run again with --resume")


def read_predictions(run: Path, step: int, classes: int) -> NDArray[np.int16]:
    """True and predicted incremental position of each test image of the classes seen, int16 [n, 2]."""
    return _array(run / f"predictions/step_{step}.npy", np.dtype(np.int16), (None, 2), classes, AGAIN)


def confusion_of(predictions: NDArray[np.int16], classes: int) -> NDArray[np.int64]:
    """The confusion matrix that such predictions make."""
    true, predicted = predictions.astype(np.int64).T
    return np.bincount(true * classes + predicted, minlength=classes**2).reshape(classes, classes)


def _array(
    path: Path, dtype: np.dtype[Any], shape: tuple[int | None, int], below: int | None, fix: str
) -> NDArray[Any]:
    """A file of numbers from 0 on, and below this one. A size in its header that is not that of the file takes no
    memory."""
    with files.readable(path, fix):
        try:
            found = np.load(path, mmap_mode="r")
            sizes = [size if wanted is None else wanted for size, wanted in zip(found.shape, shape, strict=True)]
            whole = found.dtype == dtype and [*found.shape] == sizes and found.min() >= 0
            whole = whole and (below is None or found.max() < below)
        except OSError:
            raise
        except Exception:  # a damaged header or a zip raises many types
            whole = False
    if not whole:
        wanted = ", ".join("n" if size is None else str(size) for size in shape)
        raise Damaged(path, f"damaged (not {dtype} [{wanted}], of numbers that can be)", fix)
    return np.array(found)


def _read(path: Path, model: type[Content], fix: str) -> Content:
    return _parsed(files.read(path, fix), model, path, fix)


def _parsed(text: bytes, model: type[Content], path: Path, fix: str, line: str = "") -> Content:
    try:
        return model.model_validate(json.loads(text))
    except pydantic.ValidationError as error:
        reason = first_problem(error)
    except (ValueError, RecursionError):  # cut off, binary, or nested without end
        reason = "not JSON"
    raise Damaged(path, f"damaged ({line}{reason})", fix)


def first_problem(error: pydantic.ValidationError) -> str:
    """The first thing that is wrong with a content, and where, in one line."""
    first = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(str(part) for part in first["loc"][:6])
    what = re.sub(r"^Value error, | or (an )?instance of \w+$", "", first["msg"])
    return " ".join((f"{place}: {what}" if place else what).split())
