"""One pass of a frozen network over test or training images, and the accuracies of a step."""

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from fastil import ranks
from fastil.data import Loader
from fastil.device import multiplying_in
from fastil.errors import UserError
from fastil.models import Folded, Output
from fastil.plan import sequential_plan

BATCH = 256  # images of a forward pass without gradients
# fastil.reporting.run_files checks it when a result is read again.
Count = Annotated[int, Field(strict=True, ge=0)]
Percent = Annotated[float, Field(strict=True, ge=0, le=100, allow_inf_nan=False)]


@dataclass(frozen=True)
class EvaluationConfig:
    """How classes are predicted."""

    predictor: Literal["cnn", "nme"] = "cnn"  # the head's argmax, or iCaRL's nearest mean of exemplars
    nme_mirrored: bool = True  # means include mirror images, if training flips; LUCIR's ImageNet code: without


@dataclass(frozen=True)
class StepResult:
    """Accuracies after one step, in percent of the test images of every class seen so far: an entry of results.json."""

    step: Count
    classes_seen: Count
    top1: Percent
    top1_base: Percent  # over the classes of the base step
    top1_old: Percent | None  # over the classes of all earlier steps
    top1_new: Percent  # over the classes of this step
    top5: Percent | None  # where there are more than five classes
    nme_top1: Percent | None = None  # of the nearest-mean-of-exemplars classifier, for methods that use one


def forward(
    network: Folded, loader: Loader, ids: NDArray[np.int64], *, mirrored: bool = False, keeps_logits: bool = True
) -> Output:
    """Return features and logits of the images `ids`, in that order, under the test-time transform; no maps.

    network: in float32; it takes over the current weights first. mirrored: take the images' mirror images.
    keeps_logits: if not, the logits have no columns, because those of ImageNet's base step take 2.6 GB.

    Whatever the precision of training, this is IEEE float32: exemplars, class means and accuracies depend on the
    weights alone. Rows are float32 on the loader's device. Several processes read a part each, and all have every row
    afterwards.
    """
    network.refresh()
    here = ids[ranks.part_of(len(ids))]
    features = logits = torch.empty(0, 0, device=loader.device)
    row = 0
    with torch.no_grad(), multiplying_in("fp32", loader.device):
        for batch in loader.batches(sequential_plan(here, loader.transform, BATCH, mirrored, loader.sizes)):
            out = network(batch.images)
            if row == 0:  # allocated once: joining batches at the end would hold them twice
                features = out.features.new_empty(len(here), out.features.shape[1])
                logits = out.logits.new_empty(len(here), out.logits.shape[1] if keeps_logits else 0)
            part = slice(row, row := row + len(batch.images))
            features[part] = out.features
            if keeps_logits:
                logits[part] = out.scaled_logits
    logits = ranks.whole_of(logits, len(ids)) if keeps_logits else logits.new_empty(len(ids), 0)
    return Output(ranks.whole_of(features, len(ids)), [], logits)


def evaluate(
    logits: Tensor, positions: Tensor, *, step: int, num_base: int, num_old: int, num_seen: int
) -> tuple[StepResult, NDArray[np.int64], NDArray[np.int64]]:
    """Return the result, the confusion matrix and the predictions of a step.

    logits: [n, W] of the step's predictor; columns from num_seen on are ignored. positions: int64 [n], true incremental
    positions. The matrix is int64 [seen, seen], rows are true classes, in incremental order; the predictions are int64
    [n]. Raises UserError for logits that are not finite.
    """
    seen = logits[:, :num_seen]
    ends = torch.stack(torch.aminmax(seen))  # both NaN if one logit is; a mask would take as much memory again
    if not bool(torch.isfinite(ends).all()):  # argmax over NaN is arbitrary
        raise UserError(f"logits that are not numbers in step {step}: training diverged; lower lr")
    ranked = seen.topk(min(5, num_seen), dim=1).indices
    cells = positions * num_seen + ranked[:, 0]
    confusion = torch.bincount(cells, minlength=num_seen**2).view(num_seen, num_seen).cpu().numpy()
    in_five = int((ranked == positions[:, None]).any(dim=1).sum())
    hits, totals = np.diag(confusion), confusion.sum(axis=1)

    def percent(start: int, stop: int) -> float:
        return 100 * int(hits[start:stop].sum()) / int(totals[start:stop].sum())

    result = StepResult(
        step=step,
        classes_seen=num_seen,
        top1=percent(0, num_seen),
        top1_base=percent(0, num_base),
        top1_old=percent(0, num_old) if num_old else None,
        top1_new=percent(num_old, num_seen),
        top5=100 * in_five / len(positions) if num_seen > 5 else None,
    )
    return result, confusion, ranked[:, 0].cpu().numpy()
