"""The effective protocol: what a run will do, step by step."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from fastil.errors import UserError
from fastil.plan import num_batches
from fastil.protocol import Protocol, numbering_note
from fastil.recipe import Recipe
from fastil.settings import shown
from fastil.text import columns, paragraph

COUNTED = ("balanced", "meta_balanced", "rescaled")  # losses that correct for the number of images of each class


@dataclass(frozen=True)
class StepPlan:
    """One step of the effective protocol."""

    step: int
    new_classes: int
    classes_seen: int
    new_images: int
    exemplars: int  # of old classes, rehearsed in this step; in joint training all of their images
    exemplars_per_class: int  # at most; fewer where a class has fewer images
    held_out: int  # images of both that are held out of training, for Meta's B_t or BiC
    epochs: int
    iterations: int
    visits: int  # images seen in training
    finetune_visits: int  # and in balanced finetuning after it
    memory_visits: int  # and to learn exemplars (Mnemonics)
    first_lr: float
    last_lr: float

    @property
    def classes_old(self) -> int:
        """The number of classes of earlier steps."""
        return self.classes_seen - self.new_classes


def effective_steps(
    recipe: Recipe, protocol: Protocol, train_counts: NDArray[np.int64], names: Sequence[str] | None = None
) -> list[StepPlan]:
    """Return the steps of a recipe on a data set. train_counts: int64 [classes], training images by class id.

    A memory too small for the last step or for the method, or a class with too few images, is a UserError now, not
    after days of training.
    """
    smallest = recipe.memory.quota(len(protocol.order))
    if smallest == 0:
        check_without_memory(recipe)
    holds_out = recipe.holds_out and len(protocol.steps) > 1
    meta = recipe.loss.loss == "meta_balanced"
    who = f"loss={recipe.loss.loss}" if meta or not holds_out else f"method={recipe.method.method}"
    if holds_out and smallest < 2:
        raise UserError(
            f"{who} holds out exemplars of each class and trains on the others: it needs at "
            f"least 2 per class, the memory leaves {smallest}; use exemplars_per_class=2 or more, or "
            f"{'loss=balanced' if meta else 'another method'}"
        )
    needed = 1 + (recipe.held_out(recipe.memory.quota(protocol.base)) if holds_out else 0)
    poor = [c for c in protocol.order if train_counts[c] < needed]
    if poor:
        listed = ", ".join(f"{names[c] if names else c} ({train_counts[c]})" for c in poor[:5])
        raise UserError(
            f"too few training images of {listed}: {who} needs at least {needed} of every class; add "
            f"images or leave the class out"
        )
    plans: list[StepPlan] = []
    config, seen = recipe.train, 0
    for step, classes in enumerate(protocol.steps):
        quota, of_old = recipe.memory.quota(seen) if seen else 0, train_counts[protocol.order[:seen]]
        rehearsed = int(of_old.max(initial=0)) if recipe.procedure.is_joint else quota
        exemplars = int(np.minimum(of_old, rehearsed).sum())
        new_images = int(train_counts[classes].sum())
        epochs = config.epochs_of(step)
        per_class = recipe.held_out(quota or recipe.memory.quota(len(classes))) if holds_out else 0
        if not (seen or recipe.reserves):
            per_class = 0
        held_out = per_class * (seen + len(classes))
        images = new_images + exemplars - held_out
        batches = num_batches(images, config.batch_size)
        seen += len(classes)
        balanced = seen * min(recipe.memory.quota(seen), int(train_counts[protocol.order[:seen]].min()))
        plans.append(
            StepPlan(
                step=step,
                new_classes=len(classes),
                classes_seen=seen,
                new_images=new_images,
                exemplars=exemplars,
                exemplars_per_class=rehearsed,
                held_out=held_out,
                epochs=epochs,
                iterations=epochs * batches,
                visits=epochs * images,
                finetune_visits=recipe.correction.epochs_of(step) * balanced,
                memory_visits=images * recipe.procedure.exemplar_epochs(recipe.keys()),
                first_lr=config.learning_rate(0, epochs),
                last_lr=config.learning_rate(epochs - 1, epochs),
            )
        )
    return plans


def check_without_memory(recipe: Recipe) -> None:
    """Raise UserError for what a recipe with exemplars_per_class=0 has and cannot do without exemplars."""
    keeps_images = recipe.procedure.is_joint
    needs = {
        f"loss={recipe.loss.loss}": recipe.loss.balanced and not keeps_images,  # log 0
        f"method={recipe.method.method}": recipe.procedure.needs_exemplars,
        f"sampler={recipe.sampler.sampler}": recipe.sampler.sampler != "uniform" and not keeps_images,
        f"correction={recipe.correction.correction}": recipe.correction.correction != "none",
        f"predictor={recipe.evaluation.predictor}": recipe.evaluation.predictor == "nme",
    }
    instead = {"loss": "loss=softmax", "method": "another method", "sampler": "sampler=uniform"}
    instead |= {"correction": "correction=none", "predictor": "predictor=cnn"}
    for setting in (setting for setting, needed in needs.items() if needed):
        key = setting.partition("=")[0]
        raise UserError(
            f"exemplars_per_class=0 with {setting}: needs images of the old classes; raise exemplars_per_class, or set "
            f"{instead[key]}"
        )


@dataclass(frozen=True)
class StepWork:
    """What a step computes, in forward passes of an image. phases: in their order, by the name of each. visit: of an
    image in training."""

    phases: dict[str, float]
    visit: float

    @property
    def total(self) -> float:
        """That of all phases."""
        return sum(self.phases.values())


def run_work(recipe: Recipe, steps: Sequence[StepPlan], test_counts: NDArray[np.int64]) -> list[StepWork]:
    """Return the work of each step. test_counts: test images of each class, in incremental order."""
    teacher, seen = recipe.procedure.uses_teacher, test_counts.cumsum()
    work = []
    for plan in steps:
        visit = visit_cost(plan, teacher)
        phases = {
            "train": plan.visits * visit,
            "correct": plan.finetune_visits * visit,
            "memory": plan.memory_visits * visit + plan.new_images,
            "evaluate": float(seen[plan.classes_seen - 1]),
        }
        work.append(StepWork(phases, visit))
    return work


def visit_cost(plan: StepPlan, teacher: bool) -> float:
    """Return the forward passes that a training step on an image is worth: three, or four with a teacher. teacher:
    whether incremental steps have one."""
    return 4.0 if plan.step and teacher else 3.0


def run_flops(steps: Sequence[StepPlan], forward: int, teacher: bool = True) -> float:
    """Return the floating-point operations of training. forward: those of a forward pass. teacher: whether incremental
    steps have one."""
    return sum(
        (plan.visits + plan.finetune_visits + plan.memory_visits) * forward * visit_cost(plan, teacher)
        for plan in steps
    )


def frozen_visits(steps: Sequence[StepPlan], test_counts: NDArray[np.int64]) -> int:
    """Return how many images a run passes through the frozen network, to select exemplars and to evaluate.
    test_counts: test images of each class, in incremental order."""
    seen = test_counts.cumsum()
    return sum(plan.new_images + int(seen[plan.classes_seen - 1]) for plan in steps)


def names_by_step(protocol: Protocol, names: Sequence[str]) -> list[list[str]]:
    """Return the names of the classes that each step adds, in the order of the protocol."""
    return [[names[c] for c in classes] for classes in protocol.steps]


def class_lines(protocol: Protocol, names: Sequence[str], most: int) -> list[str]:
    """Return `names_by_step` for a terminal, a line for each step, with at most `most` names."""
    return [
        f"step {step} adds  {', '.join(shown(name) for name in added[:most])}"
        + (f" and {len(added) - most} more" if len(added) > most else "")
        for step, added in enumerate(names_by_step(protocol, names))
    ]


def notes(recipe: Recipe, names: Sequence[str] | None) -> list[str]:
    """Return lines for the user about settings that can be trained but may not be what was meant."""
    lines, loss, sampler = [], recipe.loss.loss, recipe.sampler.sampler
    if sampler != "uniform" and loss in COUNTED:
        lines.append(
            f"loss={loss} with sampler={sampler} corrects the imbalance twice: the loss counts images, and the sampler "
            "evens out how often they are seen; set sampler=uniform, or loss=softmax"
        )
    exemplars = recipe.memory.exemplars_per_class
    if recipe.method.method == "finetune" and exemplars != 0:
        lines.append(
            "method=finetune with exemplars is rehearsal without distillation; the reference line below all methods is "
            "exemplars_per_class=0 loss=softmax"
        )
    numbering = None if names is None or recipe.protocol.order == "natural" else numbering_note(names)
    return lines if numbering is None else [*lines, numbering]


def as_table(steps: Sequence[StepPlan]) -> str:
    """Return the steps as a table for a terminal, and below it what is the same in many of them."""

    def rehearsed(plan: StepPlan) -> str:
        """The exemplars, and how many of a class."""
        if not plan.exemplars:
            return "0"
        if plan.exemplars == sum(before.new_images for before in steps[: plan.step]):
            return f"{plan.exemplars:,} (all)"
        most = "" if plan.exemplars == plan.exemplars_per_class * plan.classes_old else "max "
        return f"{plan.exemplars:,} ({most}{plan.exemplars_per_class}/class)"

    header = ("step", "classes", "new images", "exemplars", "epochs", "iterations", "visits")
    rows = [
        (
            str(plan.step), f"+{plan.new_classes} = {plan.classes_seen}", f"{plan.new_images:,}", rehearsed(plan),
            str(plan.epochs), f"{plan.iterations:,}", f"{plan.visits:,}",
        )
        for plan in steps
    ]  # fmt: skip
    rates = _by_step(steps, lambda plan: f"{plan.first_lr:g} to {plan.last_lr:.2g}")
    lines = [columns(header, rows, right=(0, 2, 4, 5, 6)), paragraph(f"lr {rates}", "   ")]
    if any(plan.held_out for plan in steps):
        held_out = _by_step(steps, lambda plan: f"{plan.held_out:,}")
        lines.append(paragraph(f"held out of new images and exemplars {held_out}", "   "))
    return "\n".join(lines)


def _by_step(steps: Sequence[StepPlan], value: Callable[[StepPlan], str]) -> str:
    """What may change from step to step, as text: "0.1 to 0.01 in step 0, 0.1 to 0.001 in steps 1 to 5"."""
    groups = [(text, [plan.step for plan in plans]) for text, plans in groupby(steps, value)]
    if len(groups) == 1:
        return groups[0][0]
    return ", ".join(
        f"{text} in step {of[0]}" if len(of) == 1 else f"{text} in steps {of[0]} to {of[-1]}" for text, of in groups
    )
