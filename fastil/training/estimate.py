"""`fastil plan`: what a recipe would do, what it would hold in memory and how long it would take here."""

import math
from typing import NamedTuple

import numpy as np

from fastil.data import Dataset
from fastil.data.formats.beton import Beton
from fastil.data.loaders.choose import check_resident, choose, read_rate, resident_bytes, sample
from fastil.data.published import table
from fastil.data.sources import Split, image_size, load_dataset
from fastil.device import device_name, pick_device, precision_note, settle_precision
from fastil.errors import UserError
from fastil.models import check_backbone
from fastil.protocol import Ids
from fastil.recipe import Recipe
from fastil.reporting.fidelity import opening
from fastil.text import duration
from fastil.training import compiling, step_plan
from fastil.training.capacity import check_batch
from fastil.training.run_directory import protocol_file
from fastil.training.speed import Rates, busy, speeds

NAMED = 100  # classes of a step
META_COST = 3.1  # training steps that an update of alpha takes besides its own (python -m bench.meta)


class Planned(NamedTuple):
    """What a plan says of the images: of those that are there, or, without them, of those that were published."""

    dataset: Dataset | None
    counts: Ids  # training images of each class
    names: list[str] | None
    size: tuple[int, int]  # height and width of what the network is shown
    source: str
    place: str


def _planned(recipe: Recipe) -> Planned:
    try:
        dataset = load_dataset(recipe.data)
    except UserError as error:
        known = table().get(recipe.data.dataset)
        if known is None or recipe.data.data is not None:
            raise
        names = None if known.class_names is None else list(known.class_names)
        source = f"{recipe.data.dataset}, as published, because the files are not here ({error})"
        held = known.images * math.prod(known.shape)
        streamed = recipe.data.dataset == "imagenet"
        size = (recipe.data.size, recipe.data.size) if streamed else known.shape[:2]
        place = "streamed" if streamed else f"{held / 2**20:,.0f} MiB resident as uint8"
        return Planned(None, np.full(known.classes, known.per_class), names, size, source, place)
    source = f"{dataset.name}: {len(dataset.train.labels):,} training and {len(dataset.val.labels):,} test images"
    held = sum(split.images.nbytes for split in (dataset.train, dataset.val) if isinstance(split, Split))
    place = f"{held / 2**20:,.0f} MiB resident as uint8" if held else "streamed"
    counts = np.bincount(dataset.train.labels)
    return Planned(dataset, counts, dataset.class_names, image_size(recipe.data, dataset), source, place)


def plan_text(recipe: Recipe) -> str:
    """The effective protocol as text. Without the files, a published shape of the data set is used."""
    dataset, counts, names, size, source, place = _planned(recipe)
    images = None if dataset is None else dataset.train
    notes = () if dataset is None else dataset.notes
    protocol = recipe.build_protocol(len(counts), names)
    steps = step_plan.effective_steps(recipe, protocol, counts, names)
    device = pick_device(recipe.train.device)
    check_batch(recipe, steps, size, device)
    precision = settle_precision(recipe.train.precision, device)
    student = recipe.build_network(len(protocol.order), 0).to(device)
    check_backbone(student, *size)
    flops, handed_on = compiling.cost_per_image(student, *size)
    check_batch(recipe, steps, size, device, handed_on)
    meta = meta_cost(recipe)

    def seconds(rates: Rates) -> float:
        return sum(
            (plan.visits * (1 + meta) + plan.finetune_visits + plan.memory_visits) / rates.later(recipe)
            if plan.step
            else (plan.visits + plan.memory_visits) / rates.plain
            for plan in steps
        )

    timed = speeds(recipe, size)
    kept = reading = ""
    if isinstance(images, Beton) and images.mode == "jpeg":
        rate = read_rate(sample(images), size)
        reading = f"; without reading, which these cores alone do at about {rate:,.0f} images/s"
    backend, why = recipe.data.loader, "as asked for"
    if backend == "auto" and dataset is not None:
        backend, why = choose(
            dataset.train, dataset.val, device, size, lambda: timed.now.plain, recipe.data.memory == "resident"
        )
    settled = recipe.settled(device).shared_by(1)
    described = None if dataset is None else protocol_file(settled, dataset, protocol, steps, size, [backend])
    if recipe.data.memory == "resident" and images is not None:
        exemplars = recipe.memory.total(counts[protocol.order])
        check_resident(images, exemplars, backend, device)
        kept = f"; about {resident_bytes(images, exemplars) / 2**30:.1f} GiB decoded on {device}"
    eager = "uncompiled" if device.type == "cpu" else "uncompiled and uncaptured, so a run should be faster"
    finetuned = sum(plan.finetune_visits for plan in steps)
    learned = sum(plan.memory_visits for plan in steps)
    parameters = sum(p.numel() for p in student.parameters())
    method, loss, train, memory = recipe.method, recipe.loss, recipe.train, recipe.memory
    with_teacher = f", {timed.now.distilled:,.0f} with the teacher" if recipe.procedure.uses_teacher else ""
    slow, quota = precision_note(precision, device), memory.quota(len(protocol.order))
    lines = [
        f"{recipe.name}: {recipe.description}",
        f"data         {source}, {size[0]}x{size[1]}, {place}",
        *([] if dataset is None else [f"loader       {backend}: {why}"]),
        *opening(recipe, dataset, described),
        f"classes      {len(protocol.order)}" + (f", list {protocol.class_hash(names)}" if names else ""),
        f"model        {recipe.model.model}, {parameters:,} parameters, {flops / 2e6:,.0f} MMAC per image",
        f"loss         {method.method}, loss={loss.loss}, T={method.temperature:g}, alpha={loss.alpha:g}",
        f"parts        sampler={recipe.sampler.sampler}, correction={recipe.correction.correction}, "
        f"predictor={recipe.evaluation.predictor}",
        f"optimiser    SGD, momentum {train.momentum:g}, weight decay {train.weight_decay:g}, "
        f"batch {train.batch_size}, {precision}",
        step_plan.as_table(steps),
        *([] if names is None else step_plan.class_lines(protocol, names, NAMED)),
        f"image visits {sum(plan.visits for plan in steps):,} in {sum(plan.iterations for plan in steps):,} iterations"
        + (f", and {finetuned:,} in balanced finetuning" if finetuned else "")
        + (f", and {learned:,} to learn exemplars" if learned else ""),
        f"exemplars    {f'{quota} per class at the end, by {memory.exemplar_selection}{kept}' if quota else 'none'}",
        f"estimated    {duration(seconds(timed.now))} on {device_name(device)}, {eager}: {timed.now.plain:,.0f} "
        f"images/s{with_teacher}, timed now over a few steps{reading}",
        *([] if timed.quiet is None else [busy(timed.others, duration(seconds(timed.quiet)))]),
    ]
    said = [*([] if slow is None else [slow]), *step_plan.notes(recipe, names)]
    return "\n".join([*lines, *said, *(f"note: {note}" for note in notes)])


def meta_cost(recipe: Recipe) -> float:
    """Training steps that Meta's updates of alpha take for each of the network's."""
    return META_COST / recipe.meta.meta_every if recipe.loss.loss == "meta_balanced" else 0.0
