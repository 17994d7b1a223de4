"""Sizes written in a model's code: which attributes change, and which axes become one because the code says so."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from secateur.graph import trace
from secateur.graph.sizes import Attribute, Size, evaluate, expression
from secateur.surgery import cut_units, prove

X = torch.randn(2, 5, 12)


def test_a_size_remembers_how_it_was_computed():
    heads, width = Size(3, Attribute("m", "heads")), Size(12, Attribute("m", "width"))
    assert isinstance(width // heads, int) and width // heads == 4 and 2 * heads + 1 == 7 and -heads == -3
    new = {"heads": 2, "width": 8}
    assert evaluate(expression(width // heads + 1), lambda leaf: new[leaf.name]) == 5
    assert evaluate(expression(24 // heads), lambda leaf: new[leaf.name]) == 12
    assert type(copy.deepcopy(heads)) is int and type(heads**-0.5) is float


class Attention(nn.Module):
    """Fused attention whose last reshape is written in one of several ways."""

    def __init__(self, style):
        super().__init__()
        self.style, self.num_heads, self.head_dim = style, 3, 4
        self.inner = 12
        self.embed, self.head = nn.Linear(12, 12), nn.Linear(12, 5)
        self.qkv, self.proj = nn.Linear(12, 36), nn.Linear(12, 12)

    def forward(self, x):
        x = self.embed(x)
        b, n, c = x.shape
        width = c // self.num_heads if self.style == "divided" else self.head_dim
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, width).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        last = {"attribute": self.inner, "free": -1, "channels": c, "divided": -1}[self.style]
        return self.head(x + self.proj(y.reshape(b, n, last)))


@pytest.mark.parametrize("style", ["attribute", "free"])
def test_heads_leave_alone_when_attributes_hold_the_sizes(style):
    model = Attention(style)
    graph = trace(model, X)
    assert {g.kind: g.size for g in graph.prunable()} == {"heads": 3, "hidden": 12}
    keep = {g.name: torch.tensor([0, 2]) for g in graph.prunable("heads")}
    assert prove(model, graph, keep, X) == {}
    changes = cut_units(model, graph, keep)
    assert model.num_heads == 2 and model.head_dim == 4
    assert model.inner == (8 if style == "attribute" else 12)
    assert changes.attributes[""].get("num_heads") == 2
    assert model(X).shape == (2, 5, 5)


@pytest.mark.parametrize("style", ["channels", "divided"])
def test_heads_and_channels_leave_together_when_one_size_serves_both(style):
    model = Attention(style)
    graph = trace(model, X)
    (group,) = graph.prunable()
    counts = {(s.name, s.dim): s.index.shape[1] for s in group.slices}
    assert group.kind == "hidden" and group.size == 3
    assert counts["embed.weight", 0] == 4 and counts["qkv.weight", 0] == 12 and counts["proj.weight", 1] == 4
    assert prove(model, graph, {group.name: torch.tensor([1, 2])}, X) == {}


class Gated(nn.Module):
    """Two gates picked by constant places from one layer's output."""

    def __init__(self):
        super().__init__()
        self.f, self.h = nn.Linear(12, 8 + 2), nn.Linear(8, 5)

    def forward(self, x):
        y, gates = torch.split(self.f(x), [8, 2], -1)
        return self.h(y * gates[..., 0:1] + y.tanh() * gates[..., 1:2])


def test_single_gates_are_not_units():
    graph = trace(Gated(), X)
    assert not any(g.size == 2 for g in graph.prunable())
    assert [
        "cut at constant places" in g.reason
        for g in graph.groups
        if g.slices[0].name == "f.weight" and g.size < 12
    ] == [True, True]


class Standardised(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(12, 8), nn.Linear(8, 6), nn.Linear(6, 5)

    def forward(self, x):
        w = self.b.weight
        w = F.batch_norm(w.reshape(1, w.shape[0], -1), None, None, training=True).reshape(w.shape)
        return self.c(F.linear(self.a(x), w))


def test_weight_standardisation_mixes_its_inputs_but_not_its_outputs():
    model = Standardised()
    graph = trace(model, X)
    assert {g.size: g.exact for g in graph.prunable()} == {8: False, 6: True}
    assert prove(model, graph, {g.name: torch.arange(3) for g in graph.prunable()}, X) == {}


def test_einsum():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.w, self.h = nn.Linear(12, 8), nn.Parameter(torch.randn(6, 8)), nn.Linear(6, 5)

        def forward(self, x):
            return self.h(torch.einsum("bnc,dc->bnd", self.a(x), self.w))

    model = Net()
    graph = trace(model, X)
    assert sorted(
        (g.size, sorted((s.name, s.dim, s.role) for s in g.slices if s.name == "w")) for g in graph.prunable()
    ) == [(6, [("w", 0, "out")]), (8, [("w", 1, "in")])]
    assert prove(model, graph, {g.name: torch.arange(3) for g in graph.prunable()}, X) == {}


def test_whole_groups_of_a_convolution_leave_where_heads_share_its_channels():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.grouped, self.heads = (
                nn.Conv2d(3, 12, 1),
                nn.Conv2d(12, 12, 3, padding=1, groups=3),
                3,
            )
            self.q, self.o, self.head = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 5)

        def forward(self, x):
            x = self.stem(x)
            x = (x + self.grouped(x)).flatten(2).transpose(1, 2)
            b, n, c = x.shape
            q = self.q(x).view(b, n, self.heads, -1).transpose(1, 2)
            y = F.scaled_dot_product_attention(q, q, q).transpose(1, 2).reshape(b, n, c)
            return self.head(x + self.o(y))

    model, x = Net(), torch.randn(2, 3, 4, 4)
    graph = trace(model, x)
    (group,) = graph.prunable()
    assert group.size == 3
    keep = {group.name: torch.tensor([0, 2])}
    assert prove(model, graph, keep, x) == {}
    cut_units(model, graph, keep)
    assert (model.grouped.groups, model.grouped.in_channels, model.grouped.weight.shape[1]) == (2, 8, 4)


def test_integers_are_plain_again_after_a_trace():
    model = Attention("attribute")
    trace(model, X)
    assert type(model.num_heads) is int and type(model.qkv.out_features) is int


class Asserted(nn.Module):
    """Code that looks at its sizes before it runs."""

    def __init__(self, how):
        super().__init__()
        self.how, self.channels, self.half = how, 8, 4
        self.a, self.b = nn.Linear(12, 8), nn.Linear(8, 5)

    def forward(self, x):
        y = self.a(x)
        if self.how == "assert":
            assert y.shape[-1] == self.channels
        elif self.how == "raise" and self.channels != y.size(2):
            raise ValueError("channels")
        elif self.how == "half":
            assert y.shape[-1] == 2 * self.half
        elif self.how == "tuple":
            assert y.shape[2:] == (self.channels,)
        return self.b(y.relu())


@pytest.mark.parametrize("how", ["assert", "raise", "half", "tuple"])
def test_a_size_that_the_code_compares_follows(how):
    model = Asserted(how)
    graph = trace(model, X)
    (group,) = graph.prunable()
    keep = {group.name: torch.tensor([0, 1, 5, 6])}
    assert prove(model, graph, keep, X) == {}
    cut_units(model, graph, keep)
    assert (model.channels, model.half) == ((8, 2) if how == "half" else (4, 4))
    assert model(X).shape == (2, 5, 5)


def test_nothing_is_noted_of_comparisons_after_a_trace():
    trace(Asserted("assert"), X)
    assert Size.compared is None


@pytest.mark.parametrize("grown", ["repeat", "expand", "attribute"])
def test_rows_gathered_by_numbers_that_all_channels_share(grown):
    """The best rows are taken from a tensor of channels, with an index made as wide as the channels."""

    class Best(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.score, self.b, self.width = nn.Linear(12, 8), nn.Linear(12, 1), nn.Linear(8, 5), 8

        def forward(self, x):
            y, best = self.a(x), self.score(x).topk(2, dim=1)[1]
            wide = {
                "repeat": lambda: best.repeat(1, 1, y.shape[-1]),
                "expand": lambda: best.expand(-1, -1, y.shape[-1]),
                "attribute": lambda: best.repeat(1, 1, self.width),
            }[grown]()
            return self.b(y.gather(1, wide))

    model = Best()
    graph = trace(model, X)
    (group,) = graph.prunable()
    keep = {group.name: torch.tensor([0, 1, 5])}
    assert group.size == 8 and prove(model, graph, keep, X) == {}
    cut_units(model, graph, keep)
    assert model(X).shape == (2, 2, 5)
