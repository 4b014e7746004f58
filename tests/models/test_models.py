"""Networks: layouts against arithmetic and a functional forward written from their descriptions; heads; seeds."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastil.errors import UserError
from fastil.models import MODELS, ModelConfig, build_network
from fastil.models.blocks import SliceShortcut
from fastil.models.heads import CosineHead, LinearHead, padded_width
from fastil.models.resnet_cifar import ResNetCifar

CIFAR = ("resnet8", "resnet14", "resnet20", "resnet32")
# channels and blocks of each stage, and the stride of its first block
STAGES = {
    "resnet8": [(16, 1, 1), (32, 1, 2), (64, 1, 2)],
    "resnet14": [(16, 2, 1), (32, 2, 2), (64, 2, 2)],
    "resnet20": [(16, 3, 1), (32, 3, 2), (64, 3, 2)],
    "resnet32": [(16, 5, 1), (32, 5, 2), (64, 5, 2)],
    "resnet32_rebuffi": [(16, 5, 1), (32, 5, 2), (64, 4, 2), (64, 1, 1)],
    "resnet18": [(64, 2, 1), (128, 2, 2), (256, 2, 2), (512, 2, 2)],
    "resnet18_pod": [(64, 2, 1), (128, 2, 2), (256, 2, 2), (512, 2, 2)],
}
DEPTHS = dict(zip(STAGES, (8, 14, 20, 32, 32, 18, 18), strict=True))
# stem: side of the convolution, its stride and padding, and whether a 3x3 pooling of stride 2 follows
STEMS = {name: (3, 1, 1, False) for name in (*CIFAR, "resnet32_rebuffi")} | {
    "resnet18": (7, 2, 3, True),
    "resnet18_pod": (3, 1, 1, True),
}


def build(name, num_classes=10, seed=0, **config):
    return build_network(ModelConfig(name, **config), num_classes, seed, keeps_maps=True)


def images_for(name, rows=2, seed=0):
    side = 64 if name.startswith("resnet18") else 32
    return torch.randn(rows, 3, side, side, generator=torch.Generator().manual_seed(seed))


def stages(network):
    return [stage for stage in network.backbone.children() if isinstance(stage, nn.Sequential)]


def shake(network, seed=1):
    """Random batch normalisation and head, so that nothing is hidden behind a 0 or a 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for part in network.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.weight.uniform_(0.5, 1.5, generator=generator)
                part.bias.uniform_(-0.5, 0.5, generator=generator)
                part.running_mean.uniform_(-0.5, 0.5, generator=generator)
                part.running_var.uniform_(0.5, 1.5, generator=generator)
        network.head.weight.uniform_(-1, 1, generator=generator)
        network.head.bias.uniform_(-1, 1, generator=generator)
    return network.eval()


def block_outputs(network, images):
    """What each residual block returns, in order, from forward hooks."""
    seen = []
    hooks = [
        block.register_forward_hook(lambda module, args, out: seen.append((args[0], out)))
        for stage in stages(network)
        for block in stage
    ]
    with torch.no_grad():
        out = network(images)
    for hook in hooks:
        hook.remove()
    return seen, out


def normalise(x, bn):
    shape = (1, -1, 1, 1)
    scale = bn.weight / torch.sqrt(bn.running_var + 1e-5)
    return (x - bn.running_mean.view(shape)) * scale.view(shape) + bn.bias.view(shape)


def relu_after_addition(name, last_relu, stage, block):
    """Whether a ReLU follows the addition of a block, as the reference codes have it."""
    channels_and_blocks = STAGES[name]
    if name == "resnet32_rebuffi":
        return False
    if name == "resnet18_pod":
        return block == 0
    is_last = stage == len(channels_and_blocks) - 1 and block == channels_and_blocks[stage][1] - 1
    return last_relu or not is_last


def described_forward(name, network, x, last_relu):
    """Features, maps and logits by formulas, using nothing of the network but its weights."""
    body = network.backbone
    _, stride, padding, pooled = STEMS[name]
    x = F.relu(normalise(F.conv2d(x, body.conv1.weight, stride=stride, padding=padding), body.bn1))
    if pooled:
        x = F.max_pool2d(x, 3, 2, 1)
    maps = []
    for s, ((channels, blocks, first_stride), stage) in enumerate(zip(STAGES[name], stages(network), strict=True)):
        for b in range(blocks):
            part, stride = stage[b], first_stride if b == 0 else 1
            y = F.relu(normalise(F.conv2d(x, part.conv1.weight, stride=stride, padding=1), part.bn1))
            y = normalise(F.conv2d(y, part.conv2.weight, padding=1), part.bn2)
            if stride == 1 and x.shape[1] == channels:
                shortcut = x
            elif name == "resnet32_rebuffi":  # option A: concatenate x and 0 * x, every second pixel
                shortcut = torch.cat((x[..., ::2, ::2], 0 * x[..., ::2, ::2]), dim=1)
            else:  # option B
                convolution, bn = part.shortcut
                shortcut = normalise(F.conv2d(x, convolution.weight, stride=stride), bn)
            x = y + shortcut
            if relu_after_addition(name, last_relu, s, b):
                x = F.relu(x)
        maps.append(x)
    if name in ("resnet32_rebuffi", "resnet18_pod") and last_relu:
        x = F.relu(x)
    features = x.mean(dim=(2, 3))
    return features, maps, features @ network.head.weight.T + network.head.bias


def parameters_by_arithmetic(name, width):
    """Convolutions without bias, two numbers per channel of a batch normalisation, a linear head with bias."""
    stem, project = STEMS[name], name != "resnet32_rebuffi"
    channels = STAGES[name][0][0]
    total = 3 * channels * stem[0] ** 2 + 2 * channels
    for out, blocks, stride in STAGES[name]:
        for block in range(blocks):
            total += 9 * channels * out + 9 * out * out + 4 * out
            if project and block == 0 and (stride != 1 or channels != out):
                total += channels * out + 2 * out
            channels = out
    return total + width * channels + width


def test_every_model_is_covered_here():
    assert set(MODELS) == set(STAGES) == set(DEPTHS)


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_those_of_the_layout(name):
    assert sum(p.numel() for p in build(name, 100).parameters()) == parameters_by_arithmetic(name, 104)


def test_resnet18_has_the_published_parameters_of_torchvisions():
    assert sum(p.numel() for p in build("resnet18", 1000).parameters()) == 11_689_512


@pytest.mark.parametrize("name", MODELS)
def test_depth_counts_convolutions_and_the_head_on_the_main_path(name):
    """Shortcuts hold 1x1 convolutions only, and the main path none."""
    layers = [part for part in build(name).modules() if isinstance(part, (nn.Conv2d, LinearHead))]
    main = [part for part in layers if not (isinstance(part, nn.Conv2d) and part.kernel_size == (1, 1))]
    assert len(main) == DEPTHS[name]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("last_relu", [True, False])
def test_forward_is_the_described_one(name, last_relu):
    network, images = shake(build(name, 13, last_relu=last_relu)), images_for(name)
    with torch.no_grad():
        features, maps, logits = described_forward(name, network, images, last_relu)
        out = network(images)
    for ours, wanted in zip([out.features, out.logits, *out.maps], [features, logits, *maps], strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))


@pytest.mark.parametrize("name", MODELS)
def test_shapes_of_features_maps_and_logits(name):
    with torch.no_grad():
        out = build(name, 21).eval()(images_for(name, rows=3))
    if name == "resnet18":
        wanted = [(64, 16), (128, 8), (256, 4), (512, 2)]  # 64 / 2 / 2
    elif name == "resnet18_pod":
        wanted = [(64, 32), (128, 16), (256, 8), (512, 4)]  # 64 / 2, for the stem keeps the size
    elif name == "resnet32_rebuffi":
        wanted = [(16, 32), (32, 16), (64, 8), (64, 8)]
    else:
        wanted = [(16, 32), (32, 16), (64, 8)]
    assert [tuple(m.shape) for m in out.maps] == [(3, channels, side, side) for channels, side in wanted]
    assert out.features.shape == (3, wanted[-1][0])
    assert out.logits.shape == (3, 24)


@pytest.mark.parametrize("name", [*CIFAR, "resnet18"])
@pytest.mark.parametrize("last_relu", [True, False])
def test_a_relu_follows_every_addition_and_last_relu_switches_the_last_one(name, last_relu):
    """LUCIR's network for a cosine head has it off, so that features have both signs."""
    blocks, out = block_outputs(shake(build(name, last_relu=last_relu)), images_for(name))
    assert len(blocks) == sum(stage[1] for stage in STAGES[name])
    assert all(y.min() >= 0 for _, y in blocks[:-1])
    assert (blocks[-1][1].min() >= 0) == last_relu
    assert (out.features.min() >= 0) == last_relu


@pytest.mark.parametrize("last_relu", [True, False])
def test_rebuffi_has_no_relu_after_any_addition_and_one_before_pooling(last_relu):
    blocks, out = block_outputs(shake(build("resnet32_rebuffi", last_relu=last_relu)), images_for("resnet32"))
    assert len(blocks) == 15
    assert all(y.min() < 0 for _, y in blocks)
    assert all(m.min() < 0 for m in out.maps)
    pooled, raw = F.relu(out.maps[-1]).mean(dim=(2, 3)), out.maps[-1].mean(dim=(2, 3))
    torch.testing.assert_close(out.features, pooled if last_relu else raw)
    assert not torch.allclose(pooled, raw)


def test_rebuffi_starts_with_every_block_as_its_shortcut():
    """The last batch normalisation of each block starts at 0; training mode, as the first batch sees it."""
    network = build("resnet32_rebuffi").train()
    widened = 0
    blocks, out = block_outputs(network, images_for("resnet32"))
    for x, y in blocks:
        if x.shape == y.shape:
            wanted = x
        else:
            widened += 1
            wanted = torch.cat((x[..., ::2, ::2], 0 * x[..., ::2, ::2]), dim=1)
        assert torch.equal(y, wanted)
    assert widened == 2
    assert not out.maps[-1][:, 16:].any()


@pytest.mark.parametrize("side", [8, 7])
def test_the_slicing_shortcut_is_every_second_pixel_and_channels_of_zero(side):
    x = torch.randn(2, 5, side, side)
    y = SliceShortcut(5)(x)
    assert torch.equal(y, torch.cat((x[..., ::2, ::2], 0 * x[..., ::2, ::2]), dim=1))


@pytest.mark.parametrize("last_relu", [True, False])
def test_podnets_resnet18_has_a_relu_after_the_first_block_of_a_stage_only(last_relu):
    network = shake(build("resnet18_pod", last_relu=last_relu))
    blocks, out = block_outputs(network, images_for("resnet18"))
    assert [bool(y.min() >= 0) for _, y in blocks] == [True, False] * 4
    last = F.relu(out.maps[-1]) if last_relu else out.maps[-1]
    torch.testing.assert_close(out.features, last.mean(dim=(2, 3)))


def test_podnets_resnet18_has_a_small_stem_and_starts_with_every_block_as_its_shortcut():
    network = build("resnet18_pod")
    stem = network.backbone.conv1
    assert (stem.kernel_size, stem.stride, stem.padding) == ((3, 3), (1, 1), (1, 1))
    last = [part for stage in stages(network) for part in stage]
    assert all(not block.bn2.weight.any() for block in last)


@pytest.mark.parametrize("name", MODELS)
def test_convolutions_start_as_he_proposed_and_batch_normalisation_as_the_identity(name):
    network = build(name, 100, seed=3)
    zeroed = name in ("resnet32_rebuffi", "resnet18_pod")
    last = {block.bn2 for stage in stages(network) for block in stage}
    for part in network.modules():
        if isinstance(part, nn.Conv2d):
            assert part.bias is None
            fan_out = part.out_channels * part.kernel_size[0] * part.kernel_size[1]
            count = part.weight.numel()
            std = part.weight.std().item() / math.sqrt(2 / fan_out)
            assert abs(std - 1) < 5 / math.sqrt(2 * count)  # five standard errors
        elif isinstance(part, nn.BatchNorm2d):
            assert (part.weight == (0 if zeroed and part in last else 1)).all()
            assert not part.bias.any()
            assert not part.running_mean.any()
            assert (part.running_var == 1).all()


@pytest.mark.parametrize("name", MODELS)
def test_the_seed_decides_the_weights(name):
    torch.manual_seed(1)
    a = build(name, seed=5).state_dict()
    torch.manual_seed(2)
    b, c = build(name, seed=5).state_dict(), build(name, seed=6).state_dict()
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert all(not torch.equal(a[key], c[key]) for key in a if a[key].ndim == 4)


@pytest.mark.parametrize("name", MODELS)
def test_building_a_network_leaves_torchs_global_generator_alone(name):
    before = torch.get_rng_state()
    build(name)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("name", MODELS)
def test_weights_lie_channels_last(name):
    for part in build(name).modules():
        if isinstance(part, nn.Conv2d):
            assert part.weight.is_contiguous(memory_format=torch.channels_last)
            assert part.weight.stride(1) == 1


@pytest.mark.parametrize("depth", [9, 2, 0])
def test_a_depth_that_is_not_6n_plus_2_is_an_error(depth):
    with pytest.raises(ValueError, match="6n"):
        ResNetCifar(depth, True, torch.Generator())
    with pytest.raises(UserError, match=f"model=resnet{depth}: unknown; did you mean resnet"):
        build(f"resnet{depth}")


# --- the head


def test_the_padded_width_is_the_next_multiple_of_8():
    for num_classes in range(1, 1001):
        width = padded_width(num_classes)
        assert width % 8 == 0
        assert num_classes <= width < num_classes + 8


@pytest.mark.parametrize(("num_classes", "width"), [(1, 8), (8, 8), (9, 16), (100, 104), (1000, 1000)])
def test_logits_have_the_padded_width(num_classes, width):
    network = build("resnet8", num_classes).eval()
    assert network.width == width
    with torch.no_grad():
        assert network(images_for("resnet8", rows=1)).logits.shape == (1, width)


def test_the_head_starts_at_zero():
    head = build("resnet8", 10).head
    assert not head.weight.any()
    assert not head.bias.any()


def test_the_head_is_an_affine_map_of_the_features():
    head = LinearHead(3, 8)
    with torch.no_grad():
        head.weight.normal_(generator=torch.Generator().manual_seed(0))
        head.bias.normal_(generator=torch.Generator().manual_seed(1))
    features = torch.randn(4, 3, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(head(features)[0], features @ head.weight.T + head.bias)


@pytest.mark.parametrize(("start", "stop"), [(0, 5), (5, 6), (5, 16), (7, 7)])
def test_opening_rows_touches_these_rows_only(start, stop):
    head = LinearHead(32, 16)
    with torch.no_grad():
        head.weight.fill_(7.0)
        head.bias.fill_(7.0)
    parameters = [head.weight, head.bias]
    head.open_rows(start, stop, torch.Generator().manual_seed(0))
    opened = torch.zeros(16, dtype=torch.bool)
    opened[start:stop] = True
    assert (head.weight[~opened] == 7).all()
    assert (head.bias[~opened] == 7).all()
    assert (head.weight[opened] != 7).all()
    assert (head.bias[opened] != 7).all()
    assert [id(p) for p in (head.weight, head.bias)] == [id(p) for p in parameters]
    assert all(p.requires_grad and p.grad_fn is None for p in parameters)


def test_opened_rows_are_uniform_in_one_over_the_root_of_the_dimension():
    head, bound = LinearHead(64, 400), 1 / 8
    head.open_rows(0, 400, torch.Generator().manual_seed(0))
    for values in (head.weight, head.bias):
        shares = torch.histc(values.detach() / bound, bins=4, min=-1, max=1) / values.numel()
        assert values.abs().max() <= bound
        assert (shares - 0.25).abs().max() < 5 * math.sqrt(0.25 * 0.75 / values.numel())


def test_the_generator_decides_the_rows_whatever_was_opened_before():
    a, b, c = LinearHead(8, 16), LinearHead(8, 16), LinearHead(8, 16)
    b.open_rows(0, 4, torch.Generator().manual_seed(99))
    for head, seed in ((a, 1), (b, 1), (c, 2)):
        torch.rand(3)
        head.open_rows(4, 9, torch.Generator().manual_seed(seed))
    assert torch.equal(a.weight[4:9], b.weight[4:9])
    assert torch.equal(a.bias[4:9], b.bias[4:9])
    assert not torch.equal(a.weight[4:9], c.weight[4:9])
    assert not torch.equal(a.bias[4:9], c.bias[4:9])


@pytest.mark.parametrize("proxies", [None, 3])
def test_imprinted_rows_are_as_long_as_the_old_ones_are_on_average(proxies):
    """The average is of the rows before, not of those after; directions keep a length of their own as a factor."""
    head = CosineHead(6, 16, proxies)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(head.weight.shape, generator=generator) * torch.arange(1.0, 17).view(
        16, *[1] * len(head.weight[0].shape)
    )
    head.weight.data.copy_(rows)
    given = torch.randn(4, *head.weight.shape[1:], generator=generator).double()
    head.imprint(5, given)
    lengths = [math.sqrt(sum(v * v for v in row)) for row in rows[:5].reshape(-1, 6).tolist()]
    wanted = given * (sum(lengths) / len(lengths))
    torch.testing.assert_close(head.weight.data[5:9].double(), wanted, rtol=1e-6, atol=1e-6)
    assert torch.equal(head.weight.data[:5], rows[:5])
    assert torch.equal(head.weight.data[9:], rows[9:])
    assert head.scale == 1


@pytest.mark.parametrize(
    ("name", "stem", "side"),
    [("resnet18", "3x3", 3), ("resnet18_pod", "7x7", 7), ("resnet18", "own", 7), ("resnet18_pod", "own", 3)],
)
def test_the_stem_is_the_one_asked_for(name, stem, side):
    network = build(name, stem=stem, last_relu=False)
    conv, stride = network.backbone.conv1, {3: 1, 7: 2}[side]
    assert (conv.kernel_size, conv.stride, conv.padding) == ((side, side), (stride, stride), (side // 2, side // 2))
    assert conv.bias is None
    assert conv.out_channels == 64
    std = conv.weight.std().item() / math.sqrt(2 / (64 * side**2))
    assert abs(std - 1) < 5 / math.sqrt(2 * conv.weight.numel())
    with torch.no_grad():
        out = network.eval()(images_for(name))
    assert [m.shape[-1] for m in out.maps] == [64 // (2 * stride * k) for k in (1, 2, 4, 8)]
    assert out.features.isfinite().all()


def test_maps_leave_the_network_only_where_they_are_asked_for():
    images = torch.randn(2, 3, 16, 16)
    without, with_maps = build_network(ModelConfig("resnet8"), 10, 0), build("resnet8")
    out, wanted = without(images), with_maps(images)
    assert out.maps == []
    assert len(wanted.maps) == 3
    assert torch.equal(out.features, wanted.features)
    assert torch.equal(out.logits, wanted.logits)
