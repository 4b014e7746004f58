"""Joint training, finetuning and runs without a rehearsal memory: their losses, their training sets, what they refuse,
and the lines that figures and tables draw of them."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastil.data import Batch
from fastil.errors import UserError
from fastil.methods import METHODS, LossConfig, Meter, MethodConfig, StepContext
from fastil.models import Output
from fastil.protocol import Protocol, class_order
from fastil.recipe_file import load
from fastil.reporting import figures
from fastil.reporting.runs import Run, group_runs
from fastil.reproduce import tables
from fastil.training.experiment import Experiment
from fastil.training.step_plan import effective_steps, notes
from fastil.training.trainer import Stopped

pytestmark = pytest.mark.usefixtures("without_figures")

W, NUM_OLD, NUM_SEEN = 16, 5, 11
WITHOUT_OLD = np.array([0] * NUM_OLD + [50, 41, 60, 13, 22, 38] + [0] * (W - NUM_SEEN))
QUICK = ["epochs=2", "base_epochs=2", "batch_size=32", "precision=fp32", "compile=false", "loss=softmax"]


def trained(folder, *settings, resume=False, stop_at=None):
    """A run on digits; stop_at: (step, images of that step)."""
    experiment = Experiment(load("digits", [*QUICK, *settings]), folder, resume)
    seen = dict.fromkeys(range(9), 0)

    def tick(images):
        seen[experiment.step] += images

    if stop_at is not None:
        experiment.trainer.tick = tick
        experiment.trainer.stop = lambda: seen[stop_at[0]] >= stop_at[1]
    experiment.run()
    return experiment


def weights(folder, step):
    return torch.load(folder / f"checkpoints/step_{step}.pt", weights_only=True)


@pytest.mark.parametrize("name", ["finetune", "joint", "il_baseline"])
@pytest.mark.parametrize("loss", ["softmax", "rescaled"])
def test_without_exemplars_the_softmax_is_over_all_classes_seen(name, loss):
    """As in `F.cross_entropy` over the columns of all classes seen, those of old classes without images among them."""
    method = METHODS[name](MethodConfig(), LossConfig(loss), W, torch.device("cpu"))
    method.begin_step(StepContext(1, NUM_OLD, NUM_SEEN, WITHOUT_OLD))
    generator = torch.Generator().manual_seed(1)
    logits, teacher = (3 * torch.randn(7, W, generator=generator) for _ in range(2))
    logits[:, NUM_SEEN:] = torch.nan  # classes not seen yet reach nothing
    labels = torch.randint(NUM_OLD, NUM_SEEN, (7,), generator=generator)
    nothing, ours = torch.zeros(7, 1), logits.clone().requires_grad_()
    batch, out, teacher_out = Batch(nothing, labels, labels), Output(nothing, [], ours), Output(nothing, [], teacher)

    wanted_logits = logits[:, :NUM_SEEN].double().requires_grad_()
    each = F.cross_entropy(wanted_logits, labels, reduction="none")
    if loss == "rescaled":  # in inverse proportion to the images of a class, mean 1 over the training images
        inverse = 1 / torch.from_numpy(WITHOUT_OLD[NUM_OLD:NUM_SEEN]).double()
        each = each * inverse[labels - NUM_OLD] * WITHOUT_OLD.sum() / len(inverse)
    wanted = each.mean()
    if name == "il_baseline":
        p, q = (torch.softmax(z[:, :NUM_OLD].double() / 2, 1) for z in (teacher, wanted_logits))
        rho = NUM_OLD / NUM_SEEN
        wanted = (1 - rho) * wanted - rho * 4 * (p * q.log()).sum(1).mean()
    wanted.backward()

    given = teacher_out if method.uses_teacher else None
    assert float(method.loss(batch, out, given).detach()) == pytest.approx(float(wanted.detach()), rel=1e-6)
    method.backward(batch, out, given, Meter(torch.zeros(7, 4), torch.zeros(())))
    torch.testing.assert_close(ours.grad[:, :NUM_SEEN].double(), wanted_logits.grad, rtol=1e-5, atol=1e-7)
    assert not ours.grad[:, NUM_SEEN:].any()


def test_joint_training_does_not_depend_on_the_steps_before(tmp_path):
    """Whatever the steps before were: the last one has a new network and the images of all classes."""
    one, other, fine = tmp_path / "one", tmp_path / "other", tmp_path / "fine"
    for folder, method, increment in ((one, "joint", "[1,4]"), (other, "joint", "[3,2]"), (fine, "finetune", "[1,4]")):
        trained(folder, f"method={method}", "exemplars_per_class=0", "base_classes=5", f"increment={increment}")
    assert [step.classes_seen for step in Run(one).results.steps] == [5, 6, 10]
    ours, theirs = weights(one, 2), weights(other, 2)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    for step in (0, 1):  # the base step is the same; then one goes on with its network
        equal = all(
            torch.equal(a, b) for a, b in zip(weights(one, step).values(), weights(fine, step).values(), strict=True)
        )
        assert equal == (step == 0)


def test_joint_training_sees_every_image_of_the_classes_seen(tmp_path):
    experiment = trained(tmp_path / "run", "method=joint", "exemplars_per_class=0", "base_classes=4", "increment=3")
    labels = experiment.dataset.train.labels
    for step, seen in enumerate((4, 7, 10)):
        ids, held_out = experiment.rehearsal.training_set(step)
        wanted = [i for i, label in enumerate(labels) if label in experiment.protocol.order[:seen].tolist()]
        assert sorted(ids) == wanted
        assert not len(held_out)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    visited = {line["step"]: line["images"] for line in lines}
    assert visited == {s: int(np.isin(labels, experiment.protocol.order[:n]).sum()) for s, n in enumerate((4, 7, 10))}


@pytest.mark.parametrize("method", ["finetune", "joint", "il_baseline"])
def test_a_stopped_run_without_memory_goes_on_to_the_same_end(method, tmp_path):
    settings = [f"method={method}", "exemplars_per_class=0", "base_classes=6", "increment=2"]
    trained(tmp_path / "whole", *settings)
    assert all(not ids for ids in json.loads((tmp_path / "whole/memory/step_2.json").read_text()).values())
    with pytest.raises(Stopped):
        trained(tmp_path / "run", *settings, stop_at=(1, 70))
    trained(tmp_path / "run", *settings, resume=True)
    for name in ("results.json", "metrics.jsonl", "predictions/step_2.npy"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["loss=balanced"], "loss=balanced"),
        (["loss=meta_balanced"], "loss=meta_balanced"),
        (["predictor=nme"], "predictor=nme"),
        (["sampler=memory_oversampling"], "sampler=memory_oversampling"),
        (["correction=balanced_finetuning"], "correction=balanced_finetuning"),
        (["method=bic"], "method=bic"),
        (["method=tpcil", "head=cosine"], "method=tpcil"),
        (["method=mnemonics", "head=cosine"], "method=mnemonics"),
        (["method=joint", "predictor=nme"], "predictor=nme"),
        (["method=joint", "loss=meta_balanced"], "at least 2 per class"),
    ],
)
def test_what_needs_exemplars_is_refused_without_them(settings, said):
    recipe = load("digits", ["loss=softmax", *settings, "exemplars_per_class=0"])
    with pytest.raises(UserError, match=said):
        effective_steps(recipe, Protocol(class_order("lucir", 10), 5, 1), np.full(10, 140))


@pytest.mark.parametrize(
    "settings", [["method=joint", "loss=balanced"], ["method=lucir", "head=cosine"], ["method=wa"]]
)
def test_what_can_do_without_exemplars_runs(settings, tmp_path):
    experiment = trained(tmp_path / "run", "exemplars_per_class=0", "base_classes=6", "increment=4", *settings)
    shown = set(experiment.dataset.train.labels[experiment.rehearsal.training_set(1)[0]].tolist())
    order = experiment.protocol.order.tolist()
    assert shown == set(order if "method=joint" in settings else order[6:])


def test_figures_draw_reference_lines_in_grey(tmp_path, monkeypatch):
    """Next to other runs, and one of a kind: several would look alike. Finetuning with a memory is a method."""
    kinds = {"il_baseline": 1, "joint": 0, "finetune": 0, "replay": 1}
    for name, exemplars in kinds.items():
        method = "finetune" if name == "replay" else name
        settings = [f"method={method}", f"exemplars_per_class={exemplars}", "base_classes=6", "increment=4", "epochs=1"]
        trained(tmp_path / name, *settings)
    drawn = []
    monkeypatch.setattr(figures, "save_figure", lambda figure, path, then="": drawn.append(figure))

    def looks(*names):
        figures.draw_accuracy(group_runs([Run(tmp_path / name) for name in names]), tmp_path)
        lines = drawn[-1].axes[0].get_lines()
        return [line.get_linestyle() if line.get_color() == "grey" else "" for line in lines]

    assert looks("il_baseline", "joint", "finetune") == ["", "--", ":"]
    assert looks("replay", "joint") == ["", "--"]
    assert looks("joint", "finetune") == ["", ""]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (["method=finetune"], True),  # with the exemplars of the recipe it is no lower line
        (["method=finetune", "loss=softmax", "exemplars_per_class=null", "memory_budget=20"], True),
        (["method=finetune", "loss=softmax", "exemplars_per_class=0"], False),
        (["method=joint"], False),
    ],
)
def test_finetuning_with_exemplars_is_said_to_be_no_reference_line(settings, told):
    lines = notes(load("digits", settings), None)
    assert any("exemplars_per_class=0 loss=softmax" in line for line in lines) == told


@pytest.mark.parametrize("name", ["table1", "table2", "table3", "table4"])
@pytest.mark.parametrize("scale", ["cpu", "short", "paper"])
def test_tables_train_reference_lines_only_where_they_are_named(name, scale):
    table = tables.table_of(tables.read_tables(), name, scale)
    assert not any(entry.reference for entry in tables.only(table, []))
    named = tables.only(table, ["joint,finetune"])
    assert {entry.row for entry in named} == {"joint", "finetune"}
    assert all(entry.reference and entry.load(0).memory.exemplars_per_class == 0 for entry in named)
    assert {entry.steps for entry in named} == {entry.steps for entry in table.entries}
    assert all(entry.load(0).method.method == entry.row for entry in named)
