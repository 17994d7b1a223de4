"""`nn.MultiheadAttention` and what is built of it: cut models against smaller ones that PyTorch's constructors make."""

import copy

import pytest
import torch
from torch import nn

import secateur
from secateur.graph import trace
from secateur.surgery import cut_units, mask_units, prove

X = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(1))


class Encoder(nn.Module):
    def __init__(self, width=32, heads=4, hidden=48, norm_first=False):
        super().__init__()
        self.embed = nn.Linear(5, width)
        layer = nn.TransformerEncoderLayer(
            width, heads, hidden, batch_first=True, activation="gelu", norm_first=norm_first
        )
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, 3)

    def forward(self, x, padding=None):
        return self.head(self.encoder(self.embed(x), src_key_padding_mask=padding))


class Attention(nn.Module):
    """A residual attention without norms, so that a cut equals a mask to rounding."""

    def __init__(self, average=True, **options):
        super().__init__()
        self.embed, self.head = nn.Linear(5, 12), nn.Linear(12, 3)
        self.attention = nn.MultiheadAttention(12, 3, batch_first=True, **options)
        self.average = average

    def forward(self, x):
        x = self.embed(x)
        out, weights = self.attention(x, x, x, average_attn_weights=self.average)
        return self.head(x + out), weights.flatten(1).sum(1)


def randomised(model):
    torch.manual_seed(0)
    for p in model.parameters():
        p.data.normal_(0, 0.3)
    return model.eval()


def halves(graph, *kinds):
    return {g.name: torch.arange(0, g.size, 2) for g in graph.prunable(kinds or None) if g.kind != "layers"}


@pytest.mark.parametrize("norm_first", [False, True])
def test_an_encoder_of_half_the_heads_is_the_one_that_pytorch_builds(norm_first):
    model = randomised(Encoder(norm_first=norm_first))
    graph = trace(model, X)
    # 14 tokens: four square projections, two products of attention, two of the feed-forward, embedding and head
    layer = 14 * 4 * 32 * 32 + 2 * 14 * 7 * 32 + 14 * 2 * 32 * 48
    assert graph.macs() == 2 * layer + 14 * 5 * 32 + 14 * 32 * 3
    (stream,) = graph.prunable("hidden")
    assert stream.size == 4 and [g.size for g in graph.prunable("neurons")] == [48, 48]
    keep = halves(graph)
    half = 14 * 4 * 16 * 16 + 2 * 14 * 7 * 16 + 14 * 2 * 16 * 24
    assert graph.macs(keep) == 2 * half + 14 * 5 * 16 + 14 * 16 * 3
    assert prove(model, graph, keep, X) == {}
    cut = copy.deepcopy(model)
    cut_units(cut, graph, keep)

    small = Encoder(16, 2, 24, norm_first).eval()
    channels, neurons = torch.cat([torch.arange(8), torch.arange(16, 24)]), torch.arange(0, 48, 2)
    state = model.state_dict()
    for name, value in state.items():
        if name.startswith("head"):
            state[name] = value[:, channels] if value.dim() == 2 else value
        elif "in_proj" in name:
            value = value.unflatten(0, (3, 32))[:, channels].flatten(0, 1)
            state[name] = value[:, channels] if value.dim() == 2 else value
        elif "linear1" in name:
            state[name] = value[neurons][:, channels] if value.dim() == 2 else value[neurons]
        elif "linear2.weight" in name:
            state[name] = value[channels][:, neurons]
        elif name == "embed.weight" or value.dim() == 1:
            state[name] = value[channels]
        else:
            state[name] = value[channels][:, channels]
    small.load_state_dict(state)
    padding = torch.zeros(2, 7, dtype=torch.bool)
    padding[1, 4:] = True
    for mask in (None, padding):
        with torch.no_grad():  # PyTorch's fused path
            assert torch.equal(cut(X, mask), small(X, mask))
        torch.testing.assert_close(cut(X, mask), small(X, mask), rtol=0, atol=0)
    for a, b in zip(cut.modules(), small.modules(), strict=True):
        if isinstance(a, nn.MultiheadAttention):
            names = ("embed_dim", "num_heads", "head_dim", "kdim", "vdim")
            assert [getattr(a, n) for n in names] == [getattr(b, n) for n in names]


@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize("options", [{}, {"average": False}, {"bias": False}, {"add_bias_kv": True}, {"add_zero_attn": True}], ids=str)  # fmt: skip
def test_cut_heads_equal_masked_ones(options, inner):
    model = randomised(Attention(**options))
    model.attention.bias_k is None or model.attention.bias_k.data.normal_()
    forward = model.forward
    model.forward = lambda x: forward(x)[0]
    graph = trace(model, X, inner=inner)
    (stream,) = graph.prunable("hidden")
    assert stream.size == (4 if inner else 3)
    keep = {stream.name: torch.tensor([0, 2])}
    assert prove(model, graph, keep, X) == {}
    assert graph.rule_errors == []
    cut, masked = copy.deepcopy(model), copy.deepcopy(model)
    cut_units(cut, graph, keep)
    mask_units(masked, graph, keep)
    del cut.forward, masked.forward
    # narrower heads divide by another root: their queries make up for it
    torch.testing.assert_close(cut(X)[0], masked(X)[0], rtol=0, atol=1e-6)
    sizes = (6, 3, 2) if inner else (8, 2, 4)
    assert (cut.attention.embed_dim, cut.attention.num_heads, cut.attention.head_dim) == sizes


class Detector(nn.Module):
    """As DETR: a convolutional stem, an encoder, learned queries, a decoder that reads both."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 4, stride=4)
        self.transformer = nn.Transformer(16, 4, 2, 2, 24, batch_first=True)
        self.queries, self.places = nn.Parameter(torch.randn(5, 16)), nn.Parameter(torch.randn(16, 16))
        self.box, self.kind = nn.Linear(16, 4), nn.Linear(16, 3)

    def forward(self, x):
        tokens = self.stem(x).flatten(2).transpose(1, 2) + self.places
        found = self.transformer(tokens, self.queries.expand(len(x), -1, -1))
        return self.box(found).sigmoid(), self.kind(found)


def test_a_detector_with_cross_attention():
    model, x = randomised(Detector()), torch.randn(2, 3, 16, 16)
    pruned = secateur.prune(model, x, method="group-magnitude", target="params<=60%")
    assert pruned.report["met"] and pruned.plan.kinds
    assert sum(p.numel() for p in pruned.model.parameters()) <= 0.6 * sum(
        p.numel() for p in model.parameters()
    )
    keep = halves(pruned.graph)
    assert {pruned.graph[name].kind for name in keep} == {"hidden", "neurons"}
    assert prove(model, pruned.graph, keep, x) == {}
    pruned.model.train()(x)[0].sum().backward()


def test_a_vision_transformer_of_torchvision_meets_its_target():
    vit = pytest.importorskip("torchvision.models.vision_transformer")
    model = vit.VisionTransformer(16, 4, 2, 4, 32, 64, num_classes=5)
    model, x = randomised(model), torch.randn(2, 3, 16, 16)
    pruned = secateur.prune(model, x, method="group-magnitude", target="params<=50%")
    assert pruned.report["met"] and not pruned.report["notes"]
    kept = sum(p.numel() for p in pruned.model.parameters())
    assert kept <= 0.5 * sum(p.numel() for p in model.parameters())
    neurons = [g for g in pruned.report["groups"] if g["kind"] == "neurons" and "mlp" in g["name"]]
    assert all(g["kept"] > 20 for g in neurons)  # the heads gave, too


def test_heads_on_a_stream_that_cannot_shrink_are_refused_before_the_cut():
    model = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True).eval()
    x = torch.randn(2, 7, 16)
    graph = trace(model, x)
    assert [g.kind for g in graph.prunable()] == ["neurons"]
    reasons = {g.reason for g in graph.groups if g.kind == "heads"}
    assert any("its heads fill the width of its queries, which is fixed" in why for why in reasons)
    assert prove(model, graph, halves(graph), x) == {}


def test_keys_and_values_of_other_widths():
    class Cross(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v = nn.Linear(5, 12), nn.Linear(5, 8), nn.Linear(5, 6)
            self.attention = nn.MultiheadAttention(12, 3, kdim=8, vdim=6, batch_first=True)
            self.head = nn.Linear(12, 3)

        def forward(self, x):
            return self.head(self.attention(self.q(x), self.k(x), self.v(x))[0])

    model = randomised(Cross())
    graph = trace(model, X)
    keep = halves(graph)
    assert sorted(graph[name].size for name in keep) == [
        3,
        6,
        8,
        12,
    ]  # heads; values, keys; what the head reads
    assert prove(model, graph, keep, X) == {}
    cut_units(model, graph, keep)
    a = model.attention
    assert (a.embed_dim, a.num_heads, a.head_dim, a.kdim, a.vdim) == (8, 2, 4, 4, 3)
    assert model(X).shape == (2, 7, 3)
