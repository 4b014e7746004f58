"""What a run says of itself: before it trains, after an epoch, after a step, and when it goes on."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastil import ranks
from fastil.data import Dataset
from fastil.device import device_name, precision_note
from fastil.evaluation import StepResult
from fastil.plan import share_of
from fastil.protocol import Protocol
from fastil.recipe import Recipe
from fastil.reporting.checkpoints import Position
from fastil.reporting.fidelity import opening
from fastil.reporting.run_files import ProtocolFile
from fastil.training import step_plan
from fastil.training.run_loaders import RunLoaders
from fastil.training.step_plan import StepPlan
from fastil.training.trainer import EpochRecord

NAMED = 10  # classes of a step; protocol.json has all
LONG_ENOUGH = 5.0  # seconds of an epoch that says what the bottleneck is
LOADER_BOUND = 0.1  # a larger share of waiting for data is worth doing something about


def announcement(
    recipe: Recipe,
    dataset: Dataset,
    protocol: Protocol,
    steps: Sequence[StepPlan],
    loaders: RunLoaders,
    out: Path,
    described: ProtocolFile,
) -> str:
    """The effective protocol, so that no one has to guess what was trained. described: what protocol.json says."""
    device = loaders.train.device
    slow = precision_note(recipe.precision, device)
    lines = [
        f"{recipe.name}: {recipe.method.method}, loss={recipe.loss.loss}, {recipe.model.model}, "
        f"seed {recipe.train.seed}, on {device_name(device)}, {recipe.precision}{shared(recipe)}",
        f"{dataset.name}, class list {protocol.class_hash(dataset.class_names)}, into {out}",
        *opening(recipe, dataset, described),
        f"loader {loaders.train.name}: {loaders.why}" + ("; exemplars stay decoded" if loaders.keeps_exemplars else ""),
        *([] if slow is None else [slow]),
        step_plan.as_table(steps),
        *step_plan.class_lines(protocol, dataset.class_names, NAMED),
        *step_plan.notes(recipe, dataset.class_names),
    ]
    return "\n".join(lines)


def shared(recipe: Recipe) -> str:
    """How many processes train together, and how batch normalisation sees their batch; nothing where one is alone."""
    if ranks.count() == 1:
        return ""
    shares = {share_of(recipe.train.batch_size, rank, ranks.count()) for rank in (0, ranks.count() - 1)}
    images = " or ".join(str(share) for share in sorted(shares))
    return f", {ranks.count()} processes with {images} images each of a batch, bn={recipe.train.bn}"


def of_epoch(record: EpochRecord, streamed: bool) -> str:
    """The line of an epoch. streamed: whether its images were read from a file, so that the loop may wait for them."""
    shown = "".join(f"  {name} {value:.3g}" for name, value in record.observed.items() if isinstance(value, float))
    return (
        f"{'' if record.phase == 'train' else 'finetuning, '}epoch {record.epoch}/{record.epochs}  "
        f"lr {record.lr:.3g}  loss {record.loss:.4f}  train top-1 {record.train_top1:.2f}{shown}  "
        f"{record.images / record.seconds:,.0f} img/s{waiting(record) if streamed else ''}"
    )


def waiting(record: EpochRecord) -> str:
    """Who waits for whom where data is streamed: the share of the time in which the device had to wait for data, and
    that in which the loader's threads had to wait for training. The loader works ahead, so except for the first batch,
    which is much of a short epoch, only the faster of the two waits."""
    share = record.data_seconds / record.seconds
    data = f", data {share:.0%}"
    if record.seconds < LONG_ENOUGH:
        return data
    idle = "" if record.loader_idle is None else f", loader {record.loader_idle:.0%} idle"
    return f"{data} ({'loader' if share >= LOADER_BOUND else 'network'}-bound{idle})"


def of_step(result: StepResult, seconds: float) -> str:
    """The line of a step that took so many seconds to train."""
    split = "" if result.top1_old is None else f", old {result.top1_old:.2f}, new {result.top1_new:.2f}"
    return f"step {result.step}: {result.classes_seen} classes, top-1 {result.top1:.2f}{split}  ({seconds:.0f} s)"


def of_resume(position: Position) -> str:
    """Where a run goes on."""
    return (
        f"going on at step {position.step}, phase {position.phase}, epoch {position.epoch + 1}, "
        f"batch {position.batch + 1}"
    )


def of_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """A line for each thing that is no setting, has changed since the stop, and can change what a run computes."""
    return [
        f"{key}: {before[key]} before the stop and {value} from here on; the numbers may differ a little from those of "
        "a run without a stop"
        for key, value in now.items()
        if key in before and before[key] != value
    ]
