"""LRP: the sheet's worked example, the invariants, zennit as an independent implementation, what has no rule."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from secateur.errors import SecateurError
from secateur.saliency.relevance import COMPOSITES, Composite, layer_relevance, propagate
from secateur.tasks.networks.cifar_resnet import CifarResNet


def one_hot(classes):
    return lambda logits: F.one_hot(torch.as_tensor(classes), logits.shape[-1]).to(logits)


def toy():
    net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2, bias=False))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1, -1], [0.5, 1], [-1, 0.25], [0.2, 0.3]]))
        net[0].bias.copy_(torch.tensor([0.5, 0, 0, 0]))
        net[2].weight.copy_(torch.tensor([[1, 2, -1, 0.5], [-1, 1, 3, 0.5]]))
    return net


@pytest.mark.parametrize(
    ("target", "hidden", "pixels"),
    [
        (0, [0, 0.925926, 0, 0.074074], [0.203704, 0.796296]),
        (1, [0, 0.862069, 0, 0.137931], None),
    ],
)
def test_the_worked_example(target, hidden, pixels):
    seen = {}
    found = propagate(toy(), torch.tensor([[1.0, 2.0]]), one_hot([target]), "z+", watch=seen.__setitem__)
    assert torch.allclose(seen["0.weight"], torch.tensor([hidden]), atol=1e-6)
    if pixels:
        assert torch.allclose(found, torch.tensor([pixels]), atol=1e-6)


def randomised(net, seed=1):
    """BatchNorms that do something; their eps is zero, as zennit leaves a factor of 1 / sqrt(1 + eps) behind a fold."""
    generator = torch.Generator().manual_seed(seed)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 0.0
            for tensor, low, high in (
                (module.running_mean, -0.3, 0.3),
                (module.running_var, 0.5, 1.5),
                (module.weight.data, 0.5, 1.5),
                (module.bias.data, -0.2, 0.2),
            ):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)
    return net.eval()


def composites():
    from zennit import composites as z

    own = {"linear": "epsilon", "stabiliser": 1e-6, "biases": True}
    return [
        (z.EpsilonPlus, Composite(**own)),
        (z.EpsilonPlusFlat, Composite(**own, first="flat")),
        (z.EpsilonAlpha2Beta1, Composite(**own, conv="alpha-beta")),
    ]


def small(network):
    """torchvision's own classes with few layers."""
    from torchvision.models import resnet, vgg

    torch.manual_seed(0)
    if network == "vgg":
        net = vgg.VGG(vgg.make_layers([16, "M", 32, 32, "M", 64, "M"], batch_norm=True), num_classes=5)
        net.avgpool, net.classifier = (
            nn.AdaptiveAvgPool2d(2),
            nn.Sequential(nn.Linear(256, 32), nn.ReLU(), nn.Linear(32, 5)),
        )
        return randomised(net)
    block = resnet.BasicBlock if network == "basic" else resnet.Bottleneck
    return randomised(resnet.ResNet(block, [2, 1, 1, 1], num_classes=5))


@pytest.mark.parametrize("network", ["vgg", "basic", "bottleneck"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_relevances_agree_with_zennit(network, dtype):
    """Residual sums and BatchNorms are found without being told which network it is."""
    pytest.importorskip("torchvision")
    pytest.importorskip("zennit")
    from zennit.attribution import Gradient
    from zennit.torchvision import ResNetCanonizer, VGGCanonizer

    net = small(network).to(dtype)
    x = torch.randn(2, 3, 32, 32, dtype=dtype)
    for theirs, ours in composites():
        canonizer = VGGCanonizer() if network == "vgg" else ResNetCanonizer()
        with Gradient(copy.deepcopy(net), theirs(canonizers=[canonizer])) as attributor:
            _, expected = attributor(x, F.one_hot(torch.tensor([3, 1]), 5).to(dtype))
        found = propagate(net, x, one_hot([3, 1]), ours)
        largest, error = expected.abs().max(), (found - expected).abs().max()
        assert largest > 1e-4
        assert error < 1e-5 if dtype == torch.float32 else error < 1e-9 * largest


def test_the_box_rule_agrees_with_zennit():
    pytest.importorskip("zennit")
    from zennit.attribution import Gradient
    from zennit.composites import SpecialFirstLayerMapComposite
    from zennit.rules import Epsilon, Pass, ZBox, ZPlus
    from zennit.types import Convolution

    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(216, 3),
    )
    x = torch.rand(2, 3, 8, 8) * 4 - 2
    first = [(Convolution, ZBox(torch.tensor(-2.0), torch.tensor(2.5), stabilizer=1e-6, zero_params="bias"))]
    rest = [(Convolution, ZPlus(zero_params="bias")), (nn.Linear, Epsilon()), (nn.ReLU, Pass())]
    with Gradient(net, SpecialFirstLayerMapComposite(layer_map=rest, first_map=first)) as attributor:
        _, expected = attributor(x, F.one_hot(torch.tensor([0, 2]), 3).float())
    ours = Composite(linear="epsilon", first="box", low=-2.0, high=2.5, stabiliser=1e-6)
    assert torch.allclose(propagate(net, x, one_hot([0, 2]), ours), expected, atol=1e-5)


@pytest.fixture(scope="module")
def resnet():
    torch.manual_seed(3)
    return randomised(CifarResNet(14))


def test_a_residual_network_hands_all_of_it_to_the_first_layer_and_the_pixels(resnet):
    """Without biases, as relevance is lost at units that are on through their bias alone."""
    totals = {}

    def watch(name, relevance):
        totals[name] = relevance.flatten(1).sum(1)

    net = copy.deepcopy(resnet)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.zero_()
            module.bias.data.zero_()
    x = torch.rand(3, 3, 32, 32)
    found = propagate(net, x, one_hot([1, 2, 3]), "z+", watch=watch)
    assert found.shape == x.shape
    assert torch.allclose(found.sum((1, 2, 3)), torch.ones(3), atol=1e-4)
    assert torch.allclose(totals["conv1.weight"], torch.ones(3), atol=1e-4)


def test_a_plain_network_conserves_in_every_layer():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3, bias=False), nn.ReLU(inplace=True), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(72, 5, bias=False),
    )  # fmt: skip
    totals = []

    def watch(name, relevance):
        assert (relevance >= 0).all()
        totals.append(relevance.flatten(1).sum(1))

    x = torch.rand(4, 3, 16, 16)
    found = propagate(net, x, one_hot([0, 1, 2, 4]), Composite(epsilon=1e-9), watch=watch)
    for total in [*totals, found.flatten(1).sum(1)]:
        assert torch.allclose(total, torch.ones(4), rtol=1e-5)


def test_scaling_a_filter_and_its_consumer_changes_nothing():
    net, seen, scaled = toy(), {}, {}
    x = torch.tensor([[1.0, 2.0], [2.0, 0.3]])
    propagate(net, x, one_hot([0, 1]), "z+", watch=seen.__setitem__)
    with torch.no_grad():
        net[0].weight[1] *= 3
        net[0].bias[1] *= 3
        net[2].weight[:, 1] /= 3
    propagate(net, x, one_hot([0, 1]), "z+", watch=scaled.__setitem__)
    assert torch.allclose(seen["0.weight"], scaled["0.weight"], atol=1e-6)


def test_a_relu_in_place_and_sums_in_place_are_what_they_are_out_of_place():
    class Block(nn.Module):
        def __init__(self, in_place):
            super().__init__()
            self.conv, self.head, self.in_place = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(3, 2), in_place

        def forward(self, x):
            y = self.conv(x)
            if self.in_place:
                y += x
                y.relu_()
                y.mul_(2.0)
            else:
                y = torch.relu(y + x) * 2.0
            return self.head(y.mean((2, 3)))

    torch.manual_seed(0)
    one = Block(True)
    other = Block(False)
    other.load_state_dict(one.state_dict())
    x = torch.rand(2, 3, 6, 6)
    first, second = (propagate(net, x, one_hot([0, 1]), "epsilon") for net in (one, other))
    assert torch.allclose(first, second, atol=1e-6) and first.abs().sum() > 0.1


def test_a_norm_behind_an_activation_in_place_is_not_folded_into_the_convolution():
    class Late(nn.Module):
        def __init__(self, in_place):
            super().__init__()
            self.conv, self.norm, self.head, self.in_place = (
                nn.Conv2d(3, 4, 3),
                nn.BatchNorm2d(4),
                nn.Linear(4, 2),
                in_place,
            )

        def forward(self, x):
            y = self.conv(x)
            y = y.relu_() if self.in_place else y.relu()
            return self.head(self.norm(y).mean((2, 3)))

    torch.manual_seed(0)
    one = randomised(Late(True))
    other = randomised(Late(False))
    other.load_state_dict(one.state_dict())
    x = torch.rand(2, 3, 6, 6)
    first, second = (propagate(net, x, one_hot([0, 1]), "z+") for net in (one, other))
    assert torch.allclose(first, second, atol=1e-6) and first.abs().sum() > 0.1


def test_products_in_other_words_have_the_same_relevance():
    torch.manual_seed(0)
    w = torch.randn(4, 3)

    class Product(nn.Module):
        def __init__(self, f):
            super().__init__()
            self.f, self.weight = f, nn.Parameter(torch.rand(4, 4))

        def forward(self, x):
            return self.f(x, self.weight) @ w

    x = torch.rand(2, 4)
    ways = [
        torch.matmul,
        torch.mm,
        lambda a, b: torch.einsum("ij,jk->ik", a, b),
        lambda a, b: F.linear(a, b.t()),
    ]
    nets = [Product(f) for f in ways]
    for net in nets[1:]:
        net.load_state_dict(nets[0].state_dict())
    found = [propagate(net, x, one_hot([0, 2]), "epsilon") for net in nets]
    for other in found[1:]:
        assert torch.allclose(found[0], other, atol=1e-5)


def test_attention_hands_all_to_the_values(tiny_llama):
    """By hand: with its weights as constants, a head's relevance goes to v in proportion to weight times value."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, 5, 4).double().unbind(0)
    weights = (q @ k.transpose(-1, -2) / 2).softmax(-1)
    head = torch.randn(4, 3).double()

    class Attend(nn.Module):
        def __init__(self, fused):
            super().__init__()
            self.fused, self.p = fused, nn.Parameter(torch.zeros(1).double())

        def forward(self, v):
            mixed = (
                F.scaled_dot_product_attention(q, k + 0 * v, v)
                if self.fused
                else torch.softmax(q @ (k + 0 * v).transpose(-1, -2) / 2, -1) @ v
            )
            return (mixed @ head).mean((1, 2))

    z = weights @ v
    out = z @ head
    top = torch.zeros_like(out)
    mean = out.mean((1, 2), keepdim=True)
    top[..., 1] = (out / 10 / mean)[..., 1]
    at_z = torch.einsum("bhtd,dc,bhtc->bhtd", z, head, top / out)
    expected = v * (weights.transpose(-1, -2) @ (at_z / z))
    for fused in (True, False):
        found = propagate(Attend(fused), v, one_hot([1, 1]), Composite("epsilon", "epsilon", epsilon=1e-15))
        assert torch.allclose(found, expected, rtol=1e-6, atol=1e-8)


def test_multi_head_attention_modules_and_vision_transformers_have_rules():
    timm = pytest.importorskip("timm")
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0).eval()
    net = nn.Sequential(layer, nn.Flatten(), nn.Linear(80, 3)).eval()
    x = torch.randn(2, 5, 16)
    plain = net(x)
    seen = []
    found = propagate(net, x, lambda logits: seen.append(logits) or one_hot([0, 1])(logits), "epsilon")
    assert torch.allclose(seen[0], plain, atol=1e-5)
    assert torch.isfinite(found).all() and found.abs().sum() > 0
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=4).eval()
    x = torch.randn(1, 3, 32, 32)
    assert torch.isfinite(propagate(vit, x, one_hot([2]), "z+")).all()


def test_a_gate_hands_all_to_the_signal():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.head = nn.Linear(3, 3), nn.Linear(3, 2, bias=False)

        def forward(self, x):
            return self.head(x * self.gate(x).sigmoid())

    net, x = Gated(), torch.rand(2, 3) + 0.1
    hidden = x * net.gate(x).sigmoid()
    expected = hidden * net.head.weight[[1, 0]] / (hidden * net.head.weight[[1, 0]]).sum(1, keepdim=True)
    assert torch.allclose(propagate(net, x, one_hot([1, 0]), "epsilon"), expected, rtol=1e-3)


@pytest.mark.parametrize("rule", ["z+", "epsilon", "alpha-beta", "box"])
def test_a_layer_hands_on_what_it_received(rule):
    torch.manual_seed(0)
    x, w, r = (
        torch.rand(4, 6, dtype=torch.float64),
        torch.randn(5, 6, dtype=torch.float64),
        torch.rand(4, 5).double(),
    )
    found = layer_relevance(rule, F.linear, x, w, None, r, Composite(epsilon=1e-12, low=-0.1, high=1.1))
    assert torch.allclose(found.sum(1), r.sum(1), rtol=1e-6)


def test_z_plus_by_loops():
    torch.manual_seed(0)
    x, w, r = torch.randn(6), torch.randn(3, 6), torch.rand(3)
    expected = torch.zeros(6)
    for j in range(3):
        share = torch.tensor([max(0.0, float(x[i] * w[j, i])) for i in range(6)])
        expected += share / share.sum() * r[j]
    assert torch.allclose(layer_relevance("z+", F.linear, x, w, None, r, Composite()), expected, atol=1e-6)


def test_the_model_is_left_as_it_was(resnet):
    net = copy.deepcopy(resnet).train()
    net.layer1.eval()
    net.conv1.weight.requires_grad_(False)
    net.linear.weight.grad = torch.ones_like(net.linear.weight)
    state = {n: t.clone() for n, t in net.state_dict().items()}
    modes = [m.training for m in net.modules()]
    propagate(net, torch.rand(1, 3, 32, 32), one_hot([0]))
    assert modes == [m.training for m in net.modules()]
    assert not net.conv1.weight.requires_grad and net.linear.weight.requires_grad
    assert (net.linear.weight.grad == 1).all() and net.linear.bias.grad is None
    assert all(torch.equal(state[n], t) for n, t in net.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in net.modules())


def test_half_precision_and_each_composite(resnet):
    x = torch.rand(1, 3, 32, 32)
    exact = propagate(resnet, x, one_hot([0]))
    half = propagate(copy.deepcopy(resnet).bfloat16(), x, one_hot([0]))
    assert half.dtype == torch.float32
    assert torch.corrcoef(torch.stack([exact.flatten(), half.flatten()]))[0, 1] > 0.9
    for name in COMPOSITES:
        assert torch.isfinite(propagate(resnet, x, one_hot([0]), name)).all()


@pytest.mark.parametrize(
    ("net", "match"),
    [
        (nn.Sequential(nn.Linear(4, 3), nn.Softmax(-1)), "before any softmax"),
        (nn.Sequential(nn.LSTM(4, 3)), "no relevance rule"),
    ],
)
def test_what_has_no_rule_is_named(net, match):
    if isinstance(net[0], nn.LSTM):
        net.append(nn.Identity())
        net[1].forward = lambda found: found[0]
    with pytest.raises(SecateurError, match=match):
        propagate(net, torch.rand(2, 4), lambda logits: logits)


def test_an_operation_without_a_rule_in_the_path_is_named():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x):
            return torch.cumsum(self.fc(x), -1)

    with pytest.raises(SecateurError, match="Cumsum"):
        propagate(Odd(), torch.rand(2, 4), lambda logits: logits)


def test_unknown_rules_are_named():
    with pytest.raises(SecateurError, match="epsilon-plus"):
        propagate(toy(), torch.rand(1, 2), one_hot([0]), "zeta")
    with pytest.raises(SecateurError, match="alpha-beta"):
        Composite(conv="zz")
