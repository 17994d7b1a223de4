"""Cuts one after the other along one trace: the same model as one cut, and the graph that a new trace would find."""

import copy

import pytest
import torch
import transformers
from torch import nn

from secateur.errors import SecateurError
from secateur.gates.cost import ExpectedCost
from secateur.graph import trace
from secateur.graph.smaller import smaller
from secateur.surgery import Shrinking, cut_units, mask_units
from secateur.surgery.shrink import within

IDS = torch.arange(16).reshape(2, 8)
SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "intermediate_size": 24,
}
GPT = {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_inner": 24, "vocab_size": 64, "n_positions": 32}
IDS_OF = {"bos_token_id": 0, "eos_token_id": 0}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SMALL, num_key_value_heads=8),
    "grouped, tied": lambda: transformers.LlamaConfig(
        **SMALL, num_key_value_heads=4, tie_word_embeddings=True
    ),
    "biases": lambda: transformers.Qwen2Config(**SMALL, num_key_value_heads=4),
    "one key": lambda: transformers.LlamaConfig(**SMALL, num_key_value_heads=1),
    "fused": lambda: transformers.GPT2Config(**GPT, **IDS_OF),
    "parallel": lambda: transformers.GPTNeoXConfig(**SMALL, **IDS_OF),
    "two norms": lambda: transformers.Gemma2Config(**SMALL, num_key_value_heads=4, head_dim=4),
    "encoder": lambda: transformers.BertConfig(**SMALL),
}


class Conv(nn.Module):
    """Depthwise, concatenated and flattened channels, a residual, BatchNorm."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.norm, self.c = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)
        self.d, self.head = nn.Conv2d(16, 4, 3, stride=2), nn.Linear(36, 5)

    def forward(self, x):
        x = self.a(x)
        y = x + self.c(torch.relu(self.norm(self.b(x))))
        return self.head(self.d(torch.cat([x, y], 1)).flatten(1))


class Recurrent(nn.Module):
    """An LSTM between two layers."""

    def __init__(self):
        super().__init__()
        self.first, self.lstm, self.last = nn.Linear(4, 8), nn.LSTM(8, 10, batch_first=True), nn.Linear(10, 3)

    def forward(self, x):
        return self.last(self.lstm(self.first(x).relu())[0])


class Scaled(nn.Module):
    """Attention of two heads that divides by the root of their width."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x):
        q, k, v = (m(x).view(*x.shape[:2], 2, -1).transpose(1, 2) for m in (self.q, self.k, self.v))
        made = nn.functional.scaled_dot_product_attention(q, k, v)
        return x + self.o(made.transpose(1, 2).flatten(2))


def build(name):
    torch.manual_seed(0)
    if name == "conv":
        model, inputs = Conv(), torch.randn(2, 3, 8, 8)
    elif name == "lstm":
        model, inputs = Recurrent(), torch.randn(2, 5, 4)
    else:
        config = CONFIGS[name]()
        made = transformers.AutoModel if name == "encoder" else transformers.AutoModelForCausalLM
        model, inputs = made.from_config(config), {"input_ids": IDS}
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape) * 0.3)
    return model.eval(), inputs


EVERY = [*CONFIGS, "conv", "lstm"]
KINDS = ("heads", "kv_groups", "neurons", "hidden", "channels")


def steps(graph):
    """Three cuts, each further than the one before; not from the end, so that places move."""
    found = []
    for n in (1, 2, 3):
        keep = {}
        for g in graph.prunable(KINDS):
            gone = [u for u in (1, 0, 3, 6) if u < g.size - 1][: n if g.size > 4 else 1]
            keep[g.name] = torch.tensor([u for u in range(g.size) if u not in gone])
        found.append(keep)
    return found


def outputs(model, inputs):
    with torch.no_grad():
        made = model(**inputs, use_cache=False) if isinstance(inputs, dict) else model(inputs)
    return made if isinstance(made, torch.Tensor) else made[0]


def said(graph):
    """What a graph says of the units that can be cut, in a form that can be compared."""
    return {
        g.name: (g.kind, g.size, [(s.name, s.dim, s.role, s.index.tolist()) for s in g.slices])
        for g in graph.prunable(KINDS)
    }


@pytest.mark.parametrize("name", EVERY)
def test_cuts_in_a_row_are_one_cut_and_the_graph_is_that_of_a_new_trace(name):
    model, inputs = build(name)
    graph = trace(model, inputs)
    once, masked = copy.deepcopy(model), copy.deepcopy(model)
    held = {n: p for n, p in model.named_parameters(remove_duplicate=False)}
    shrinking = Shrinking(model, graph)
    for keep in steps(graph):
        shrinking.to(keep)
        again = trace(model, inputs)
        assert said(shrinking.graph) == said(again)
        assert shrinking.graph.shapes == again.shapes
        assert shrinking.graph.params() == again.params() == sum(p.numel() for p in model.parameters())
        assert shrinking.graph.macs() == again.macs() == graph.macs(keep)
    changes, whole = shrinking.settle(), cut_units(once, graph, keep)
    assert (changes.shapes, changes.config) == (whole.shapes, whole.config)
    assert changes.attributes == whole.attributes and changes.uniform == whole.uniform
    assert {n: (p.shape, p.tolist()) for n, p in model.state_dict().items()} == {
        n: (p.shape, p.tolist()) for n, p in once.state_dict().items()
    }
    assert torch.equal(outputs(model, inputs), outputs(once, inputs))
    assert all(p is held[n] for n, p in model.named_parameters(remove_duplicate=False))
    exact = {n: units for n, units in keep.items() if graph[n].exact}
    if exact.keys() == keep.keys():
        mask_units(masked, graph, keep)
        assert torch.allclose(outputs(model, inputs), outputs(masked, inputs), atol=1e-5)
    for p in model.parameters():
        p.grad = None
    outputs(model, inputs)
    (model(**inputs)[0] if isinstance(inputs, dict) else model(inputs)).sum().backward()
    assert all(p.grad is None or p.grad.shape == p.shape for p in model.parameters())


def test_numbers_are_those_of_the_dense_model():
    assert within(torch.tensor([0, 2, 5, 7]), torch.tensor([2, 7])).tolist() == [1, 3]
    for kept in ([3], [0, 8]):
        with pytest.raises(SecateurError, match=r"units \[[38]\] have left already"):
            within(torch.tensor([0, 2, 5, 7]), torch.tensor(kept))
    model, inputs = build("llama")
    shrinking = Shrinking(model, trace(model, inputs))
    places = shrinking.to({"model.layers.0.mlp:neurons": torch.tensor([u for u in range(24) if u != 3])})
    assert places["model.layers.0.mlp.down_proj.weight"][1].tolist() == [u for u in range(24) if u != 3]
    places = shrinking.to({"model.layers.0.mlp:neurons": torch.tensor([0, 4, 23])})
    assert places["model.layers.0.mlp.up_proj.weight"][0].tolist() == [0, 3, 22]
    assert shrinking.to({}) == {} and shrinking.to(dict(shrinking.keep)) == {}
    before = {n: p.clone() for n, p in model.state_dict().items()}
    with pytest.raises(SecateurError, match="have left already"):
        shrinking.to({"model.layers.0.mlp:neurons": torch.tensor([0, 3])})
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())


def test_what_can_not_be_followed_is_refused():
    model, inputs = build("llama")
    graph = trace(model, inputs)
    with pytest.raises(SecateurError, match="layers that leave give what is left other names"):
        smaller(graph, {"model.layers:layers": torch.tensor([1])})
    scaled = trace(Scaled(), torch.randn(2, 3, 8), inner=True)
    wide = next(g for g in scaled.prunable("head_dim"))
    with pytest.raises(SecateurError, match="narrower heads"):
        smaller(scaled, {wide.name: torch.arange(wide.size - 1)})
    after = smaller(graph, {"model.layers.0.mlp:neurons": torch.arange(3)})
    with pytest.raises(SecateurError, match="was cut after the trace"):
        ExpectedCost(after)
