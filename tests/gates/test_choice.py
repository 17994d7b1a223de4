"""A choice among widths and depths: numbers of the sheet tas, and networks that a choice has narrowed."""

import copy
import importlib.util
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from secateur import SecateurError
from secateur.gates import Choice, ExpectedCost, choice_of, counts_of, depth_choices, place, width_choices
from secateur.gates.choice import interpolate, noisy, temperature
from secateur.graph import trace
from secateur.surgery import cut_units, mask_units
from secateur.tasks.networks.cifar_resnet import CifarResNet
from secateur.tasks.networks.digits_resnet import DigitsResNet

PATH = Path(__file__).parents[2] / "benchmarks" / "architectures.py"
SPEC = importlib.util.spec_from_file_location("architectures", PATH)
architectures = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(architectures)


def wide(graph):
    return [g for g in graph.prunable(("channels", "layers")) if len(counts_of(g)) > 1]


def placed(model, x):
    graph = trace(model, x)
    torch.manual_seed(0)
    return graph, place(copy.deepcopy(model), graph, choice_of, groups=wide(graph))


def decide(gated, number):
    """Every choice at its count of this number, without a doubt."""
    for choice in gated.choices().values():
        with torch.no_grad():
            choice.logits.fill_(-50.0)
            choice.logits[min(number, len(choice.counts) - 1) if number >= 0 else number] = 50.0


# ------------------------------------------------------------------ numbers of the sheet


@pytest.mark.parametrize(
    ("channels", "expected"),
    [
        (3, [1.5, 3, 4.5]),
        (7, [1, 1.5, 2.5, 3, 3.5, 4.5, 5]),
        (8, [1, 1.5, 2, 2.5, 3.5, 4, 4.5, 5]),
        (5, [1, 2, 3, 4, 5]),
    ],
)
def test_channel_wise_interpolation(channels, expected):
    row = torch.tensor([1.0, 2, 3, 4, 5])
    assert interpolate(row[None], channels)[0].tolist() == pytest.approx(expected)
    y = torch.randn(2, 5, 3, 4)
    torch.testing.assert_close(interpolate(y, channels), F.adaptive_avg_pool3d(y, (channels, 3, 4)))
    torch.testing.assert_close(
        interpolate(y.movedim(1, -1), channels, 3), interpolate(y, channels).movedim(1, -1)
    )


def test_mixing_weights():
    z = noisy(torch.tensor([0, math.log(2), 0]), torch.tensor([0.1, -0.3, 0.8]), 0.5)
    assert z.tolist() == pytest.approx([-2.572589, -1.986294, -1.172589], abs=1e-5)
    assert z.softmax(0).tolist() == pytest.approx([0.145932, 0.262286, 0.591783], abs=1e-5)
    assert z[[1, 2]].softmax(0).tolist() == pytest.approx([0.307101, 0.692899], abs=1e-5)


def test_choices():
    assert width_choices(16) == (4, 6, 8, 9, 11, 12, 14, 16)
    assert width_choices(64) == (19, 25, 32, 38, 44, 51, 57, 64)
    assert width_choices(90)[4] == 63 and len(width_choices(8)) == 7 and width_choices(3) == (1, 2, 3)
    assert depth_choices(2) == (1, 2) and depth_choices(9) == (1, 3, 5, 7, 9)
    assert depth_choices(18) == (*range(1, 18, 2), 18)


def test_temperature():
    found = [temperature(done) for done in (0, 0.25, 0.5, 1)]
    assert found == pytest.approx([5, 4.282412, 2.55, 0.1], abs=1e-6)


def test_expected_cost():
    """3 x 3, 16 channels in, of 16 channels out 10 expected, 8 x 8 places: 0.09216 M."""
    model = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.Conv2d(16, 4, 1, bias=False))
    graph = trace(model, torch.zeros(1, 16, 8, 8))
    even = Choice(16, width_choices(16))
    even.logits.data.zero_()
    assert even.keep().sum().item() == pytest.approx(10)
    cost = ExpectedCost(graph).macs({"0:channels": even.keep()})
    assert cost.item() == pytest.approx(0.09216e6 + 10 * 4 * 64)
    stage = Choice(3, (1, 2, 3), pair=False)
    stage.logits.data = torch.tensor([0.2, 0.3, 0.5]).log()
    assert stage.keep().tolist() == pytest.approx([1, 0.8, 0.5])


# ------------------------------------------------------------------ what is drawn


def test_two_different_counts_are_drawn_as_often_as_noise_and_logits_say():
    """By hand: the first of the two is a Gumbel draw, so its chances are softmax(logits) at tau = 1, averaged over noise."""
    choice = Choice(4, (1, 2, 3, 4), tau=1e-3)
    choice.logits.data = torch.tensor([0.1, 0.2, 0.3, 0.4]).log()
    generator, first = torch.Generator().manual_seed(0), torch.zeros(4)
    for _ in range(4000):
        numbers, weights = choice.draw(generator)
        assert numbers[0] != numbers[1] and weights.sum().item() == pytest.approx(1, abs=1e-6)
        first[numbers[int(weights.argmax())]] += 1 / 4000
    # at a low temperature the larger weight is that of the largest noisy logit, which is a draw of softmax(logits)
    assert first.tolist() == pytest.approx([0.1, 0.2, 0.3, 0.4], abs=0.035)


def test_gradients_reach_the_two_drawn_and_all_through_the_cost():
    torch.manual_seed(0)
    choice = Choice(16, width_choices(16))
    numbers, weights = choice.draw()
    weights[0].backward()
    moved = choice.logits.grad.abs() > 1e-7
    assert moved.nonzero().flatten().tolist() == sorted(numbers)
    choice.logits.grad = None
    choice.keep().sum().log().backward()
    assert (choice.logits.grad != 0).all()


def test_draws_are_a_function_of_torchs_seed():
    choice = Choice(16, width_choices(16))
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        choice.sample()
        found.append((choice.drawn[0], choice.drawn[1].tolist()))
    assert found[0] == found[1] != found[2]


# ------------------------------------------------------------------ networks


@pytest.mark.parametrize("build", [DigitsResNet, lambda: CifarResNet(8)])
def test_full_width_and_depth_is_the_plain_network(build):
    torch.manual_seed(0)
    model = build().eval()
    x = torch.randn(2, *model.input_size)
    _, gated = placed(model, x)
    decide(gated, -1)
    assert torch.equal(gated.eval()(x), model(x))
    gated.train()
    for part in gated.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.eval()
    torch.testing.assert_close(gated(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "name",
    [
        "timm:mobilenetv3_small_050",
        "timm:regnetx_002",
        "timm:ghostnet_100",
    ],
)
def test_a_decided_shape_is_the_masked_and_the_cut_network(name):
    """Before anything is trained each width's norm is the first channels of the model's."""
    model, inputs = architectures.build(name)
    model.eval()
    graph, gated = placed(model, inputs)
    decide(gated, 2)
    keep = gated.open()
    masked = copy.deepcopy(model)
    mask_units(masked, graph, keep)
    outputs = architectures.outputs
    for a, b in zip(outputs(gated.eval(), inputs), outputs(masked, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert ExpectedCost(graph).macs(gated.keep()).item() == pytest.approx(graph.macs(keep), rel=1e-6)


def test_the_norms_of_the_widths_are_trained_and_saved_with_the_gates():
    """One for each width of each choice behind a BatchNorm, beside the network's own."""
    model = DigitsResNet().eval()
    _, gated = placed(model, torch.randn(2, *model.input_size))
    wide = [choice for name, choice in gated.choices().items() if not gated.points[name].blocks]
    norms = [part for part in gated.widths.modules() if isinstance(part, nn.BatchNorm2d)]
    assert len(norms) >= sum(len(choice.counts) for choice in wide) > 0
    assert {id(p) for norm in norms for p in norm.parameters()} <= {id(p) for p in gated.parameters()}
    assert any(name.startswith("widths.") for name in gated.state_dict())


class Joined(nn.Module):
    """One norm over the channels of two convolutions, which are two groups."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 4, 3), nn.Conv2d(1, 6, 3)
        self.norm, self.last = nn.BatchNorm2d(10), nn.Conv2d(10, 2, 1)

    def forward(self, x):
        return self.last(torch.relu(self.norm(torch.cat([self.a(x), self.b(x)], 1))))


def test_two_groups_behind_one_norm():
    torch.manual_seed(0)
    model, x = Joined(), torch.randn(5, 1, 4, 4)
    model.train()(x)
    model.eval()
    graph, gated = placed(model, x)
    decide(gated, 1)
    keep = gated.open()
    assert {name: len(units) for name, units in keep.items()} == {"a:channels": 2, "b:channels": 2}
    small = copy.deepcopy(model)
    cut_units(small, graph, keep)
    torch.testing.assert_close(gated.eval()(x), small(x))
    for choice in gated.choices().values():
        with torch.no_grad():
            choice.logits.zero_()
    torch.manual_seed(0)
    gated.train()(x).sum().backward()
    moved = [choice.logits.grad.abs().sum() for choice in gated.choices().values()]
    assert len(moved) == 2 and min(moved) > 0


def test_the_mixture_is_that_of_two_networks_by_hand():
    """One hidden convolution of 4 channels: widths 2 and 4, weights of its own, worked out by plain calls."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1), nn.Flatten()
    )
    x = torch.randn(5, 1, 4, 4)
    graph = trace(model, x)
    gated = place(copy.deepcopy(model), graph, lambda g: Choice(4, (2, 4)), kinds=("channels",)).train()
    torch.manual_seed(3)
    found = gated(x)
    numbers, weights = gated.choices()["0:channels"].drawn
    assert sorted(numbers) == [0, 1]
    made = model[0](x)
    half, full = (
        F.batch_norm(made[:, :2], None, None, training=True),
        F.batch_norm(made, None, None, training=True),
    )
    half = half[:, [0, 0, 1, 1]]
    share = weights[numbers.index(0)].item()
    expected = model[4](model[3](torch.relu(share * half + (1 - share) * full)))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_depths_are_mixed_behind_the_stage():
    torch.manual_seed(0)
    model = DigitsResNet().eval()
    x = torch.randn(2, 1, 8, 8)
    graph = trace(model, x)
    groups = [graph["stage1:layers"]]
    gated = place(copy.deepcopy(model), graph, choice_of, groups=groups).train()
    gated.model.eval()
    torch.manual_seed(1)
    found = gated(x)
    weights = gated.choices()["stage1:layers"].drawn[1]
    state = torch.relu(model.stem_bn(model.stem(x)))
    states = [state := block(state) for block in model.stage1]
    mixed = sum(w * s for w, s in zip(weights, states))
    rest = model.stage2(torch.relu(model.step_bn(model.step(mixed))))
    torch.testing.assert_close(found, model.linear(rest.mean((2, 3))))
    decide(gated, 0)
    small = copy.deepcopy(model)
    cut_units(small, graph, gated.open())
    torch.testing.assert_close(gated.eval()(x), small(x))


# ------------------------------------------------------------------ bad input


class Apart(nn.Module):
    """Two blocks with something between them."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1)
        self.blocks = nn.ModuleList(DigitsResNet().stage1[:2])
        self.head = nn.Linear(16, 2)

    def forward(self, x):
        return self.head(self.blocks[1](self.blocks[0](self.stem(x)) + 1).mean((2, 3)))


def test_bad_input_is_refused_by_name():
    with pytest.raises(SecateurError, match="tau.*isn't above 0"):
        Choice(4, (2, 4), tau=0.0).draw()
    for counts in ((4,), (2, 3), (0, 4), (4, 2), (2, 2, 4)):
        with pytest.raises(SecateurError, match="for 4 units"):
            Choice(4, counts)
    model = DigitsResNet()
    x = torch.randn(2, 1, 8, 8)
    _, gated = placed(model, x)
    with pytest.raises(SecateurError, match="norm of its own"):
        gated.fold()
    gated.choices()["stage1.1:channels"].logits.data[2] = math.nan
    for mode in (True, False):
        with pytest.raises(SecateurError, match="stage1.1:channels.*isn't finite"):
            gated.train(mode)(x)
    single = SimpleNamespace(name="stage:layers", kind="layers", size=1)
    with pytest.raises(SecateurError, match="stage:layers.*too narrow for a choice"):
        choice_of(single)
    apart = Apart().eval()
    graph = trace(apart, x)
    with pytest.raises(SecateurError, match="stands between its blocks"):
        place(apart, graph, choice_of, kinds=("layers",)).train()(x)


def test_a_stream_that_norms_mix_has_no_widths():
    model, inputs = architectures.build("hf:vit")
    graph = trace(model, inputs)
    streams = graph.prunable("hidden")
    assert streams
    with pytest.raises(SecateurError, match="none of its widths stands alone"):
        place(model, graph, lambda g: Choice(g.size, width_choices(g.size)), groups=streams)
