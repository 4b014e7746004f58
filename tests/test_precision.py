"""Which precision a run computes in, that it keeps it, and what stays float32."""

import os

import numpy as np
import pytest
import torch
import yaml
from conftest import TINY

from fastil import device as devices
from fastil.data import Split, make_loader
from fastil.device import (
    choosing_kernels,
    fastest_precision,
    multiplying_in,
    pick_device,
    precision_note,
    settle_precision,
)
from fastil.errors import UserError
from fastil.plan import Key, Transform, training_plan
from fastil.recipe_file import load, read_effective
from fastil.reporting.checkpoints import Position
from fastil.reporting.report import write_report
from fastil.training import compiling, step_plan
from fastil.training.experiment import Experiment

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def processor(monkeypatch, *flags):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(flags, True), raising=False)


def gpu(monkeypatch, native):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        (["amx_tile", "amx_bf16", "avx512_bf16"], "bf16"),
        (["avx512_bf16", "avx512_f"], "bf16"),
        (["avx512_f"], "fp32"),
        (["avx2"], "fp32"),
        ([], "fp32"),
    ],
)
def test_auto_on_a_cpu_is_told_by_its_flags(flags, wanted, monkeypatch):
    processor(monkeypatch, *flags)
    assert settle_precision("auto", CPU) == fastest_precision(CPU) == wanted
    assert settle_precision("fp32", CPU) == "fp32"
    assert settle_precision("bf16", CPU) == "bf16"


@pytest.mark.parametrize(("native", "wanted"), [(True, "bf16"), (False, "fp32")])
def test_auto_on_cuda_is_bf16_where_it_is_native(native, wanted, monkeypatch):
    gpu(monkeypatch, native)
    assert settle_precision("auto", CUDA) == wanted
    assert settle_precision("tf32", CUDA) == "tf32"
    assert (precision_note("bf16", CUDA) is None) == native


def test_a_torch_that_does_not_tell_its_flags_still_tells_amx(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert fastest_precision(CPU) == "bf16"
    assert "amx_bf16" in devices.processor_name()


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
@pytest.mark.parametrize(("flags", "slow"), [(["amx_bf16"], False), (["avx512_bf16"], False), (["avx2"], True)])
def test_emulated_bf16_is_said_to_be_slow(flags, slow, machine, monkeypatch):
    """By how much only where that was measured; an ARM processor may have products that torch does not tell of."""
    processor(monkeypatch, *flags)
    monkeypatch.setattr("platform.machine", lambda: machine)
    note = precision_note("bf16", CPU)
    assert (note is not None) == slow
    assert precision_note("fp32", CPU) is None
    if note is not None:
        assert ("emulates" in note) == ("ten times" in note) == (machine == "x86_64")
        assert "slower" in note
        assert "\n" not in note


def test_tf32_needs_cuda_when_a_run_starts_and_computes_in_float32_where_it_is_resumed_without(monkeypatch):
    with pytest.raises(UserError, match="precision=tf32: only CUDA"):
        settle_precision("tf32", CPU)
    assert "float32" in precision_note("tf32", CPU)
    assert load("digits").settled(CPU, "tf32").train.precision == "tf32"


def test_cuda_multiplies_as_the_precision_says_and_afterwards_as_before():
    places = torch.backends.cudnn.conv, torch.backends.cudnn.rnn, torch.backends.cuda.matmul
    before = [place.fp32_precision for place in places]
    for precision, wanted in (("fp32", "ieee"), ("bf16", "ieee"), ("tf32", "tf32")):
        with multiplying_in(precision, CUDA):
            assert [place.fp32_precision for place in places] == [wanted] * 3
            with multiplying_in("fp32", CUDA):  # evaluation within a run
                assert [place.fp32_precision for place in places] == ["ieee"] * 3
            assert [place.fp32_precision for place in places] == [wanted] * 3
            # torch.compile(mode="max-autotune") asks by these names, which raise where a newer one says something else
            assert torch.backends.cudnn.allow_tf32 == torch.backends.cuda.matmul.allow_tf32 == (wanted == "tf32")
        assert [place.fp32_precision for place in places] == before
    with pytest.raises(ZeroDivisionError), multiplying_in("tf32", CUDA):
        raise ZeroDivisionError
    assert [place.fp32_precision for place in places] == before


@pytest.mark.parametrize("deterministic", [True, False])
def test_cuda_takes_kernels_of_a_fixed_order_or_the_fastest_and_afterwards_what_it_took_before(deterministic):
    cudnn = torch.backends.cudnn

    def state():
        return cudnn.benchmark, cudnn.deterministic, torch.get_deterministic_debug_mode()

    before = state()
    with choosing_kernels(deterministic, CUDA):
        assert state() == ((False, True, 1) if deterministic else (True, False, 0))
    assert state() == before
    with choosing_kernels(deterministic, CPU):
        assert state() == before
    with pytest.raises(ZeroDivisionError), choosing_kernels(deterministic, CUDA):
        raise ZeroDivisionError
    assert state() == before


@pytest.mark.parametrize("backend", ["resident", "threads", "reference"])
def test_loaders_write_the_type_that_is_asked_for_and_float32_otherwise(backend):
    random = np.random.default_rng(0)
    split = Split(random.integers(0, 256, (11, 9, 7, 3), dtype=np.uint8), np.arange(11) % 2)
    transform = Transform(9, 7, pad=2, flip=True, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    loader = make_loader(split, backend, transform, "cpu")
    plan = training_plan(np.arange(11), Key(0, 0, "train", 0), transform, 4, loader.sizes)
    wide, narrow = list(loader.batches(plan)), list(loader.batches(plan, 0, torch.bfloat16))
    for ours, theirs in zip(narrow, wide, strict=True):
        assert theirs.images.dtype == torch.float32
        assert torch.equal(ours.images, theirs.images.bfloat16())
        assert torch.equal(ours.labels, theirs.labels)
    loader.close()


BRIEF = [setting for setting in TINY if not setting.startswith("precision")]
BRIEF += ["classes=6", "base_classes=4", "increment=2", "epochs=1", "base_epochs=1", "device=cpu"]


def test_only_training_sees_bfloat16(tmp_path, monkeypatch):
    """Herding, class means and evaluation read float32 images and yield what float32 weights say of them."""
    experiment = Experiment(load("digits", [*BRIEF, "precision=bf16", "predictor=nme"]), tmp_path / "run", False)
    seen = {"student": set(), "teacher": set(), "frozen": set()}
    for name, network in (
        ("student", experiment.trainer.student),
        ("teacher", experiment.trainer.folded_teacher.plain),
        ("frozen", experiment.frozen.folded.plain),
    ):
        network.register_forward_hook(
            lambda module, inputs, out, name=name: seen[name].add((inputs[0].dtype, out.features.dtype))
        )
    monkeypatch.setattr(experiment, "compile", lambda: None)  # which counts the operations of a forward
    experiment.run()
    bf16, fp32 = (torch.bfloat16, torch.bfloat16), (torch.float32, torch.float32)
    assert seen == {"student": {bf16}, "teacher": {bf16}, "frozen": {fp32}}
    assert not torch.is_autocast_enabled("cpu")


def test_a_run_stores_its_precision_and_keeps_it_on_another_processor(tmp_path, monkeypatch, capsys):
    processor(monkeypatch, "amx_bf16")
    out = tmp_path / "run"
    experiment = Experiment(load("digits", BRIEF), out, False)

    def killed(*arguments):
        experiment.save(Position())  # a start that fails before its first checkpoint leaves nothing behind
        raise KeyboardInterrupt

    monkeypatch.setattr(experiment, "run_step", killed)
    with pytest.raises(KeyboardInterrupt):
        experiment.run()
    assert read_effective(out / "recipe.yaml").train.precision == "bf16"
    processor(monkeypatch, "avx2")
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    capsys.readouterr()
    resumed = Experiment(load("digits", BRIEF), out, True)
    assert resumed.trainer.precision == "bf16"
    resumed.run()
    assert capsys.readouterr().out.count("emulates it") == 1
    assert yaml.safe_load((out / "recipe.yaml").read_text())["precision"] == "bf16"


def train(out, *overrides, resume=False, base=None):
    return Experiment(load("digits", [*BRIEF, *overrides]), out, resume, base).run()


def test_another_precision_is_refused_on_resume(tmp_path):
    results = train(tmp_path / "run", "precision=bf16")
    with pytest.raises(UserError, match="precision was bf16, now fp32"):
        train(tmp_path / "run", "precision=fp32", resume=True)
    assert train(tmp_path / "run", resume=True) == results


def test_an_older_recipe_with_auto_means_what_it_meant(tmp_path):
    for device, wanted in (("auto", "fp32"), ("cpu", "fp32"), ("cuda", "bf16"), ("cuda:1", "bf16")):
        keys = yaml.safe_load(load("digits").dump()) | {"precision": "auto", "device": device}
        path = tmp_path / f"{wanted}.yaml"
        path.write_text(yaml.safe_dump(keys))
        assert read_effective(path).train.precision == wanted


@pytest.mark.parametrize(
    ("timings", "wanted"),
    [
        ('{"machine": {"device": "NVIDIA H200"}}', "bf16"), ('{"machine": {"device": "CPU (2 threads)"}}', "fp32"),
        ('{"machine": {}}', "fp32"), ("[1]", "fp32"), ("\xff", "fp32"),
    ],
)  # fmt: skip
def test_an_older_auto_of_device_auto_is_told_by_the_machine_of_the_run(timings, wanted, tmp_path):
    keys = yaml.safe_load(load("digits").dump()) | {"precision": "auto", "device": "auto"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(keys))
    (tmp_path / "timings.json").write_bytes(timings.encode("latin-1"))
    assert read_effective(tmp_path / "recipe.yaml").precision == wanted


def test_a_base_step_of_another_precision_is_not_taken(tmp_path):
    train(tmp_path / "a", "precision=bf16")
    with pytest.raises(UserError, match="precision is bf16 there and fp32 here"):
        train(tmp_path / "b", "precision=fp32", base=tmp_path / "a")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("as_html", [False, True])
@pytest.mark.parametrize("other", ["digits", "of_another_recipe"])
def test_runs_of_two_precisions_stand_in_no_report_together(two_precisions, other, as_html, tmp_path):
    bf16, fp32 = two_precisions["digits", "bf16"], two_precisions[other, "fp32"]
    with pytest.raises(UserError) as refused:
        write_report([bf16, fp32], tmp_path / "report", as_html)
    for part in (f"bf16 by {bf16}", f"fp32 by {fp32}", "report them apart"):
        assert part in str(refused.value)
    assert not (tmp_path / "report").exists()
    write_report([two_precisions["digits", "fp32"], two_precisions["of_another_recipe", "fp32"]], None, False)


@pytest.fixture(scope="module")
def two_precisions(tmp_path_factory):
    """Run directories by recipe and precision: digits, and the same as a recipe of one's own with another loss."""
    root = tmp_path_factory.mktemp("precisions")
    (root / "of_another_recipe.yaml").write_text("base: digits\nloss: balanced\n")
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastil.reporting.figures.draw_run", lambda folder: None)
        for recipe, name, precision in (
            ("digits", "digits", "bf16"), ("digits", "digits", "fp32"),
            (str(root / "of_another_recipe.yaml"), "of_another_recipe", "fp32"),
        ):  # fmt: skip
            out = found[name, precision] = root / f"{name}-{precision}"
            Experiment(load(recipe, [*BRIEF, f"precision={precision}"]), out, False).run()
    return found


def test_an_evaluation_that_does_not_compile_says_so_and_training_stays_compiled(tmp_path, monkeypatch, capsys):
    asked = []

    def compile_network(network, example, *, train, use="training", cast_weights=False):
        asked.append((use, tuple(example.shape), example.dtype))
        return (network, f"no header: {use} runs uncompiled") if use == "evaluation" else (network.forward, None)

    monkeypatch.setattr(compiling, "compile_network", compile_network)
    monkeypatch.setattr("fastil.training.trainer.compile_network", compile_network)
    monkeypatch.setitem(compiling.REPAID_BY, "cpu", 0)
    experiment = Experiment(load("digits", [*BRIEF, "compile=true", "precision=bf16"]), tmp_path / "run", False)
    experiment.compile()
    batch = experiment.recipe.train.batch_size
    assert asked == [
        ("training", (batch, 3, 8, 8), torch.bfloat16),
        ("training", (batch, 3, 8, 8), torch.bfloat16),
        ("evaluation", (256, 3, 8, 8), torch.float32),
    ]
    out = capsys.readouterr().out
    assert "evaluation runs uncompiled" in out
    assert "compiled in" in out
    counts = np.bincount(experiment.dataset.val.labels)[experiment.protocol.order]
    trained = np.bincount(experiment.dataset.train.labels)[experiment.protocol.order]
    assert step_plan.frozen_visits(experiment.steps, counts) == trained.sum() + counts[:4].sum() + counts.sum()


def among_others(monkeypatch, count):
    """Be one of so many processes on this machine."""
    monkeypatch.setenv("WORLD_SIZE", str(count))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(count))
    monkeypatch.setenv("LOCAL_RANK", "2")


@pytest.mark.parametrize(
    ("name", "gpus", "line"),
    [
        ("cuda:1", 4, r"^device=cuda:1: one GPU for 4 processes; use device=cuda"),
        ("cuda", 3, r"^4 processes on this machine see 3 GPUs; .*--nproc-per-node 3"),
        ("auto", 1, r"^4 processes on this machine see 1 GPU; .*--nproc-per-node 1"),
        ("cuda", 0, r"^device=cuda: 0 such devices are visible; use device=cpu"),
    ],
)
def test_every_process_has_a_gpu_of_its_own(name, gpus, line, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    among_others(monkeypatch, 4)
    with pytest.raises(UserError, match=line):
        pick_device(name)


@pytest.mark.parametrize(("name", "among", "picked"), [
    ("auto", 1, "cuda"), ("cuda", 1, "cuda"), ("cuda:1", 1, "cuda:1"),
    ("auto", 4, "cuda:2"), ("cuda", 4, "cuda:2"), ("cpu", 4, "cpu"),
])  # fmt: skip
def test_a_gpu_is_that_of_the_local_rank_and_cublas_may_be_asked_to_add_in_order(name, among, picked, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    among_others(monkeypatch, among)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    assert str(pick_device(name)) == picked
    assert ("CUBLAS_WORKSPACE_CONFIG" in os.environ) == (picked != "cpu")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
