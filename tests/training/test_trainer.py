"""The training step: no wait for the device, no recompilation, the update that the formulas ask for."""

import copy
import ctypes
import dataclasses
import functools
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)

from fastil.data import Batch, Split, make_loader
from fastil.errors import UserError
from fastil.evaluation import forward
from fastil.losses import balanced_cross_entropy, distillation, log_prior
from fastil.methods import METHODS, LossConfig, MetaAlpha, MetaConfig, Meter, MethodConfig, StepContext, configs_of
from fastil.methods.bic import BiCConfig, fit_bias
from fastil.methods.corrections import CorrectionConfig
from fastil.methods.il_baseline import ILBaseline
from fastil.models import Folded, ModelConfig, Output, build_network
from fastil.optimiser import TrainConfig
from fastil.plan import Key, Transform, cycled_plan, training_plan
from fastil.reporting.checkpoints import TrainerState
from fastil.training.compiling import decide, has_cxx_compiler
from fastil.training.phases import BeforeUpdate, Phase
from fastil.training.trainer import Stopped, Trainer

CLASSES, SIZE = 6, 8
TRANSFORM = Transform(SIZE, SIZE, pad=1, flip=True, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))


def images_of(classes=CLASSES, each=12):
    """Separable images: the class decides the brightness of one quadrant."""
    random = np.random.default_rng(0)
    labels = np.repeat(np.arange(classes), each)
    images = random.integers(0, 80, (len(labels), SIZE, SIZE, 3))
    for row, label in enumerate(labels):
        images[row, (label // 2) * 2 : (label // 2) * 2 + 2, (label % 2) * 4 : (label % 2) * 4 + 4] += 150
    return Split(images.astype(np.uint8), labels.astype(np.int64))


def make_trainer(split, config=None, device="cpu", table=None, model=None, **hooks):
    config = config or TrainConfig(epochs=2, batch_size=16, lr=0.05, device="cpu", precision="fp32")
    with unset_fake_temporarily():
        model = model or ModelConfig("resnet8")
        maps = model.head == "proxies"  # PODNet reads them
        student, teacher = (build_network(model, CLASSES, 0, keeps_maps=maps) for _ in range(2))
    if detect_fake_mode() is not None:
        student, teacher = on_fake(student, device), on_fake(teacher, device)
    calls = {"save": lambda *a: None, "report": lambda r: None, "tick": lambda n: None, "stop": lambda: False}
    calls |= {"say": print} | hooks
    loader = make_loader(split, "auto", TRANSFORM, device)
    table = torch.arange(CLASSES, device=device) if table is None else table
    return Trainer(config, student, teacher, loader, table, **calls)


def on_fake(network, device):
    """Put fake tensors in place of every parameter and buffer (Module.to cannot swap fake ones)."""
    for module in network.modules():
        for name, value in module._parameters.items():
            if value is not None:
                layout = torch.channels_last if value.ndim == 4 else torch.contiguous_format
                fake = torch.empty(value.shape, device=device, memory_format=layout)
                module._parameters[name] = torch.nn.Parameter(fake, requires_grad=value.requires_grad)
        for name, value in module._buffers.items():
            if value is not None:
                module._buffers[name] = torch.empty(value.shape, dtype=value.dtype, device=device)
    return network


@pytest.fixture(scope="module")
def cuda_guard(tmp_path_factory):
    """Lets a CPU build of torch trace fake CUDA tensors through autograd's forward half: its registry of device guards
    has no entry for CUDA, and gets the one torch itself uses where a CUDA build finds no GPU."""
    if torch.version.cuda:
        return
    if not has_cxx_compiler():
        pytest.skip("fake CUDA tensors on a CPU build of torch need a C++ compiler: apt-get install g++")
    folder, package = tmp_path_factory.mktemp("guard"), Path(torch.__file__).parent
    source = folder / "guard.cpp"
    source.write_text(
        "#include <c10/core/impl/DeviceGuardImplInterface.h>\n"
        "namespace c10::impl { C10_REGISTER_GUARD_IMPL(CUDA, NoOpDeviceGuardImpl<DeviceType::CUDA>) }\n"
    )
    command = ["g++", "-std=c++20", "-shared", "-fPIC", f"-I{package}/include", source]
    subprocess.run([*command, "-o", folder / "guard.so", f"-L{package}/lib", "-lc10"], check=True)
    ctypes.CDLL(str(folder / "guard.so"))


def make_phase(trainer, method, ids, *, step=0, epochs=2, batch_size=16, teacher=None, lr=0.05):
    return Phase(
        name="train", step=step, parameters=list(trainer.student.parameters()),
        plan=lambda epoch: training_plan(ids, Key(0, step, "train", epoch), TRANSFORM, batch_size),
        epochs=epochs, schedule=lambda epoch: lr, method=method,
        teacher=bool(step) if teacher is None else teacher,
    )  # fmt: skip


def begin(trainer, method, step, num_old, num_seen, counts):
    method.begin_step(StepContext(step, num_old, num_seen, np.asarray(counts)))
    trainer.begin_step()
    trainer.student.head.open_rows(num_old, num_seen, torch.Generator().manual_seed(step))


def with_meta(phase, method, held_out, gradient, every=2):
    """The phase with alpha learned on those images."""
    meta = MetaAlpha(MetaConfig(meta_every=every, meta_gradient=gradient), method, 16)
    meta.begin_step()
    stream = functools.partial(cycled_plan, held_out, Key(0, 1, "meta"), TRANSFORM, 16)
    return dataclasses.replace(phase, before_update=BeforeUpdate(every, stream, meta.before_update))


COSINE = {"head": "cosine", "last_relu": False}
PARTS = {
    "lucir": ("lucir", "balanced", COSINE, {}),
    "podnet": ("podnet", "nca", {"head": "proxies", "proxies": 3}, {}),
    "podnet_paper": ("podnet", "nca", {"head": "proxies", "proxies": 3}, {"nca_variant": "paper"}),
    "tpcil": ("tpcil", "softmax", COSINE, {}),
    "bic_all": ("bic", "softmax", {}, {"bic_groups": "all"}),
    "icarl": ("icarl", "rescaled", {}, {}),
    "icarl_bce": ("icarl_bce", "softmax", {}, {}),
    "separated": ("il_baseline", "separated", COSINE, {}),
    "mnemonics": ("mnemonics", "softmax", COSINE, {}),
    "mnemonics_released": (
        "mnemonics", "softmax", COSINE | {"weight_transfer": True}, {"mnemonics": "released"},
    ),
}  # fmt: skip


def method_on_fake(name, trainer):
    """As it is in the first incremental step of two old and four new classes."""
    method, loss, _, keys = PARTS[name]
    parts = {
        part: config(**{f.name: keys[f.name] for f in dataclasses.fields(config) if f.name in keys})
        for part, config in configs_of("il_baseline").items()
    }
    loss = LossConfig(loss, nca_variant=keys.get("nca_variant", "released"))
    width = trainer.student.width
    built = METHODS[method](MethodConfig(method), loss, width, trainer.device, parts, CLASSES)
    built.begin_step(StepContext(1, 2, CLASSES, np.array([3] * 2 + [12] * 4 + [0] * (width - CLASSES))))
    if method == "tpcil":
        built.vertices = torch.empty(width, trainer.student.head.weight.shape[-1], device=trainer.device)
    return built


@pytest.fixture
def fake(cuda_guard, monkeypatch):
    """Fake tensors in place of all, on either device: fit(device, model, build) trains an epoch on them."""
    # torch ships no fake form of its fused SGD; the real one reads the learning rate inside its kernel.
    library = torch.library.Library("aten", "IMPL", "Meta")
    library.impl("_fused_sgd_.tensor_lr", lambda *args, **kwargs: None)

    def fit(device, model, build):
        reached = []

        def backward(tensors, gradients=None):
            """In place of the autograd engine, which refuses to start on CUDA without an accelerator."""
            tensors, gradients = ([x] if not isinstance(x, list) else x for x in (tensors, gradients))
            for tensor, gradient in zip(tensors, gradients, strict=True):
                assert tensor.requires_grad
                assert tensor.ndim == 0 if gradient is None else gradient.shape == tensor.shape
            reached.append(len(tensors))
            for parameter in trainer.student.parameters():
                parameter.grad = torch.empty_like(parameter)

        if device == "cuda":
            monkeypatch.setattr(torch.Tensor, "backward", backward)
            monkeypatch.setattr(torch.autograd, "backward", backward)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            config = TrainConfig(batch_size=16, precision="fp32")
            trainer = make_trainer(images_of(), config, device=device, model=model)
            images = trainer.loader.images
            trainer.loader.images = mode.from_tensor(images) if device == "cpu" else images
            assert trainer.loader.images.device.type == device
            phase = build(trainer)
            batches = list(trainer.loader.batches(phase.plan(0)))
            assert [len(b.images) for b in batches] == [16, 16, 16, 16, 8]
            for batch in batches:
                assert isinstance(batch.images, FakeTensor)
                assert batch.images.device.type == device
                assert batch.images.is_contiguous(memory_format=torch.channels_last)
            trained = []
            trainer.tick = trained.append
            with pytest.raises(DataDependentOutputException):  # nothing before the epoch's one read, which must raise
                trainer.fit(phase)
            assert trained == [16, 16, 16, 16, 8]
            assert len(reached) >= 5 or device == "cpu"

    yield fit
    del library


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("gradient", [None, "jvp", "difference"])
def test_training_never_waits_for_the_device(device, gradient, fake):
    """A fake tensor has no values, so any .item(), .tolist() or branch on one raises. gradient: of Meta's alpha.

    CUDA: everything but the autograd engine, which refuses to start without an accelerator; CPU: with it.
    """

    def build(trainer):
        method = ILBaseline(MethodConfig(), LossConfig("meta_balanced"), trainer.student.width, trainer.device)
        phase = make_phase(trainer, method, np.arange(72), step=1)
        return phase if gradient is None else with_meta(phase, method, np.arange(12), gradient)

    fake(device, None, build)


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("name", PARTS)
def test_no_method_waits_for_the_device(device, name, fake):
    def build(trainer):
        method = method_on_fake(name, trainer)
        phase = make_phase(trainer, method, np.arange(72), step=1)
        parameters, trainable = method.parameters(trainer.student, 1), method.trainable(trainer.student)
        return dataclasses.replace(phase, parameters=parameters, trainable=trainable, clamp=method.clamp)

    fake(device, ModelConfig("resnet8", **PARTS[name][2]), build)


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("parameters", ["classifier", "weights", "all"])
@pytest.mark.parametrize("name", ["softmax", "lucir", "podnet"])
def test_balanced_finetuning_never_waits_for_the_device(device, name, parameters, fake):
    def build(trainer):
        if name == "softmax":
            method = ILBaseline(MethodConfig(), LossConfig("softmax"), trainer.student.width, trainer.device)
        else:
            method = method_on_fake(name, trainer)
        correction = CorrectionConfig("balanced_finetuning", finetune_parameters=parameters)
        phase = make_phase(trainer, method, np.arange(72), step=1)
        parts = {"parameters": correction.parameters(trainer.student), "clamp": method.clamp, "bn_mode": "frozen"}
        return dataclasses.replace(phase, name="correct", **parts)

    fake(device, ModelConfig("resnet8", **PARTS[name][2]) if name in PARTS else None, build)


@pytest.mark.parametrize("groups", ["newest", "all"])
def test_stage_2_of_bic_never_waits_for_the_device(groups):
    """On fake CPU tensors, because the autograd engine does not start on CUDA without an accelerator."""
    with FakeTensorMode():
        logits, targets = torch.randn(300, CLASSES), torch.randint(0, CLASSES, (300,))
        beta, gamma = fit_bias(logits, targets, 2, BiCConfig(groups, bic_epochs=3))
        assert isinstance(beta, FakeTensor)
        assert beta.shape == gamma.shape == ()


@pytest.mark.parametrize("with_teacher", [False, True])
def test_a_methods_backward_is_that_of_its_loss(with_teacher):
    method = ILBaseline(MethodConfig(), LossConfig(), 8, torch.device("cpu"))
    method.begin_step(StepContext(1, 4, CLASSES, np.array([2] * 4 + [9] * (CLASSES - 4) + [0] * (8 - CLASSES))))
    labels = torch.tensor([0, 5, 3])
    batch = Batch(torch.zeros(3, 3, SIZE, SIZE), labels, labels)
    outputs, meter = [], Meter(torch.zeros(4, 4), torch.zeros(()))
    for backward in (
        lambda *a: method.loss(*a).backward(),
        lambda *a: method.backward(*a, meter),
    ):
        torch.manual_seed(0)
        logits, teacher = torch.randn(3, 8, requires_grad=True), torch.randn(3, 8)
        out, teacher_out = (Output(torch.zeros(3, 2), [], z) for z in (logits, teacher))
        backward(batch, out, teacher_out if with_teacher else None)
        outputs.append(logits.grad)
    assert torch.equal(*outputs)


@pytest.mark.skipif(not has_cxx_compiler(), reason="needs a C++ compiler: apt-get install g++")
def test_nothing_is_recompiled_after_the_second_incremental_step():
    counters = torch._dynamo.utils.counters
    split = images_of()
    trainer = make_trainer(split)
    method = ILBaseline(MethodConfig(), LossConfig(), trainer.student.width, trainer.device)
    assert trainer.compile() is None
    assert trainer.fast_student is not trainer.student
    frozen = Folded(trainer.student, torch.float32, 256)
    graphs = []
    for step, (old, seen) in enumerate([(0, 2), (2, 3), (3, 4), (4, 5), (5, 6)]):
        counts = [12 if c < seen else 0 for c in range(trainer.student.width)]
        begin(trainer, method, step, old, seen, counts)
        ids = np.arange(seen * 12 - step)  # ragged last batches of several sizes
        trainer.fit(make_phase(trainer, method, ids, step=step, epochs=1))
        forward(frozen, trainer.loader, ids)  # as herding and evaluation do
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] > 0
    assert graphs[2] == graphs[3] == graphs[4]


@pytest.mark.skipif(not has_cxx_compiler(), reason="needs a C++ compiler: apt-get install g++")
def test_compiling_leaves_no_trace_and_changes_no_result():
    split = images_of()
    plain, compiled = make_trainer(split), make_trainer(split)
    before = copy.deepcopy(compiled.student.state_dict())
    assert compiled.compile() is None
    assert all(torch.equal(before[name], value) for name, value in compiled.student.state_dict().items())
    assert all(parameter.grad is None for parameter in compiled.student.parameters())
    for trainer in (plain, compiled):
        method = ILBaseline(MethodConfig(), LossConfig(), trainer.student.width, trainer.device)
        begin(trainer, method, 0, 0, 6, [12] * 6 + [0, 0])
        trainer.fit(make_phase(trainer, method, np.arange(72), epochs=1))
    for name, value in plain.student.state_dict().items():
        torch.testing.assert_close(compiled.student.state_dict()[name], value, rtol=1e-3, atol=1e-4)


def test_where_the_student_exchanges_statistics_only_the_teacher_is_compiled(monkeypatch):
    compiled, said = [], []
    monkeypatch.setattr(torch, "compile", lambda network, dynamic: compiled.append(network) or network)
    monkeypatch.setattr("fastil.ranks.count", lambda: 2)
    config = TrainConfig(batch_size=16, device="cpu", precision="fp32", bn="sync")
    trainer = make_trainer(images_of(), config, say=said.append)
    assert trainer.compile() is None
    assert compiled == [trainer.folded_teacher.plain]
    assert len(said) == 1
    assert "student runs uncompiled" in said[0]
    assert not trainer.compiled


def test_a_failed_compilation_falls_back_with_one_line(monkeypatch):
    def broken(network, dynamic):
        def fail(images):
            raise RuntimeError("Python.h: No such file\nlong log")

        return fail

    monkeypatch.setattr(torch, "compile", broken)
    trainer = make_trainer(images_of())
    why = trainer.compile()
    assert why is not None
    assert "Python.h" in why
    assert "uncompiled" in why
    assert "\n" not in why
    assert trainer.fast_student is trainer.student


def test_compile_is_decided_by_work_and_by_what_is_installed(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr("fastil.training.compiling.has_cxx_compiler", lambda: True)
    assert decide("auto", cpu, 1e9) == (False, None)
    assert decide("auto", cpu, 1e18) == (True, None)
    assert decide(True, cpu, 1e9) == (True, None)
    assert decide(False, cpu, 1e18) == (False, None)
    monkeypatch.setattr("fastil.training.compiling.has_cxx_compiler", lambda: False)
    wanted, line = decide(True, cpu, 1e18)
    assert not wanted
    assert line is not None
    assert re.search("no C\\+\\+ compiler.*g\\+\\+", line)


def reference_step(network, teacher, images, positions, counts, num_old, num_seen, lr, weight_decay, momentum):
    """One SGD update of eq. 1 from torch's own optimiser and the plain formulas, apart from the trainer."""
    network, teacher = copy.deepcopy(network).train(), copy.deepcopy(teacher).eval()
    optimizer = torch.optim.SGD(network.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay)
    rho = num_old / num_seen
    logits = network(images).logits
    with torch.no_grad():
        teacher_logits = teacher(images).logits
    loss = rho * distillation(logits, teacher_logits, num_old, 2.0)
    loss = loss + (1 - rho) * balanced_cross_entropy(logits, positions, log_prior(torch.tensor(counts), num_old))
    loss.backward()
    optimizer.step()
    return network


def test_one_update_is_equation_1_with_plain_sgd():
    table = torch.tensor([2, 0, 3, 1, 5, 4])  # label to incremental position
    trainer = make_trainer(images_of(), table=table)
    method = ILBaseline(MethodConfig(), LossConfig(), trainer.student.width, trainer.device)
    begin(trainer, method, 0, 0, 4, [12] * 4 + [0] * 4)
    trainer.fit(make_phase(trainer, method, np.arange(48), epochs=1))
    counts = [2, 2, 2, 2, 12, 12, 0, 0]
    begin(trainer, method, 1, 4, 6, counts)
    phase = make_phase(trainer, method, np.arange(32, 48), step=1, epochs=1)
    (batch,) = trainer.loader.batches(phase.plan(0))
    config = trainer.config
    rates = (0.05, config.weight_decay, config.momentum)
    wanted = reference_step(trainer.student, trainer.teacher, batch.images, table[batch.labels], counts, 4, 6, *rates)
    teacher_before = copy.deepcopy(trainer.teacher.state_dict())
    trainer.fit(phase)
    for name, value in wanted.state_dict().items():
        torch.testing.assert_close(trainer.student.state_dict()[name], value, rtol=1e-5, atol=1e-6, msg=name)
    assert all(torch.equal(teacher_before[name], value) for name, value in trainer.teacher.state_dict().items())


def test_rows_of_classes_not_seen_stay_zero_and_old_knowledge_is_the_teacher():
    trainer = make_trainer(images_of())
    method = ILBaseline(MethodConfig(), LossConfig(), trainer.student.width, trainer.device)
    begin(trainer, method, 0, 0, 3, [12] * 3 + [0] * 5)
    trainer.fit(make_phase(trainer, method, np.arange(36)))
    head = trainer.student.head
    assert head.weight[:3].abs().sum() > 0
    assert torch.equal(head.weight[3:], torch.zeros_like(head.weight[3:]))
    assert torch.equal(head.bias[3:], torch.zeros_like(head.bias[3:]))
    trained = copy.deepcopy(trainer.student.state_dict())
    begin(trainer, method, 1, 3, 6, [2] * 3 + [12] * 3 + [0] * 2)
    for name, value in trainer.teacher.state_dict().items():
        assert torch.equal(value, trained[name]), name
    assert not trainer.teacher.training
    assert not any(parameter.requires_grad for parameter in trainer.teacher.parameters())


def test_momentum_is_forgotten_between_phases_and_buffers_stay_in_place():
    trainer = make_trainer(images_of())
    method = ILBaseline(MethodConfig(), LossConfig(), trainer.student.width, trainer.device)
    begin(trainer, method, 0, 0, 6, [12] * 6 + [0] * 2)
    phase = make_phase(trainer, method, np.arange(72), epochs=1)
    update = trainer.update(phase)
    trainer.fit(phase)
    buffers = [state["momentum_buffer"] for state in update.optimizer.state.values()]
    assert sum(float(b.abs().sum()) for b in buffers) > 0
    pointers = [b.data_ptr() for b in buffers]
    update.reset()
    assert sum(float(b.abs().sum()) for b in buffers) == 0
    trainer.fit(phase)
    assert trainer.update(phase) is update
    assert [state["momentum_buffer"].data_ptr() for state in update.optimizer.state.values()] == pointers


@pytest.mark.parametrize("stop_after", [1, 3, 4, 5, 7])
def test_stopping_between_any_two_batches_and_going_on_gives_the_same_weights(stop_after):
    """4.5 batches an epoch, two epochs: a stop inside, at the end and right after an epoch."""
    ids = np.arange(72)
    whole, records = make_trainer(images_of()), []
    whole.report = records.append
    method = ILBaseline(MethodConfig(), LossConfig(), whole.student.width, whole.device)
    begin(whole, method, 0, 0, 6, [12] * 6 + [0] * 2)
    whole.fit(make_phase(whole, method, ids))

    saved, seen, resumed_records = {}, [0], []
    part = make_trainer(images_of(), report=resumed_records.append)

    def save(phase, epoch, batch):
        assert phase == "train"
        saved.update(epoch=epoch, batch=batch, state=copy.deepcopy(part.state_dict()))

    part.save = save
    part.tick = lambda images: seen.__setitem__(0, seen[0] + 1)
    part.stop = lambda: seen[0] >= stop_after
    begin(part, method, 0, 0, 6, [12] * 6 + [0] * 2)
    with pytest.raises(Stopped):
        part.fit(make_phase(part, method, ids))

    rest = make_trainer(images_of(), report=resumed_records.append)
    phase = make_phase(rest, method, ids)
    rest.load_state_dict(TrainerState.model_validate(saved["state"]), Path("last.pt"), "")
    rest.fit(phase, saved["epoch"], saved["batch"])
    for name, value in whole.student.state_dict().items():
        assert torch.equal(value, rest.student.state_dict()[name]), name
    assert [(r.epoch, r.loss, r.train_top1) for r in records] == [
        (r.epoch, r.loss, r.train_top1) for r in resumed_records
    ]


def test_divergence_is_one_clear_line():
    trainer = make_trainer(images_of())
    method = ILBaseline(MethodConfig(), LossConfig(), trainer.student.width, trainer.device)
    begin(trainer, method, 0, 0, 6, [12] * 6 + [0] * 2)
    with pytest.raises(UserError, match="diverged; lower lr"):
        trainer.fit(make_phase(trainer, method, np.arange(72), epochs=5, lr=1e30))


@pytest.mark.parametrize(
    ("config", "epochs", "wanted"),
    [
        # Section 4.1.3: CIFAR 250 epochs, divided by 10 at 100, 150, 200; ImageNet 100 epochs, at 30, 60, 80, 90.
        (TrainConfig(lr=0.1, milestones=[0.4, 0.6, 0.8]), 250, {99: 0.1, 100: 0.01, 149: 0.01, 150: 1e-3, 200: 1e-4}),
        (TrainConfig(lr=0.1, milestones=[0.3, 0.6, 0.8, 0.9]), 100, {29: 0.1, 30: 0.01, 60: 1e-3, 80: 1e-4, 90: 1e-5}),
        (TrainConfig(lr=0.2, schedule="cosine"), 10, {0: 0.2, 5: 0.1}),
    ],
)  # fmt: skip
def test_learning_rates_are_the_published_ones(config, epochs, wanted):
    for epoch, lr in wanted.items():
        assert config.learning_rate(epoch, epochs) == pytest.approx(lr)


def test_a_drop_multiplies_the_rate_by_lr_drop_and_never_in_the_first_epoch():
    config = TrainConfig(lr=0.8, lr_drop=0.5, milestones=[0.01, 0.25, 0.6])
    rates = [config.learning_rate(epoch, 10) for epoch in range(10)]
    assert rates == pytest.approx([0.8, 0.4, 0.2, 0.2, 0.2, 0.2, 0.1, 0.1, 0.1, 0.1])  # 0.25 of 10 is 2, to even
    flat = TrainConfig(lr=0.8, lr_drop=1.0, milestones=[0.5])
    assert [flat.learning_rate(epoch, 4) for epoch in range(4)] == [0.8] * 4
    cosine = TrainConfig(lr=0.8, lr_drop=0.5, schedule="cosine")
    assert [cosine.learning_rate(epoch, 4) for epoch in range(4)] == pytest.approx([0.8, 0.68284271, 0.4, 0.11715729])
