"""Maps: the sheets' numbers, captum as an independent implementation, what is left of the model, and refusals."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import secateur
from secateur import SecateurError
from secateur.method import method_class
from secateur.methods.grad_cam import cam
from secateur.methods.normgrad import contribution_map
from secateur.saliency import class_sensitivity, saliency_methods
from secateur.saliency.maps import combine, unit_range
from secateur.saliency.record import record
from secateur.tasks.networks.cifar_resnet import CifarResNet

X = torch.tensor([[1.0, 0, 2], [2, 1, -1]])[None, :, None]
G = torch.tensor([[0.5, 1, -1], [-1, 0, 2]])[None, :, None]
ANY = [name for name in saliency_methods() if method_class(name).example() is None]
"""Those that read any classifier."""


@pytest.mark.parametrize(
    ("contribution", "reduction", "expected"),
    [
        ("scaling", "sum", [-1.5, 0, -4]),
        ("conv1", "norm", [2.5, 1, 5]),
        ("scaling", "positive", [0.5, 0, 0]),
        ("scaling", "norm", [2.061553, 0, 2.828427]),
        ("bias", "norm", [1.118034, 1, 2.236068]),
        ("conv1", "max", [1, 1, 4]),
        ("conv1", "sum", [-1.5, 1, 1]),
        ("conv3", "norm", [2.738613, 3.316625, 5.477226]),
    ],
)
def test_the_sheets_numbers(contribution, reduction, expected):
    found = contribution_map(X, G, contribution, reduction)
    assert torch.allclose(found, torch.tensor(expected).float()[None, None], atol=1e-5)


def test_the_sheets_grad_cam_and_combinations():
    assert torch.allclose(cam(X, G), torch.tensor([0.833333, 0.333333, 0])[None, None], atol=1e-5)
    maps = [torch.tensor([0, 0.5, 1])[None, None], torch.tensor([0.25, 1, 0.5])[None, None]]
    # the second isn't in its unit range, as the sheet has it: a corner that both call least brings it there
    wide = [F.pad(m, (1, 1)) + F.pad(torch.zeros(1, 1, 3), (0, 2), value=0)[..., :5] for m in maps]
    for how, expected in (("product", [0, 0.840896, 0.594604]), ("sum", [0.1875, 0.875, 0.625])):
        assert torch.allclose(combine(wide, (0.25, 0.75), how)[0, 0, 1:4], torch.tensor(expected), atol=1e-5)


@pytest.mark.parametrize("contribution", ["conv1", "conv3"])
@pytest.mark.parametrize("reduction", ["norm", "positive", "sum", "max"])
def test_closed_forms_are_those_of_the_outer_product(contribution, reduction):
    torch.manual_seed(0)
    x, g = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    size = 3 if contribution == "conv3" else 1
    around = F.unfold(x, size, padding=size // 2).reshape(2, 3 * size**2, 4, 5)
    outer = torch.einsum("nihw,njhw->nijhw", around, g).flatten(1, 2)
    expected = {
        "norm": outer.norm(dim=1), "positive": outer.clamp(min=0).norm(dim=1),
        "sum": outer.sum(1), "max": outer.amax(1),
    }[reduction]  # fmt: skip
    assert torch.allclose(contribution_map(x, g, contribution, reduction), expected, atol=1e-5)


def test_contributions_add_up_to_the_gradient_of_an_identity_convolution():
    torch.manual_seed(0)
    x = torch.randn(1, 4, 5, 5)
    identity = nn.Conv2d(4, 4, 1, bias=False)
    identity.weight.data.copy_(torch.eye(4)[..., None, None])
    head = nn.Sequential(nn.ReLU(), nn.Conv2d(4, 2, 3), nn.Flatten(), nn.Linear(18, 3))
    y = identity(x)
    y.retain_grad()
    head(y)[0, 1].backward()
    assert torch.allclose(
        torch.einsum("nihw,njhw->ij", y.grad, x), identity.weight.grad[..., 0, 0], atol=1e-6
    )


def test_signs_and_rotations_of_channels():
    torch.manual_seed(0)
    x, g, q = torch.randn(1, 4, 3, 3), torch.randn(1, 4, 3, 3), torch.linalg.qr(torch.randn(4, 4))[0]
    mixed = [torch.einsum("ij,njhw->nihw", q, t) for t in (x, g)]
    for contribution, reduction, same in (
        ("conv1", "norm", True),
        ("scaling", "sum", True),
        ("scaling", "positive", False),
    ):
        before, after = (
            contribution_map(x, g, contribution, reduction),
            contribution_map(*mixed, contribution, reduction),
        )
        assert torch.allclose(before, after, atol=1e-5) is same
    assert torch.equal(contribution_map(x, -g), contribution_map(x, g))


@pytest.fixture(scope="module")
def vgg():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 12, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(12 * 16, 6),
    ).eval()  # fmt: skip


@pytest.fixture(scope="module")
def resnet():
    torch.manual_seed(1)
    net = CifarResNet(8)
    net(torch.randn(16, 3, 32, 32))
    return net.eval()


def picture(size=16, count=None):
    torch.manual_seed(7)
    return torch.randn(3, size, size) if count is None else torch.randn(count, 3, size, size)


def test_gradient_guided_backpropagation_and_grad_cam_agree_with_captum(vgg):
    attr = pytest.importorskip("captum.attr")
    x, target = picture()[None], 4
    net = copy.deepcopy(vgg)
    for module in net:
        if isinstance(module, nn.ReLU):
            module.inplace = False
    pairs = {
        "gradient": attr.Saliency(net).attribute(x.clone(), target=target, abs=False),
        "guided-backprop": attr.GuidedBackprop(net).attribute(x.clone(), target=target),
    }
    for name, expected in pairs.items():
        found = secateur.saliency(vgg, x, name, target)
        assert torch.allclose(found.attribution, expected, atol=1e-6)
        assert torch.allclose(found.values, expected.abs().amax(1), atol=1e-6)
    times = secateur.saliency(vgg, x, "gradient", target, times_input=True).attribution
    assert torch.allclose(times, attr.InputXGradient(net).attribute(x.clone(), target=target), atol=1e-6)
    coarse = attr.LayerGradCam(net, net[8]).attribute(x, target=target, relu_attributions=True)
    expected = F.interpolate(coarse, (16, 16), mode="bilinear", align_corners=False)[:, 0]
    found = secateur.saliency(vgg, x, "grad-cam", target)
    assert found.layers == ("8",)
    assert torch.allclose(found.values, expected, atol=1e-6)
    both = secateur.saliency(vgg, x, "guided-grad-cam", target)
    assert torch.allclose(both.attribution, pairs["guided-backprop"] * expected[:, None], atol=1e-6)


def test_functional_activations_are_guided_too(resnet):
    """captum guides modules only; here the same network is written with modules."""
    attr = pytest.importorskip("captum.attr")

    class Functional(nn.Module):
        def __init__(self, layers):
            super().__init__()
            self.layers = layers

        def forward(self, x):
            return self.layers[2](F.relu(self.layers[0](x)).flatten(1))

    layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Linear(4 * 36, 5))
    modules = nn.Sequential(layers[0], layers[1], nn.Flatten(), layers[2])
    x = picture(8)[None]
    expected = attr.GuidedBackprop(modules).attribute(x.clone(), target=2)
    assert torch.allclose(
        secateur.saliency(Functional(layers), x, "guided-backprop", 2).attribution, expected, atol=1e-6
    )


def test_the_recorder_sees_what_autograd_sees(vgg):
    x = picture()[None]
    a = vgg[:4](x).detach().requires_grad_(True)
    expected = torch.autograd.grad(vgg[4:](a)[0, 3], a)[0]
    seen = record(vgg, x, 3, ["3"])
    assert torch.allclose(seen.activations["3"], a, atol=1e-6) and torch.allclose(
        seen.gradients["3"], expected, atol=1e-6
    )


@pytest.mark.parametrize("method", ANY)
def test_a_map_of_a_batch_is_the_maps_of_its_pictures(resnet, method):
    x, targets = picture(32, 2), [3, 5]
    kwargs = {"longer": 32} if method == "salient-relevance" else {}
    if method == "lrp":
        kwargs = {"composite": "epsilon-plus"}
    both = secateur.saliency(resnet, x, method, targets, **kwargs)
    assert both.values.shape == (2, 32, 32) and both.target == targets and both.values.dtype == torch.float32
    for one, target, values in zip(x, targets, both.values):
        alone = secateur.saliency(resnet, one, method, target, **kwargs)
        assert alone.values.shape == (32, 32) and alone.target == target
        assert torch.allclose(alone.values, values, rtol=1e-3, atol=1e-4 * float(values.abs().max()))
        assert alone.values.std() > 0


@pytest.mark.parametrize("method", ANY)
@pytest.mark.parametrize("meta", [0.0, 0.01])
def test_the_model_is_left_exactly_as_it_was(resnet, method, meta):
    net = copy.deepcopy(resnet).train()
    net.layer2.eval()
    net.conv1.weight.requires_grad_(False)
    net.linear.bias.grad = torch.ones(10)
    ran = []
    hook = net.layer1.register_forward_hook(lambda *_: ran.append(1))
    state = {n: t.clone() for n, t in net.state_dict().items()}
    modes, counts = [m.training for m in net.modules()], [len(m._forward_hooks) for m in net.modules()]
    kwargs = {"longer": 32} if method == "salient-relevance" else {}
    secateur.saliency(net, picture(32), method, 2, meta=meta, **kwargs)
    assert ran and hook.id in net.layer1._forward_hooks
    assert [m.training for m in net.modules()] == modes and [
        len(m._forward_hooks) for m in net.modules()
    ] == counts
    assert not any(m._backward_hooks or m._forward_pre_hooks for m in net.modules())
    assert all(torch.equal(state[n], t) for n, t in net.state_dict().items())
    assert [p.requires_grad for p in net.parameters()] == [
        n != "conv1.weight" for n, _ in net.named_parameters()
    ]
    assert (net.linear.bias.grad == 1).all() and net.linear.weight.grad is None


def test_an_error_on_the_way_leaves_the_model_too(resnet):
    net = copy.deepcopy(resnet).train()
    with pytest.raises(SecateurError, match="no class 10 of 10"):
        secateur.saliency(net, picture(32), target=10, meta=0.1)
    assert net.training and all(p.requires_grad for p in net.parameters())
    assert not any(m._forward_hooks for m in net.modules())


def test_meta_saliency_is_a_step_of_sgd(resnet):
    x, net = picture(32)[None], copy.deepcopy(resnet)
    F.cross_entropy(net(x), torch.tensor([6])).backward()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter -= 0.02 * parameter.grad
    expected = secateur.saliency(net, x, target=6).values
    assert torch.allclose(secateur.saliency(resnet, x, target=6, meta=0.02).values, expected, atol=1e-5)
    assert not torch.allclose(secateur.saliency(resnet, x, target=6).values, expected, rtol=1e-3)


def test_stages_are_found(resnet, vgg):
    assert secateur.saliency(resnet, picture(32), layers="all").layers == ("layer1", "layer2", "layer3")
    assert secateur.saliency(vgg, picture(), layers="all").layers == ("3", "8")
    assert secateur.saliency(vgg, picture(), layers="3,6", weights=(1, 3)).layers == ("3", "6")
    torchvision = pytest.importorskip("torchvision")
    deep = torchvision.models.resnet.ResNet(torchvision.models.resnet.Bottleneck, [1, 1, 1, 1])
    names = ("layer1", "layer2", "layer3", "layer4")
    assert secateur.saliency(deep, picture(64), layers="all").layers == names


def test_tokens_lie_on_the_grid_of_patches():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", img_size=(32, 64), depth=2, num_classes=4).eval()
    nn.init.normal_(vit.head.weight)
    x = torch.randn(1, 3, 32, 64)
    seen = record(vit, x, 1, ["blocks.0"])
    expected = (seen.activations["blocks.0"].norm(dim=2) * seen.gradients["blocks.0"].norm(dim=2))[
        :, 1:
    ].reshape(1, 2, 4)
    found = secateur.saliency(vit, x, target=1, layers="blocks.0").values
    assert torch.allclose(found, F.interpolate(expected[None], (32, 64), mode="bilinear")[0], atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("method", ["normgrad", "gradient", "lrp"])
def test_other_precisions(resnet, dtype, method):
    exact = secateur.saliency(resnet, picture(32), method, 1).values
    found = secateur.saliency(copy.deepcopy(resnet).to(dtype), picture(32), method, 1).values
    assert found.dtype == torch.float32
    assert torch.corrcoef(torch.stack([exact.flatten(), found.flatten()]))[0, 1] > (
        0.999 if dtype == torch.float64 else 0.8
    )


def test_a_constant_map_is_zeros_in_its_unit_range_and_a_blur_keeps_the_sum():
    assert not unit_range(torch.full((2, 3, 3), 4.0)).any()
    net = nn.Sequential(nn.Conv2d(3, 2, 1, bias=False), nn.Flatten(), nn.Linear(2 * 400, 2))
    plain, soft = (secateur.saliency(net, picture(20), "gradient", 0, blur=b).values for b in (0.0, 0.1))
    assert soft.std() < plain.std() / 2 and soft.mean().item() == pytest.approx(plain.mean().item(), rel=0.1)


def test_class_sensitivity_is_one_for_a_model_that_is_blind_to_the_class():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 3),
    )
    assert -1 <= class_sensitivity(net, picture(), "linear-approximation") < 0.999
    with torch.no_grad():
        net[6].weight.copy_(torch.rand(6).expand(3, 6) * torch.tensor([1.0, 2.0, 3.0])[:, None])
    assert class_sensitivity(net, picture(), "normgrad") == pytest.approx(1)


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"target": 10}, "no class 10 of 10"),
        ({"target": -1}, "no class -1"),
        ({"target": "cat"}, "is no class"),
        ({"target": 1.5}, "is no class"),
        ({"target": True}, "is no class"),
        ({"target": [1, 2]}, "2 classes for 1 pictures"),
        ({"method": "nomgrad"}, "normgrad"),
        ({"layers": "layer9"}, "no layer 'layer9'"),
        ({"shrubbery": 1}, "no hyperparameter"),
        ({"reduction": "median"}, "no reduction"),
        ({"image": torch.zeros(32, 32)}, "no picture"),
        ({"image": torch.zeros(3, 32, 32, dtype=torch.uint8)}, "normalised"),
        ({"image": torch.full((3, 32, 32), torch.nan)}, "NaN"),
        ({"layers": "all", "weights": (1.0,)}, "can't weigh 3"),
    ],
)
def test_what_makes_no_sense_is_named(resnet, changed, match):
    given = {"image": picture(32), **changed}
    with pytest.raises(SecateurError, match=match):
        secateur.saliency(resnet, given.pop("image"), **given)


def test_models_without_convolutions_or_classes_are_named():
    flat = nn.Sequential(nn.Flatten(), nn.Linear(48, 5), nn.ReLU(), nn.Linear(5, 3))
    flat[3].weight.data.abs_()
    with pytest.raises(SecateurError, match="no convolution"):
        secateur.saliency(flat, picture(4))
    for method in ("gradient", "lrp", "guided-backprop"):
        assert secateur.saliency(
            flat, picture(4), method, 0, **({"composite": "epsilon"} if method == "lrp" else {})
        ).values.any()
    with pytest.raises(SecateurError, match=r"not \[pictures, classes\]"):
        secateur.saliency(nn.Sequential(nn.Conv2d(3, 3, 3)), picture(8))


def test_a_class_that_nothing_speaks_for_is_named(vgg):
    net = copy.deepcopy(vgg)
    with torch.no_grad():
        net[11].weight[2] = 0
    for method in ("normgrad", "grad-cam", "gradient", "lrp"):
        with pytest.raises(SecateurError, match="nothing in picture speaks for class 2"):
            secateur.saliency(net, picture(), method, 2)


def test_networks_read_from_files_have_the_same_maps(tmp_path):
    """Their convolutions are operations, not modules."""
    from secateur.io.exchange import load_file

    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 6, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4),
    ).eval()  # fmt: skip
    net[8].weight.data.abs_()
    x = picture(16)
    secateur.export(net, x[None], tmp_path / "net.pt2")
    read = load_file(tmp_path / "net.pt2")
    for method in ("normgrad", "grad-cam", "guided-backprop", "lrp"):
        expected = secateur.saliency(net, x[None], method, 1).values
        assert torch.allclose(secateur.saliency(read, x[None], method, 1).values, expected, atol=1e-6)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_callers_gradient_mode_is_no_matter(resnet, mode):
    x = picture(32)
    expected = {method: secateur.saliency(resnet, x, method, 1).values for method in ("normgrad", "lrp")}
    with mode():
        for method, values in expected.items():
            assert torch.allclose(secateur.saliency(resnet, x.clone(), method, 1).values, values, atol=1e-6)
        assert secateur.saliency(resnet, x.clone(), target=1, meta=0.1).values.any()
