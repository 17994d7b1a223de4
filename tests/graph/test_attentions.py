"""Attentions as units: where they are found, and what a model without some of them computes, saves and caches."""

import copy

import pytest
import torch
from torch import nn

import secateur
from secateur.graph import trace
from secateur.graph.attentions import attention_groups
from secateur.surgery import cut_units, mask_units, prove, unmask_units
from secateur.surgery.absent import Absent


@pytest.fixture
def model(tiny_llama):
    return tiny_llama(num_hidden_layers=4)


@pytest.fixture
def ids():
    return torch.randint(0, 64, (2, 24), generator=torch.Generator().manual_seed(1))


def traced(model, inputs):
    graph = trace(model, inputs)
    graph.groups += attention_groups(model, graph, inputs)
    return graph


def test_where_they_are(model, ids):
    group = traced(model, {"input_ids": ids})["model.layers:attentions"]
    assert group.modules == tuple(f"model.layers.{n}.self_attn" for n in range(4))
    assert (group.size, group.returns, group.least, group.reason) == (4, 2, 0, None)


def test_they_are_no_part_of_a_plain_trace(model, ids):
    assert not [g for g in trace(model, {"input_ids": ids}).groups if g.kind == "attentions"]


class Block(nn.Module):
    """Attention that gives a plain tensor."""

    def __init__(self):
        super().__init__()
        self.attn, self.norm, self.mlp = Heads(), nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x):
        x = x + self.attn(self.norm(x))
        return x + self.mlp(x).relu()


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.out(y)


def test_an_attention_that_gives_a_tensor():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8), nn.Sequential(*[Block() for _ in range(3)]), nn.Linear(8, 2)).eval()
    x = torch.randn(2, 6, 5)
    graph = traced(net, x)
    group = next(g for g in graph.groups if g.kind == "attentions")
    assert (group.name, group.returns) == ("1:attentions", 0)
    keep = {group.name: torch.tensor([1])}
    assert prove(net, graph, keep, x) == {}
    masked, cut = copy.deepcopy(net), copy.deepcopy(net)
    mask_units(masked, graph, keep)
    cut_units(cut, graph, keep)
    assert [type(block.attn) is Absent for block in cut[1]] == [True, False, True]
    assert torch.allclose(masked(x), cut(x), atol=1e-6)
    unmask_units(masked)
    assert torch.equal(masked(x), net(x))
    assert sum(p.numel() for p in cut.parameters()) == graph.params(keep)


def test_what_is_left_is_counted_and_cached(model, ids):
    """The first attention leaves: the others count anew, or a cache would be asked for the length of an empty layer."""
    graph = traced(model, {"input_ids": ids})
    keep = {"model.layers:attentions": torch.tensor([1, 3])}
    masked = copy.deepcopy(model)
    mask_units(masked, graph, keep)
    cut_units(model, graph, keep)
    assert [getattr(layer.self_attn, "layer_idx", None) for layer in model.model.layers] == [None, 0, None, 1]
    whole = model(ids, use_cache=False).logits
    assert torch.allclose(whole, masked(ids, use_cache=False).logits, atol=1e-6)
    begun = model(ids[:, :9], use_cache=True).past_key_values
    assert torch.allclose(model(ids[:, 9:], past_key_values=begun).logits, whole[:, 9:], atol=1e-5)
    again = trace(model, {"input_ids": ids})
    cut_units(model, again, {"model.layers:layers": torch.tensor([0, 3])})
    assert [getattr(layer.self_attn, "layer_idx", None) for layer in model.model.layers] == [None, 0]


def test_saved_and_loaded_by_secateur_and_by_transformers(model, ids, tmp_path):
    from transformers import AutoModelForCausalLM

    pruned = secateur.prune(
        model, method="group-magnitude", target="params<=80%", kinds=("attentions", "neurons"), data=ids
    )
    assert any(isinstance(layer.self_attn, Absent) for layer in pruned.model.model.layers)
    pruned.save(tmp_path / "small")
    expected = pruned.model(ids).logits
    loaded, _ = secateur.load(tmp_path / "small")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "small", trust_remote_code=True)
    for other in (loaded, plain):
        assert torch.equal(other(ids).logits, expected)
    secateur.apply_plan(model, secateur.Plan.load(tmp_path / "small"))
    assert torch.equal(model(ids).logits, expected)


def test_caches_of_several_kinds_keep_all(ids):
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, layer_types=["sliding_attention", "full_attention"] * 2,
    )  # fmt: skip
    model = Gemma3ForCausalLM(config).eval()
    group = traced(model, {"input_ids": ids})["model.layers:attentions"]
    assert "caches of different kinds" in group.reason
