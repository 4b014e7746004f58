"""One of several processes that train runs together, for test_ranks: python ranks_worker.py JOB.json, under torchrun's
environment variables. It notes the gradients and seeds of all updates, and the batch of the first one with the network
before and after; it can compute in float64."""

import json
import sys
from pathlib import Path

import torch

from fastil import ranks
from fastil.data.loaders.resident import Resident
from fastil.data.loaders.streaming import Streaming
from fastil.methods import MetaAlpha, Method
from fastil.methods.classification_loss import ClassificationLoss
from fastil.methods.tpcil import Tpcil
from fastil.models import ExternalBackbone
from fastil.models.heads import CosineHead
from fastil.optimiser import Update
from fastil.recipe import Recipe
from fastil.recipe_file import load
from fastil.training import compiling, experiment, trainer


def doubled(init):
    """An __init__ after which all float32 tensors of the object are float64."""

    def made(self, *arguments, **keywords):
        init(self, *arguments, **keywords)
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor) and value.dtype == torch.float32:
                setattr(self, name, value.double())

    return made


def in_float64():
    """Train in float64: what processes add up in another order then differs in the last of 16 digits."""
    build = Recipe.build_network

    def build_in_float64(self, *arguments):
        network = build(self, *arguments).double()
        if isinstance(network.backbone, ExternalBackbone):  # evaluation is by itself, and hands it float32
            network.backbone.module.register_forward_pre_hook(lambda module, given: (given[0].double(),))
        return network

    Recipe.build_network = build_in_float64
    compiling.cost_per_image = lambda *arguments: (1, 1)  # it tries float32, like the check
    experiment.check_backbone = lambda *arguments: None
    trainer.pixel_dtype = lambda precision: torch.float64
    batches, whole = trainer.Trainer.batches, Resident.whole
    trainer.Trainer.batches = lambda self, plan: (b._replace(images=b.images.double()) for b in batches(self, plan))
    Resident.whole = lambda self, ids: whole(self, ids).double()
    for part in (Method, ClassificationLoss, MetaAlpha):  # their weights: rounded shares of them would not add up to 1
        part.__init__ = doubled(part.__init__)
    join = Tpcil.join

    def join_in_float64(self):
        self.vertices = self.vertices.double()
        join(self)

    Tpcil.join = join_in_float64
    CosineHead.formula = True  # the kernel takes no float64


def noting_gradients(noted):
    apply = Update.apply

    def watched(self):
        noted.append(torch.cat([p.grad.double().flatten() for p in self.parameters if p.grad is not None]))
        apply(self)

    Update.apply = watched


def noting_steps(seeds, first):
    """Note what torch is seeded with in each update, and the first one: images and labels, the network's state."""
    step = trainer.Trainer.train_step

    def watched(self, phase, update, inputs, size):
        seeds.append(torch.initial_seed())
        if not first:
            batch = self.prepared(phase, inputs, size)[0]
            first.update(images=batch.images, labels=batch.labels)
            first["before"] = {name: value.clone() for name, value in self.student.state_dict().items()}
        step(self, phase, update, inputs, size)
        if "after" not in first:
            first["after"] = {name: value.clone() for name, value in self.student.state_dict().items()}

    trainer.Trainer.train_step = watched


def noting_reads(noted):
    """Note every image that is read from a file."""
    content = Streaming.content

    def watched(self, i):
        noted.append(i)
        return content(self, i)

    Streaming.content = watched


def main():
    job = json.loads(Path(sys.argv[1]).read_text())
    if job["float64"]:
        in_float64()
    noted, reads, seeds, first = [], [], [], {}
    noting_gradients(noted)
    noting_steps(seeds, first)
    noting_reads(reads)
    with ranks.together():
        torch.set_num_threads(1)
        for run in job["runs"]:
            for kept in (noted, reads, seeds, first):
                kept.clear()
            recipe = load(run.get("recipe", "digits"), run["settings"], data=run.get("data"))
            running = experiment.Experiment(recipe, Path(run["out"]), resume=False)
            running.directory.draw = lambda: None
            if job["float64"]:  # what a step computes from counts; the meter, which is float32, has been made
                torch.set_default_dtype(torch.float64)
            running.run()
            torch.set_default_dtype(torch.float32)
            out = Path(run["out"])
            (out / f"reads_{ranks.rank()}.json").write_text(json.dumps(reads))
            (out / f"seeds_{ranks.rank()}.json").write_text(json.dumps(seeds))
            if ranks.first():
                torch.save(list(noted), out / "gradients.pt")
                torch.save(first, out / "first.pt")


if __name__ == "__main__":
    main()
