"""What `bench.kernels` runs: of each kernel the shapes and inputs, the contestants, and what their results must be.

The peers of the incremental loss are in `bench.loss_contestants`. For the other kernels the peer is their form in plain
torch, eager and compiled, which computes the same from the same arguments, its gradient by hand included.
"""

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bench import loss_contestants as loss
from bench.cases import DTYPES, Case
from fastil.kernels import incremental_loss_grad
from fastil.models import ModelConfig, Network, build_network

FASTIL, AUTOGRAD, EAGER, COMPILED, LIGER = "fastil", "fastil-autograd", "eager", "torch.compile", "Liger-Kernel"
PEERS = (EAGER, COMPILED, LIGER, AUTOGRAD)
SIDE, FEATURES, PROXIES, EXEMPLARS = 8, 64, 10, 20  # of maps, and of the heads and herds of CIFAR-100
PHOTO, BOX = (375, 500), 318  # pixels: an image of ImageNet, and a side of a box
Contestant = Callable[[Any], Any]
Compiler = Callable[[Callable[..., Any]], Callable[..., Any]]


@dataclass(frozen=True)
class Kernel:
    """One kernel of the bench.

    axes: what B and W are. shapes: B, W and classes, unless others are asked for. make: the inputs of one call.
    contestants: functions of these inputs, made when they are wanted. compiled: the same from what compiles a function.
    reference: the right result; tolerance: how far from it a result may be, relative, by dtype. must_move: bytes.
    by_data: contestants whose launches depend on the data, not on the shape alone. sets: of inputs, which take turns.
    """

    axes: str
    shapes: tuple[tuple[int, int, int], ...]
    dtypes: tuple[str, ...]
    make: Callable[[Case, torch.device, int], Any]
    contestants: dict[str, Callable[[], Contestant]]
    compiled: Callable[[Compiler], Contestant] | None = None
    reference: Contestant | None = None
    tolerance: dict[str, float] | None = None
    must_move: Callable[[Case], int] | None = None
    by_data: tuple[str, ...] = ()
    sets: int = 8


def entrants(kernel: Kernel, peers: tuple[str, ...], compiler: Compiler | None) -> dict[str, Contestant]:
    """Return fastil and the wanted peers by name, as far as the kernel has them; without a compiler, those that need
    none."""
    found = {name: make() for name, make in kernel.contestants.items() if name == FASTIL or name in peers}
    if kernel.compiled is not None and compiler is not None and COMPILED in peers:
        found[COMPILED] = kernel.compiled(compiler)
    return found


def peers_here() -> tuple[str, ...]:
    """Return the peers that are installed."""
    return tuple(name for name in PEERS if name != LIGER or importlib.util.find_spec("liger_kernel"))


def _spread(form: Callable[..., Any]) -> Contestant:
    return lambda call: form(*call)


def _forms(name: str) -> dict[str, Any]:
    """Return the contestants of a kernel whose operator and plain form share its name."""
    plain = importlib.import_module(f"fastil.kernels.{name}").plain  # its import registers the operator
    contestants = {FASTIL: lambda: _spread(getattr(torch.ops.fastil, name)), EAGER: lambda: _spread(plain)}
    return {
        "contestants": contestants,
        "compiled": lambda compiler: _spread(compiler(plain)),
        "reference": _spread(plain),
        "tolerance": {"fp32": 1e-4, "bf16": 1e-2},
    }


def _rand(case: Case, device: torch.device, seed: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    random = torch.Generator(device).manual_seed(seed)
    return [torch.randn(shape, device=device, generator=random).to(DTYPES[case.dtype]) for shape in shapes]


def _augment(case: Case, device: torch.device, seed: int) -> list[Any]:
    """Crops of images with a border of 4 pixels, from as large a data set as CIFAR's; without a GPU, where a gather
    counts as reading all of it, from the batch alone. Every crop is off by 2 pixels, which is what -4 to 4 come to in
    the mean, so all read the same number of bytes."""
    batch, side = case.batch, case.width
    random = torch.Generator(device).manual_seed(seed)
    count = batch if device.type == "cpu" else max(batch, min(50_000, 2**30 // (3 * side**2)))
    images = torch.randint(0, 256, (count, side, side, 3), dtype=torch.uint8, device=device, generator=random)
    corner = torch.where(torch.arange(2 * batch).view(batch, 2) % 4 < 2, 2, -2)
    boxes = torch.cat((corner, torch.full((batch, 2), side)), 1).to(device)
    ids = torch.randperm(count, device=device, generator=random)[:batch]
    flips = torch.arange(batch, device=device) % 2 == 0
    mean, std = torch.full((3,), 0.5, device=device), torch.full((3,), 0.25, device=device)
    return [images, ids, boxes, flips, mean, std, DTYPES[case.dtype], side, side]


def _crop_resize(case: Case, device: torch.device, seed: int) -> list[Any]:
    """Boxes of 318x318, the mean area of random resized crops, out of as many images of 375x500, each at its own place.
    The table lies on the device, and on the host for the peer."""
    batch, side, (height, width) = case.batch, case.width, PHOTO
    random = torch.Generator(device).manual_seed(seed)
    length = height * width * 3
    store = torch.randint(0, 256, (batch * length,), dtype=torch.uint8, device=device, generator=random)
    table = [
        [i * length, height, width, 7 * i % (height - BOX), 11 * i % (width - BOX), BOX, BOX, side, side, 0, 0, i]
        for i in range(batch)
    ]
    return [store, torch.tensor(table, device=device), torch.tensor(table), side]


def _frames_by(form: Callable[[Tensor, Tensor, Tensor], None], on_host: bool) -> Contestant:
    def run(call: list[Any]) -> Tensor:
        store, table, table_on_host, side = call
        frames = torch.empty(len(table), side, side, 3, dtype=torch.uint8, device=store.device)
        form(store, table_on_host if on_host else table, frames)
        return frames

    return run


def _crop_resize_forms() -> dict[str, Any]:
    plain = importlib.import_module("fastil.kernels.crop_resize").plain
    loop = _frames_by(plain, on_host=True)
    return {
        "contestants": {FASTIL: lambda: _frames_by(torch.ops.fastil.crop_resize, on_host=False), EAGER: lambda: loop},
        "reference": loop,
        "tolerance": {"uint8": 1e-3},  # sums in another order may round to the neighbour
    }


def _herd(case: Case, device: torch.device, seed: int) -> list[Any]:
    (features,) = _rand(case, device, seed, (case.batch, case.width, FEATURES))
    features = torch.nn.functional.normalize(features + 1, dim=2)
    counts = torch.full((case.batch,), case.width, device=device)
    return [features @ features.mT, counts, min(EXEMPLARS, case.width), 1000, 1e-9]


def _pod_spatial(case: Case, device: torch.device, seed: int) -> list[Any]:
    shape = (case.batch, case.width, SIDE, SIDE)
    maps = _rand(case, device, seed, shape, shape)
    return [part.contiguous(memory_format=torch.channels_last) for part in maps] + [1]


def _less_forget(case: Case, device: torch.device, seed: int) -> list[Any]:
    return list(_rand(case, device, seed, *[(case.batch, case.width)] * 2))


def _cosine_head(case: Case, device: torch.device, seed: int) -> list[Any]:
    shapes = ((case.batch, FEATURES), (case.batch, case.width), (case.width, PROXIES, FEATURES))
    features, grad, weight = _rand(case, device, seed, *shapes)
    return [grad, features, weight.float(), torch.ones((), device=device), 1.0]


def _cosine(forward: Callable[..., Any], backward: Callable[..., Any]) -> Callable[..., Any]:
    """Return the head and its gradients as one function."""

    def run(grad: Tensor, features: Tensor, weight: Tensor, scale: Tensor, sharpness: float) -> tuple[Tensor, ...]:
        similarities, *saved = forward(features, weight, scale, sharpness)
        return similarities, *backward(grad, features, weight, scale, *saved, sharpness)

    return run


def _cosine_forms() -> dict[str, Any]:
    module = importlib.import_module("fastil.kernels.cosine_head")
    plain = _cosine(module.plain, module.plain_grad)
    operators = _cosine(torch.ops.fastil.cosine_head, torch.ops.fastil.cosine_head_grad)
    return _forms("cosine_head") | {
        "contestants": {FASTIL: lambda: _spread(operators), EAGER: lambda: _spread(plain)},
        "compiled": lambda compiler: _spread(compiler(plain)),
        "reference": _spread(plain),
    }


def _alpha_hypergradient(case: Case, device: torch.device, seed: int) -> list[Any]:
    logits, tangent = _rand(case, device, seed, *[(case.batch, case.width)] * 2)
    target = torch.randint(0, case.classes, (case.batch,), device=device)
    scalars = [torch.tensor(value, device=device) for value in (case.num_old, case.classes, 0.5)]
    return [logits, tangent, target, torch.zeros(case.width, device=device), *scalars]


@dataclass
class Step:
    """What a training step of ResNet-32 works on."""

    student: Network
    teacher: Network
    optimizer: torch.optim.Optimizer
    images: Tensor
    loss: loss.Call
    autocast: bool


def _step(case: Case, device: torch.device, seed: int) -> Step:
    student, teacher = (build_network(ModelConfig("resnet32"), case.width, seed + i).to(device) for i in range(2))
    (images,) = _rand(replace(case, dtype="fp32"), device, seed, (case.batch, 3, 32, 32))
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01, momentum=0.9, weight_decay=2e-4, fused=True)
    call = loss.make_call(replace(case, dtype="fp32"), device, seed)
    images = images.contiguous(memory_format=torch.channels_last)
    return Step(student, teacher.eval(), optimizer, images, call, case.dtype == "bf16")


def _step_with(backward: Callable[[Tensor, Tensor, loss.Call], None]) -> Contestant:
    """Return a step that is eager but for its loss: `backward` gets the logits of student and teacher."""

    def run(step: Step) -> None:
        step.optimizer.zero_grad()
        device = step.images.device.type
        with torch.autocast(device, torch.bfloat16, enabled=step.autocast, cache_enabled=False):
            logits = step.student(step.images).logits
            with torch.no_grad():
                teacher_logits = step.teacher(step.images).logits
        backward(logits, teacher_logits, step.loss)
        step.optimizer.step()

    return run


def _by_kernel(logits: Tensor, teacher: Tensor, c: loss.Call) -> None:
    logits.backward(incremental_loss_grad(logits, c.target, c.prior, teacher, meter=c.meter, **loss.scalars_of(c)))  # type: ignore[no-untyped-call]


def _by_formulas(logits: Tensor, teacher: Tensor, c: loss.Call) -> None:
    loss.formulas(logits, teacher, c.target, c.prior, c.num_old, c.ce_weight, c.kd_weight).backward()  # type: ignore[no-untyped-call]


def _size(case: Case) -> int:
    return DTYPES[case.dtype].itemsize


LOSS = Kernel(
    "rows of logits x columns, of which the first CLASSES are classes and half of those old",
    ((128, 104, 100), (128, 1000, 1000), (1024, 104, 100), (1024, 1000, 1000), (1024, 4000, 4000),
     (128, 21848, 21841), (1024, 21848, 21841)),
    ("fp32", "bf16"),
    loss.make_call,
    {
        FASTIL: lambda: loss.fused_gradient,
        AUTOGRAD: lambda: loss.fused_autograd,
        EAGER: lambda: loss.backward_of(loss.formulas),
        LIGER: loss.liger,
    },
    compiled=lambda compiler: loss.backward_of(compiler(loss.formulas)),
    reference=loss.gradient_in_float64,
    tolerance={"fp32": 1e-5, "bf16": 1e-2},
    must_move=lambda case: case.batch * (2 * case.width + case.num_old) * _size(case),  # the teacher's old columns only
)  # fmt: skip
KERNELS = {
    "incremental_loss": LOSS,
    "augment": Kernel(
        "images x pixels of a side", ((128, 32, 32),), ("fp32", "bf16"), _augment,
        **_forms("augment") | {"tolerance": {"fp32": 0.0, "bf16": 1e-2}},
        must_move=lambda case: case.batch * case.width**2 * 3 * (1 + _size(case)),
    ),
    "crop_resize": Kernel(
        "images of 375x500 x pixels of a side of a frame", ((64, 224, 224),), ("uint8",), _crop_resize,
        **_crop_resize_forms(), must_move=lambda case: case.batch * 3 * (BOX**2 + case.width**2), by_data=(EAGER,),
    ),
    "herd": Kernel(
        "classes x images of each, 20 exemplars from features of 64", ((50, 500, 500),), ("fp64",), _herd,
        **_forms("herd") | {"tolerance": {"fp64": 0.0}, "compiled": None},  # it waits for the device in every turn
        must_move=lambda case: case.batch * case.width**2 * 8, by_data=(EAGER,),
    ),
    "pod_spatial": Kernel(
        "images x channels of maps of 8x8", ((128, 64, 64),), ("fp32", "bf16"), _pod_spatial, **_forms("pod_spatial"),
        must_move=lambda case: 3 * case.batch * case.width * SIDE**2 * _size(case),
    ),
    "less_forget": Kernel(
        "rows x features", ((128, 64, 64),), ("fp32", "bf16"), _less_forget, **_forms("less_forget"),
        must_move=lambda case: 3 * case.batch * case.width * _size(case),
    ),
    "cosine_head": Kernel(
        "images x classes of 10 proxies, features of 64; forward and gradients", ((128, 104, 104),), ("fp32", "bf16"),
        _cosine_head, **_cosine_forms(),
        must_move=lambda case: (
            2 * case.batch * (case.width + FEATURES) * _size(case) + 2 * case.width * PROXIES * FEATURES * 4
        ),
    ),
    "alpha_hypergradient": Kernel(
        "rows of logits x columns, of which the first CLASSES are classes and half of those old", ((128, 104, 100),),
        ("fp32", "bf16"), _alpha_hypergradient, **_forms("alpha_hypergradient"),
        must_move=lambda case: 2 * case.batch * case.width * _size(case) + 4 * case.width,
    ),
    "step": Kernel(
        "images of 32x32 x columns of the head: an eager step of ResNet-32 with a teacher, and its loss",
        ((128, 104, 100),), ("bf16", "fp32"), _step,
        {FASTIL: lambda: _step_with(_by_kernel), EAGER: lambda: _step_with(_by_formulas)}, sets=1,
    ),
}  # fmt: skip
