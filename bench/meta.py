"""The cost of learning alpha: time per step and peak memory, against a plain step and two unrolled graphs.

python -m bench.meta [--rounds N] [--precision bf16]

The public library needs `pip install higher`; without it that line is left out.

plain: a step of BalancedS-CE with distillation. jvp, difference: Meta BalancedS-CE as fastil computes it, at every step
and at every tenth (section 4.1.3). unrolled: the graph through the update that the paper describes, every step. higher:
the same by the library `higher`, in the usual eager loop. ResNet-32 at 32x32, batch 128, 50 old and 10 new classes. All
gradients of alpha are compared first. Peak memory: the highest sum of the profiler's allocations and releases within a
turn, so what was there before (data, weights, momentum, the teacher) is not included; it is stated separately.
"""

import argparse
import dataclasses
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.harness import digits_at, ratio, save, show, spread, take_turns
from bench.train_step import BATCH, NUM_OLD, build
from fastil.device import Precision, pick_device
from fastil.losses import balanced_cross_entropy
from fastil.methods import LossConfig, MetaAlpha, MetaConfig
from fastil.methods.meta import UpdateContext
from fastil.training.phases import BeforeUpdate

CYCLE = 10  # steps per turn: a tenth of them with an update of alpha where every = 10


class Bench:
    """A trainer in the middle of an incremental step, its batch and a balanced one."""

    def __init__(self, precision: Precision) -> None:
        self.device = pick_device("auto")
        split = digits_at(32, 2 * BATCH)
        loss = LossConfig("meta_balanced")
        self.trainer, self.method, self.phase, _ = build(split, self.device, 2 * BATCH, loss, precision)
        self.trainer.table = torch.arange(0, 60, 6, device=self.device)  # the ten digits, over old and new classes
        self.inputs, _ = self.trainer.loader.inputs(self.phase.plan(0))
        self.batch, self.held_out = self.trainer.loader.batches(self.phase.plan(0), 0, self.trainer.pixels)
        self.trainer.lr.fill_(0.01)
        self.trainer.student.train()
        self.update = self.trainer.update(self.phase)

    def meta(self, gradient: Any) -> MetaAlpha:
        """Return a MetaAlpha that computes its gradient in this way."""
        meta = MetaAlpha(MetaConfig(meta_gradient=gradient), self.method, BATCH)
        meta.begin_step()
        return meta

    def cycle(self, gradient: str | None, every: int) -> Callable[[], float]:
        """Return a function that gives the seconds per training step of a cycle."""
        phase, steps = self.phase, CYCLE if every > 1 else 2
        if gradient is not None:  # the trainer gets its balanced batch below, so no plan of them is asked for
            hook = BeforeUpdate(every, lambda first, count: phase.plan(0), self.meta(gradient).before_update)
            phase = dataclasses.replace(phase, before_update=hook)

        def run() -> float:
            began = time.perf_counter()
            for number in range(steps):
                if phase.before_update is not None and number % every == 0:
                    self.trainer.before_update(
                        phase, phase.before_update, self.update, self.inputs, len(self.inputs.ids), self.held_out
                    )
                self.trainer.train_step(phase, self.update, self.inputs, len(self.inputs.ids))
            self.trainer.meter.rows.sum(0).tolist()  # the end of the queue
            return (time.perf_counter() - began) / steps

        return run

    def context(self) -> UpdateContext:
        """Return the step just before its update, with both batches."""
        table, trainer = self.trainer.table, self.trainer
        batch, held_out = (b._replace(labels=table[b.labels]) for b in (self.batch, self.held_out))
        with torch.no_grad():
            teacher_out = trainer.teacher(batch.images)
        return UpdateContext(
            batch, teacher_out, held_out, trainer.fast_student, trainer.student, self.update, trainer.autocast
        )


def with_higher(bench: Bench) -> Callable[[], Tensor] | None:
    """Return the gradient of the shared log alpha by the public library, as its users would write it; None if it is
    missing."""
    try:
        import higher  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        return None
    trainer, method = bench.trainer, bench.method
    optimizer = torch.optim.SGD(
        trainer.student.parameters(),
        lr=0.01,
        momentum=trainer.config.momentum,
        weight_decay=trainer.config.weight_decay,
    )
    for parameter, buffer in zip(bench.update.parameters, bench.update.buffers, strict=True):
        optimizer.state[parameter]["momentum_buffer"] = buffer
    is_old = method.classification.is_old

    def gradient() -> Tensor:
        context = bench.context()
        log_alpha = torch.zeros((), device=bench.device, requires_grad=True)
        prior = method.classification.prior_without_alpha + torch.where(is_old, log_alpha, 0.0)
        with higher.innerloop_ctx(trainer.student, optimizer, copy_initial_weights=True) as (unrolled, update):
            out = unrolled(context.batch.images)
            update.step(method.formula(context.batch, out, context.teacher_out, prior))
            logits = unrolled(context.held_out.images).logits
            seen = torch.where(prior > -torch.inf, 0.0, -torch.inf).detach()
            (found,) = torch.autograd.grad(balanced_cross_entropy(logits, context.held_out.labels, seen), log_alpha)
        return found

    return gradient


def peak_bytes(run: Callable[[], object]) -> int:
    """Return the highest sum of allocations minus releases while it runs, in bytes."""
    with torch.profiler.profile(profile_memory=True) as profile:
        run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    return int(np.cumsum(sizes).max())


def main() -> None:
    """Run the bench and write its result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    arguments = parser.parse_args()
    rounds = arguments.rounds
    bench = Bench(arguments.precision)
    higher = with_higher(bench)
    gradients = {
        name: float(bench.meta(name).gradient(bench.context()).sum()) for name in ("unrolled", "jvp", "difference")
    }
    if higher is not None:
        gradients["higher"] = float(higher())
    for name, value in gradients.items():
        print(
            f"dL_val/dlog alpha by {name:<12}{value:+.6e}  {abs(value / gradients['unrolled'] - 1):.1e} from unrolled"
        )
    plain = bench.cycle(None, CYCLE)
    contestants = {
        "plain": plain,
        "jvp, every 10": bench.cycle("jvp", 10),
        "difference, every 10": bench.cycle("difference", 10),
        "jvp, every step": bench.cycle("jvp", 1),
        "difference, every step": bench.cycle("difference", 1),
        "unrolled, every step": bench.cycle("unrolled", 1),
    }

    def higher_step() -> float:
        began = time.perf_counter()
        assert higher is not None
        higher()
        bench.trainer.train_step(bench.phase, bench.update, bench.inputs, len(bench.inputs.ids))
        return time.perf_counter() - began

    if higher is not None:
        contestants["higher, every step"] = higher_step
    for run in contestants.values():
        run()  # warm-up
    figures = take_turns(contestants, rounds)
    peaks = {name: peak_bytes(run) for name, run in contestants.items()}
    ratios = {name: ratio(figures, name, "plain") for name in contestants if name != "plain"}
    for name, values in figures.items():
        show(f"{name}: seconds per step", spread(values), "s")
    for name, over_plain in ratios.items():
        show(f"{name} / plain: time", over_plain)
        print(f"{name} / plain: peak memory{peaks[name] / peaks['plain']:28.3f}  ({peaks[name] / 2**20:.0f} MiB)")
    resident = sum(t.nbytes for t in [*bench.trainer.student.parameters(), *bench.update.buffers])
    content = {
        "rounds": rounds,
        "batch": BATCH,
        "model": "resnet32",
        "precision": arguments.precision,
        "num_old": NUM_OLD,
        "gradients of log alpha": gradients,
        "seconds per step": {name: spread(values) for name, values in figures.items()},
        "over plain": ratios,
        "peak bytes": peaks,
        "weights and momentum, bytes": resident,
    }
    print(f"written to {save(f'meta_{arguments.precision}', bench.device, content)}")


if __name__ == "__main__":
    main()
