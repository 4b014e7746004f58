"""One run: for each step open the classes, train, correct, select exemplars, evaluate, save."""

import dataclasses
import hashlib
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastil import outside, ranks
from fastil.data import load_dataset
from fastil.data.sources import image_size
from fastil.device import choosing_kernels, multiplying_in, pick_device
from fastil.evaluation import StepResult, evaluate
from fastil.methods import FeatureExtractor, MemoryContext, MetaAlpha, Method, StepContext
from fastil.models import check_backbone
from fastil.nearest_mean import nearest_mean_scores
from fastil.protocol import Ids
from fastil.recipe import Recipe
from fastil.reporting.checkpoints import Checkpoint, Position
from fastil.reporting.run_files import ProtocolFile, Results
from fastil.text import passing
from fastil.training import base_step, capacity, compiling, messages, run_directory, step_plan
from fastil.training.clock import Clock, versions
from fastil.training.frozen import FrozenNetwork
from fastil.training.interrupt import Interrupt, SharedInterrupt
from fastil.training.phases import Phases
from fastil.training.progress import NoBar, StepBar
from fastil.training.run_loaders import RunLoaders
from fastil.training.run_parts import RunParts
from fastil.training.step_plan import StepPlan
from fastil.training.trackers import Callback
from fastil.training.tracking import Tracking
from fastil.training.trainer import EpochRecord, Trainer, seed_torch
from fastil.training.training_set import Rehearsal


class Experiment:
    """The state of a run. Its directory is made only when everything that can be wrong has been checked."""

    def __init__(
        self, recipe: Recipe, out: Path, resume: bool, base_run: Path | None = None, callback: Callback | None = None
    ) -> None:
        self.directory = run_directory.opened(out, resume, recipe)
        self.resume = resume = self.directory.resume
        self.interrupt = Interrupt() if ranks.count() == 1 else SharedInterrupt()
        self.progress, self.clock = StepBar() if ranks.first() else NoBar(), Clock()
        self.tracking = Tracking(out, recipe.train.track, callback, self.progress.say)
        self.device = pick_device(recipe.train.device)
        begun = ranks.from_first(self.directory.begun)
        recipe = recipe.settled(self.device, None if begun is None else begun.precision)
        self.recipe = recipe = recipe.shared_by(ranks.count(), begun)
        self.dataset = load_dataset(recipe.data)
        for note in self.dataset.notes:
            self.progress.say(note)
        names = self.dataset.class_names
        self.protocol = recipe.build_protocol(len(names), names)
        counts = np.bincount(self.dataset.train.labels, minlength=len(names))
        self.steps = step_plan.effective_steps(recipe, self.protocol, counts, names)
        self.test_counts = np.bincount(self.dataset.val.labels, minlength=len(names))[self.protocol.order]
        self.progress.work = step_plan.run_work(recipe, self.steps, self.test_counts)
        order, size = self.protocol.order, image_size(recipe.data, self.dataset)
        capacity.check_batch(recipe, self.steps, size, self.device)
        student, teacher = (recipe.build_network(len(order), recipe.train.seed).to(self.device) for _ in range(2))
        check_backbone(student, *size)
        if ranks.count() > 1 and recipe.train.bn == "sync":
            student.synchronise()
        self.flops, handed_on = compiling.cost_per_image(student, *size)
        capacity.check_batch(recipe, self.steps, size, self.device, handed_on)
        self.shared_base: base_step.BaseStep | None = None
        if base_run is not None and not (resume and self.directory.checkpoints()):  # else it is behind us
            base_step.check(base_run, recipe, self.protocol, self.dataset, counts)
            self.shared_base = base_step.read(base_run, teacher, self.device)  # the first step overwrites the teacher
        self.loaders = RunLoaders(
            recipe, self.dataset, self.device, recipe.memory.total(counts[order]),
            before=None if begun is None else begun.data.loader,
        )  # fmt: skip
        self.recipe = recipe = recipe.read_by(self.loaders.train.name)
        self.method = recipe.build_method(student.width, len(order), self.device)
        probe = recipe.build_method(student.width, len(order), self.device)
        for plan in self.steps[:2]:  # a mistake in code from outside is said before there is a directory
            seen = np.pad(counts[order][: plan.classes_seen], (0, student.width - plan.classes_seen))
            context = StepContext(plan.step, plan.classes_old, plan.classes_seen, seen)
            outside.imported(f"method={recipe.method.method}", partial(probe.begin_step, context))
        self.meta: MetaAlpha | None = None
        if recipe.loss.loss == "meta_balanced":
            self.meta = MetaAlpha(recipe.meta, self.method, recipe.train.batch_size)
        self.phases = Phases(recipe, student, self.method, self.meta, self.loaders.train, len(self.steps))
        self.trainer = Trainer(
            recipe.train, student, teacher, self.loaders.train,
            torch.from_numpy(self.protocol.positions(len(names))).to(self.device),
            save=lambda *place: self.save(Position(self.step, *place)), report=self.report,
            tick=self.progress.advance, stop=self.interrupt.requested, say=self.progress.say,
        )  # fmt: skip
        self.frozen = FrozenNetwork(student, self.loaders)
        self.rehearsal = Rehearsal(recipe, self.protocol, self.dataset, self.frozen, self.progress.say)
        self.extractor = FeatureExtractor(self.frozen.training_output, lambda p: self.dataset.train.of_class(order[p]))
        self.parts = RunParts(
            len(self.steps), self.trainer, self.meta, self.method, self.rehearsal, self.loaders, self.clock
        )
        self.step = 0
        self.described: ProtocolFile | None = None  # protocol.json, in the process that writes it

    def run(self) -> Results:
        """Train what is left of the run. Returns the content of results.json.

        Raises trainer.Stopped on SIGTERM or SIGINT, with a checkpoint written.
        """
        devices = [self.device] if self.device.type == "cuda" else []
        with (
            self.directory.held(), self.tracking, self.interrupt, torch.random.fork_rng(devices),
            choosing_kernels(self.recipe.train.deterministic, self.device), multiplying_in("fp32", self.device),
        ):  # fmt: skip
            position = self.restore()
            if self.described is not None:
                announcement = messages.announcement(
                    self.recipe, self.dataset, self.protocol, self.steps, self.loaders, self.directory.path,
                    self.described,
                )  # fmt: skip
                if position.step < len(self.steps):
                    self.progress.say(announcement)
                self.tracking.begin(self.recipe, announcement, len(self.parts.results))
            if position.step < len(self.steps):
                self.compile()
                for line in messages.of_changes(self.parts.ran_before, self.parts.conditions()):
                    self.progress.say(f"{self.directory.path}: {line}")
            for plan in self.steps[position.step :]:
                self.run_step(plan, position if position.step == plan.step else Position(plan.step))
                state = self.parts.state_dict(Position(plan.step + 1))
                self.directory.save_step(plan.step, self.trainer.student.state_dict(), state)
                self.directory.write_results(self.recipe, self.parts.results)
                self.write_timings()
                self.directory.save(state)  # last: only now is the step never done again
                self.tracking.step()
            self.directory.write_results(self.recipe, self.parts.results)
            if ranks.first():
                passing("drawing the figures")
            ranks.from_first(self.directory.draw)  # after which all files are there, for all processes
            return run_directory.results_of(self.recipe, self.parts.results)

    def run_step(self, plan: StepPlan, position: Position) -> None:
        """One step, from its beginning or from a position inside it."""
        self.step = plan.step
        seed_torch(self.recipe.train.seed, plan.step, "open")
        if position == Position(plan.step):
            position = self.open_classes(plan)
        if position.phase == "train":
            position = self.train(plan, position)
        if position.phase == "correct":
            self.finetune(plan, position)
        began = time.perf_counter()
        self.progress.begin_phase(plan.step, "memory")
        self.select_exemplars(plan)
        selected = time.perf_counter()
        self.progress.begin_phase(plan.step, "evaluate")
        self.parts.results.append(self.evaluate(plan))
        self.clock.set(plan.step, memory=selected - began, evaluate=time.perf_counter() - selected)
        self.progress.end()
        self.progress.say(messages.of_step(self.parts.results[-1], self.clock.trained(plan.step)))

    def open_classes(self, plan: StepPlan) -> Position:
        """Freeze the teacher and initialise the head's rows of the new classes; a base step may be another run's. In
        joint training the network is a new one, with all of its rows."""
        self.trainer.begin_step()
        generator = torch.Generator().manual_seed(init_seed(self.recipe.train.seed, plan.step))
        student, first = self.trainer.student, plan.classes_old
        if self.method.is_joint:
            fresh, first = self.recipe.build_network(len(self.protocol.order), self.recipe.train.seed), 0
            student.load_state_dict(fresh.state_dict())
        self.method.open_classes(student, first, plan.classes_seen, generator, self.extractor)
        if self.shared_base is None or plan.step > 0:
            return Position(plan.step)
        student.load_state_dict(self.shared_base.weights)
        for line in self.shared_base.metrics:
            self.append(line)
        self.parts.base_step_of = self.shared_base.source
        self.progress.say(f"base step taken from {self.shared_base.source}")
        return Position(plan.step, "memory")

    def train(self, plan: StepPlan, position: Position) -> Position:
        """Train on the new classes and the exemplars. Returns where the step goes on."""
        ids, held_out = self.rehearsal.training_set(plan.step)
        self.begin(plan, ids, fresh=position.epoch == position.batch == 0)
        probabilities = self.recipe.sampler.probabilities(self.rehearsal.positions_of(ids), plan.classes_old)
        phase = self.phases.training(plan.step, ids, probabilities, held_out)
        self.loaders.keep(self.rehearsal.memory.ids())
        done = position.epoch * len(ids) + position.batch * self.recipe.train.batch_size
        self.progress.begin_phase(plan.step, "train", position.epoch + 1, phase.epochs, done)
        self.trainer.fit(phase, position.epoch, position.batch)
        position = Position(plan.step, "memory")
        if self.recipe.correction.epochs_of(plan.step):
            self.rehearsal.select_finetuning_set(plan.step)
            position = Position(plan.step, "correct")
        self.save(position)
        return position

    def finetune(self, plan: StepPlan, position: Position) -> None:
        """Balanced finetuning on the exemplars of every class seen, herded for it."""
        ids = self.rehearsal.finetuning_set
        self.begin(plan, ids, fresh=position.epoch == position.batch == 0)
        self.loaders.keep(self.rehearsal.memory.ids())
        phase = self.phases.finetuning(plan.step, ids)
        done = position.epoch * len(ids) + position.batch * self.recipe.train.batch_size
        self.progress.begin_phase(plan.step, "correct", position.epoch + 1, phase.epochs, done)
        self.trainer.fit(phase, position.epoch, position.batch)
        self.save(Position(plan.step, "memory"))

    def begin(self, plan: StepPlan, ids: Ids, *, fresh: bool) -> None:
        """Set the method to what is trained on now. fresh: Meta's alpha starts again; otherwise it goes on."""
        counts = np.bincount(self.rehearsal.positions_of(ids), minlength=self.trainer.student.width)
        self.method.begin_step(StepContext(plan.step, plan.classes_old, plan.classes_seen, counts))
        if self.meta is not None:
            self.meta.begin_step() if fresh else self.meta.refresh()

    def select_exemplars(self, plan: StepPlan) -> None:
        """Let the method correct what it has trained, select the exemplars, and let the method work on them."""
        ids, held_out = self.rehearsal.training_set(plan.step)
        self.begin(plan, ids, fresh=False)
        seed_torch(self.recipe.train.seed, plan.step, "memory")
        student = self.trainer.student
        if plan.step > 0:
            positions = torch.from_numpy(self.rehearsal.positions_of(held_out)).to(self.device)
            self.method.after_training(student, self.extractor, held_out, positions)
            self.agree()
        self.directory.write_exemplars(plan.step, self.rehearsal.update(plan.step))
        kept = self.rehearsal.memory.ids()
        memory = MemoryContext(
            kept, self.rehearsal.positions_of(kept), self.extractor, self.loaders.plain,
            lambda epoch: self.trainer.batches(self.phases.training_epoch(plan.step, ids, None, epoch)),
        )  # fmt: skip
        pixels = self.method.after_memory(student, memory)
        self.agree()
        ranks.copy_from_first(list(pixels.values()))
        self.loaders.overlay(pixels)
        ranks.check_same("exemplars and weights", self.digest)

    def agree(self) -> None:
        """Give the methods of all processes the state of the first one's, which each has computed for itself."""
        state = ranks.from_first(self.method.state_dict)
        if not ranks.first():
            self.method.load_state_dict(state)

    def digest(self) -> str:
        """What all processes must agree in after a step."""
        found = hashlib.sha256(self.rehearsal.memory.ids().tobytes())
        for value in self.trainer.student.state_dict().values():
            found.update(value.cpu().numpy().tobytes())
        return found.hexdigest()

    def evaluate(self, plan: StepPlan) -> StepResult:
        """Top-1 over the test images of every class seen, by the recipe's predictor."""
        positions = self.rehearsal.positions[self.dataset.val.labels]
        ids = np.flatnonzero((positions >= 0) & (positions < plan.classes_seen))
        out = self.frozen.test_output(ids)
        nme = self.recipe.evaluation.predictor == "nme"
        if nme:
            kept, mirrored = self.rehearsal.memory.ids(), self.recipe.evaluation.nme_mirrored
            means = self.frozen.class_means(kept, self.rehearsal.positions_of(kept), mirrored)
            scores = nearest_mean_scores(out.features, means)
            self.directory.write_predictor(plan.step, {"means": means})
        else:
            scores = self.method.predict(out.logits)
            if type(self.method).predict is not Method.predict:
                context = self.method.context
                state = {"num_old": context.num_old, "num_seen": context.num_seen, "method": self.method.state_dict()}
                self.directory.write_predictor(plan.step, state | {"counts": torch.from_numpy(context.counts)})
        result, confusion, predicted = evaluate(
            scores, torch.from_numpy(positions[ids]).to(self.device), step=plan.step,
            num_base=self.steps[0].classes_seen, num_old=plan.classes_old, num_seen=plan.classes_seen,
        )  # fmt: skip
        self.directory.write_confusion(plan.step, confusion)
        self.directory.write_predictions(plan.step, positions[ids], predicted)
        return dataclasses.replace(result, nme_top1=result.top1) if nme else result

    def restore(self) -> Position:
        """Take up the latest checkpoint of the directory that can be used. Returns where the run goes on."""
        state = ranks.from_first(self.claim)
        if state is None:
            return Position()
        if not ranks.first():
            self.parts.take_up(state, self.directory, self.directory.last)
        return state.position

    def claim(self) -> Checkpoint | None:
        """Claim the directory, and take up the latest checkpoint of it that can be used."""
        transform = self.loaders.test.transform
        size = transform.height, transform.width
        read_by = [self.loaders.train.name, *(self.shared_base.read_by if self.shared_base else ())]
        protocol = run_directory.protocol_file(self.recipe, self.dataset, self.protocol, self.steps, size, read_by)
        protocol = self.directory.check(self.recipe, protocol)
        state = self.parts.resumed(self.directory, self.device, self.progress.say)
        if state is not None and state.position.step == len(self.steps):  # finished: nothing is trained now
            protocol = self.directory.trained_as_before(protocol)
        self.described = protocol
        self.directory.begin(self.recipe, protocol, state)
        path = self.directory.path
        if state is None:
            if self.resume:
                self.progress.say(f"{path}: no checkpoint to resume from, starting from the beginning")
            return None
        if state.weights_sha256 is not None:  # of a finished step: last.pt cannot be used
            self.save(state.position)
        finished, last = state.position.step == len(self.steps), len(self.steps) - 1
        if finished and not (path / f"checkpoints/step_{last}.pt").exists():
            self.directory.save_step(last, self.trainer.student.state_dict(), self.parts.state_dict(state.position))
        if self.parts.results:
            self.directory.write_results(self.recipe, self.parts.results)
            if not (path / "timings.json").exists():
                self.write_timings()
        lost = self.directory.mend(self.parts.results)
        if lost:
            self.progress.say(f"{path}: missing, and only training again writes them: {', '.join(lost)}")
        self.progress.say(f"{path}: {'finished already' if finished else messages.of_resume(state.position)}")
        return state

    def save(self, position: Position) -> None:
        """Write the checkpoint of this position."""
        self.directory.save(self.parts.state_dict(position))

    def report(self, record: EpochRecord) -> None:
        """Write and show an epoch."""
        line = dataclasses.asdict(record)
        measured = [line.pop(name) for name in ("seconds", "data_seconds", "loader_idle")]  # which no rerun reproduces
        self.clock.epoch(record.step, record.phase, record.images, *measured)
        self.append(line | line.pop("observed"))
        self.progress.epoch(messages.of_epoch(record, self.loaders.streams), record.epoch, record.epochs)

    def append(self, line: dict[str, Any]) -> None:
        """Write a line of metrics.jsonl, and tell the trackers."""
        self.directory.append_metrics(line)
        self.tracking.epoch(line)

    def compile(self) -> None:
        """Compile training and evaluation, each where the run repays it."""
        frozen = self.flops * step_plan.frozen_visits(self.steps, self.test_counts)
        training = step_plan.run_flops(self.steps, self.flops, self.method.uses_teacher)
        compiling.compile_run(
            self.recipe.train.compile, self.device, self.trainer.compile, training,
            self.frozen.compile, frozen, self.progress.say,
        )  # fmt: skip

    def write_timings(self) -> None:
        """Write timings.json."""
        run = {"base_step_of": self.parts.base_step_of, "compiled": self.trainer.compiled}
        self.directory.write_timings(self.clock.summary() | run | versions(self.device))

    def close(self) -> None:
        """Remove the bar, before the caller says how the run ended, and end the threads of the loaders."""
        self.progress.end()
        self.loaders.close()


def init_seed(seed: int, step: int) -> int:
    """The seed of the generator that initialises the head's rows of a step."""
    return seed * 10_000 + step + 1
