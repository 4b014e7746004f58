"""The rebuilt methods against what their authors' public code computes on the same tensors.

The inputs are drawn from numpy's RandomState here as there; the expected numbers were printed by the original code, run
with torch 2.13 in float64. Of a tensor a test knows a digest: its norm and its first, middle and last element.

LUCIR: hshustc/CVPR19_Incremental_Learning@e5a90ae. POD: arthurdouillard/incremental_learning.pytorch@c09fc54.
MNEM: yaoyao-liu/class-incremental-learning@6a92ab0 (mnemonics-training/1_train). SSIL: hongjoon0805/SS-IL-Official
@8c32381. A shim is whatever the code needed to run today.
"""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_published import BATCH, LABELS, method_of
from test_published import NUM_OLD as OLD
from test_published import NUM_SEEN as SEEN
from torch import nn

from fastil import losses
from fastil.memory import herd
from fastil.methods import FeatureExtractor, MemoryContext, Meter
from fastil.methods.bic import BiCConfig, fit_bias
from fastil.methods.lucir import mean_direction
from fastil.methods.mnemonics import Exemplars
from fastil.methods.podnet import class_proxies
from fastil.models import ModelConfig, Output, build_network
from fastil.models.heads import CosineHead, LinearHead
from fastil.nearest_mean import class_means, nearest_mean_scores
from fastil.optimiser import TrainConfig
from fastil.recipe_file import load

B, D, NEW, W = 12, 7, SEEN - OLD, 16
OF_NEW = OLD + torch.arange(B) % NEW


def random(seed, *shape):
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape)).float()


def network_of(name, seed, images, **config):
    """In float64. Its weights, in the order of the state dict, which is the same in the original, are drawn from the
    seed; its running statistics are those of the images."""
    network = build_network(ModelConfig(name, **config), SEEN, 0, keeps_maps=True).double()
    network.head.formula = True  # the kernels of cosine heads are in float32
    source = np.random.RandomState(seed)
    for key, tensor in network.backbone.state_dict().items():
        if tensor.is_floating_point():
            z = source.standard_normal(tuple(tensor.shape))
            if key.endswith(("factor", "running_var")) or (tensor.ndim == 1 and key.endswith("weight")):
                z = 1 + 0.1 * np.tanh(z)
            else:
                z *= 0.1 if tensor.ndim == 1 else np.sqrt(2 / (len(z) * z[0, 0].size))
            tensor.copy_(torch.from_numpy(z))
    for part in network.backbone.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.momentum = 1.0
    with torch.no_grad():
        network.train().backbone(images.double())
    return network.eval()


def head_of(kind, rows, *arguments):
    head = kind(rows.shape[-1], W, *arguments)
    head.weight.data[: len(rows)] = rows
    return head


def wide(x):
    return F.pad(x, (0, W - x.shape[1]))


def entropy(teacher_logits):
    """The entropy of the teacher at T = 2: what the KL divergence has and the kernel leaves out."""
    p = torch.softmax(teacher_logits.detach()[:, :OLD].double() / 2, 1)
    return -float((p * p.log()).sum(1).mean())


def value(loss):
    return float(loss.detach())


def same(tensors, digest, rel=2e-5):
    tensors = [tensors] if isinstance(tensors, torch.Tensor) else tensors
    flat = torch.cat([t.detach().double().flatten() for t in tensors])
    found = [float(v) for v in (flat.norm(), flat[0], flat[len(flat) // 2], flat[-1])]
    assert found == pytest.approx(digest, rel=rel, abs=5e-7 * digest[0])


@pytest.mark.parametrize(
    ("labels", "loss", "features", "rows", "sigma"),
    [
        (LABELS, 9.2642642, [0.9953562, -0.04901083, 0.07506127, -0.3343186],
         [0.4367053, 0.0001259056, 0.01986984, -0.02174329], 0.4443054),
        (OF_NEW, 8.5493002, [0.926199, 0.07618394, 0.07506127, -0.2198098],
         [0.2984149, 0.01682395, 0.01235318, -0.03159198], 0.4203496),
    ],
)  # fmt: skip
def test_lucirs_loss_and_head(labels, loss, features, rows, sigma):
    """LUCIR utils_incremental/incremental_train_and_eval_MR_LF.py, modified_linear.py, lambda as in the script.
    Shim: the target of nn.MarginRankingLoss as a column."""
    method, head, batch = method_of("lucir"), head_of(CosineHead, random(3, SEEN, D)), BATCH._replace(labels=labels)
    head.scale.data.fill_(3.5)
    x, teacher = random(1, B, D).requires_grad_(), Output(random(2, B, D), [], torch.zeros(B, W), torch.ones(()))
    out = Output(x, [], *head(x))
    same(out.scaled_logits[:, :SEEN], [15.57687, 1.794388, -0.09758445, 0.1618733])
    assert value(method.loss(batch, out, teacher)) == pytest.approx(loss, rel=1e-6)
    method.backward(batch, out, teacher, Meter(torch.zeros(B, 4), torch.zeros(())))
    same(x.grad, features)
    same(head.weight.grad[:SEEN], rows)
    assert value(head.scale.grad) == pytest.approx(sigma, rel=1e-5)


def test_icarls_loss_in_lucirs_code():
    """LUCIR utils_incremental/incremental_train_and_eval.py."""
    head, old_head = (head_of(LinearHead, random(seed, n, D)) for seed, n in ((3, SEEN), (5, OLD)))
    head.bias.data[:SEEN], old_head.bias.data[:OLD] = random(4, SEEN), random(6, OLD)
    x, hat = random(1, B, D).requires_grad_(), old_head(random(2, B, D))[0].detach()
    loss = method_of("icarl").loss(BATCH, Output(x, [], *head(x)), Output(x, [], hat))
    loss.backward()
    assert value(loss) - entropy(hat) == pytest.approx(6.2506507, rel=1e-6)  # T^2 beta is 1
    same(x.grad, [1.193433, 0.01097919, -0.03177543, -0.1056552])
    same(head.weight.grad[:SEEN], [0.9284336, 0.1493599, 0.2596309, -0.07740807])
    same(head.bias.grad[:SEEN], [0.3829316, 0.1479703, 0.1236004, -0.06870813])


@pytest.mark.parametrize(
    ("name", "last_relu", "seeds", "side", "settled", "trained", "gradient"),
    [
        ("resnet32", False, (11, 14, 12, 13), 32, [19.78972, 1.497682, 1.187876, 1.283661],
         [19.91478, 1.439281, 1.447804, 1.128473], [681.9897, -3.676375, 0.9847276, -1.547583]),
        ("resnet32", True, (11, 14, 12, 13), 32, [22.20828, 1.658884, 1.369401, 1.418923],
         [22.49113, 1.6111, 1.632413, 1.278825], [636.2397, -3.770934, 1.019937, -1.181585]),
        ("resnet18_pod", False, (51, 54, 52, 53), 64, [21.22132, 0.5067077, 0.7489741, 1.746257],
         [19.88317, 0.3235438, 0.6308978, 1.000982], [1920.297, 9.499165, 0.01025509, -2.600617]),
    ],
)  # fmt: skip
def test_networks(name, last_relu, seeds, side, settled, trained, gradient):
    """LUCIR cifar100-class-incremental/modified_resnet_cifar.py and resnet_cifar.py; POD inclearn/convnet/resnet.py,
    resnet18(nf=64), "raw_features"."""
    rows, settling = (4, 12) if side == 32 else (2, 4)
    backbone = network_of(name, seeds[0], random(seeds[1], settling, 3, side, side), last_relu=last_relu).backbone
    images = random(seeds[2], rows, 3, side, side).double()
    same(backbone(images)[0], settled)
    features = backbone.train()(images)[0]
    same(features, trained)
    (features * random(seeds[3], *features.shape)).sum().backward()
    same([p.grad for p in backbone.parameters()], gradient)


def test_herding_exemplar_mean_and_imprinting():
    """LUCIR class_incremental_cosine_cifar100.py lines 268-289, 396-414, 443-451; POD inclearn/lib/herding.py
    icarl_selection, models/icarl.py compute_examplar_mean. Images 3 and 7 are equal; secondly, turns repeat."""
    features, flipped = random(21, 60, D).double() + 0.5, random(24, 60, D).double() + 0.5
    features[7] = features[3]
    picks = [45, 32, 10, 47, 50, 39, 16, 1, 27, 59, 31, 58, 52, 20, 42, 48, 43, 25, 6, 34]
    assert herd(features, 20).tolist() == picks
    assert herd(random(22, 6, 2), 6).tolist() == [3, 0, 5, 4, 2, 1]
    of_500 = [364, 109, 168, 412, 145, 237, 156, 69, 36, 468, 403, 131, 419, 353, 230, 427, 20, 370, 266, 169]
    assert herd(random(23, 500, 64).abs(), 20).tolist() == of_500
    one_class = torch.zeros(20, dtype=torch.int64)
    mean = nearest_mean_scores(torch.eye(D).double(), class_means(features[picks], flipped[picks], one_class))
    same(mean, [1.0, 0.3634576, 0.3150281, 0.3577269])
    head = head_of(CosineHead, random(3, SEEN, D)[:OLD])
    head.imprint(OLD, mean_direction(features.float())[None])
    same(head.weight[OLD], [2.530764, 0.7153862, 0.4877594, 0.8945411])


def test_podnets_network_and_loss():
    """POD inclearn/models/podnet.py _compute_loss with the options of podnet_cnn_cifar100.yaml, on its BasicNet with
    convnet/my_resnet.py. Similarities are 2 cos - 2 there. Shim: float64 as the default type."""
    images, settling = random(12, B, 3, 32, 32).double(), random(14, B, 3, 32, 32)
    network, teacher = (
        network_of("resnet32_rebuffi", seed, at, last_relu=False, head="proxies")
        for seed, at in ((31, settling), (33, images))
    )
    network.head.weight.data[:SEEN] = random(32, SEEN * 10, 64).view(SEEN, 10, 64).double()
    network.head.scale.data.fill_(2.5)
    out = network(images)
    same(out.features, [14.00646, 0.7661796, 1.037489, 0.3591978])  # "raw_features", which the classifier sees
    same(out.maps, [1692.053, -1.8968, -1.052495, 0.9753565])
    same(out.logits[:, :SEEN], [1.095931, -0.03210486, 0.0516646, 0.09734735])
    with_relu = network_of("resnet32_rebuffi", 31, settling, last_relu=True)
    same(with_relu(images).features, [36.01431, 2.074211, 2.335445, 1.229443])  # "features"
    out = network.train()(images)
    with torch.no_grad():
        teacher_out = teacher(images)
    loss = losses.nca(out.logits, LABELS, SEEN, out.scale)
    assert value(loss) == pytest.approx(2.2957364, rel=1e-7)
    loss = loss + method_of("podnet", loss="nca").extra_loss(BATCH, out, teacher_out, losses)
    loss.backward()
    assert value(loss) == pytest.approx(6.1184256, rel=1e-7)
    same([p.grad for p in network.backbone.parameters()], [3.525638, -0.06547665, -0.0009171497, 0.02303918])
    same(network.head.weight.grad[:SEEN], [0.05556383, -6.068033e-05, -0.0002527409, -0.0007159564])
    assert value(network.head.scale.grad) == pytest.approx(0.04751989, rel=1e-6)


def test_losses_in_podnets_code():
    """POD inclearn/lib/losses: base.py nca and embeddings_similarity, distillation.py pod; models/icarl.py
    _compute_loss, the mean over the classes seen."""
    y, eta = wide(torch.tanh(random(41, 40, SEEN))).requires_grad_(), torch.tensor(4.3, requires_grad=True)
    x, z = random(1, B, D).requires_grad_(), wide(random(46, B, SEEN)).requires_grad_()
    maps = [random(42, B, 3, 6, 6).requires_grad_(), random(43, B, 5, 4, 4).requires_grad_()]
    terms = [
        losses.nca(y, torch.arange(40) % SEEN, SEEN, eta, 0.6, "released"),
        losses.pod_spatial(maps, [random(44, B, 3, 6, 6), random(45, B, 5, 4, 4)]),
        losses.pod_flat(x, random(2, B, D)),
        losses.icarl_cross_entropy(z, LABELS, wide(random(47, B, OLD)), OLD, SEEN, SEEN),
    ]
    sum(terms).backward()
    assert [value(v) for v in terms] == pytest.approx([4.2927114, 0.7356260, 1.0023802, 0.7337082], rel=1e-6)
    same(y.grad[:, :SEEN], [0.7926603, -0.1075, 2.22362e-05, 0.005644482])
    assert value(eta.grad) == pytest.approx(0.6960877, rel=1e-5)
    same([m.grad for m in maps], [0.02462558, -0.0005387481, -4.67919e-06, 1.614392e-05])
    same(x.grad, [0.1313451, 0.002761645, 0.01331583, -0.03589033])
    same(z.grad[:, :SEEN], [0.03666876, 0.003169796, -0.002213591, 0.003612015])


def test_podnets_classifier():
    """POD inclearn/lib/network/classifiers.py: CosineClassifier with 10 proxies, and add_imprinted_classes by k-means
    (shim: n_init=10, its default then)."""
    head, x = head_of(CosineHead, random(48, SEEN * 10, D).view(SEEN, 10, D), 10), random(1, B, D).requires_grad_()
    y = head(x)[0][:, :SEEN]
    same(y, [5.818996, 0.1822493, 0.4461042, 0.4017598])
    (y * random(49, B, SEEN)).sum().backward()
    same(x.grad, [4.022907, -0.3265538, -0.3258228, 0.2163806])
    same(head.weight.grad[:SEEN], [4.329931, -0.008412433, -0.2989277, -0.05465717])
    head = head_of(CosineHead, random(63, OLD * 4, D).view(OLD, 4, D), 4)
    head.imprint(OLD, class_proxies((6 * random(61, 4, D)).repeat(15, 1) + 0.3 * random(62, 60, D), 4, 0)[None])
    proxies = head.weight.data[OLD]
    same(proxies[proxies[:, 0].argsort()], [5.070688, -1.82102, -0.6333936, 0.1104805])


def test_mnemonics_network_and_loss():
    """MNEM models/modified_resnetmtl_cifar.py, utils/conv2d_mtl.py, trainer/incremental.py."""
    config, images = {"last_relu": False, "head": "cosine", "weight_transfer": True}, random(12, B, 3, 32, 32).double()
    network, teacher = (
        network_of("resnet32", seed, at, **config) for seed, at in ((71, random(14, B, 3, 32, 32)), (72, images))
    )
    for part, rows, scale in ((network, random(73, SEEN, 64), 3.5), (teacher, random(74, OLD, 64), 2.0)):
        part.head.weight.data[: len(rows)] = rows.double()
        part.head.scale.data.fill_(scale)
    same(network(images).features, [33.08, 1.278654, 1.120599, 1.080376])
    method, out = method_of("mnemonics", "mnemonics=released"), network.train()(images)
    teacher_out = teacher.requires_grad_(False)(images)
    loss = method.formula(BATCH, out, teacher_out, torch.where(torch.arange(W) < SEEN, 0.0, -math.inf))
    loss.backward()
    assert value(loss) - entropy(teacher_out.scaled_logits) == pytest.approx(2.3446875, rel=1e-7)
    *moving, rows, scale = [p.grad for p in method.parameters(network, 1)]
    same(moving, [0.7831884, -0.002934416, 0.0002549829, -0.007550393])  # factors and batch normalisation
    same(rows[:SEEN], [0.08704549, 0.004345603, -0.002415632, -0.007370101])
    assert value(scale) == pytest.approx(0.05638277, rel=1e-6)


def test_mnemonics_objective_of_exemplars():
    """MNEM trainer/mnemonics.py lines 337-372. Shim: the means have the type of the rest."""
    network = network_of("resnet32", 71, random(14, B, 3, 32, 32), last_relu=False, head="cosine", weight_transfer=True)
    means = torch.from_numpy(np.random.RandomState(76).standard_normal((64, SEEN, 2))[:, :OLD, 0].T.copy())
    pixels = torch.cat((torch.zeros(OLD, 3, 32, 32), random(75, NEW * 3, 3, 32, 32))).double()
    loader = SimpleNamespace(device="cpu", whole=lambda ids: pixels.clone())
    extractor = FeatureExtractor(lambda ids, mirrored: Output(means, [], means), lambda position: None)
    positions = np.concatenate((np.arange(OLD), OLD + np.repeat(np.arange(NEW), 3)))
    exemplars = Exemplars(network, MemoryContext(np.arange(len(pixels)), positions, extractor, loader, None), OLD)
    found = exemplars.class_mean_loss(BATCH._replace(images=random(77, B, 3, 32, 32).double()), 0.0)
    (moved,) = torch.autograd.grad(found, exemplars.pixels)
    assert value(found) == pytest.approx(2.2527481955, rel=1e-8)
    same(moved[OLD:], [0.009930988, 5.138412e-06, -2.238496e-06, 1.096801e-05])


def test_bics_stages():
    """SSIL trainer/bic.py, train and bias_correction. Shims: no GPU; in stage 2 the optimiser of the TensorFlow code
    (wuyuebupt/LargeScaleIncrementalLearning@7f687a3 resnet.py: lr 0.1, momentum 0.9), whose penalty of gamma is not
    here. The rate drops an update later there, hence the tolerance."""
    method, z, hat = method_of("bic"), wide(random(81, B, SEEN)).requires_grad_(), wide(2 * random(82, B, OLD))
    method.beta[3:OLD], method.gamma[3:OLD] = 0.6, -0.4
    loss = method.loss(BATCH, Output(None, [], 2 * z), Output(None, [], hat))
    loss.backward()
    assert value(loss) - OLD / SEEN * entropy(method.corrected(hat)) == pytest.approx(1.8222674, rel=1e-6)
    same(z.grad[:, :SEEN], [0.3096681, -0.08158605, 0.0116538, 0.01263405])
    labels, logits = torch.arange(90) % SEEN, 2 * random(83, 90, SEEN)
    logits[torch.arange(90), labels] += 2
    logits[:, OLD:] += 1.5
    found = fit_bias(logits, labels, OLD, BiCConfig(bic_penalty=0.0))
    assert [value(v) for v in found] == pytest.approx([0.57137705, -0.10752534], abs=5e-4)


def test_lucirs_balanced_finetuning_leaves_the_scale():
    """LUCIR imagenet-class-incremental/cbf_class_incremental_cosine_imagenet.py lines 643-648 (ft_flag 2): what has a
    learning rate is fc1.weight and fc2.weight; fc.sigma is in no group."""
    network = build_network(ModelConfig("resnet8", head="cosine"), SEEN, 0)
    moved = load("imagenet_lucir_5").correction.parameters(network)
    assert [p is network.head.weight for p in moved] == [True]


def test_podnets_learning_rates_lag_an_epoch():
    """POD inclearn/lib/factory.py get_lr_scheduler("cosine"), stepped as in models/icarl.py."""
    rates = [TrainConfig(schedule="cosine").learning_rate(max(0, epoch - 1), 160) for epoch in (0, 1, 2, 80, 159)]
    assert rates == pytest.approx([0.1, 0.1, 0.09999036202, 0.05098168462, 3.854818796e-05], rel=1e-8)
