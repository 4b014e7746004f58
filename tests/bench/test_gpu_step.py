"""The bench of a step on a GPU, as far as a CPU can run it: the trainer's own loop, nothing captured."""

import numpy as np
import pytest
import torch

from bench import gpu_step
from bench.harness import digits_at
from fastil.data import make_loader
from fastil.methods import LossConfig, MethodConfig, StepContext
from fastil.methods.il_baseline import ILBaseline
from fastil.models import ModelConfig, build_network
from fastil.optimiser import TrainConfig
from fastil.plan import Key, Transform, training_plan
from fastil.training.phases import Phase
from fastil.training.trainer import Trainer

BATCH, TRANSFORM = 16, Transform(8, 8, pad=1, flip=False, mean=(0.3,) * 3, std=(0.4,) * 3)


@pytest.fixture
def steps(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *args: None)
    monkeypatch.setattr(gpu_step, "STEPS", 3)
    monkeypatch.setattr(gpu_step, "SKIPPED", 1)
    student, teacher = (build_network(ModelConfig("resnet8"), 10, seed) for seed in (0, 1))
    seen = []
    config = TrainConfig(batch_size=BATCH, epochs=1, precision="fp32")
    trainer = Trainer(
        config, student, teacher, make_loader(digits_at(8, 3 * BATCH), "auto", TRANSFORM, "cpu"), torch.arange(10),
        save=lambda *a: None, report=lambda record: seen.append(record.images), tick=lambda n: None,
        stop=lambda: False, say=print,
    )  # fmt: skip
    method = ILBaseline(MethodConfig(), LossConfig(), student.width, torch.device("cpu"))
    method.begin_step(StepContext(1, 5, 10, np.full(student.width, 10)))
    phase = Phase(
        name="train", step=1, parameters=list(student.parameters()), epochs=1, schedule=lambda epoch: 0.01,
        plan=lambda epoch: training_plan(np.arange(3 * BATCH), Key(0, 1), TRANSFORM, BATCH), method=method,
    )  # fmt: skip
    return trainer, phase, seen


def test_each_mode_trains_so_many_steps_on_its_networks(steps):
    trainer, phase, seen = steps
    calls = []
    compiled = lambda images: (calls.append(len(images)), trainer.student(images))[1]  # noqa: E731
    trainer.fast_student = compiled
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastil.training.trainer.CapturedStep", gpu_step.Kept)
        found = gpu_step.Steps(trainer, phase, BATCH)
        for mode in gpu_step.MODES:
            calls.clear()
            assert found.rate(mode) > 0
            assert seen[-1] == 4 * BATCH  # more than the plan has: it is repeated
            assert len(calls) == (0 if mode.startswith("eager") else 4)
            assert gpu_step.Kept.wanted == mode.endswith("captured")
            assert not gpu_step.Kept.last.graphs
        assert found.ceiling() is None


def test_a_mode_that_fails_says_why_and_the_others_are_measured(steps, monkeypatch):
    trainer, phase, _ = steps
    rate = gpu_step.Steps.rate

    def rate_or_not(self, mode):
        if mode == "compiled":
            raise RuntimeError("out of memory\nand more")
        return rate(self, mode)

    monkeypatch.setattr(gpu_step.Steps, "rate", rate_or_not)
    monkeypatch.setattr(gpu_step.Steps, "launched", lambda self, mode: 12.0)
    monkeypatch.setattr(gpu_step.Steps, "idle", lambda self, mode: None)
    found = gpu_step.measure(trainer, phase, BATCH, rounds=2)
    assert found["compiled"] == {"failed": "out of memory"}
    assert len(found["eager"]["images_per_second"]) == 2
    assert found["eager"]["launches_a_step"] == 12.0
