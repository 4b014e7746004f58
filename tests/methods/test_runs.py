"""Every method from its first step to its last on digits: it learns, it resumes exactly, memory and head have the right
shapes, and any of them takes alpha, Meta or a correction."""

import functools
import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SOAK

from fastil import files, losses
from fastil.data import Batch
from fastil.errors import UserError
from fastil.methods.bic import BiC
from fastil.recipe_file import load
from fastil.training.base_step import base_identity
from fastil.training.experiment import Experiment
from fastil.training.training_set import Rehearsal

pytestmark = pytest.mark.usefixtures("without_figures")

COSINE = ["head=cosine", "last_relu=false"]
PROXIES = ["head=proxies", "proxies=3", "last_relu=false"]
METHODS = {
    "icarl": ["method=icarl", "loss=softmax", "predictor=nme"],
    "icarl_bce": ["method=icarl_bce", "loss=softmax", "predictor=nme", "lr=0.3"],
    "bic": ["method=bic", "loss=softmax"],
    "bic_all": ["method=bic", "loss=softmax", "bic_groups=all", "bic_decay=falling"],
    "lucir": ["method=lucir", "loss=softmax", *COSINE],
    "lucir_balanced": ["method=lucir", "loss=balanced", *COSINE],
    "mnemonics": ["method=mnemonics", "loss=softmax", "mnemonics_lr=1.0", *COSINE],
    "mnemonics_released": [
        "method=mnemonics", "mnemonics=released", "mnemonics_lr=1.0", "weight_transfer=true", "loss=softmax", *COSINE,
    ],
    "podnet": [
        "method=podnet", "loss=nca", *PROXIES, "correction=balanced_finetuning", "finetune_parameters=weights",
        "finetune_bn=train", "finetune_epochs=2",
    ],
    "podnet_balanced": ["method=podnet", "loss=balanced", *PROXIES],
    "bic_reserved": ["method=bic", "bic_validation=reserved"],
    "tpcil": ["method=tpcil", "loss=softmax", *COSINE],
    "finetune": ["method=finetune", "loss=softmax", "sampler=class_oversampling"],  # else it forgets all old classes
    "joint": ["method=joint", "loss=softmax"],
    "wa": ["method=wa", "loss=softmax", "epochs=10"],  # scaling helps once the new rows have grown
}  # fmt: skip
SHORT = [
    "base_classes=6", "increment=2", "base_epochs=4", "epochs=3", "batch_size=64", "lr=0.06", "exemplars_per_class=10",
    "compile=false", "checkpoint_every=1", "precision=fp32",
]  # fmt: skip


STOPS = {"train": [2, "train", 2, 0], "memory": [2, "memory", 0, 0]}  # where a run is killed that goes on
BRIEF = [*SHORT, "base_epochs=2", "epochs=1"]
FINETUNED = ["correction=balanced_finetuning", "finetune_epochs=1"]


def run(overrides, out, resume=False, base=None):
    return Experiment(load("digits", [*SHORT, *overrides]), out, resume, base).run().model_dump()


def run_until_killed(overrides, out, monkeypatch):
    """A run that ends right after its checkpoint behind the first epoch of step 1."""
    save = files.save

    class Killed(Exception):
        pass

    def until(path, state):
        save(path, state)
        if state.get("position") == [1, "train", 1, 0]:
            raise Killed

    monkeypatch.setattr(files, "save", until)
    with pytest.raises(Killed):
        run(overrides, out)
    monkeypatch.setattr(files, "save", save)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A method's run by its name, made once: the experiment, its folder and its results. Next to the folder lies what a
    process that was killed at each of STOPS would have left of it."""

    @functools.cache
    def of(name):
        folder = tmp_path_factory.mktemp(name) / "run"
        save = files.save

        def save_and_copy(path, state):
            save(path, state)
            for stop, position in STOPS.items():
                if state.get("position") == position:
                    shutil.copytree(folder, folder.with_name(stop))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(files, "save", save_and_copy)
            experiment = Experiment(load("digits", [*SHORT, *METHODS[name]]), folder, False)
            return experiment, folder, experiment.run().model_dump()

    return of


@pytest.fixture(scope="module", params=METHODS)
def finished(request, trained):
    return request.param, *trained(request.param)[1:]


def test_it_learns(finished):
    _, _, results = finished
    assert [step["classes_seen"] for step in results["steps"]] == [6, 8, 10]
    assert results["steps"][0]["top1"] > 60
    assert results["average_incremental_accuracy"] > 45
    assert results["final_top1"] > 25  # chance is 10


def test_memory_and_head_have_the_right_shapes(finished):
    name, folder, _ = finished
    memory = json.loads((folder / "memory/step_2.json").read_text())
    assert len(memory) == 10
    assert {len(ids) for ids in memory.values()} == {10}
    weights = torch.load(folder / "checkpoints/step_2.pt", weights_only=True)
    head = weights["head.weight"]
    assert head.shape == ((16, 3, 64) if name.startswith("podnet") else (16, 64))
    assert head[:10].flatten(1).any(1).all()
    assert not head[10:].any()
    linear = ("icarl", "icarl_bce", "bic", "bic_all", "bic_reserved", "finetune", "joint", "wa")
    assert ("head.scale" in weights) == (name not in linear)


@pytest.mark.parametrize("turn", range(len(STOPS) if SOAK else 1))
def test_killed_in_any_step_it_goes_on_to_the_same_end(finished, turn):
    """With the checkpoint of the middle of the second incremental step, and before its memory is chosen: half of the
    methods with the one and half with the other, `make soak` all with both."""
    name, folder, results = finished
    stop = list(STOPS)[(list(METHODS).index(name) + turn) % len(STOPS)]
    out = folder.with_name(stop)
    left = torch.load(out / "checkpoints/last.pt", weights_only=True)
    assert left["position"] == STOPS[stop]
    assert run(METHODS[name], out, resume=True) == results
    for file in ("results.json", "metrics.jsonl", "memory/step_2.json"):
        assert (out / file).read_bytes() == (folder / file).read_bytes()
    ours, theirs = (torch.load(d / "checkpoints/step_2.pt", weights_only=True) for d in (out, folder))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_reserved_images_are_the_same_in_every_step_and_never_trained_on(tmp_path, monkeypatch):
    sets, training_set = [], Rehearsal.training_set

    def spy(rehearsal, step):
        sets.append(training_set(rehearsal, step))
        return sets[-1]

    monkeypatch.setattr(Rehearsal, "training_set", spy)
    experiment = Experiment(load("digits", [*SHORT, *METHODS["bic_reserved"], "epochs=1"]), tmp_path / "run", False)
    experiment.run()
    labels = experiment.dataset.train.labels
    trained, reserved = (np.unique(np.concatenate(ids)) for ids in zip(*sets, strict=True))
    assert np.bincount(labels[reserved]).tolist() == [1] * 10  # a tenth of 10
    assert not np.isin(trained, reserved).any()
    assert np.isin(experiment.rehearsal.memory.ids(), trained).all()
    memory = json.loads((tmp_path / "run/memory/step_2.json").read_text())
    assert np.isin(reserved, np.concatenate([*memory.values()])).all()


@pytest.mark.parametrize(
    "overrides",
    [["method=bic"], ["method=bic", "bic_validation=reserved"], ["method=icarl", "loss=meta_balanced"]],
)
def test_balanced_finetuning_never_sees_held_out_images(overrides, tmp_path, monkeypatch):
    """Many of them, so that herding would find some. As many images of every class are finetuned on."""
    sets, finetuned = {}, {}
    training_set, finetune = Rehearsal.training_set, Experiment.finetune

    def spy(rehearsal, step):
        sets[step] = training_set(rehearsal, step)
        return sets[step]

    def spy_too(experiment, plan, *arguments):
        finetuned[plan.step] = experiment.rehearsal.finetuning_set
        finetune(experiment, plan, *arguments)

    monkeypatch.setattr(Rehearsal, "training_set", spy)
    monkeypatch.setattr(Experiment, "finetune", spy_too)
    share = "meta_share" if "loss=meta_balanced" in overrides else "bic_share"
    experiment = Experiment(load("digits", [*BRIEF, *FINETUNED, f"{share}=0.4", *overrides]), tmp_path / "run", False)
    experiment.run()
    assert sorted(finetuned) == [1, 2]
    for step, ids in finetuned.items():
        trained, held_out = sets[step]
        seen = 6 + 2 * step
        assert len(held_out) == 4 * seen
        assert not np.isin(ids, held_out).any()
        assert np.isin(ids, trained).all()
        assert np.bincount(experiment.rehearsal.positions_of(ids)).tolist() == [6] * seen


@pytest.mark.parametrize(("parameters", "moves"), [("weights", False), ("classifier", True)])
def test_finetuning_of_the_weights_alone_leaves_the_scale_exactly(parameters, moves, tmp_path, monkeypatch):
    kept, finetune = [], Experiment.finetune

    def spy(experiment, *arguments):
        head = experiment.trainer.student.head
        kept.append([head.scale.detach().clone(), head.weight.detach().clone()])
        finetune(experiment, *arguments)
        kept.append([head.scale.detach().clone(), head.weight.detach().clone()])

    monkeypatch.setattr(Experiment, "finetune", spy)
    run([*METHODS["lucir"], *BRIEF, *FINETUNED, f"finetune_parameters={parameters}"], tmp_path / "run")
    assert len(kept) == 4
    assert kept[0][0] != 1  # training has moved it
    for before, after in (kept[:2], kept[2:]):
        assert (before[0] != after[0]) == moves
        assert (before[1][:6] != after[1][:6]).any()


@pytest.mark.parametrize(("flip", "asked"), [(True, True), (True, False), (False, True)])
def test_class_means_take_in_mirror_images_where_training_has_them_and_they_are_wanted(flip, asked, tmp_path):
    """A finished run's predictions, image by image: the class whose mean of exemplars is nearest."""
    keys = [f"flip={flip}", f"nme_mirrored={asked}", "base_classes=10", "base_epochs=1", "increment=1"]
    recipe = load("digits", [*SHORT, *METHODS["icarl"], *keys])
    experiment = Experiment(recipe, tmp_path / "run", False)
    results = experiment.run().model_dump()
    network = experiment.trainer.student.eval()

    def directions(split, ids, mirrored):
        pixels = torch.from_numpy(split.images[ids]).permute(0, 3, 1, 2) / 255
        pixels = (pixels - 0.305) / 0.376
        with torch.no_grad():
            features = network(pixels.flip(3) if mirrored else pixels).features.double().numpy()
        return features / np.linalg.norm(features, axis=1, keepdims=True)

    train, val = experiment.dataset.train, experiment.dataset.val
    found = {}
    for sides in ([False], [False, True]):
        means = [
            sum(directions(train, ids, side).sum(0) for side in sides)
            for ids in experiment.rehearsal.memory.exemplars.values()
        ]
        means = np.stack([m / np.linalg.norm(m) for m in means])
        of_test = directions(val, np.arange(len(val.labels)), False)
        found[len(sides)] = np.square(of_test[:, None] - means).sum(2)
    wanted, other = (found[2], found[1]) if flip and asked else (found[1], found[2])
    predicted = np.load(tmp_path / "run/predictions/step_0.npy")[:, 1]
    assert (wanted.argmin(1) == predicted).all()
    assert (other.argmin(1) != predicted).any()
    assert results["steps"][0]["top1"] == pytest.approx(
        100 * (wanted.argmin(1) == experiment.rehearsal.positions[val.labels]).mean()
    )


# What each method is known for, against the same run without it: one step of four classes after a base step of six.

ONE_STEP = ["increment=4", "base_epochs=3", "epochs=3", "batch_size=32", "lr=0.03"]


@pytest.fixture(scope="module")
def ablated(tmp_path_factory):
    """Runs by their overrides, each once, on a base step that those with the same network share."""
    root, bases, runs = tmp_path_factory.mktemp("ablated"), {}, {}

    def of(*overrides):
        if overrides not in runs:
            network = tuple(o for o in overrides if o.startswith(("head=", "last_relu=", "proxies=", "loss=")))
            experiment = Experiment(
                load("digits", [*SHORT, *ONE_STEP, *overrides]), root / f"{len(runs)}", False, bases.get(network)
            )
            ends = []
            after_memory = experiment.method.after_memory
            experiment.method.after_memory = lambda *a: (ends.append(changes(experiment)), after_memory(*a))[1]
            experiment.run()
            bases.setdefault(network, root / f"{len(runs)}")
            runs[overrides] = ends[-1]
        return runs[overrides]

    return of


def changes(experiment):
    """How far training has taken the features of test images of old classes, and their maps, from the teacher's; and
    the topology loss among them, as TPCIL has it at the end of the step."""
    positions = experiment.rehearsal.positions[experiment.dataset.val.labels]
    ids = np.flatnonzero(positions < 6)
    images = experiment.loaders.test.whole(ids)
    networks = (experiment.trainer.student, experiment.trainer.teacher)
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        for network in networks:
            patch.setattr(network, "keeps_maps", True)
        student, teacher = (network.eval()(images) for network in networks)
        found = {
            "features": float(losses.less_forget(student.features, teacher.features)),
            "maps": float(losses.pod_spatial(student.maps, teacher.maps)),
        }
        if experiment.step and experiment.recipe.method.method == "tpcil":
            patch.setattr(type(experiment.method), "adaptive_lambda", 1.0)
            batch = Batch(images, torch.from_numpy(positions[ids]), torch.from_numpy(ids))
            found["topology"] = float(experiment.method.extra_loss(batch, student, teacher, losses))
    return found


def test_lucirs_less_forget_constraint_keeps_the_directions_of_features(ablated):
    with_it, without = (ablated(*METHODS["lucir"], f"lucir_lambda={v}") for v in (5, 0))
    assert with_it["features"] < 0.7 * without["features"]


def test_podnets_terms_keep_features_and_maps(ablated):
    flat, spatial, without = (
        ablated(*METHODS["podnet_balanced"], f"pod_flat={f}", f"pod_spatial={s}") for f, s in ((1, 0), (0, 3), (0, 0))
    )
    assert flat["features"] < 0.7 * without["features"]
    assert spatial["maps"] < 0.7 * without["maps"]


def test_tpcils_loss_keeps_the_topology(ablated):
    with_it, without = (ablated(*METHODS["tpcil"], f"tpcil_lambda={v}") for v in (5, 0))
    assert with_it["topology"] < 0.7 * without["topology"]


@pytest.mark.parametrize("validation", ["each_step", "reserved"])
def test_bics_second_stage_lowers_the_cross_entropy_of_held_out_images(validation, tmp_path, monkeypatch):
    seen, after_training = [], BiC.after_training

    def spy(method, network, extractor, held_out, positions):
        def cross_entropy(logits):
            return float(F.cross_entropy(logits[:, : method.context.num_seen], positions))

        out = extractor.extract(held_out, False)
        plain = cross_entropy(out.scaled_logits)
        after_training(method, network, extractor, held_out, positions)
        seen.append((method.context.num_seen, plain, cross_entropy(method.predict(out.logits))))

    monkeypatch.setattr(BiC, "after_training", spy)
    run(
        [*METHODS["bic"], "bic_share=0.3", f"bic_validation={validation}", "base_epochs=2", "epochs=2"],
        tmp_path / "run",
    )
    assert [classes for classes, _, _ in seen] == [8, 10]
    assert all(after < 0.98 * before for _, before, after in seen)


@pytest.mark.parametrize("name", ["lucir", "podnet_balanced", "mnemonics_released"])
def test_old_rows_of_the_head_stay_as_they_were(name, trained):
    folder = trained(name)[1]
    before, after = (torch.load(folder / f"checkpoints/step_{k}.pt", weights_only=True)["head.weight"] for k in (1, 2))
    assert torch.equal(before[:8], after[:8])
    assert not torch.equal(before[8:10], after[8:10])


def test_finetuning_moves_the_old_proxies_too_but_not_the_scale(trained):
    folder = trained("podnet")[1]
    before, after = (torch.load(folder / f"checkpoints/step_{k}.pt", weights_only=True) for k in (1, 2))
    assert (before["head.weight"][:8] != after["head.weight"][:8]).all()


def test_weight_transfer_trains_factors_of_frozen_filters(trained):
    folder = trained("mnemonics_released")[1]
    base, last = (torch.load(folder / f"checkpoints/step_{k}.pt", weights_only=True) for k in (0, 2))
    filters = [key for key in base if key.endswith("original")]
    factors = [key for key in base if key.endswith("factor")]
    assert len(filters) == len(factors) > 5
    assert all(torch.equal(base[key], last[key]) for key in filters)
    assert all((base[key] == 1).all() and (last[key] != 1).any() for key in factors)


@pytest.mark.parametrize("name", ["mnemonics", "mnemonics_released"])
def test_mnemonics_change_the_pixels_of_the_memory_and_of_nothing_else(name, trained):
    experiment = trained(name)[0]
    original = torch.from_numpy(experiment.dataset.train.images)
    changed = (experiment.loaders.train.images.cpu() != original).flatten(1).any(1).numpy()
    memory = experiment.rehearsal.memory.ids()
    assert changed[memory].mean() > 0.5
    assert not changed[np.setdiff1d(np.arange(len(changed)), memory)].any()


@pytest.mark.parametrize(
    "overrides",
    [
        ["method=lucir", "loss=meta_balanced", *COSINE],
        ["method=podnet", "loss=meta_balanced", "meta_gradient=difference", *PROXIES],
        ["method=lucir", "loss=balanced", "alpha=0.5", "sampler=memory_oversampling", *COSINE],
        ["method=bic", "loss=meta_balanced"],
        ["method=icarl", "loss=rescaled", "correction=balanced_finetuning", "finetune_epochs=2"],
        ["method=il_baseline", "loss=balanced", *COSINE],
    ],
)
def test_any_method_takes_alpha_meta_or_a_correction(overrides, tmp_path):
    results = run(["base_classes=8", *overrides], tmp_path / "run")
    assert results["final_top1"] > 25
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    if "loss=meta_balanced" in overrides:
        alphas = [line["alpha"] for line in lines if line["step"]]
        assert all(np.isfinite(alphas))
        assert any(alpha != 1 for alpha in alphas)


def test_a_base_step_of_another_training_is_named(tmp_path):
    run([*BRIEF, "method=il_baseline", "loss=balanced", *COSINE], tmp_path / "donor")
    with pytest.raises(UserError, match="loss of the base step is cross-entropy there and nca here"):
        run([*BRIEF, "method=il_baseline", "loss=nca", *COSINE], tmp_path / "run", base=tmp_path / "donor")


def test_a_falling_decay_makes_another_base_step_whatever_the_increment():
    constant, falling = (
        load("digits", ["method=bic", "increment=1", f"bic_decay={d}"]) for d in ("constant", "falling")
    )
    assert base_identity(constant) != base_identity(falling)


def test_methods_with_the_same_base_step_share_it_bit_for_bit(trained, tmp_path):
    assert run(METHODS["tpcil"], tmp_path / "shared", base=trained("lucir")[1]) == trained("tpcil")[2]
