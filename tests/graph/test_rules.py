"""One small module per rule: the coupled sets counted by hand (Spec: spa, worked examples), and slice against mask."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from secateur.errors import SecateurError
from secateur.graph import trace
from secateur.surgery import cut_units, mask_units, prove


def found(graph):
    """{(units, {tensor.dim: count})} of the prunable groups."""
    return sorted(
        (
            (
                g.size,
                {
                    f"{s.name.replace('weight', 'w').replace('bias', 'b')}.{s.dim}": s.index.shape[1]
                    for s in g.slices
                },
            )
            for g in graph.prunable()
            if g.kind != "layers"
        ),
        key=str,
    )


def expect(graph, *groups):
    assert found(graph) == sorted(groups, key=str)


def randomised(model):
    torch.manual_seed(0)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point():
            tensor.data.uniform_(0.5, 1.5) if "running" in name else tensor.data.normal_(0, 0.3)
    return model.eval()


class Chain(nn.Module):
    """Producer, operation, consumer."""

    def __init__(self, *layers, **named):
        super().__init__()
        self.order = list(layers)
        for name, layer in named.items():
            setattr(self, name, layer)

    def forward(self, x):
        for step in self.order:
            x = getattr(self, step)(x) if isinstance(step, str) else step(x)
        return x


def conv(a, b, k=1, **kw):
    return nn.Conv2d(a, b, k, **kw)


class SpecNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.c1, self.b1 = conv(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.c2 = conv(8, 8, 3, padding=1, groups=2, bias=False)
        self.c3, self.dw = conv(8, 8), conv(8, 8, 3, padding=1, groups=8)
        self.c4, self.fc = conv(16, 6), nn.Linear(24, 5)

    def forward(self, x):
        x = F.relu(self.b1(self.c1(x)))
        y = self.c3(F.relu(self.c2(x)))
        x = x + y
        x = F.relu(self.c4(torch.cat([self.dw(x), y], 1)))
        return self.fc(F.adaptive_avg_pool2d(x, 2).flatten(1))


def test_a_residual_grouped_depthwise_and_joined_convolutions():
    model = randomised(SpecNet())
    x = torch.randn(2, 3, 8, 8)
    graph = trace(model, x)
    expect(
        graph,
        (4, {"c1.w.0": 2, "c1.b.0": 2, "b1.w.0": 2, "b1.b.0": 2, "b1.running_mean.0": 2, "b1.running_var.0": 2,
             "c2.w.1": 1, "c3.w.0": 2, "c3.b.0": 2, "dw.w.0": 2, "dw.b.0": 2, "c4.w.1": 4}),
        (4, {"c2.w.0": 2, "c3.w.1": 2}),
        (6, {"c4.w.0": 1, "c4.b.0": 1, "fc.w.1": 4}),
    )  # fmt: skip
    assert graph.params() == 907
    by_size = {len(g.slices): g for g in graph.prunable()}
    keep = {by_size[12].name: torch.tensor([0, 1, 3]), by_size[2].name: torch.tensor([1, 2, 3]),
            by_size[3].name: torch.tensor([0, 2, 3, 5])}  # fmt: skip
    assert graph.params(keep) == 581
    assert prove(model, graph, keep, x) == {}
    cut, masked = copy.deepcopy(model), copy.deepcopy(model)
    cut_units(cut, graph, keep)
    mask_units(masked, graph, keep)
    assert sum(p.numel() for p in cut.parameters()) == 581
    torch.testing.assert_close(cut(x), masked(x), rtol=0, atol=1e-6)
    assert (cut.c1.out_channels, cut.b1.num_features, cut.dw.groups, cut.c2.groups) == (6, 6, 6, 2)
    assert (cut.c4.in_channels, cut.c4.out_channels, cut.fc.in_features) == (12, 4, 16)


class Decoder(nn.Module):
    """h=16, 4 query heads on 2 key-value heads of width 4, FFN 24, every way to share keys and values."""

    def __init__(self, share="expand", fused=False, rope=False, qk_norm=False):
        super().__init__()
        self.share, self.rope = share, rope
        self.heads, self.kv, self.d = 4, 2, 4
        self.embed, self.head = nn.Embedding(32, 16), nn.Linear(16, 32, bias=False)
        self.n1, self.n2, self.n3 = nn.RMSNorm(16), nn.RMSNorm(16), nn.RMSNorm(16)
        for name, a, b in (("q", 16, 16), ("k", 16, 8), ("v", 16, 8), ("o", 16, 16), ("down", 24, 16)):
            setattr(self, name, nn.Linear(a, b, bias=False))
        if fused:
            self.gu = nn.Linear(16, 48, bias=False)
        else:
            self.gate, self.up = nn.Linear(16, 24, bias=False), nn.Linear(16, 24, bias=False)
        self.qn, self.kn = (nn.RMSNorm(4), nn.RMSNorm(4)) if qk_norm else (nn.Identity(), nn.Identity())
        self.fused = fused

    def rotate(self, x):
        if not self.rope:
            return x
        angle = torch.arange(x.shape[-2])[:, None] * torch.tensor([1.0, 0.1]).repeat(2)
        half = x.shape[-1] // 2
        return x * angle.cos() + torch.cat([-x[..., half:], x[..., :half]], -1) * angle.sin()

    def forward(self, ids):
        x = self.embed(ids)
        b, n, _ = x.shape
        y = self.n1(x)
        q = self.rotate(self.qn(self.q(y).view(b, n, -1, self.d)).transpose(1, 2))
        k = self.rotate(self.kn(self.k(y).view(b, n, -1, self.d)).transpose(1, 2))
        v = self.v(y).view(b, n, -1, self.d).transpose(1, 2)
        if self.share == "enable_gqa":
            z = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        else:
            if self.share == "expand":
                k, v = (
                    t[:, :, None].expand(b, t.shape[1], 2, n, self.d).reshape(b, 2 * t.shape[1], n, self.d)
                    for t in (k, v)
                )
            else:
                k, v = (t.repeat_interleave(2, 1) for t in (k, v))
            z = torch.matmul(torch.matmul(q, k.transpose(2, 3)).div(2).softmax(-1), v)
        x = x + self.o(z.transpose(1, 2).reshape(b, n, -1))
        y = self.n2(x)
        if self.fused:
            a, u = self.gu(y).chunk(2, -1)
        else:
            a, u = self.gate(y), self.up(y)
        return self.head(self.n3(x + self.down(F.silu(a) * u)))


@pytest.mark.parametrize("share", ["expand", "repeat_interleave", "enable_gqa"])
@pytest.mark.parametrize("options", [{}, {"rope": True}, {"qk_norm": True}, {"fused": True}], ids=str)
def test_b_decoder(share, options):
    model = randomised(Decoder(share, **options))
    ids = torch.arange(12).reshape(2, 6)
    graph = trace(model, ids)
    ffn = (
        {"gu.w.0": 2, "down.w.1": 1} if options.get("fused") else {"gate.w.0": 1, "up.w.0": 1, "down.w.1": 1}
    )
    into = ["gu"] if options.get("fused") else ["gate", "up"]
    stem = {
        "embed.w.1",
        "n1.w.0",
        "n2.w.0",
        "n3.w.0",
        "q.w.1",
        "k.w.1",
        "v.w.1",
        "o.w.0",
        "down.w.0",
        "head.w.1",
    }
    stem |= {f"{name}.w.1" for name in into}
    expect(
        graph, (2, {"q.w.0": 8, "k.w.0": 4, "v.w.0": 4, "o.w.1": 8}), (24, ffn), (16, dict.fromkeys(stem, 1))
    )
    if options.get("qk_norm"):
        norms = [g for g in graph.groups if any(s.name.startswith(("qn", "kn")) for s in g.slices)]
        assert norms and all(g.reason for g in norms)
    keep = {g.name: torch.arange(1, g.size, 2) for g in graph.prunable(["kv_groups", "neurons"])}
    assert prove(model, graph, keep, ids) == {}
    cut, masked = copy.deepcopy(model), copy.deepcopy(model)
    cut_units(cut, graph, keep)
    mask_units(masked, graph, keep)
    torch.testing.assert_close(cut(ids), masked(ids), rtol=0, atol=1e-6)
    assert cut.o.weight.shape == (16, 8) and cut.down.weight.shape == (16, 12)


def test_b2_bare_encoder_keeps_its_output():
    import transformers

    config = transformers.BertConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=4, intermediate_size=24
    )
    graph = trace(
        transformers.BertModel(config, add_pooling_layer=False), {"input_ids": torch.zeros(2, 6).long()}
    )
    assert {g.kind: g.size for g in graph.prunable()} == {"heads": 4, "neurons": 24}
    assert any(g.size == 16 and "output of the model" in (g.reason or "") for g in graph.groups)


class FusedViT(nn.Module):
    def __init__(self, h=12, heads=3):
        super().__init__()
        self.heads, self.d = heads, h // heads
        self.patch, self.pos = nn.Conv2d(3, h, 4, 4), nn.Parameter(torch.randn(1, 4, h))
        self.norm1, self.norm2, self.qkv = nn.LayerNorm(h), nn.LayerNorm(h), nn.Linear(h, 3 * h)
        self.proj, self.fc1, self.fc2, self.head = (
            nn.Linear(h, h),
            nn.Linear(h, 20),
            nn.Linear(20, h),
            nn.Linear(h, 5),
        )

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2) + self.pos
        b, n, _ = x.shape
        q, k, v = (
            self.qkv(self.norm1(x)).reshape(b, n, 3, self.heads, self.d).permute(2, 0, 3, 1, 4).unbind(0)
        )
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, -1))
        x = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return self.head(x.mean(1))


def test_c_fused_vision_transformer():
    model = randomised(FusedViT())
    x = torch.randn(2, 3, 8, 8)
    graph = trace(model, x)
    heads = next(g for g in graph.prunable("heads"))
    assert heads.size == 3 and {(s.name, s.dim): s.index.shape[1] for s in heads.slices} == {
        ("qkv.weight", 0): 12, ("qkv.bias", 0): 12, ("proj.weight", 1): 4}  # fmt: skip
    assert [g.size for g in graph.prunable("hidden")] == [12] and [
        g.size for g in graph.prunable("neurons")
    ] == [20]
    assert all(s.dim == 2 for g in graph.prunable() for s in g.slices if s.name == "pos")
    keep = {heads.name: torch.tensor([0, 2]), **{g.name: torch.arange(7) for g in graph.prunable("neurons")}}
    assert prove(model, graph, keep, x) == {}
    cut_units(model, graph, keep)
    assert (model.heads, model.d, model.qkv.out_features) == (2, 4, 24)


def test_d_tied_embeddings_freeze_the_vocabulary_for_both_names():
    model = Decoder()
    model.head.weight = model.embed.weight
    graph = trace(randomised(model), torch.arange(12).reshape(2, 6))
    assert graph.aliases == {"head.weight": "embed.weight"}
    assert not any(
        s.dim == 0 and s.name in ("embed.weight", "head.weight") for g in graph.prunable() for s in g.slices
    )
    assert graph.params() == sum(p.numel() for p in model.parameters())


def test_e_channels_under_a_norm_are_marked_inexact():
    graph = trace(randomised(Decoder()), torch.arange(12).reshape(2, 6))
    assert {g.kind: g.exact for g in graph.prunable()} == {
        "kv_groups": True,
        "neurons": True,
        "hidden": False,
    }


X2, X1 = torch.randn(2, 4, 6, 6), torch.randn(2, 5, 8)
RULES = {
    "transposed, two groups": (
        Chain("a", "t", "b", a=conv(4, 8), t=nn.ConvTranspose2d(8, 6, 2, groups=2), b=conv(6, 4)), X2,
        [(4, {"a.w.0": 2, "a.b.0": 2, "t.w.0": 2}), (3, {"t.w.1": 1, "t.b.0": 2, "b.w.1": 2})]),
    "transposed, depthwise 4 to 8": (
        Chain("a", "t", "b", a=conv(4, 4), t=nn.ConvTranspose2d(4, 8, 2, groups=4), b=conv(8, 4)), X2,
        [(4, {"a.w.0": 1, "a.b.0": 1, "t.w.0": 1, "t.b.0": 2, "b.w.1": 2})]),
    "group norm, 2 of 8": (
        Chain("a", "n", "b", a=conv(4, 8), n=nn.GroupNorm(2, 8), b=conv(8, 4)), X2,
        [(4, {"a.w.0": 2, "a.b.0": 2, "n.w.0": 2, "n.b.0": 2, "b.w.1": 2})]),
    "group norm, each channel": (
        Chain("a", "n", "b", a=conv(4, 8), n=nn.GroupNorm(8, 8), b=conv(8, 4)), X2,
        [(8, {"a.w.0": 1, "a.b.0": 1, "n.w.0": 1, "n.b.0": 1, "b.w.1": 1})]),
    "layer norm of two": (
        Chain("a", "n", "b", a=nn.Linear(8, 2), n=nn.LayerNorm(2), b=nn.Linear(2, 4)), X1,
        [(2, {"a.w.0": 1, "a.b.0": 1, "n.w.0": 1, "n.b.0": 1, "b.w.1": 1})]),
    "pixel shuffle": (
        Chain("a", nn.PixelShuffle(2), "b", a=conv(4, 16), b=conv(4, 3)), X2,
        [(4, {"a.w.0": 4, "a.b.0": 4, "b.w.1": 1})]),
    "pixel unshuffle": (
        Chain("a", nn.PixelUnshuffle(2), "b", a=conv(4, 4), b=conv(16, 3)), X2,
        [(4, {"a.w.0": 1, "a.b.0": 1, "b.w.1": 4})]),
    "channel shuffle": (
        Chain("a", lambda x: x.view(2, 2, 4, 6, 6).transpose(1, 2).reshape(2, 8, 6, 6), "c", a=conv(4, 8), c=conv(8, 4)),
        X2, [(4, {"a.w.0": 2, "a.b.0": 2, "c.w.1": 2})]),
    "gated linear unit": (
        Chain("a", nn.GLU(1), "b", a=conv(4, 12), b=conv(6, 4)), X2, [(6, {"a.w.0": 2, "a.b.0": 2, "b.w.1": 1})]),
    "channel shuffle, torch's own": (
        Chain("a", "s", "c", a=conv(4, 8), s=nn.ChannelShuffle(2), c=conv(8, 4)), X2,
        [(4, {"a.w.0": 2, "a.b.0": 2, "c.w.1": 2})]),
    "each channel twice": (
        Chain("a", lambda x: x.repeat_interleave(2, 1), "b", a=conv(4, 3), b=conv(6, 4)), X2,
        [(3, {"a.w.0": 1, "a.b.0": 1, "b.w.1": 2})]),
    "each row twice": (
        Chain("a", lambda x: x.repeat_interleave(2, -2), "b", a=conv(4, 3), b=conv(3, 4)), X2,
        [(3, {"a.w.0": 1, "a.b.0": 1, "b.w.1": 1})]),
    "windows of a picture": (
        Chain("a", lambda x: x.unfold(2, 2, 2).amax(-1), "b", a=conv(4, 8), b=conv(8, 4)), X2,
        [(8, {"a.w.0": 1, "a.b.0": 1, "b.w.1": 1})]),
    "windows of channels": (Chain("a", lambda x: x.unfold(1, 2, 2).sum(-1), "b", a=conv(4, 8), b=conv(4, 4)), X2, []),
    "rows of a picture": (
        Chain("a", lambda x: x.narrow(2, 1, 3), "b", a=conv(4, 8), b=conv(8, 4)), X2,
        [(8, {"a.w.0": 1, "a.b.0": 1, "b.w.1": 1})]),
    "unequal parts at fixed places": (
        Chain("a", lambda x: torch.cat([F.relu(p) for p in x.split([2, 4, 2], 1)], 1), "b", a=conv(4, 8), b=conv(8, 4)), X2, []),
    "every other channel": (Chain("a", lambda x: x[:, ::2] * x[:, 1::2], "b", a=conv(4, 8), b=conv(4, 4)), X2,
        [(4, {"a.w.0": 2, "a.b.0": 2, "b.w.1": 1})]),
    "channels at a fixed place": (Chain("a", lambda x: x.narrow(1, 1, 5), "b", a=conv(4, 8), b=conv(5, 4)), X2, []),
    "median over a picture": (
        Chain("a", lambda x: x.flatten(2).median(2).values, "b", a=conv(4, 8), b=nn.Linear(8, 4)), X2,
        [(8, {"a.w.0": 1, "a.b.0": 1, "b.w.1": 1})]),
    "median over channels": (Chain("a", lambda x: x.median(1, keepdim=True).values + x, "b", a=conv(4, 8), b=conv(8, 4)), X2, []),
    "the smallest of channels": (
        Chain("a", lambda x: x.topk(2, 1, largest=False).values, "b", a=conv(4, 8), b=conv(2, 4)), X2, []),
    "one vector on a matrix": (
        Chain("a", lambda x: x[0, 0], "b", a=nn.Linear(8, 6), b=nn.Linear(6, 3)), X1, [(6, {"a.w.0": 1, "a.b.0": 1, "b.w.1": 1})]),
    "flip": (
        Chain("a", lambda x: x + x.flip(1), "b", a=conv(4, 6), b=conv(6, 4)), X2,
        [(3, {"a.w.0": 2, "a.b.0": 2, "b.w.1": 2})]),
    "roll on channels": (Chain("a", lambda x: x.roll(1, 1), "b", a=conv(4, 8), b=conv(8, 4)), X2, []),
    "sort on channels": (Chain("a", lambda x: x.sort(1)[0], "b", a=conv(4, 8), b=conv(8, 4)), X2, []),
    "added to the input": (Chain(lambda x: x + F.relu(x), "a", a=nn.Linear(8, 8)), X1, []),
    "times a vector of constants": (
        Chain("a", lambda x: x * torch.linspace(1, 2, 6), "b", a=nn.Linear(8, 6), b=nn.Linear(6, 3)), X1, []),
    "plus a column of constants": (
        Chain("a", lambda x: x + torch.linspace(1, 2, 5)[:, None], "b", a=nn.Linear(8, 6), b=nn.Linear(6, 3)), X1,
        [(6, {"a.w.0": 1, "a.b.0": 1, "b.w.1": 1})]),
    "three at once": (
        Chain("a", lambda x: torch.addcmul(x, x.relu(), x.sin()), "b", a=nn.Linear(8, 6), b=nn.Linear(6, 3)), X1,
        [(6, {"a.w.0": 1, "a.b.0": 1, "b.w.1": 1})]),
    "prelu": (
        Chain("a", "p", "b", a=conv(4, 8), p=nn.PReLU(8), b=conv(8, 4)), X2,
        [(8, {"a.w.0": 1, "a.b.0": 1, "p.w.0": 1, "b.w.1": 1})]),
}  # fmt: skip


def test_the_kernel_of_a_channel_shuffle_is_traced_too():
    """It has no derivative, so the proof of a cut refuses it."""
    model = Chain("a", lambda x: torch.native_channel_shuffle(x, 2), "c", a=conv(4, 8), c=conv(8, 4))
    expect(trace(model.eval(), X2), (4, {"a.w.0": 2, "a.b.0": 2, "c.w.1": 2}))


@pytest.mark.parametrize("name", RULES)
def test_e2_rule(name):
    model, x, groups = RULES[name]
    model = randomised(copy.deepcopy(model))
    graph = trace(model, x)
    expect(graph, *groups)
    for g in graph.prunable():
        bad = prove(model, graph, {g.name: torch.arange(0, g.size, 2)}, x)
        assert bad == {} or name == "channel shuffle"


def test_units_under_a_norm_are_inexact_however_few():
    model, x, _ = RULES["layer norm of two"]
    assert [g.exact for g in trace(model, x).prunable()] == [False]


class Expanded(nn.Module):
    """One number for all channels, laid over as many as a constant or the layer's own size says."""

    def __init__(self, width=None):
        super().__init__()
        self.a, self.b, self.width = nn.Linear(8, 6), nn.Linear(6, 3), width

    def forward(self, x):
        width = self.a.out_features if self.width is None else 6
        return self.b(F.relu(self.a(x) + x.mean(-1, keepdim=True).expand(len(x), width)))


def test_expanded_to_a_layer_s_own_size_or_to_a_constant():
    check(Expanded(), torch.randn(2, 8), (6, {"a.w.0": 1, "a.b.0": 1, "b.w.1": 1}))
    graph = check(Expanded("constant"), torch.randn(2, 8))
    assert any("no channels to cut" in (g.reason or "") for g in graph.groups)


def test_values_of_another_shape_are_refused():
    model = randomised(Chain("a", F.relu, "b", a=nn.Linear(8, 6), b=nn.Linear(6, 3)))
    (group,) = trace(model, torch.randn(2, 8)).prunable()
    assert group.reduce({"a.weight": torch.ones(6, 8), "b.weight": torch.ones(3, 6)}).tolist() == [11] * 6
    for values in (
        {"a.weight": torch.ones(5, 8)},
        {"b.weight": torch.ones(3, 5)},
        {"b.weight": torch.ones(3)},
    ):
        with pytest.raises(SecateurError, match="values of shape"):
            group.reduce(values)


@pytest.mark.parametrize("first", [True, False])
def test_rows_joined_with_rows_of_constants_keep_their_columns(first):
    def joined(x):
        zeros = x.new_zeros(len(x), 1, 6)
        return torch.cat([zeros, x] if first else [x, zeros], 1)

    graph = trace(Chain("a", joined, "b", a=nn.Linear(8, 6), b=nn.Linear(6, 3)), X1)
    assert not graph.prunable()
    assert any("no channels to cut" in g.reason for g in graph.groups if g.slices[0].name == "a.weight")


class Table(nn.Module):
    """A router's numbers pick rows of a table of as many rows, or of more."""

    def __init__(self, rows, experts=4, picked=2):
        super().__init__()
        self.gate, self.out, self.picked = nn.Linear(8, experts), nn.Linear(8, 3), picked
        self.table = nn.Parameter(torch.randn(rows, 8))

    def forward(self, x):
        return self.out(x + self.table[self.gate(x).topk(self.picked, -1).indices].sum(-2))


def test_a_router_of_two_picks_rows_of_a_table_of_two():
    graph = trace(Table(2, experts=2, picked=1), torch.randn(5, 8))
    (group,) = graph.prunable()
    assert {(s.name, s.dim) for s in group.slices} == {("gate.weight", 0), ("gate.bias", 0), ("table", 0)}


@pytest.mark.parametrize(("rows", "experts"), [(4, [4]), (6, [])])
def test_a_router_s_numbers_among_other_rows(rows, experts):
    graph = trace(Table(rows), torch.randn(5, 8))
    assert [g.size for g in graph.prunable()] == experts
    if not experts:
        reason = next(g.reason for g in graph.groups if g.size == rows)
        assert "picked by index" in reason and not graph.rule_errors


class Told(nn.Module):
    """A router whose numbers are compared with a number."""

    def __init__(self, compare):
        super().__init__()
        self.gate, self.out, self.compare = nn.Linear(8, 4), nn.Linear(8, 3), compare

    def forward(self, x):
        chosen = self.compare(self.gate(x).topk(2, -1).indices)
        return self.out(x * chosen.to(x.dtype).sum(-1, keepdim=True))


@pytest.mark.parametrize("compare", [lambda n: n < 2, lambda n: n != 1, lambda n: n > 0, lambda n: n + 1])
def test_units_that_are_told_apart_by_number_stay(compare):
    graph = trace(randomised(Told(compare)), torch.randn(5, 8))
    assert not graph.prunable()
    reason = next(
        g.reason for g in graph.groups if any(s.name == "gate.weight" and s.dim == 0 for s in g.slices)
    )
    assert "number" in reason


class OneDNN(nn.Module):
    """An operation that exists for plain convolutions only, so it has no `transposed`."""

    def __init__(self):
        super().__init__()
        self.a, self.b = conv(4, 6), conv(6, 4)

    def forward(self, x):
        y = torch.ops.aten.mkldnn_convolution(x, self.a.weight, self.a.bias, [0, 0], [1, 1], [1, 1], 1)
        return self.b(F.relu(y))


def test_a_convolution_of_one_library():
    check(OneDNN(), X2, (6, {"a.w.0": 1, "a.b.0": 1, "b.w.1": 1}))


class Halves(nn.Module):
    """One matrix, used in two halves that are multiplied."""

    def __init__(self):
        super().__init__()
        self.W, self.b = nn.Parameter(torch.randn(12, 8)), nn.Linear(6, 3)

    def forward(self, x):
        half = len(self.W) // 2
        return self.b(F.relu(F.linear(x, self.W[:half])) * F.linear(x, self.W[half:]))


class Vector(nn.Module):
    """Products of a vector with a matrix, from either side, and with a vector."""

    def __init__(self, form):
        super().__init__()
        self.a, self.W, self.form = nn.Linear(8, 6), nn.Parameter(torch.randn(6, 3)), form

    def forward(self, x):
        x = F.relu(self.a(x[0, 0]))
        if self.form == "left":
            return x @ self.W
        return self.W.T @ x if self.form == "right" else x @ self.W[:, 0]


@pytest.mark.parametrize("form", ["left", "right", "dot"])
def test_vectors_are_multiplied(form):
    check(Vector(form), X1, (6, {"a.w.0": 1, "a.b.0": 1, "W.0": 1}))


def test_a_part_of_a_parameter_makes_units_too():
    graph = check(Halves(), torch.randn(2, 8), (6, {"W.0": 2, "b.w.1": 1}))
    assert {s.name: s.role for s in graph.prunable()[0].slices} == {"W": "out", "b.weight": "in"}


def test_columns_written_by_index_freeze_them():
    def write(x):
        x = x.clone()
        x[:, torch.tensor([1, 2])] = 0
        return x

    graph = trace(Chain("a", write, "b", a=nn.Linear(8, 6), b=nn.Linear(6, 3)), torch.randn(2, 8))
    assert not graph.prunable() and "index_put" in graph.unknown


class AddToInput(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(8, 8)

    def forward(self, x):
        return x + self.a(x)


class Padded(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = conv(3, 4), conv(3, 8), conv(8, 2)

    def forward(self, x):
        return self.c(F.pad(self.a(x), (0, 0, 0, 0, 2, 2)) + self.b(x))


class Shared(nn.Module):
    """Three query heads of width 4 on one key-value head."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, n, bias=False) for n in (12, 4, 4, 12))
        self.o = nn.Linear(12, 8, bias=False)

    def forward(self, x):
        b, n, _ = x.shape
        q = self.q(x).view(b, n, -1, 4).transpose(1, 2)
        k, v = self.k(x)[:, None], self.v(x)[:, None]
        return self.o(
            F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).reshape(b, n, -1)
        )


class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8, bias=False), nn.Linear(6, 3)
        self.W, self.bias = nn.Parameter(torch.randn(8, 6)), nn.Parameter(torch.randn(6))

    def forward(self, x):
        return self.b(torch.addmm(self.bias, self.a(x).view(-1, self.W.shape[0]), self.W))


class Mixer(nn.Module):
    def __init__(self):
        super().__init__()
        self.e, self.t1, self.t2, self.h = (
            nn.Linear(3, 8),
            nn.Linear(5, 10),
            nn.Linear(10, 5),
            nn.Linear(8, 2),
        )

    def forward(self, x):
        x = self.e(x)
        x = x + self.t2(F.relu(self.t1(x.transpose(1, 2)))).transpose(1, 2)
        return self.h(x)


def check(model, x, *groups):
    model = randomised(model)
    graph = trace(model, x)
    expect(graph, *groups)
    keep = {g.name: torch.arange(0, g.size, 2) for g in graph.prunable()}
    assert prove(model, graph, keep, x) == {}
    return graph


def test_e2_added_to_the_graph_input():
    check(AddToInput(), X1)


def test_e2_padded_channels():
    graph = check(
        Padded(), torch.randn(2, 3, 4, 4), (4, {"a.w.0": 1, "a.b.0": 1, "b.w.0": 1, "b.b.0": 1, "c.w.1": 1})
    )
    rows = next(s for s in graph.prunable()[0].slices if s.name == "b.weight")
    assert rows.index.reshape(-1).tolist() == [2, 3, 4, 5]
    assert any("padded" in (g.reason or "") for g in graph.groups)


@pytest.mark.parametrize("layers", [1, 2])
def test_e2_lstm(layers):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.r, self.c = nn.LSTM(8, 6, layers, batch_first=True), nn.Linear(6, 3)

        def forward(self, x):
            return self.c(self.r(x)[0])

    one = {"r.w_ih_l0.0": 4, "r.w_hh_l0.0": 4, "r.w_hh_l0.1": 1, "r.b_ih_l0.0": 4, "r.b_hh_l0.0": 4}
    model = randomised(Net())
    graph = trace(model, X1)
    (group,) = graph.prunable()
    counts = {
        f"{s.name}.{s.dim}".replace("weight", "w").replace("bias", "b"): s.index.shape[1]
        for s in group.slices
    }
    assert group.size == 6 and {k: v for k, v in counts.items() if "l0" in k} == one and counts["c.w.1"] == 1
    assert prove(model, graph, {group.name: torch.tensor([0, 2, 5])}, X1) == {}
    cut_units(model, graph, {group.name: torch.tensor([0, 2, 5])})
    assert model.r.hidden_size == 3 and model(X1).shape == (2, 5, 3)


def test_e2_multi_query_attention():
    check(Shared(), X1, (3, {"q.w.0": 4, "o.w.1": 4}))


def test_e2_bare_weight_through_addmm():
    check(Bare(), torch.randn(5, 8), (8, {"a.w.0": 1, "W.0": 1}), (6, {"W.1": 1, "b.0": 1, "b.w.1": 1}))


def test_e2_mixer():
    stem = {"e.w.0": 1, "e.b.0": 1, "h.w.1": 1}
    check(Mixer(), torch.randn(2, 5, 3), (10, {"t1.w.0": 1, "t1.b.0": 1, "t2.w.1": 1}), (8, stem))


@pytest.mark.parametrize("rows", [3, 30])  # 30: by a matrix product
def test_distances_to_the_vectors_of_a_codebook(rows):
    class Nearest(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.book = nn.Linear(8, 6), nn.Parameter(torch.randn(rows, 6))

        def forward(self, x):
            return torch.cdist(self.a(x), self.book)

    check(Nearest(), torch.randn(28, 8), (6, {"a.w.0": 1, "a.b.0": 1, "book.1": 1}))


def test_regions_of_a_picture():
    ops = pytest.importorskip("torchvision").ops
    boxes = torch.tensor([[0, 0.0, 0.0, 3.0, 3.0], [1, 1.0, 1.0, 4.0, 3.0], [1, 0.0, 2.0, 4.0, 4.0]])
    for pool in (ops.roi_align, ops.roi_pool):
        model = Chain("a", lambda x, pool=pool: pool(x, boxes, 2), "b", a=conv(3, 4), b=conv(4, 5))
        check(model, torch.randn(2, 3, 5, 5), (4, {"a.w.0": 1, "a.b.0": 1, "b.w.1": 1}))


def test_an_operation_without_a_rule_freezes_with_its_name_and_line():
    model = Chain("a", lambda x: torch.linalg.qr(x)[0], "b", a=nn.Linear(8, 8), b=nn.Linear(5, 4))
    graph = trace(model, torch.randn(2, 5, 8))
    assert not graph.prunable()
    reason = next(iter(graph.unknown.values()))
    assert "linalg_qr" in reason and "test_rules.py" in reason


def test_h_permuting_hidden_channels_permutes_the_units():
    model = randomised(SpecNet())
    x = torch.randn(2, 3, 8, 8)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    other = copy.deepcopy(model)
    other.c4.weight.data, other.c4.bias.data = model.c4.weight.data[order], model.c4.bias.data[order]
    other.fc.weight.data = model.fc.weight.data.view(5, 6, 4)[:, order].reshape(5, 24)
    torch.testing.assert_close(other(x), model(x))

    def scores(m):
        group = next(g for g in trace(m, x).prunable() if g.size == 6)
        return group.reduce({n: p.detach().abs() for n, p in m.named_parameters()})

    torch.testing.assert_close(scores(other), scores(model)[order])


def test_h_all_units_of_a_group_have_the_same_footprint():
    graph = trace(randomised(SpecNet()), torch.randn(2, 3, 8, 8))
    for g in graph.groups:
        assert all(s.index.shape[0] == g.size and len(s.index.unique()) == s.index.numel() for s in g.slices)


def test_no_model_name_in_the_graph_or_the_surgery():
    from pathlib import Path

    import secateur

    root = Path(secateur.__file__).parent
    text = " ".join(
        p.read_text().lower() for p in [*(root / "graph").rglob("*.py"), *(root / "surgery").glob("*.py")]
    )
    names = "llama qwen gpt bert mistral mixtral gemma opt_ vit_ swin resnet convnext mamba whisper wav2vec clip deit"
    assert [name for name in names.split() if name in text] == []


@pytest.mark.parametrize(
    "pick", [lambda y: y.argmax(-1), lambda y: y.topk(2, -1)[1], lambda y: y.max(-1)[1] * 2]
)
def test_numbers_of_classes_as_the_output_keep_the_classes(pick):
    """A class that leaves would renumber those after it: 3 neurons can be cut, the 5 classes cannot."""

    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 3), nn.Linear(3, 5)

        def forward(self, x):
            return pick(self.b(F.relu(self.a(x))))

    model = randomised(Classifier())
    graph = trace(model, torch.randn(6, 4))
    expect(graph, (3, {"a.w.0": 1, "a.b.0": 1, "b.w.1": 1}))
    (classes,) = (g for g in graph.groups if g.size == 5)
    assert [(s.name, s.dim) for s in classes.slices] == [("b.weight", 0), ("b.bias", 0)]
    assert "number" in classes.reason
