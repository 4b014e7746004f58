"""The captured training step, on a CPU: a graph that records what torch is asked to do, and does it again on the same
tensors. What a step takes from elsewhere (a Python number that changes, a tensor in another place) it would not see."""

from typing import ClassVar

import pytest
import torch
from test_bf16 import COMBINATIONS
from test_runs import BRIEF, run
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastil.training import trainer
from fastil.training.captured import CapturedStep
from fastil.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("without_figures")

# One incremental step; enough batches of both sizes that all are captured.
SETTINGS = [*BRIEF, "precision=fp32", "classes=5", "base_classes=4", "increment=1", "epochs=6", "batch_size=64"]


class Graph:
    """In the place of torch.cuda.CUDAGraph."""

    made: ClassVar[list["Graph"]] = []

    def __init__(self):
        self.calls, self.replays = [], 0
        Graph.made.append(self)

    def pool(self):
        return None

    @torch.no_grad()
    def replay(self):
        self.replays += 1
        for function, args, kwargs, results in self.calls:
            found = function(*args, **kwargs)
            for old, new in zip(results, tree_leaves(found), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Recording(TorchDispatchMode):
    """In the place of torch.cuda.graph: afterwards nothing has happened but that the graph knows the calls."""

    def __init__(self, graph, pool, **options):
        super().__init__()
        self.graph, self.before = graph, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        assert function is not torch.ops.aten._local_scalar_dense.default, "the host waits for the device"
        given = dict(zip((a.name for a in function._schema.arguments), args, strict=False)) | kwargs
        for argument in function._schema.arguments:
            written = argument.alias_info is not None and argument.alias_info.is_write
            if written or argument.name in ("running_mean", "running_var"):  # of which the schema does not tell
                tensors = [t for t in tree_leaves(given.get(argument.name)) if isinstance(t, torch.Tensor)]
                self.before += [(t, t.clone()) for t in tensors]
        result = function(*args, **kwargs)
        self.graph.calls.append((function, args, kwargs, tree_leaves(result)))
        return result

    def __exit__(self, *exc):
        super().__exit__(*exc)
        with torch.no_grad():
            for tensor, old in reversed(self.before):
                tensor.copy_(old)


@pytest.fixture
def captured(monkeypatch):
    """Have steps captured by those two."""

    class Captured(CapturedStep):
        def __init__(self, step, *, capture, failed):
            assert not capture  # there is no GPU
            super().__init__(step, capture=True, failed=failed)

    Graph.made.clear()
    monkeypatch.setattr(trainer, "CapturedStep", Captured)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", Recording)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)


@pytest.mark.parametrize("name", COMBINATIONS)
def test_a_captured_run_is_the_uncaptured_one_bit_for_bit(name, tmp_path, request):
    settings = [*SETTINGS, *COMBINATIONS[name]]
    plain = run(settings, tmp_path / "plain")
    request.getfixturevalue("captured")
    assert run(settings, tmp_path / "captured") == plain
    assert len(Graph.made) >= 2
    assert sum(graph.replays for graph in Graph.made) >= 20
    for file in ("metrics.jsonl", "memory/step_1.json"):
        assert (tmp_path / "captured" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()
    for step in (0, 1):
        ours, theirs = (
            torch.load(tmp_path / d / f"checkpoints/step_{step}.pt", weights_only=True) for d in ("captured", "plain")
        )
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def addresses(trainer, phase, update, inputs):
    """Where everything lies that a training step reads or writes from one update to the next, by its name."""
    parts = {"student": trainer.student, "teacher": trainer.teacher, "folded": trainer.folded_teacher.plain}
    tensors = {f"{part}.{k}": v for part, net in parts.items() for k, v in net.state_dict(keep_vars=True).items()}
    momentum = f"momentum of {phase.name}, {id(update.parameters[0])}"
    tensors |= {f"{momentum}, {i}": buffer for i, buffer in enumerate(update.buffers)}
    tensors |= {"lr": trainer.lr, "meter": trainer.meter.rows, "unfused": trainer.meter.unfused, "table": trainer.table}
    for part in (phase.method, phase.method.classification):
        tensors |= {f"{type(part).__name__}.{k}": v for k, v in vars(part).items() if isinstance(v, torch.Tensor)}
    inputs = {f"{k} of {len(inputs.ids)}": v for k, v in inputs._asdict().items() if v is not None}
    return {k: v.data_ptr() for k, v in tensors.items()}, {k: v.data_ptr() for k, v in inputs.items()}


@pytest.mark.parametrize("name", COMBINATIONS)
def test_nothing_moves_from_one_update_to_the_next(name, tmp_path, monkeypatch):
    """What a graph reads and writes stays where it is: the buffers of inputs for a phase, all else for the run, but for
    the momentum of Mnemonics' weight transfer, whose incremental steps train other parameters than the base step."""
    whole_run, of_phase, updates = {}, {}, []
    step = Trainer.train_step

    def watched(self, phase, update, inputs, size):
        lasting, passing = addresses(self, phase, update, inputs)
        for key, at in lasting.items():
            if key == "Tpcil.vertices":  # as wide as the features, which is known after the base step
                key = f"{key} of step {phase.step}"
            assert whole_run.setdefault(key, at) == at, key
        for key, at in passing.items():
            key = phase.step, phase.name, key
            assert of_phase.setdefault(key, at) == at, key
        assert all(p.grad is None for p in self.student.parameters())  # or a graph would add to it
        updates.append(len(inputs.ids))
        step(self, phase, update, inputs, size)

    monkeypatch.setattr(Trainer, "train_step", watched)
    run([*SETTINGS, *COMBINATIONS[name]], tmp_path / "run")
    assert len(updates) >= 20
    assert len(set(updates)) >= 2
    assert "student.head.weight" in whole_run
    assert any("momentum" in key for key in whole_run)
    assert any("log_prior" in key for key in whole_run)
