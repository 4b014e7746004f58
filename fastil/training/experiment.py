"""One run: for each step train, select exemplars, evaluate, save."""

import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastil import files
from fastil.data import Batch, Dataset, Split, load_dataset, make_loader
from fastil.data.loaders.choose import check_resident, choose
from fastil.data.loaders.streaming import Streaming
from fastil.data.sources import image_size
from fastil.device import device_name, multiplying_in, pick_device, precision_note
from fastil.errors import UserError
from fastil.evaluation import BATCH, StepResult, evaluate, forward, nearest_mean_scores
from fastil.methods import Images, Memory, MetaAlpha, StepContext, build_method
from fastil.models import Folded, Output, build_network
from fastil.plan import Transform
from fastil.protocol import build_protocol
from fastil.recipe import Recipe
from fastil.reporting import figures
from fastil.training import base_step, compiling, run_directory, step_plan
from fastil.training.clock import Clock, versions
from fastil.training.interrupt import Interrupt
from fastil.training.phases import Phases
from fastil.training.progress import Progress
from fastil.training.rehearsal import Rehearsal
from fastil.training.run_directory import Position, RunDirectory
from fastil.training.trainer import EpochRecord, Stopped, Trainer

Ids = NDArray[np.int64]
LONG_ENOUGH = 5.0  # seconds of an epoch that says what the bottleneck is
RESIZE = 256 / 224  # short side before the central crop, over the side of the crop


class Experiment:
    """The state of a run. Its directory is made only when everything that can be wrong has been checked."""

    def __init__(self, recipe: Recipe, out: Path, resume: bool, base_run: Path | None = None) -> None:
        self.resume = resume
        self.directory = RunDirectory(out, resume)
        self.interrupt = Interrupt()
        self.progress = Progress()
        self.device = pick_device(recipe.train.device)
        self.recipe = recipe = recipe.settled(self.device, self.directory.precision())
        self.dataset: Dataset = load_dataset(recipe.data)
        for note in self.dataset.notes:
            self.progress.say(note)
        num_classes = len(self.dataset.class_names)
        self.protocol = build_protocol(recipe.protocol, num_classes)
        self.class_steps = self.protocol.steps
        train_counts = np.bincount(self.dataset.train.labels, minlength=num_classes)
        self.steps = step_plan.effective_steps(recipe, self.protocol, train_counts, self.dataset.class_names)
        self.base: base_step.BaseStep | None = None
        if base_run is not None and not (resume and self.directory.last.exists()):  # else it is behind us
            base_step.check(base_run, recipe, self.protocol, self.dataset, train_counts)
            self.base = base_step.read(base_run, self.device)
        self.base_step_of: str | None = None
        augmented, plain = transforms(recipe, self.dataset)
        total = len(self.protocol.order)
        self.train_loader = make_loader(self.dataset.train, recipe.data.loader, augmented, self.device)
        if recipe.data.memory == "resident":
            exemplars = recipe.memory.total(train_counts[self.protocol.order])
            check_resident(self.dataset.train, exemplars, self.train_loader.name, self.device)
        # Training images as the frozen network sees them; a resident loader crops only what its plans ask for.
        self.plain_loader = self.train_loader
        if plain != augmented:
            self.plain_loader = make_loader(self.dataset.train, recipe.data.loader, plain, self.device)
        self.val_loader = make_loader(self.dataset.val, recipe.data.loader, plain, self.device)
        maps = recipe.procedure.reads_maps
        student, teacher = (
            build_network(recipe.model, total, recipe.train.seed, keeps_maps=maps).to(self.device) for _ in range(2)
        )
        self.method = build_method(
            recipe.method, recipe.loss, recipe.of_methods, width=student.width, num_classes=total, device=self.device
        )
        self.meta = None
        if recipe.loss.loss == "meta_balanced":
            self.meta = MetaAlpha(recipe.meta, self.method, recipe.train.batch_size)
        self.phases = Phases(recipe, student, self.method, self.meta, self.train_loader, len(self.class_steps))
        self.trainer = Trainer(
            recipe.train,
            student,
            teacher,
            self.train_loader,
            torch.from_numpy(self.protocol.positions(num_classes)).to(self.device),
            save=self.save_in_training,
            report=self.report_epoch,
            tick=self.progress.tick,
            stop=self.interrupt.requested,
        )
        self.frozen = Folded(student, torch.float32, BATCH)  # the student between two trainings
        self.frozen.plain.keeps_maps = False
        self.rehearsal = Rehearsal(
            recipe, self.protocol, self.dataset, lambda ids: self.frozen_output(ids).features, self.progress.say
        )
        self.memory = self.rehearsal.memory
        self.images = Images(self.frozen_output, lambda p: self.dataset.train.of_class(self.protocol.order[p]))
        self.overlay: dict[str, torch.Tensor] = {}  # "ids" and "images" of exemplars whose pixels were learned
        self.finetuning_ids = np.empty(0, dtype=np.int64)  # of the correction that is under way
        self.results: list[StepResult] = []
        self.step = 0
        self.clock = Clock()

    def run(self) -> dict[str, Any]:
        """Train what is left of the run; returns the content of results.json.

        Raises trainer.Stopped on SIGTERM or SIGINT, with a checkpoint written.
        """
        self.directory.create()
        with files.locked(self.directory.path), self.interrupt, multiplying_in("fp32", self.device):
            position = self.restore(self.resume)
            if position.step < len(self.class_steps):
                self.announce()
                self.compile()
            for step in range(position.step, len(self.class_steps)):
                self.run_step(step, position)
                self.directory.write_results(self.recipe, self.results)
                self.write_timings()
                weights = self.directory.path / f"checkpoints/step_{step}.pt"
                files.save(weights, self.trainer.student.state_dict())
                self.save(Position(step + 1))  # last: only now is the step never done again
            results = self.directory.write_results(self.recipe, self.results)
            figures.draw_run(self.directory.path)
            return results

    def close(self) -> None:
        """Free what the loaders hold."""
        for loader in (self.train_loader, self.plain_loader, self.val_loader):
            loader.close()

    def run_step(self, step: int, resumed: Position) -> None:
        """One step, from its beginning, or from the resumed position if that lies inside it."""
        self.step = step
        position = resumed if resumed.step == step else Position(step)
        num_old, num_seen = self.rehearsal.classes(step)
        if position == Position(step):
            self.trainer.begin_step()
            generator = torch.Generator().manual_seed(init_seed(self.recipe.train.seed, step))
            self.method.open_classes(self.trainer.student, num_old, num_seen, generator, self.images)
            if step == 0 and self.base is not None:
                self.take_base(self.base)
                position = Position(step, "memory")
        if position.phase == "train":
            self.train(step, num_old, num_seen, position)
            position = Position(step, "memory")
            if self.recipe.correction.epochs_of(step):
                position = Position(step, "correct")
                self.finetuning_ids = self.rehearsal.balanced_set(step)
            self.save(position)
        if position.phase == "correct":
            self.finetune(step, num_old, num_seen, position)
            self.save(Position(step, "memory"))
        began = time.perf_counter()
        ids, held_out = self.rehearsal.training_set(step)
        self.begin(step, num_old, num_seen, ids, Position(step, "memory"))
        if step > 0:
            positions = torch.from_numpy(self.rehearsal.positions_of(held_out)).to(self.device)
            self.method.after_training(self.trainer.student, self.images, held_out, positions)
        self.directory.write_exemplars(step, self.rehearsal.update(step))
        self.after_memory(step, ids)
        selected = time.perf_counter()
        result = self.evaluate_step(step, num_old, num_seen)
        self.clock.set(step, memory=selected - began, evaluate=time.perf_counter() - selected)
        self.results.append(result)
        split = "" if result.top1_old is None else f", old {result.top1_old:.2f}, new {result.top1_new:.2f}"
        self.progress.say(
            f"step {step}: {num_seen} classes, top-1 {result.top1:.2f}{split}  ({self.clock.trained(step):.0f} s)"
        )

    def train(self, step: int, num_old: int, num_seen: int, position: Position) -> None:
        ids, held_out = self.rehearsal.training_set(step)
        self.begin(step, num_old, num_seen, ids, position)
        probabilities = self.recipe.sampler.probabilities(self.rehearsal.positions_of(ids), num_old)
        phase = self.phases.training(step, ids, probabilities, held_out)
        self.keep_memory()
        done = position.epoch * len(ids) + position.batch * self.recipe.train.batch_size
        self.progress.begin(f"step {step}", self.steps[step].visits, done)
        self.trainer.fit(phase, position.epoch, position.batch)
        self.progress.end()

    def after_memory(self, step: int, trained: Ids) -> None:
        """What a method does with the exemplars, now that those of the new classes are among them."""
        ids = self.memory.ids()

        def training(epoch: int) -> Iterator[Batch]:
            plan = self.phases.training_epoch(step, trained, None, epoch)
            for batch in self.train_loader.batches(plan):
                if self.interrupt.requested():  # the checkpoint before the memory phase stands; this begins anew
                    raise Stopped
                self.progress.tick(len(batch.ids))
                yield batch._replace(labels=self.trainer.table[batch.labels])

        visits = self.steps[step].memory_visits
        if visits:
            self.progress.begin(f"step {step}, exemplars", visits, 0)
        context = Memory(ids, self.rehearsal.positions_of(ids), self.images, self.plain_loader, training)
        changed = self.method.after_memory(self.trainer.student, context)
        self.progress.end()
        if changed:
            self.overlay = changed
            self.show_overlay()

    def keep_memory(self) -> None:
        """The exemplars stay where they are trained on, if that was asked for."""
        if self.recipe.data.memory == "resident":
            self.train_loader.keep(self.memory.ids())

    def show_overlay(self) -> None:
        for loader in {id(loader): loader for loader in (self.train_loader, self.plain_loader)}.values():
            loader.overlay(**self.overlay)

    def frozen_output(self, ids: Ids, mirrored: bool = False) -> Output:
        return forward(self.frozen, self.plain_loader, ids, mirrored=mirrored)

    def finetune(self, step: int, num_old: int, num_seen: int, position: Position) -> None:
        """Balanced finetuning on the exemplars of every class seen, herded for it."""
        ids = self.finetuning_ids
        self.begin(step, num_old, num_seen, ids, position)
        self.keep_memory()
        self.trainer.fit(self.phases.finetuning(step, ids), position.epoch, position.batch)

    def begin(self, step: int, num_old: int, num_seen: int, ids: Ids, position: Position) -> None:
        """Set the method to what is trained on now; alpha starts anew or goes on from the checkpoint."""
        counts = np.bincount(self.rehearsal.positions_of(ids), minlength=self.trainer.student.width)
        self.method.begin_step(StepContext(step, num_old, num_seen, counts))
        if self.meta is not None:
            if position.phase != "memory" and position.epoch == position.batch == 0:
                self.meta.begin_step()
            else:
                self.meta.refresh()

    def take_base(self, taken: base_step.BaseStep) -> None:
        """The base step of another run, where this one would train the same."""
        self.trainer.student.load_state_dict(taken.weights)
        for line in taken.metrics:
            self.directory.append_metrics(line)
        self.base_step_of = taken.source
        self.progress.say(f"base step taken from {taken.source}")

    def evaluate_step(self, step: int, num_old: int, num_seen: int) -> StepResult:
        positions = self.rehearsal.positions[self.dataset.val.labels]
        ids = np.flatnonzero((positions >= 0) & (positions < num_seen))
        out = forward(self.frozen, self.val_loader, ids)
        nme = self.recipe.evaluation.predictor == "nme"
        scores = self.nearest_mean_scores(out.features) if nme else self.method.predict(out.logits)
        true = torch.from_numpy(positions[ids]).to(self.device)
        num_base = len(self.class_steps[0])
        result, confusion, predicted = evaluate(
            scores, true, step=step, num_base=num_base, num_old=num_old, num_seen=num_seen
        )
        self.directory.write_confusion(step, confusion)
        self.directory.write_predictions(step, positions[ids], predicted)
        return dataclasses.replace(result, nme_top1=result.top1) if nme else result

    @property
    def mirrors(self) -> bool:
        """Whether class means take in mirror images: only where training has seen some."""
        return self.train_loader.transform.flip and self.recipe.evaluation.nme_mirrored

    def nearest_mean_scores(self, features: torch.Tensor) -> torch.Tensor:
        ids = self.memory.ids()
        exemplars = self.frozen_output(ids).features
        mirrored = self.frozen_output(ids, mirrored=True).features if self.mirrors else exemplars
        positions = torch.from_numpy(self.rehearsal.positions_of(ids)).to(self.device)
        return nearest_mean_scores(features, exemplars, mirrored, positions)

    def restore(self, resuming: bool) -> Position:
        """Claim the directory and take up its last checkpoint, if there is one."""
        protocol = run_directory.describe(self.dataset, self.protocol, self.steps)
        state = self.directory.claim(self.recipe, protocol, self.device)
        if state is None:
            if resuming:
                self.progress.say(f"{self.directory.path}: no checkpoint to resume from, starting anew")
            return Position()
        position = Position(*state["position"])
        self.trainer.load_state_dict(state["trainer"], self.phases.all(position.step))
        if self.meta is not None:
            self.meta.load_state_dict(state["meta"])
        self.method.load_state_dict(state["method"])
        self.base_step_of = state["base_step_of"]
        self.overlay = state["overlay"]
        if self.overlay:
            self.show_overlay()
        self.finetuning_ids = np.array(state["finetuning"], dtype=np.int64)
        self.memory.exemplars = {c: np.array(ids, dtype=np.int64) for c, ids in state["memory"].items()}
        self.results = [StepResult(**result) for result in state["results"]]
        self.clock.load_state_dict(state["seconds"])
        if position.step == len(self.class_steps):
            self.progress.say(f"{self.directory.path}: finished already")
            return position
        before, now = state.get("loader", self.train_loader.name), self.train_loader.name
        if before != now:  # by loader=auto, on another machine
            self.progress.say(f"read by loader={before} so far and by {now} from here on: pixels differ a little")
        self.progress.say(
            f"{self.directory.path}: going on at step {position.step}, phase {position.phase}, "
            f"epoch {position.epoch + 1}, batch {position.batch + 1}"
        )
        return position

    def save(self, position: Position) -> None:
        self.directory.save(
            {
                "position": list(position),
                "trainer": self.trainer.state_dict(),
                "meta": {} if self.meta is None else self.meta.state_dict(),
                "method": self.method.state_dict(),
                "overlay": self.overlay,
                "base_step_of": self.base_step_of,
                "finetuning": self.finetuning_ids.tolist(),
                "loader": self.train_loader.name,
                "memory": {class_id: ids.tolist() for class_id, ids in self.memory.exemplars.items()},
                "results": [dataclasses.asdict(result) for result in self.results],
                "seconds": self.clock.state_dict(),
            }
        )

    def save_in_training(self, phase: str, epoch: int, batch: int) -> None:
        self.save(Position(self.step, phase, epoch, batch))

    def report_epoch(self, record: EpochRecord) -> None:
        line = dataclasses.asdict(record)
        self.clock.epoch(record.step, record.phase, record.images, line.pop("seconds"), line.pop("data_seconds"))
        line |= line.pop("observed")
        self.directory.append_metrics(line)
        shown = "".join(f"  {name} {value:.3g}" for name, value in record.observed.items() if isinstance(value, float))
        self.progress.epoch(
            f"{'' if record.phase == 'train' else 'finetuning, '}epoch {record.epoch}/{record.epochs}  "
            f"lr {record.lr:.3g}  loss {record.loss:.4f}  train top-1 {record.train_top1:.2f}{shown}  "
            f"{record.images / record.seconds:,.0f} img/s{waiting(record, isinstance(self.train_loader, Streaming))}",
            last=record.epoch == record.epochs,
        )

    def write_timings(self) -> None:
        run = {
            "base_step_of": self.base_step_of,
            "compiled": self.trainer.fast_student is not self.trainer.student,
        }
        files.write_json(self.directory.path / "timings.json", self.clock.summary() | run | versions(self.device))

    def announce(self) -> None:
        """The effective protocol, so that no one has to guess what was trained."""
        recipe, names = self.recipe, self.dataset.class_names
        slow = precision_note(recipe.precision, self.device)
        lines = [
            f"{recipe.name}: {recipe.method.method}, loss={recipe.loss.loss}, {recipe.model.model}, "
            f"seed {recipe.train.seed}, on {device_name(self.device)}, {recipe.precision}",
            f"{self.dataset.name}, class list {self.protocol.class_hash(names)}, into {self.directory.path}",
            f"loader {self.train_loader.name}: "
            + (choose(self.dataset.train, self.device)[1] if recipe.data.loader == "auto" else "as asked for")
            + ("; exemplars stay decoded" if recipe.data.memory == "resident" else ""),
            *([] if slow is None else [slow]),
            step_plan.as_table(self.steps),
        ]
        self.progress.say("\n".join(lines))

    def compile(self) -> None:
        student, config, size = self.trainer.student, self.recipe.train, self.train_loader.transform
        flops = compiling.flops_per_image(student, size.height, size.width)
        wanted, note = compiling.decide(config.compile, self.device, step_plan.run_flops(self.steps, flops))
        if wanted:
            began = time.perf_counter()
            note = self.trainer.compile()
            if note is None and flops * self.frozen_visits() >= compiling.REPAID_BY[self.device.type]:
                example = torch.zeros(BATCH, 3, size.height, size.width, device=self.device)
                example = example.to(memory_format=torch.channels_last)
                self.frozen.fast, slower = compiling.compile_network(
                    self.frozen.plain, example, train=False, use="evaluation"
                )
                if slower:
                    self.progress.say(slower)
            note = note or f"compiled in {time.perf_counter() - began:.0f} s"
        if note:
            self.progress.say(note)

    def frozen_visits(self) -> int:
        """Images that the run passes through the frozen network: to select exemplars and to evaluate."""
        per_class = np.bincount(self.dataset.val.labels)[self.protocol.order].cumsum()
        return sum(plan.new_images + int(per_class[plan.classes_seen - 1]) for plan in self.steps)


def transforms(recipe: Recipe, dataset: Dataset) -> tuple[Transform, Transform]:
    """The transforms of training images and of all others.

    Images that are streamed are trained on in random resized crops and seen otherwise by their centre, as ImageNet's
    (resize to 256, crop 224, and so in proportion for another size).
    """
    config = recipe.data
    height, width = image_size(config, dataset)
    plain = Transform(height, width, config.pad, config.flip, tuple(config.mean), tuple(config.std))
    if isinstance(dataset.train, Split):
        return plain, plain
    if config.pad:
        raise UserError(f"pad={config.pad}: images that are streamed are trained on in random resized crops; set pad=0")
    resize = round(height * RESIZE)
    return dataclasses.replace(plain, pad=0, resized=True), dataclasses.replace(plain, pad=0, resize=resize)


def waiting(record: EpochRecord, streamed: bool) -> str:
    """For an epoch's line: how long the loop has waited for data that is streamed. The loader works ahead, so but for
    the first batch, which is much of a short epoch, the loop waits only if it is the faster of the two."""
    if not streamed:
        return ""
    waited = f", {record.data_seconds:.1f} s waiting for data"
    if record.seconds < LONG_ENOUGH:
        return waited
    return f"{waited}: the {'loader' if record.data_seconds > record.seconds / 5 else 'network'} is the bottleneck"


def init_seed(seed: int, step: int) -> int:
    """The seed of the generator that initialises the head's rows of a step."""
    return seed * 10_000 + step + 1
