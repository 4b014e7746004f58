"""The folded twin of a network computes what the network does in eval mode."""

import copy

import pytest
import torch

from fastil.models import MODELS, Folded, ModelConfig, build_network
from fastil.models.blocks import BatchNorm, FilterScale

SIDE = 16


def trained(config, seed=0):
    """A network whose statistics and affine parameters are far from those it begins with."""
    network = build_network(config, 10, seed, keeps_maps=True)
    generator = torch.Generator().manual_seed(seed)
    network.head.open_rows(0, 10, generator)
    for part in network.modules():
        if isinstance(part, BatchNorm):
            part.running_mean.normal_(0, 0.3, generator=generator)
            part.running_var.uniform_(0.3, 2, generator=generator)
            torch.nn.init.uniform_(part.weight, 0.5, 1.5, generator=generator)
            torch.nn.init.normal_(part.bias, 0, 0.2, generator=generator)
        if isinstance(part, FilterScale):
            torch.nn.init.uniform_(part.factor, 0.5, 1.5, generator=generator)
    return network


def images(count=3, dtype=torch.float32):
    batch = torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    return batch.to(dtype, memory_format=torch.channels_last)


def assert_same(folded, network, tolerance):
    """Against the network itself in float64, each output on its own scale."""
    reference = copy.deepcopy(network).double().eval()
    with torch.no_grad(), reference.as_formula():
        wanted = reference(images().double())
    found = folded(images(dtype=folded.dtype))
    for ours, theirs in zip(
        (found.features, *found.maps, found.scaled_logits),
        (wanted.features, *wanted.maps, wanted.scaled_logits),
        strict=True,
    ):
        error = (ours.double() - theirs).abs().max() / theirs.abs().max()
        assert error < tolerance, float(error)


@pytest.mark.parametrize(
    ("name", "head"), [*((name, "linear") for name in MODELS), ("resnet8", "cosine"), ("resnet8", "proxies")]
)
def test_folded_is_the_network_in_eval_mode_to_rounding(name, head):
    network = trained(ModelConfig(name, head=head))
    folded = Folded(network, torch.float32, 3)
    assert not any(isinstance(part, torch.nn.BatchNorm2d) for part in folded.plain.modules())
    assert_same(folded, network, 1e-5)


def test_factors_per_filter_are_folded_too():
    network = trained(ModelConfig("resnet8", head="cosine", weight_transfer=True))
    folded = Folded(network, torch.float32, 3)
    assert not any(isinstance(part, FilterScale) for part in folded.plain.modules())
    assert_same(folded, network, 1e-5)


@pytest.mark.parametrize("head", ["linear", "cosine"])
def test_in_bfloat16_weights_are_rounded_once_after_folding(head):
    network = trained(ModelConfig("resnet8", head=head))
    folded = Folded(network, torch.bfloat16, 3)
    wanted = network.backbone.bn1.weight / (network.backbone.bn1.running_var + network.backbone.bn1.eps).sqrt()
    wanted = network.backbone.conv1.weight * wanted[:, None, None, None]
    assert torch.equal(folded.plain.backbone.conv1.weight, wanted.bfloat16())
    assert_same(folded, network, 5e-2)
    assert folded(images(dtype=torch.bfloat16)).logits.dtype == torch.bfloat16


def test_refresh_takes_up_new_weights_in_place_and_leaves_the_network_alone():
    network, other = trained(ModelConfig("resnet8")), trained(ModelConfig("resnet8"), seed=3)
    folded = Folded(network, torch.float32, 3)
    places = [parameter.data_ptr() for parameter in folded.plain.parameters()]
    network.load_state_dict(other.state_dict())
    network.train()
    folded.refresh()
    assert places == [parameter.data_ptr() for parameter in folded.plain.parameters()]
    assert network.training
    assert all(
        torch.equal(a, b) for a, b in zip(network.state_dict().values(), other.state_dict().values(), strict=True)
    )
    assert_same(folded, other, 1e-5)


def test_a_backbone_that_names_no_pairs_stays_as_it_is():
    network = trained(ModelConfig("resnet8"))
    network.backbone = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.BatchNorm2d(4))
    twin = Folded(network, torch.float32, 3).plain
    assert isinstance(twin.backbone[2], torch.nn.BatchNorm2d)


def test_only_full_batches_take_the_fast_way():
    folded = Folded(trained(ModelConfig("resnet8")), torch.float32, 3)
    taken = []
    folded.fast = lambda batch: taken.append(len(batch))
    folded(images(3))
    folded(images(2))
    assert taken == [3]


def test_building_a_twin_draws_no_random_number():
    network = trained(ModelConfig("resnet8"))
    before = torch.random.get_rng_state()
    Folded(network, torch.float32, 3)
    assert torch.equal(before, torch.random.get_rng_state())


def test_weights_with_a_counter_of_batches_still_load():
    network = build_network(ModelConfig("resnet8"), 10, 0)
    assert not any("num_batches_tracked" in name for name in network.state_dict())
    older = dict(trained(ModelConfig("resnet8")).state_dict())
    norms = [name.removesuffix("running_mean") for name in older if name.endswith("running_mean")]
    network.load_state_dict(older | {f"{name}num_batches_tracked": torch.tensor(7) for name in norms})
    assert all(torch.equal(network.state_dict()[name], value) for name, value in older.items())
    with pytest.raises(RuntimeError, match=r"bn1\.running_mean"):
        network.load_state_dict({name: value for name, value in older.items() if name != "backbone.bn1.running_mean"})
