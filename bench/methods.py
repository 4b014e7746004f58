"""The cost of each method per image, against IL-Baseline and against the ceiling of its own forwards and backwards.

(a) `Trainer.fit` of an incremental step of the method's CIFAR-100 recipe: its network, compiled, its loss, update and
data path. (b) the ceiling: the same compiled networks on one batch that is already there, the teacher's forward, the
student's, and a backward pass that begins with fixed gradients in whatever the method's loss reads; for Meta at every
tenth update the passes of its virtual step, of the held-out batch and along the direction as well. Goal: a / b >= 0.9.

What methods do between the steps (BiC's second stage, the pixels of Mnemonics, imprinting) is not in it: `fastil run`
has it in timings.json.

python -m bench.methods [--rounds N] [--only ROW ...]      (with --only nothing is written)
"""

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch

from bench.harness import ratio, save, spread, take_turns
from bench.train_step import BATCH, CLASSES, COUNTS, NUM_OLD, TRANSFORM, compiled_trainer
from fastil.data import Batch, Split
from fastil.device import pick_device
from fastil.methods import MetaAlpha, StepContext
from fastil.methods.meta import UpdateContext
from fastil.methods.tpcil import Tpcil
from fastil.models import Output
from fastil.optimiser import Update
from fastil.plan import EpochPlan, Key, training_plan
from fastil.recipe import Recipe
from fastil.recipe_file import load
from fastil.training.phases import BeforeUpdate, Phase
from fastil.training.trainer import Trainer

ROWS: dict[str, list[str]] = {  # overrides of the CIFAR-100 recipe of that name
    "il_baseline": [], "balanced": [], "meta": [], "icarl": [], "icarl_bce": [], "bic": [], "lucir": [],
    "lucir_balanced": [], "mnemonics": [], "mnemonics released": ["mnemonics=released", "weight_transfer=true"],
    "tpcil": [], "podnet": [], "podnet_balanced": [],
}  # fmt: skip
STEPS, META_STEPS = 4, 10
READS = {  # besides the logits
    "lucir": ("features",), "mnemonics": ("features",), "tpcil": ("features",), "podnet": ("features", "maps"),
}  # fmt: skip


class Contestant:
    """A method in the middle of an incremental step."""

    def __init__(self, recipe: Recipe, trainer: Trainer, device: torch.device) -> None:
        self.recipe, self.trainer = recipe, trainer
        width = trainer.student.width
        self.method = recipe.build_method(width, CLASSES, device)
        self.method.begin_step(StepContext(1, NUM_OLD, CLASSES, COUNTS))
        if isinstance(self.method, Tpcil):  # a graph of all classes
            ages = torch.zeros(width, width, dtype=torch.int64)
            self.method.load_state_dict(
                {"ages": ages, "vertices": torch.eye(width, trainer.student.head.weight.shape[1])}
            )
        self.meta = None
        if recipe.loss.loss == "meta_balanced":
            self.meta = MetaAlpha(recipe.meta, self.method, BATCH)
            self.meta.begin_step()
        self.steps = STEPS if self.meta is None else META_STEPS

    def phase(self) -> Phase:
        """Return the training phase of the step."""

        def plan(epoch: int, count: int = self.steps) -> EpochPlan:
            return training_plan(np.arange(count * BATCH) % (STEPS * BATCH), Key(0, 1), TRANSFORM, BATCH)

        hook = None
        if self.meta is not None:
            every = self.recipe.meta.meta_every
            hook = BeforeUpdate(every, lambda first, count: plan(0, count), self.meta.before_update)
        return Phase(
            name=self.recipe.name,
            step=1,
            parameters=self.method.parameters(self.trainer.student, 1),
            trainable=self.method.trainable(self.trainer.student),
            clamp=self.method.clamp,
            plan=plan,
            epochs=1,
            schedule=lambda epoch: 0.001,
            method=self.method,
            before_update=hook,
        )

    def fit(self) -> float:
        """Return the images per second of (a)."""
        phase, began = self.phase(), time.perf_counter()
        self.trainer.fit(phase)
        return self.steps * BATCH / (time.perf_counter() - began)

    def ceiling(self) -> float:
        """Return the images per second of (b)."""
        trainer, phase = self.trainer, self.phase()
        update = trainer.update(phase)
        batch = next(trainer.loader.batches(phase.plan(0)))
        trainer.student.train()
        began = time.perf_counter()
        for number in range(self.steps):
            trainer.folded_teacher(batch.images)
            if phase.before_update is not None and number % phase.before_update.every == 0:
                self.passes(batch)  # the virtual step
                self.passes(batch)  # as many held-out images
                self.along(batch, update)
            self.passes(batch)
            update.apply()
            trainer.student.zero_grad()
        if trainer.device.type == "cuda":
            torch.cuda.synchronize(trainer.device)
        return self.steps * BATCH / (time.perf_counter() - began)

    def passes(self, batch: Batch) -> None:
        """Run a forward and a backward pass."""
        read = self.read(self.trainer.fast_student(batch.images))
        torch.autograd.backward(read, [torch.full_like(tensor, 1e-6) for tensor in read])

    def along(self, batch: Batch, update: Update) -> None:
        """Run a forward-mode pass."""
        assert self.meta is not None
        student = self.trainer.student
        context = UpdateContext(batch, None, batch, student, student, update, self.trainer.autocast)
        self.meta.forward_mode(context, [torch.full_like(p, 1e-6) for p in update.parameters])

    def read(self, out: Output) -> list[torch.Tensor]:
        """Return the outputs that the method's loss reads."""
        of_method = READS.get(self.recipe.method.method, ())
        return [
            out.logits,
            *([out.features] if "features" in of_method else []),
            *(out.maps if "maps" in of_method else []),
        ]


def contestants(device: torch.device) -> dict[str, Contestant]:
    """Return the contestants by row; methods on the same network share one compiled pair."""
    trainers: dict[str, Trainer] = {}
    found = {}
    for row, overrides in ROWS.items():
        recipe = load(f"cifar100_{row.split()[0]}_5", overrides)
        key = f"{recipe.model} {recipe.procedure.reads_maps}"
        if key not in trainers:
            trainers[key] = make_trainer(recipe, device)
        found[row] = Contestant(recipe, trainers[key], device)
    return found


def make_trainer(recipe: Recipe, device: torch.device) -> Trainer:
    """Return a compiled trainer with random images."""
    student, teacher = (recipe.build_network(CLASSES, seed).to(device) for seed in (0, 1))
    for network in (student, teacher):
        network.head.open_rows(0, CLASSES, torch.Generator().manual_seed(0))
    pixels = np.random.default_rng(0).integers(0, 256, (STEPS * BATCH, 32, 32, 3), dtype=np.uint8)
    split = Split(pixels, np.arange(STEPS * BATCH) % CLASSES)
    return compiled_trainer(student, teacher, split, device)


def main() -> None:
    """Run the bench and write its result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=ROWS, default=[])
    arguments = parser.parse_args()
    rounds, chosen = arguments.rounds, {"il_baseline", *(arguments.only or ROWS)}
    device = pick_device("auto")
    of_row = {row: contestant for row, contestant in contestants(device).items() if row in chosen}
    turns: dict[str, Callable[[], float]] = {}
    for row, contestant in of_row.items():
        turns |= {row: contestant.fit, f"{row}, ceiling": contestant.ceiling}
    for turn in turns.values():
        turn()  # warm-up
    figures = take_turns(turns, rounds)
    results = {}
    for row in of_row:
        cost, share = ratio(figures, "il_baseline", row), ratio(figures, row, f"{row}, ceiling")
        results[row] = {"images per second": spread(figures[row]), "cost over il_baseline": cost, "a / b": share}
        print(
            f"{row:<18}{results[row]['images per second']['median']:8.0f} img/s   cost {cost['median']:.2f} "
            f"({cost['min']:.2f} to {cost['max']:.2f})   of its ceiling {share['median']:.2f} "
            f"({share['min']:.2f} to {share['max']:.2f})"
        )
    if not arguments.only:
        print("written to", save("methods", device, {"rounds": rounds, "batch": BATCH, "methods": results}))


if __name__ == "__main__":
    main()
