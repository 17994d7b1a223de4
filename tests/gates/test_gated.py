"""Gates on traced networks: closed is masked, open is the network itself, and what they are expected to cost."""

import copy
import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

from secateur import SecateurError
from secateur.gates import ExpectedCost, Gaussian, HardConcrete, Reading, StraightThrough, place, points_of
from secateur.graph import trace
from secateur.surgery import cut_units, mask_units

PATH = Path(__file__).parents[2] / "benchmarks" / "architectures.py"
SPEC = importlib.util.spec_from_file_location("architectures", PATH)
architectures = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(architectures)

HF = [
    "albert",
    "bert",
    "bloom",
    "clip",
    "convnext",
    "deberta-v2",
    "falcon",
    "gemma2",
    "gpt2",
    "llama",
    "mamba2",
    "mixtral",
]
HF += ["opt", "qwen3", "swin", "t5", "vit", "wav2vec2", "whisper"]
TIMM = ["resnet18", "mobilenetv3_small_050", "regnetx_002", "ghostnet_100"]


@pytest.mark.parametrize("name", [*(f"hf:{n}" for n in HF), *(f"timm:{n}" for n in TIMM)])
def test_closed_gates_are_masked_units_and_cost_what_is_counted(name):
    model, inputs = architectures.build(name)
    graph = trace(model, inputs)
    keep = architectures.halved(graph)
    gated = place(model, graph, lambda group: StraightThrough(group.size)).eval()
    outputs = architectures.outputs
    assert all(torch.equal(a, b) for a, b in zip(outputs(model, inputs), outputs(gated, inputs), strict=True))
    for group in set(keep) - set(gated.points):
        assert graph[group].kind == "experts" and "router" in gated.frozen[group]
    for group in set(keep) & set(gated.points):
        gated.fixed[group] = torch.zeros(graph[group].size).index_fill(0, keep[group], 1)
    masked = copy.deepcopy(model)
    mask_units(masked, graph, {group: keep[group] for group in gated.fixed})
    for a, b in zip(outputs(gated, inputs), outputs(masked, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)

    cost = ExpectedCost(graph)
    corner = {group: torch.zeros(graph[group].size).index_fill(0, keep[group], 1) for group in keep}
    assert cost.params(corner).item() == pytest.approx(graph.params(keep), rel=1e-6)
    assert cost.macs(corner).item() == pytest.approx(graph.macs(keep), rel=1e-6)
    assert cost.params({}).item() == graph.params() and cost.macs({}).item() == graph.macs()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        return self.head(torch.relu(self.bn2(self.conv2(x))).mean((2, 3)))


class Blocks(nn.Module):
    """A stem and three residual blocks of one width."""

    def __init__(self, width=8, blocks=3):
        super().__init__()
        self.stem = nn.Linear(4, width)
        self.blocks = nn.ModuleList(Residual(width) for _ in range(blocks))
        self.head = nn.Linear(width, 2)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


@pytest.fixture
def net():
    torch.manual_seed(0)
    model = Net().eval()
    for bn in (model.bn1, model.bn2):
        nn.init.normal_(bn.bias)
        bn.running_mean.normal_()
    return model, torch.randn(5, 3, 6, 6)


def test_a_gate_stands_behind_the_norm_before_the_non_linearity(net):
    """Computed by hand: conv, norm, times gate, relu."""
    model, x = net
    graph = trace(model, x)
    gated = place(model, graph, lambda group: StraightThrough(group.size), kinds=("channels",)).eval()
    gate = torch.tensor([0.5, 0.0, 1.0, 2.0])
    gated.fixed["conv1:channels"] = gate
    assert gated.points["conv1:channels"].place == "norms"
    inner = torch.relu(model.bn1(model.conv1(x)) * gate[:, None, None])
    expected = model.head(torch.relu(model.bn2(model.conv2(inner))).mean((2, 3)))
    torch.testing.assert_close(gated(x), expected)


def test_expected_cost_is_the_product_of_expected_sizes(net):
    """3x3 convolutions 3 -> E1 -> E2 on 6x6 places, then E2 x 2."""
    model, x = net
    graph = trace(model, x[:1])
    cost = ExpectedCost(graph)
    p1, p2 = torch.tensor([0.1, 0.2, 0.3, 0.4], requires_grad=True), torch.full((6,), 0.5)
    keep = {"conv1:channels": p1, "conv2:channels": p2}
    macs = cost.macs(keep)
    assert macs.item() == pytest.approx(36 * 9 * 3 * 1.0 + 36 * 9 * 1.0 * 3.0 + 3.0 * 2)
    assert cost.params(keep).item() == pytest.approx(
        (27 + 1 + 2) * 1.0 + 9 * 1.0 * 3.0 + (1 + 2) * 3.0 + 3.0 * 2 + 2
    )
    macs.backward()
    assert p1.grad.tolist() == pytest.approx([36 * 9 * (3 + 3.0)] * 4)


def test_a_blocks_parts_cost_as_often_as_it_stays():
    model = Blocks()
    x = torch.randn(1, 4)
    graph = trace(model, x)
    cost = ExpectedCost(graph)
    inner = {g.name: torch.full((g.size,), 0.5) for g in graph.prunable("neurons")}
    layers = {"blocks:layers": torch.tensor([1.0, 0.5, 0.25])}
    assert cost.macs(inner | layers).item() == pytest.approx(4 * 8 + 2 * 8 * 8 * 1.75 + 8 * 2)


def test_folded_gates_compute_the_same_without_gates(net):
    model, x = net
    graph = trace(model, x)
    gated = place(model, graph, lambda group: Gaussian(group.size), kinds=("channels",)).eval()
    for law in gated.by_group().values():
        law.mu.data = torch.linspace(-0.5, 1.5, law.units)
        law.log_variance.data = torch.where(torch.arange(law.units) == 1, 9.0, -9.0)
    expected, keep = gated(x), gated.open()
    assert [len(units) for units in keep.values()] == [3, 5]
    gated.fold()
    torch.testing.assert_close(model(x), expected)
    cut_units(model, graph, keep)
    torch.testing.assert_close(model(x), expected)


def test_hard_gates_close_in_training_too_and_give_gradients(net):
    model, x = net
    gated = place(
        model, trace(model, x), lambda group: HardConcrete(group.size, start=0.0), kinds=("channels",)
    )
    gated.train()
    torch.manual_seed(1)
    gated(x).sum().backward()
    grads = [law.logits.grad for law in gated.by_group().values()]
    assert all(grad.abs().sum() > 0 for grad in grads)
    assert {name for name, p in model.named_parameters() if p.grad is None} == set()


def test_a_closed_straight_through_gate_can_open(net):
    """The gradient of a closed gate before the consumer is that of its column times what it would have let in."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Sigmoid(), nn.Linear(4, 1))
    x = torch.randn(7, 3)
    law = StraightThrough(4, gradient="identity", start=[1.0, -1.0, 1.0, 1.0])
    gated = place(model, trace(model, x), lambda group: law, kinds=("neurons",)).train()
    gated(x).sum().backward()
    by_hand = (torch.sigmoid(model[0](x)) * model[2].weight).sum(0)
    assert law.logits.grad.tolist() == pytest.approx(by_hand.tolist(), rel=1e-5)


# ------------------------------------------------------------------ gates that read the input


def centre(net, x):
    """Answers that differ by sample: about half open."""
    net[-1].weight.normal_()
    net[-1].bias.copy_(net[-1].bias - net(x).mean(0))


def test_each_sample_skips_blocks_of_its_own():
    torch.manual_seed(0)
    model, x = Blocks().eval(), torch.randn(6, 4)
    graph = trace(model, x)
    gated = place(model, graph, lambda g: Reading(g.size, blocks=True), kinds=("layers",), inputs=x).eval()
    assert torch.equal(gated(x), model(x))  # all open
    law = gated.by_group()["blocks:layers"]
    with torch.no_grad():
        centre(law.nets[1], model.blocks[0](model.stem(x)))
    out, answers = gated(x), law.answers()
    assert 0 < answers[:, 1].sum() < 6 and answers[:, [0, 2]].all()
    whole, skipped = model(x), copy.deepcopy(model)
    mask_units(skipped, graph, {"blocks:layers": torch.tensor([0, 2])})
    expected = torch.where(answers[:, 1:2] > 0, whole, skipped(x))
    torch.testing.assert_close(out, expected)
    assert law.keep().tolist() == answers.mean(0).tolist()


def test_each_sample_closes_channels_of_its_own(net):
    model, x = net
    graph = trace(model, x)
    gated = place(model, graph, lambda g: Reading(g.size), groups=[graph["conv1:channels"]], inputs=x).eval()
    assert torch.equal(gated(x), model(x))
    law = gated.by_group()["conv1:channels"]
    with torch.no_grad():
        centre(law.nets[0], x.mean((2, 3)))
    out, gates = gated(x), law.answers()
    assert 0 < gates.sum() < gates.numel()
    inner = torch.relu(model.bn1(model.conv1(x)) * gates[:, :, None, None])
    torch.testing.assert_close(out, model.head(torch.relu(model.bn2(model.conv2(inner))).mean((2, 3))))
    gates.sum().backward()
    assert law.nets[0][-1].bias.grad.abs().sum() > 0


# ------------------------------------------------------------------ refusals


def test_a_group_without_a_gate_point_is_frozen_with_its_reason():
    model, inputs = architectures.build("hf:mixtral")
    graph = trace(model, inputs)
    found = points_of(model, graph, graph["model.layers.0.mlp:experts"])
    assert isinstance(found, str) and "router" in found
    with pytest.raises(SecateurError, match="no group gets a gate.*router"):
        place(model, graph, lambda group: StraightThrough(group.size), kinds=("experts",))


def test_refusals_name_the_gate(net):
    model, x = net
    graph = trace(model, x)
    with pytest.raises(SecateurError, match="a law of 3 gates for 4 units"):
        place(model, graph, lambda group: StraightThrough(3), kinds=("channels",))
    with pytest.raises(SecateurError, match="example"):
        place(model, graph, lambda group: Reading(group.size), kinds=("channels",))
    gated = place(model, graph, lambda group: HardConcrete(group.size), kinds=("channels",)).train()
    gated.laws[1].logits.data[2] = torch.nan
    with pytest.raises(SecateurError, match=r"isn't finite.*conv2:channels|conv2:channels.*isn't finite"):
        gated(x)
    gated.laws[1].logits.data.fill_(-9)
    with pytest.raises(SecateurError, match="all its gates are closed"):
        gated.open()


def test_each_sample_closes_neurons_of_its_own():
    """Without a norm the gate stands before the consumer."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 6), nn.Sigmoid(), nn.Linear(6, 2)), torch.randn(9, 3)
    gated = place(model, trace(model, x), lambda g: Reading(g.size), kinds=("neurons",), inputs=x).eval()
    assert torch.equal(gated(x), model(x))
    (law,) = gated.laws
    with torch.no_grad():
        centre(law.nets[0], x)
    out, gates = gated(x), law.answers()
    assert 0 < gates.sum() < gates.numel()
    torch.testing.assert_close(out, model[2](torch.sigmoid(model[0](x)) * gates))


def test_a_stream_has_no_gate_that_reads_the_input():
    model, inputs = architectures.build("hf:llama")
    graph = trace(model, inputs)
    with pytest.raises(SecateurError, match="a stream"):
        place(model, graph, lambda g: Reading(g.size), kinds=("hidden",), inputs=inputs)


class Stream(nn.Module):
    """Two producers of one stream that a norm mixes, and a vector that is added to it."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 4)
        self.place, self.norm, self.last = nn.Parameter(torch.randn(4)), nn.LayerNorm(4), nn.Linear(4, 2)

    def forward(self, x):
        x = self.a(x) + self.place
        return self.last(self.norm(x + torch.relu(self.b(x))))


def test_a_stream_is_multiplied_where_it_is_made():
    """Rows and biases of the producers and what is added; the norm and the readers see only what is closed."""
    model, x = Stream(), torch.randn(2, 3)
    graph = trace(model, x)
    (stream,) = (g for g in graph.groups if {"place", "norm.weight"} <= {s.name for s in g.slices})
    found = points_of(model, graph, stream)
    assert found.place == "producers"
    names = {(s.name, s.dim) for s in found.soft}
    assert names == {("a.weight", 0), ("a.bias", 0), ("b.weight", 0), ("b.bias", 0), ("place", 0)}
    assert {(s.name, s.dim) for s in found.closed} == {
        ("norm.weight", 0),
        ("norm.bias", 0),
        ("b.weight", 1),
        ("last.weight", 1),
    }
