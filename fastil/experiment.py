"""One run: for each step train, select exemplars, evaluate, save."""

import dataclasses
import json
import os
import platform
import signal
import time
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from fastil import checkpoint, compiling, memory, summary
from fastil.data import Dataset, load_dataset, make_loader
from fastil.errors import UserError
from fastil.evaluation import StepResult, evaluate, forward
from fastil.methods import ILBaseline, StepContext
from fastil.models import build_network
from fastil.plan import Key, Transform, training_plan
from fastil.progress import Progress
from fastil.protocol import build_protocol
from fastil.recipe import Recipe, read_effective
from fastil.report import draw_run
from fastil.trainer import EpochRecord, Phase, Stopped, Trainer


class Position(NamedTuple):
    """Where a checkpoint resumes. phase "train" goes on before that batch, "memory" with everything after training."""

    step: int = 0
    phase: str = "train"
    epoch: int = 0
    batch: int = 0


class Experiment:
    """The state of a run and its directory. The directory is made when everything that can be wrong has been checked."""

    def __init__(self, recipe: Recipe, out: Path, resume: bool) -> None:
        if out.exists() and not resume:
            raise UserError(f"{out}: exists already; go on with --resume, or choose another --out")
        self.recipe, self.out = recipe, out
        self.device = pick_device(recipe.train.device)
        self.progress = Progress()
        self.say = self.progress.say
        self.signal: int | None = None
        self.dataset: Dataset = load_dataset(recipe.data)
        for note in self.dataset.notes:
            self.say(note)
        names = self.dataset.class_names
        self.protocol = build_protocol(recipe.protocol, len(names))
        self.class_steps = self.protocol.steps
        self.train_counts = np.bincount(self.dataset.train.labels, minlength=len(names))
        self.steps = summary.effective_steps(recipe, self.protocol, self.train_counts)
        self.transform = transform_of(recipe, self.dataset)
        total = len(self.protocol.order)
        self.positions = self.protocol.positions(len(names))
        table = torch.from_numpy(self.positions).to(self.device)
        student, teacher = (build_network(recipe.model, total, recipe.train.seed).to(self.device) for _ in range(2))
        self.method = ILBaseline(recipe.method, student.width, self.device)
        self.train_loader = make_loader(self.dataset.train, "auto", self.transform, self.device)
        self.val_loader = make_loader(self.dataset.val, "auto", self.transform, self.device)
        self.trainer = Trainer(
            recipe.train, student, teacher, self.train_loader, table,
            save=self.save_in_phase, report=self.report_epoch, tick=self.progress.tick, stop=lambda: self.signal is not None,
        )  # fmt: skip
        self.memory = memory.RehearsalMemory()
        self.results: list[StepResult] = []
        self.step = 0
        self.seconds: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))

    def run(self) -> dict[str, Any]:
        """Train what is left of the run; returns the content of results.json. Raises Stopped on SIGTERM or SIGINT."""
        try:
            for name in ("checkpoints", "memory", "confusion", "figures"):
                (self.out / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.out}: cannot be made ({error.strerror}); choose another --out") from None
        with checkpoint.locked(self.out), self.signals():
            return self._run()

    def _run(self) -> dict[str, Any]:
        position = self.restore()
        if position.step < len(self.class_steps):
            self.announce()
            self.compile()
        for step in range(position.step, len(self.class_steps)):
            self.step = step
            self.run_step(step, position)
            position = Position(step + 1)
            self.write_results()
            self.save(position)
            checkpoint.save(self.out / f"checkpoints/step_{step}.pt", self.trainer.student.state_dict())
        results = self.write_results()
        draw_run(self.out)
        return results

    def run_step(self, step: int, start: Position) -> None:
        """One step, from its beginning, or from `start` if that lies in it."""
        classes = self.class_steps[step]
        num_old = sum(len(c) for c in self.class_steps[:step])
        num_seen = num_old + len(classes)
        clock = self.seconds[str(step)]
        ids = np.concatenate([*(self.dataset.train.of_class(c) for c in classes), self.memory.ids()])
        counts = np.bincount(self.positions[self.dataset.train.labels[ids]], minlength=self.trainer.student.width)
        self.method.begin_step(StepContext(step, num_old, num_seen, counts))
        began = time.perf_counter()
        if start.step != step or start == Position(step):
            self.trainer.begin_step(num_seen)
            generator = torch.Generator().manual_seed(init_seed(self.recipe.train.seed, step))
            self.trainer.student.head.open_rows(num_old, num_seen, generator)
            start = Position(step)
        if start.phase == "train":
            phase = self.training_phase(step, ids)
            plan = self.steps[step]
            self.progress.begin(
                f"step {step}", plan.visits, start.epoch * len(ids) + start.batch * self.recipe.train.batch_size
            )
            self.trainer.fit(phase, start.epoch, start.batch)
            self.progress.end()
            clock["train"] += time.perf_counter() - began
            self.save(Position(step, "memory"))
        began = time.perf_counter()
        self.select_exemplars(step, num_seen)
        clock["memory"] += time.perf_counter() - began
        began = time.perf_counter()
        result = self.evaluate_step(step, num_old, num_seen)
        clock["evaluate"] += time.perf_counter() - began
        self.results.append(result)
        old = "" if result.top1_old is None else f", old {result.top1_old:.2f}, new {result.top1_new:.2f}"
        self.say(f"step {step}: {num_seen} classes, top-1 {result.top1:.2f}{old}  ({clock['train']:.0f} s)")

    def training_phase(self, step: int, ids: np.ndarray[Any, np.dtype[np.int64]]) -> Phase:
        config = self.recipe.train
        epochs = config.epochs_of(step)
        return Phase(
            name="train",
            step=step,
            parameters=list(self.trainer.student.parameters()),
            plan=lambda epoch: training_plan(
                ids, Key(config.seed, step, "train", epoch), self.transform, config.batch_size
            ),
            epochs=epochs,
            schedule=lambda epoch: config.learning_rate(epoch, epochs),
            loss=self.method.loss,
            teacher=step > 0,
        )

    def select_exemplars(self, step: int, num_seen: int) -> None:
        """One pass over the images of the new classes; the older ones only keep a prefix of what they have."""
        config, train = self.recipe.memory, self.dataset.train
        quota = config.quota(num_seen)
        classes = self.class_steps[step]
        ids = [train.of_class(c) for c in classes]
        if config.exemplar_selection == "herding":
            features = forward(
                self.trainer.student, self.train_loader, np.concatenate(ids), self.trainer.autocast()
            ).features
            ranks = memory.herd_classes(features.split([len(i) for i in ids]), quota)
            chosen = [i[rank] for i, rank in zip(ids, ranks, strict=True)]
        else:
            key = Key(self.recipe.train.seed, step, "memory")
            chosen = [memory.select_at_random(i, quota, key) for i in ids]
        self.memory.reduce(quota)
        for class_id, exemplars in zip(classes, chosen, strict=True):
            self.memory.add(int(class_id), exemplars)
        short = [self.dataset.class_names[c] for c, i in zip(classes, ids, strict=True) if len(i) < quota]
        if short:
            self.say(f"step {step}: fewer than {quota} images in {', '.join(short)}; all of them are kept")
        content = {str(class_id): exemplars.tolist() for class_id, exemplars in self.memory.exemplars.items()}
        checkpoint.write_json(self.out / f"memory/step_{step}.json", content)

    def evaluate_step(self, step: int, num_old: int, num_seen: int) -> StepResult:
        val_positions = self.positions[self.dataset.val.labels]
        ids = np.flatnonzero((val_positions >= 0) & (val_positions < num_seen))
        logits = forward(self.trainer.student, self.val_loader, ids, self.trainer.autocast()).logits
        true = torch.from_numpy(val_positions[ids]).to(self.device)
        num_base = len(self.class_steps[0])
        result, confusion = evaluate(logits, true, step=step, num_base=num_base, num_old=num_old, num_seen=num_seen)
        checkpoint.write_atomically(self.out / f"confusion/step_{step}.npy", lambda file: np.save(file, confusion))
        return result

    # -- the run directory ---------------------------------------------------------------------------------------------

    def restore(self) -> Position:
        """Check that the directory is this recipe's and take up its last checkpoint, if there is one."""
        described = {
            "class_order": self.protocol.order.tolist(),
            "class_names": self.dataset.class_names,
            "class_list_hash": self.protocol.class_hash(self.dataset.class_names),
            "steps": [classes.tolist() for classes in self.class_steps],
            "dataset": {"name": self.dataset.name}
            | {
                name: {"sha256": split.sha256, "images": len(split.labels)}
                for name, split in (("train", self.dataset.train), ("val", self.dataset.val))
            },
            "effective": summary.as_json(self.steps),
        }
        recipe_path, protocol_path = self.out / "recipe.yaml", self.out / "protocol.json"
        last = self.out / "checkpoints/last.pt"
        if recipe_path.exists():
            old, new = read_effective(recipe_path).identity(), self.recipe.identity()
            changed = [f"{key} was {old[key]}, now {new[key]}" for key in new if old[key] != new[key]]
            if changed:
                raise UserError(
                    f"{self.out}: a run of another recipe ({'; '.join(changed)}); repeat its settings or choose another --out"
                )
        elif last.exists():
            raise UserError(f"{recipe_path}: missing, so this run cannot be checked; choose another --out")
        if last.exists() and protocol_path.exists():
            for split in ("train", "val"):
                if json.loads(protocol_path.read_text())["dataset"][split] != described["dataset"][split]:  # type: ignore[index]
                    raise UserError(
                        f"{self.out}: was run on other {split} images than those of --data; give the same ones"
                    )
        checkpoint.write_atomically(recipe_path, lambda file: file.write(self.recipe.dump().encode()) and None)
        checkpoint.write_json(protocol_path, described)
        metrics = self.out / "metrics.jsonl"
        if not last.exists():
            metrics.write_bytes(b"")
            return Position()
        state = checkpoint.load(last, self.device)
        position = Position(*state["position"])
        # A checkpoint may stand inside step K, whose optimiser state must find its buffers.
        phases = [self.training_phase(position.step, np.zeros(1, dtype=np.int64))]
        self.trainer.load_state_dict(state["trainer"], phases)
        self.memory.exemplars = {c: np.array(ids, dtype=np.int64) for c, ids in state["memory"].items()}
        self.results = [StepResult(**result) for result in state["results"]]
        for step, clock in state["seconds"].items():
            self.seconds[step].update(clock)
        with open(metrics, "ab") as file:
            file.truncate(state["metrics_bytes"])
        self.say(
            f"{self.out}: going on at step {position.step}, {position.phase}, epoch {position.epoch + 1}, batch {position.batch}"
        )
        return position

    def save_in_phase(self, epoch: int, batch: int) -> None:
        self.save(Position(self.step, "train", epoch, batch))

    def save(self, position: Position) -> None:
        metrics = self.out / "metrics.jsonl"
        state = {
            "position": list(position),
            "trainer": self.trainer.state_dict(),
            "memory": {class_id: ids.tolist() for class_id, ids in self.memory.exemplars.items()},
            "results": [dataclasses.asdict(result) for result in self.results],
            "seconds": {step: dict(clock) for step, clock in self.seconds.items()},
            "metrics_bytes": metrics.stat().st_size if metrics.exists() else 0,
        }
        checkpoint.save(self.out / "checkpoints/last.pt", state)

    def report_epoch(self, record: EpochRecord) -> None:
        line = dataclasses.asdict(record)
        clock = self.seconds[str(record.step)]
        clock["images"] += record.images
        clock["loop"] += line.pop("seconds")
        clock["waiting_for_data"] += line.pop("data_seconds")
        with open(self.out / "metrics.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
        rate = record.images / record.seconds
        self.progress.epoch(
            f"epoch {record.epoch}/{record.epochs}  lr {record.lr:.3g}  loss {record.loss:.4f}  "
            f"train top-1 {record.train_top1:.2f}  {rate:,.0f} img/s",
            last=record.epoch == record.epochs,
        )

    def write_results(self) -> dict[str, Any]:
        accuracies = [result.top1 for result in self.results]
        results = {
            "recipe": self.recipe.name,
            "method": self.recipe.method.method,
            "loss": self.recipe.method.loss,
            "seed": self.recipe.train.seed,
            "steps": [dataclasses.asdict(result) for result in self.results],
            "average_incremental_accuracy": sum(accuracies) / len(accuracies),
            "final_top1": accuracies[-1],
        }
        checkpoint.write_json(self.out / "results.json", results)
        steps = {}
        for step, clock in self.seconds.items():
            rate = clock["images"] / clock["loop"] if clock.get("loop") else None
            steps[step] = {
                "train": clock["train"], "correct": 0.0, "memory": clock["memory"], "evaluate": clock["evaluate"],
                "images_per_second": rate, "waiting_for_data": clock["waiting_for_data"],
            }  # fmt: skip
        machine = {"device": device_name(self.device), "cores": os.cpu_count(), "platform": platform.platform()}
        versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
        compiled = self.trainer.fast_student is not self.trainer.student
        timings = {"steps": steps, "compiled": compiled, "versions": versions, "machine": machine}
        checkpoint.write_json(self.out / "timings.json", timings)
        return results

    # -- around the run ------------------------------------------------------------------------------------------------

    def announce(self) -> None:
        recipe, method = self.recipe, self.recipe.method
        self.say(
            f"{recipe.name}: {method.method}, loss={method.loss}, seed {recipe.train.seed}, {recipe.model.model} on {device_name(self.device)}"
        )
        self.say(
            f"classes {self.protocol.class_hash(self.dataset.class_names)} of {self.dataset.name}, into {self.out}"
        )
        self.say(summary.as_table(self.steps))

    def compile(self) -> None:
        forward_flops = compiling.flops_per_image(self.trainer.student, self.transform.height, self.transform.width)
        wanted, why_not = compiling.decide(
            self.recipe.train.compile, self.device, lambda: summary.run_flops(self.steps, forward_flops)
        )
        if wanted:
            began = time.perf_counter()
            why_not = self.trainer.compile()
            self.say(why_not or f"compiled in {time.perf_counter() - began:.0f} s")
        elif why_not:
            self.say(why_not)

    def signals(self) -> "SignalFlag":
        return SignalFlag(self)


class SignalFlag:
    """SIGTERM and SIGINT set a flag that the next batch reads; a second one acts as usual."""

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            self.previous[number] = signal.signal(number, self.handle)

    def handle(self, number: int, frame: Any) -> None:
        self.experiment.signal = number
        signal.signal(number, self.previous[number])

    def __exit__(self, *exc: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)


def transform_of(recipe: Recipe, dataset: Dataset) -> Transform:
    """The transform a recipe asks for, at the size of the data set's images."""
    height, width = dataset.train.images.shape[1:3]
    config = recipe.data
    return Transform(height, width, config.pad, config.flip, tuple(config.mean), tuple(config.std))


def init_seed(seed: int, step: int) -> int:
    """Of the generator that initialises the head rows of a step."""
    return seed * 10_000 + step + 1


def pick_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device={name}: unknown; use auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device={name}: no CUDA device is visible; use device=cpu")
    return device


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({torch.get_num_threads()} threads)"


__all__ = ["Experiment", "Position", "Stopped"]
