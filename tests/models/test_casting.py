"""Weights that are cast together: the numbers of autocast, which casts one by one."""

import pytest
import torch
from torch.utils._pytree import tree_leaves

from fastil.device import autocast
from fastil.models import CastWeights, ModelConfig, build_network

CPU = torch.device("cpu")


def tensors_of(out):
    return [value for value in tree_leaves(out) if value is not None]


@pytest.mark.parametrize(
    "config",
    [
        ModelConfig("resnet8"),
        ModelConfig("resnet14", head="cosine", last_relu=False),
        ModelConfig("resnet8", head="proxies", proxies=3),
        ModelConfig("resnet18"),
        ModelConfig("resnet8", weight_transfer=True),  # whose weights are products, in float32
    ],
    ids=str,
)
def test_outputs_gradients_and_statistics_are_autocasts_bit_for_bit(config):
    size = 40 if config.model == "resnet18" else 13
    plain, together = (build_network(config, 5, 3, keeps_maps=True).train() for _ in range(2))
    for network in (plain, together):
        network.head.open_rows(0, 5, torch.Generator().manual_seed(0))
    images = torch.randn(6, 3, size, size, generator=torch.Generator().manual_seed(1))
    images = images.bfloat16().to(memory_format=torch.channels_last)
    weights = CastWeights(together)
    convolutions = [part for part in together.modules() if isinstance(part, torch.nn.Conv2d)]
    assert len(weights.cast()) == (0 if config.weight_transfer else len(convolutions))
    for _ in range(2):  # gradients add up
        with autocast("bf16", CPU):
            outs = plain(images), weights(weights.cast(), images)
        for ours, theirs in zip(*map(tensors_of, reversed(outs)), strict=True):
            assert torch.equal(ours, theirs)
            assert ours.dtype == theirs.dtype
        for out in outs:
            (out.scaled_logits.float().square().sum() + sum(m.float().square().mean() for m in out.maps)).backward()
    for (name, ours), theirs in zip(together.named_parameters(), plain.parameters(), strict=True):
        assert ours.grad.dtype == torch.float32, name
        assert torch.equal(ours.grad, theirs.grad), name
        assert ours.grad.stride() == theirs.grad.stride(), name
    for (name, ours), theirs in zip(together.named_buffers(), plain.buffers(), strict=True):
        assert torch.equal(ours, theirs), name


def test_frozen_weights_get_no_gradient():
    network = build_network(ModelConfig("resnet8"), 5, 0).train()
    network.backbone.conv1.weight.requires_grad_(False)
    weights, images = CastWeights(network), torch.randn(4, 3, 8, 8).bfloat16()
    with autocast("bf16", CPU):
        weights(weights.cast(), images).features.float().sum().backward()
    assert network.backbone.conv1.weight.grad is None
    assert network.backbone.stage1[0].conv1.weight.grad is not None
