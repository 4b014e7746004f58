"""The training loop, written once; it serves every phase of every method.

The loop never waits for the device: the meter adds up there and is read once per epoch.
"""

import hashlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from fastil import files, ranks
from fastil.data import Batch, Inputs, Loader
from fastil.device import Precision, autocast, multiplying_in, pixel_dtype
from fastil.errors import UserError
from fastil.methods import BUILT_IN, Meter
from fastil.methods.meta import UpdateContext
from fastil.models import ExternalBackbone, Folded, Network, Output
from fastil.optimiser import TrainConfig, Update
from fastil.plan import EpochPlan, drawn_ahead, num_batches, share_of
from fastil.reporting.checkpoints import TrainerState
from fastil.training.captured import CapturedStep, has_streams, side_stream
from fastil.training.compiling import compile_network
from fastil.training.phases import BeforeUpdate, Phase
from fastil.training.waiting import Waiting


@dataclass
class EpochRecord:
    """The figures of one epoch: a line of metrics.jsonl, without the seconds, which no rerun reproduces."""

    step: int
    phase: str
    epoch: int
    epochs: int
    lr: float
    loss: float
    train_top1: float  # percent, on augmented training images
    images: int
    seconds: float
    data_seconds: float  # for which the device had nothing to do because the next batch was not there
    loader_idle: float | None  # share of the time in which the loader's threads had nothing to do; None: not known
    observed: dict[str, Any]  # of the method: alpha, the scale of a cosine head


class Stopped(Exception):
    """A signal asked for a stop, and the checkpoint has been written."""


class Trainer:
    """Trains the student, with the teacher; both live for the whole run, compiled once, overwritten at each step.

    table: int64 [classes of the data set], from label to incremental position. save(phase, epoch, batch) writes a
    checkpoint that resumes before that batch; report gets every finished epoch; tick the images of every batch; stop
    returns whether a signal came; say shows the user a line.
    """

    def __init__(
        self,
        config: TrainConfig,
        student: Network,
        teacher: Network,
        loader: Loader,
        table: Tensor,
        *,
        save: Callable[[str, int, int], None],
        report: Callable[[EpochRecord], None],
        tick: Callable[[int], None],
        stop: Callable[[], bool],
        say: Callable[[str], None],
    ) -> None:
        self.config, self.student, self.teacher = config, student, teacher
        self.loader, self.table = loader, table
        self.save, self.report, self.tick, self.stop, self.say = save, report, tick, stop, say
        self.device = table.device
        assert config.precision != "auto"  # Recipe.settled has said what it means
        self.precision: Precision = config.precision
        self.pixels = pixel_dtype(self.precision)
        self.teacher.eval().requires_grad_(False)
        self.fast_student: Callable[[Tensor], Output] = student
        self.full = share_of(config.batch_size, ranks.rank(), ranks.count())  # images of a full batch that are here
        self.folded_teacher = Folded(teacher, self.pixels, self.full)
        self.lr = torch.zeros((), device=self.device)
        # A row more than the batch size, because a rest of one image joins the batch before it. The loss kernel adds
        # to the rows; nothing else touches them in an epoch.
        rows = torch.zeros(config.batch_size + 1, 4, device=self.device)
        self.meter = Meter(rows, torch.zeros((), device=self.device))
        self.sums = torch.zeros(5, device=self.device)  # what the meters of several processes have added up to
        self.images = 0  # counted in the meter
        # Code from outside may wait for the device, or have what changes in Python: nobody knows.
        # The same goes for exchanges with other processes, which no GPU has captured yet.
        self.captures = not isinstance(student.backbone, ExternalBackbone) and ranks.count() == 1
        self.updates: dict[str, Update] = {}
        self.momentum: dict[str, list[Tensor]] = {}  # of phases in a checkpoint, until they go on
        self.seconds = 0.0  # of the epoch so far, over resumes
        self.waiting = Waiting(loader)

    def compile(self) -> str | None:
        """Compile both networks for full batches, the student unless its layers exchange something. Returns None, or in
        one line why that failed."""
        size = (self.loader.transform.height, self.loader.transform.width)
        example = torch.zeros(self.full, 3, *size, dtype=self.pixels, device=self.device)
        example = example.to(memory_format=torch.channels_last)
        student, why_not = self.fast_student, None
        with multiplying_in(self.precision, self.device):
            if ranks.count() > 1 and self.config.bn == "sync":
                self.say("bn=sync: the student runs uncompiled, because it exchanges statistics at every layer")
            else:
                with self.autocast():
                    together = self.precision == "bf16" and not isinstance(self.student.backbone, ExternalBackbone)
                    student, why_not = compile_network(self.student, example, train=True, cast_weights=together)
            if why_not is None:
                teacher, why_not = compile_network(self.folded_teacher.plain, example, train=False)
        if why_not is None:
            self.fast_student, self.folded_teacher.fast = student, teacher
        return why_not

    @property
    def compiled(self) -> bool:
        """Whether the student is compiled."""
        return self.fast_student is not self.student

    def autocast(self) -> torch.autocast:
        """Return the context in which the student's forward runs."""
        return autocast(self.precision, self.device)

    def fit(self, phase: Phase, first_epoch: int = 0, first_batch: int = 0) -> None:
        """Run a phase, from its beginning or from where a checkpoint stopped."""
        with (
            multiplying_in(self.precision, self.device),
            side_stream(self.device),
            drawn_ahead(phase.plan, range(first_epoch, phase.epochs)) as plans,
        ):
            self._fit(phase, first_epoch, first_batch, plans)
        ranks.copy_from_first(list(self.student.buffers()))  # layers from outside may keep more of their own images

    def _fit(self, phase: Phase, first_epoch: int, first_batch: int, plans: Iterator[EpochPlan]) -> None:
        update = self.update(phase)
        ranks.copy_from_first([*self.student.state_dict().values(), *update.buffers])
        step = CapturedStep(
            lambda inputs, size: self.train_step(phase, update, inputs, size),
            capture=self.captures and has_streams(self.device) and phase.method.name in BUILT_IN,
            failed=self.uncaptured,
        )
        if first_epoch == first_batch == 0:
            update.reset()
            self.forget_epoch()
        self.student.train(phase.bn_mode == "train")
        saved = time.monotonic()  # all that is done by now is in a checkpoint, or costs nothing to repeat
        for epoch in range(first_epoch, phase.epochs):
            self.lr.fill_(phase.schedule(epoch))
            plan = next(plans)
            done = epoch * num_batches(len(plan.ids), plan.batch_size)  # updates of earlier epochs
            last = done + num_batches(len(plan.ids), plan.batch_size)
            held_out = self.waiting.over(self.held_out(phase, done + first_batch, last))
            started, before = time.perf_counter(), self.seconds
            sizes = plan.sizes().tolist()  # of the batches, which several processes may share
            batches = self.loader.inputs(plan.of_rank(ranks.rank(), ranks.count()), first_batch)
            self.waiting.begin_epoch()
            for number, inputs in enumerate(self.waiting.over(batches), first_batch):
                stop = self.stop()
                if stop or time.monotonic() - saved >= 60 * self.config.checkpoint_minutes:
                    self.seconds = before + time.perf_counter() - started
                    self.save(phase.name, epoch, number)
                    if stop:
                        raise Stopped
                    saved = time.monotonic()
                of_others = () if ranks.first() else (ranks.rank(),)  # the first draws what one process does
                seed_torch(self.config.seed, phase.step, phase.name, epoch, number, *of_others)
                if phase.before_update is not None and (done + number) % phase.before_update.every == 0:
                    self.before_update(phase, phase.before_update, update, inputs, sizes[number], next(held_out))
                step(inputs, sizes[number])
                self.images += sizes[number]
                self.tick(sizes[number])
            first_batch = 0
            sums = self.sums + self.metered()
            ce, kd, hits, ranking, unfused = sums.tolist()  # the epoch's one wait for the device
            loss = unfused + sum(
                w * term for w, term in zip(phase.method.meter_weights, (ce, kd, ranking), strict=True)
            )
            if not math.isfinite(loss):
                raise UserError(
                    f"the loss became {loss} in step {phase.step}, epoch {epoch + 1}: training diverged; "
                    f"lower {'lr' if phase.name == 'train' else 'finetune_lr'} and choose another --out"
                )
            self.report(
                EpochRecord(
                    step=phase.step,
                    phase=phase.name,
                    epoch=epoch + 1,
                    epochs=phase.epochs,
                    lr=phase.schedule(epoch),
                    loss=loss / self.images,
                    train_top1=100 * hits / self.images,
                    images=self.images,
                    seconds=before + time.perf_counter() - started,
                    data_seconds=self.waiting.read(),
                    loader_idle=self.waiting.loader_idle(),
                    observed=phase.observed(),
                )
            )
            self.forget_epoch()
            if (epoch + 1) % self.config.checkpoint_every == 0 and epoch + 1 < phase.epochs:
                self.save(phase.name, epoch + 1, 0)
                saved = time.monotonic()

    def batches(self, plan: EpochPlan) -> Iterator[Batch]:
        """Yield training batches for uses other than `fit`; labels are incremental positions. Raises Stopped after a
        signal, without writing a checkpoint: a resume goes back to the last one and repeats what was begun."""
        for batch in self.loader.batches(plan):
            if self.stop():
                raise Stopped
            self.tick(len(batch.ids))
            yield batch._replace(labels=self.table[batch.labels])

    def held_out(self, phase: Phase, first: int, last: int) -> Iterator[Batch]:
        """Return an iterator of held-out batches, one for each call of `before_update` among the updates first to
        last."""
        hook = phase.before_update
        if hook is None:
            return iter(())
        start, stop = -(-first // hook.every), -(-last // hook.every)
        if stop <= start:
            return iter(())
        plan = hook.plan(start, stop - start)
        return self.loader.batches(plan.of_rank(ranks.rank(), ranks.count()), 0, self.pixels)

    def train_step(self, phase: Phase, update: Update, inputs: Inputs, size: int) -> None:
        """Make one update, of `size` images over all processes. Nothing here reads a value back from the device, and
        what is launched does not depend on one."""
        batch, teacher_out, student = self.prepared(phase, inputs, size)
        try:
            with self.autocast():
                out = student(batch.images)
            phase.method.backward(batch, out, teacher_out, self.meter)
            if ranks.count() > 1:
                self.exchange(phase, update, batch.share, copies_of(batch, size))
            update.apply()
        finally:  # a capture that fails must leave no gradient to which the next step would add
            self.student.zero_grad()

    def exchange(self, phase: Phase, update: Update, share: float, copies: int = 1) -> None:
        """Add up over all processes, at once, the gradients, the meter, and the statistics of batch normalisation that
        are of each one's own images, weighted by their share: so whatever changes is the same everywhere, and any
        checkpoint is good for any number of processes. copies: how many processes have the same images."""
        running = []
        if phase.bn_mode == "train" and self.config.bn == "local":
            layers = (m for m in self.student.modules() if isinstance(m, _BatchNorm) and m.training)
            running = [b for m in layers for b in (m.running_mean, m.running_var) if b is not None]
            if running:  # layers from outside may normalise otherwise
                torch._foreach_mul_(running, share)
        metered = self.metered() / copies
        built_in = phase.method.name in BUILT_IN and not isinstance(self.student.backbone, ExternalBackbone)
        update.add_up([metered, *running], alike=built_in)
        self.sums.add_(metered)
        for part in self.meter:
            part.zero_()

    def metered(self) -> Tensor:
        """Return the sums of the meter: cross-entropy, distillation, hits, margin ranking and other terms, [5]."""
        return torch.cat((self.meter.rows.sum(0), self.meter.unfused[None]))

    def before_update(
        self, phase: Phase, hook: BeforeUpdate, update: Update, inputs: Inputs, size: int, held_out: Batch
    ) -> None:
        """Let Meta move alpha. It makes the batch once more and runs the teacher once more, so that the step that
        follows is the same as all others."""
        batch, teacher_out, student = self.prepared(phase, inputs, size)
        held_out = self.placed(held_out, self.config.batch_size)
        hook.run(UpdateContext(batch, teacher_out, held_out, student, self.student, update, self.autocast))

    def prepared(
        self, phase: Phase, inputs: Inputs, size: int
    ) -> tuple[Batch, Output | None, Callable[[Tensor], Output]]:
        """Make the batch, its labels incremental positions, run the teacher on it, and choose the student: the compiled
        one where it was compiled for such a batch, because a ragged one would recompile everything."""
        batch = self.placed(self.loader.batch(inputs, self.pixels), size)
        if ranks.count() > 1 and self.config.bn == "sync":
            self.student.synchronise(copies_of(batch, size))
        teacher_out = self.folded_teacher(batch.images) if phase.teacher else None
        full = len(batch.images) == self.full and phase.bn_mode == "train"
        return batch, teacher_out, self.fast_student if full else self.student

    def placed(self, batch: Batch, size: int) -> Batch:
        """Return a batch of `size` images over all processes with incremental positions as labels, and its share."""
        return batch._replace(labels=self.table[batch.labels], share=len(batch.ids) / (size * copies_of(batch, size)))

    def uncaptured(self, why: str) -> None:
        """Say why a step cannot be captured, and try no more."""
        self.captures = False
        self.say(why)

    def update(self, phase: Phase) -> Update:
        """Return the phase's optimiser: SGD with momentum and weight decay on every parameter, as in the reference
        codes. It is rebuilt only if the parameters are others."""
        decay = self.config.weight_decay if phase.weight_decay is None else phase.weight_decay
        known = self.updates.get(phase.name)
        parameters = [p for p in phase.parameters if p.requires_grad]  # a backbone from outside may freeze some
        if known is None or list(map(id, known.parameters)) != list(map(id, parameters)):
            known = Update(parameters, self.lr, self.config.momentum, decay, phase.trainable, phase.clamp)
            self.updates[phase.name] = known
            saved = self.momentum.pop(phase.name, [])
            # Otherwise it belongs to an earlier step that trained other parameters, and this one begins without.
            if [value.shape for value in saved] == [buffer.shape for buffer in known.buffers]:
                for buffer, value in zip(known.buffers, saved, strict=True):
                    buffer.copy_(value)
        known.set_weight_decay(decay)
        return known

    def forget_epoch(self) -> None:
        """Set the meter and the clock of the epoch to 0."""
        for part in (*self.meter, self.sums):
            part.zero_()
        self.images, self.seconds, self.waiting.seconds = 0, 0.0, 0.0

    def begin_step(self) -> None:
        """Make the network of the step before the teacher."""
        self.teacher.load_state_dict(self.student.state_dict())
        self.folded_teacher.refresh()

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint holds of training: networks, meter, clock and momentum."""
        return {
            "student": self.student.state_dict(),
            "teacher": self.teacher.state_dict(),
            "meter": self.meter_state(),
            "clock": [self.images, self.seconds, self.waiting.read()],
            "momentum": self.momentum | {name: update.buffers for name, update in self.updates.items()},
        }

    def meter_state(self) -> list[Tensor]:
        """Return the meter with what several processes have added up in it."""
        rows, unfused = self.meter.rows.clone(), self.meter.unfused + self.sums[4]
        rows[0] += self.sums[:4]
        return [rows, unfused]

    def load_state_dict(self, state: TrainerState, path: Path, fix: str) -> None:
        """Take up a checkpoint. path, fix: of the weights, for a message. Raises Damaged, or ValueError where the rest
        does not fit."""
        files.load_weights(self.student, state.student, path, fix)
        files.load_weights(self.teacher, state.teacher, path, fix)
        self.folded_teacher.refresh()
        self.forget_epoch()
        for part, saved in zip(self.meter, state.meter, strict=True) if state.meter else ():
            if part.shape != saved.shape:
                raise ValueError(f"meter: {[*saved.shape]} in the place of {[*part.shape]}")
            part.copy_(saved)
        if ranks.count() > 1:  # each process would count them
            self.sums.copy_(self.metered())
            for part in self.meter:
                part.zero_()
        self.images, self.seconds, self.waiting.seconds = state.clock
        self.updates, self.momentum = {}, dict(state.momentum)


def copies_of(batch: Batch, size: int) -> int:
    """Return how many processes have the same images of a batch of `size`: all, if it was too small to be shared
    out."""
    return ranks.count() if len(batch.ids) == size else 1


def seed_torch(*place: int | str) -> None:
    """Seed torch's global generators by the place in a run. Code from outside may draw from them (dropout, random
    depth, a loss that mixes images); a resume or a rerun then draws the same."""
    torch.manual_seed(int.from_bytes(hashlib.blake2b(repr(place).encode(), digest_size=8).digest()))
