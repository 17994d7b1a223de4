"""Groups of decoder language models against hand counts, and their predicted costs against PyTorch's counter."""

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from secateur.errors import SecateurError
from secateur.graph import trace
from secateur.graph.labels import Labels

IDS = {"input_ids": torch.arange(16).reshape(2, 8)}
SMALL = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "head_dim": 4,
}


def decoder(config):
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def llama(attention="sdpa", **changes):
    config = transformers.LlamaConfig(**{**SMALL, "num_key_value_heads": 2, **changes})
    config._attn_implementation = attention
    return decoder(config)


def counts(group):
    return {(s.name, s.dim): s.index.shape[1] for s in group.slices}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_llama_groups(attention):
    graph = trace(llama(attention, num_hidden_layers=1), IDS)
    assert [(g.name, g.kind, g.size) for g in graph.prunable()] == [
        ("model.layers.0.self_attn:kv_groups", "kv_groups", 2),
        ("model.layers.0.mlp:neurons", "neurons", 24),
        ("stem:hidden", "hidden", 16),
    ]
    layer = "model.layers.0."
    assert counts(graph[layer + "self_attn:kv_groups"]) == {
        (layer + "self_attn.q_proj.weight", 0): 8,
        (layer + "self_attn.k_proj.weight", 0): 4,
        (layer + "self_attn.v_proj.weight", 0): 4,
        (layer + "self_attn.o_proj.weight", 1): 8,
    }
    assert set(counts(graph[layer + "mlp:neurons"]).items()) == {
        ((layer + "mlp.gate_proj.weight", 0), 1),
        ((layer + "mlp.up_proj.weight", 0), 1),
        ((layer + "mlp.down_proj.weight", 1), 1),
    }
    stem = counts(graph["stem:hidden"])
    assert len(stem) == 1 + 3 + 2 + 5 + 1 and set(stem.values()) == {1}
    assert graph["stem:hidden"].exact is False and graph[layer + "self_attn:kv_groups"].exact is True


def test_units_are_whole_heads():
    group = trace(llama(), IDS)["model.layers.1.self_attn:kv_groups"]
    by_name = {s.name.rsplit(".", 2)[1]: s for s in group.slices}
    assert by_name["k_proj"].index.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert by_name["q_proj"].index.tolist() == [list(range(8)), list(range(8, 16))]
    assert {n: s.role for n, s in by_name.items()} == {
        "q_proj": "out",
        "k_proj": "out",
        "v_proj": "out",
        "o_proj": "in",
    }


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("kv", "kind", "units"), [(4, "heads", 4), (2, "kv_groups", 2), (1, "heads", 4)])
def test_kinds_of_attention(attention, kv, kind, units):
    group = trace(llama(attention, num_key_value_heads=kv), IDS)[f"model.layers.0.self_attn:{kind}"]
    assert group.size == units
    touched = {s.name.rsplit(".", 2)[1] for s in group.slices}
    assert touched == ({"q_proj", "o_proj"} if kv == 1 else {"q_proj", "k_proj", "v_proj", "o_proj"})


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_qwen3_with_norms_on_heads_and_tied_embeddings(attention):
    config = transformers.Qwen3Config(
        **{**SMALL, "num_hidden_layers": 1}, num_key_value_heads=2, tie_word_embeddings=True
    )
    config._attn_implementation = attention
    graph = trace(decoder(config), IDS)
    assert {g.kind: g.size for g in graph.prunable()} == {"kv_groups": 2, "neurons": 24, "hidden": 16}
    assert "positions" not in (graph["model.layers.0.self_attn.q_norm:neurons"].reason or "")
    assert graph.aliases == {"lm_head.weight": "model.embed_tokens.weight"}
    vocabulary = next(g for g in graph.groups if g.size == 64)
    assert vocabulary.reason is not None


def test_gpt2_bare_weights_and_fused_attention():
    graph = trace(
        decoder(transformers.GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=4, n_inner=24)), IDS
    )
    block = "transformer.h.0."
    assert counts(graph[block + "attn:heads"]) == {
        (block + "attn.c_attn.weight", 1): 12,
        (block + "attn.c_attn.bias", 0): 12,
        (block + "attn.c_proj.weight", 0): 4,
    }
    assert counts(graph[block + "mlp:neurons"]) == {
        (block + "mlp.c_fc.weight", 1): 1,
        (block + "mlp.c_fc.bias", 0): 1,
        (block + "mlp.c_proj.weight", 0): 1,
    }
    assert graph["stem:hidden"].size == 16
    query = next(s for s in graph[block + "attn:heads"].slices if s.name.endswith("c_attn.weight"))
    assert sorted(query.index[1].tolist()) == [4, 5, 6, 7, 20, 21, 22, 23, 36, 37, 38, 39]


def test_layers_are_the_blocks_on_the_residual_stream():
    graph = trace(llama(num_hidden_layers=3), IDS)
    assert [g.name for g in graph.prunable("layers")] == ["model.layers:layers"]
    assert graph["model.layers:layers"].modules == ("model.layers.0", "model.layers.1", "model.layers.2")


def test_predicted_parameters_and_macs():
    model = llama("eager")
    graph = trace(model, IDS)
    assert graph.params() == sum(p.numel() for p in model.parameters())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**IDS)
    assert graph.macs() == counter.get_total_flops() // 2
    keep = {
        "model.layers.0.mlp:neurons": torch.arange(6),
        "model.layers.1.self_attn:kv_groups": torch.tensor([1]),
    }
    assert graph.params(keep) == graph.params() - 18 * 3 * 16 - 16 * 8 * 2 - 16 * 4 * 2
    tokens, length, per_head = 16, 8, 2 * 2 * 8 * 4  # attention of two of four heads: q k^T and p v
    assert graph.macs(keep) == graph.macs() - tokens * (18 * 48 + 16 * 24) - 2 * length * per_head
    without = graph.macs({"model.layers:layers": torch.tensor([0])})
    assert graph.macs() - without == (graph.macs() - tokens * 16 * 64) // 2


def test_reduce_sums_a_unit_over_its_slices():
    model = llama(num_hidden_layers=1)
    graph = trace(model, IDS)
    ones = {n: torch.ones_like(p) for n, p in model.named_parameters()}
    heads = graph["model.layers.0.self_attn:kv_groups"]
    assert heads.reduce(ones).tolist() == [16.0 * (8 + 4 + 4 + 8)] * 2
    assert heads.reduce(ones, roles=["in"]).tolist() == [128.0] * 2
    assert heads.reduce(ones, "mean").tolist() == [1.0] * 2
    squares = {n: p.detach() ** 2 for n, p in model.named_parameters()}
    mlp = graph["model.layers.0.mlp:neurons"]
    by_hand = sum(model.model.layers[0].mlp.get_submodule(n).weight.detach().pow(2).sum(d)
                  for n, d in (("gate_proj", 1), ("up_proj", 1), ("down_proj", 0)))  # fmt: skip
    torch.testing.assert_close(mlp.reduce(squares), by_hand)
    assert mlp.reduce(squares, "max").shape == (24,)
    with pytest.raises(SecateurError):
        mlp.reduce(squares, "median")
    with pytest.raises(SecateurError):
        mlp.reduce({})


def test_number_of_steps_does_not_grow_with_width(monkeypatch):
    def steps(width):
        calls = []
        tie = Labels.tie
        monkeypatch.setattr(Labels, "tie", lambda *args: (calls.append(1), tie(*args))[1])
        trace(llama(hidden_size=width, intermediate_size=4 * width, head_dim=8, num_attention_heads=width // 8,
                    num_key_value_heads=width // 16), IDS)  # fmt: skip
        monkeypatch.undo()
        return len(calls)

    assert steps(32) == steps(256) > 0


def test_wrong_inputs_and_names_are_refused():
    model = llama()
    with pytest.raises(SecateurError, match="does not run"):
        trace(model, {"input_ids": "text"})
    with pytest.raises(SecateurError, match="a tensor, a tuple or a dict"):
        trace(model, 3)
    with pytest.raises(SecateurError, match="no group"):
        trace(model, IDS)["model.layers.7.mlp:neurons"]
    assert type(model.model.layers[0].self_attn.head_dim) is int
    assert model.config.use_cache is True


def test_explain_names_every_group_and_reason():
    text = trace(llama(), IDS).explain()
    assert "stem:hidden" in text and "model.layers.1.mlp:neurons" in text
    assert "frozen: it is an output of the model" in text
    assert "vocabulary" in text and "modeling_llama.py" in text
