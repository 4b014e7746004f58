"""One launch of every operator on tensors of exactly their size: what compute-sanitizer runs (`make gpu`). Elsewhere it
compares the operators' two forms once more, on the shapes at the edges of their tiles."""

import importlib

import numpy as np
import pytest
import torch

from fastil.kernels.incremental_loss import Operands


def loss(device):
    logits, teacher = torch.randn(2, 3, 37, device=device)
    scalars = [torch.tensor(v, device=device) for v in (20, 37, 0.4, 0.6, 2.0)]
    target, prior = torch.tensor([36, -1, 0], device=device), torch.zeros(37, device=device)
    scale, meter = torch.tensor(2.0, device=device), torch.zeros(3, 4, device=device)
    return Operands(logits, target, prior, teacher, *scalars, torch.rand(3, device=device), logit_scale=scale,
                    margin_weight=scale, separated=True, label_smoothing=0.1, meter=meter, value=True)  # fmt: skip


def alpha(device):
    o = loss(device)
    return [o.logits, o.teacher, o.target, o.log_prior, o.num_old, o.num_seen, o.ce_weight]


def augment(device):
    images = torch.randint(0, 256, (3, 9, 7, 3), dtype=torch.uint8, device=device)
    boxes = torch.tensor([[-3, 5, 9, 7], [8, -6, 9, 7]], device=device)
    flips, channels = torch.tensor([True, False], device=device), torch.full((3,), 0.5, device=device)
    return [images, torch.tensor([2, 0], device=device), boxes, flips, channels, channels, torch.float32, 9, 7]


def crop_resize(device):
    store = torch.randint(0, 256, (9 * 7 * 3 + 5 * 11 * 3,), dtype=torch.uint8, device=device)
    table = [[0, 9, 7, -2, 1, 12, 6, 9, 8, 1, 2, 1], [9 * 7 * 3, 5, 11, 0, 0, 5, 11, 5, 11, -1, 3, 0]]
    return [store, torch.tensor(table, device=device), torch.zeros(2, 6, 7, 3, dtype=torch.uint8, device=device)]


def herd(device):
    rows = torch.nn.functional.normalize(torch.randn(2, 37, 5, dtype=torch.float64, device=device), dim=2)
    return [rows @ rows.mT, torch.tensor([37, 20], device=device), 9, 40, 1e-9]


def pod(device):
    maps = [torch.randn(2, 5, 7, 6, device=device).contiguous(memory_format=torch.channels_last) for _ in range(2)]
    return [*maps, 1]


def head(device):
    return [
        torch.randn(7, 70, device=device),
        torch.randn(11, 3, 70, device=device),
        torch.ones((), device=device),
        2.0,
    ]


OPERATORS = {
    "incremental_loss": loss,
    "alpha_hypergradient": alpha,
    "augment": augment,
    "crop_resize": crop_resize,
    "herd": herd,
    "less_forget": lambda device: [*torch.randn(2, 3, 37, device=device)],
    "pod_spatial": pod,
    "cosine_head": head,
}


@pytest.mark.sanitize
@pytest.mark.parametrize("name", OPERATORS)
def test_both_forms_agree_on_memory_of_exactly_its_size(name, device):
    torch.manual_seed(0)
    arguments = OPERATORS[name](device)
    plain = importlib.import_module(f"fastil.kernels.{name}").plain
    jitted = getattr(importlib.import_module(f"fastil.kernels.jit.{name}"), name)
    copies = [[a.clone() if isinstance(a, torch.Tensor) else a for a in arguments] for _ in range(2)]
    with np.errstate(all="ignore"):
        ours, wanted = (form(*copy) for form, copy in zip((jitted, plain), copies, strict=True))
    for a, b in zip(*map(torch.utils._pytree.tree_leaves, ((ours, copies[0]), (wanted, copies[1]))), strict=True):
        if isinstance(a, torch.Tensor):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 if a.is_floating_point() else 1)
