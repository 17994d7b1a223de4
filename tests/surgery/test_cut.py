"""Cutting decoder language models: equal to masking, rebuilt by the fixed config, generating with a cache."""

import copy
import dataclasses

import pytest
import torch
import transformers

from secateur.errors import SecateurError
from secateur.graph import trace
from secateur.io.reshape import compare, reshape
from secateur.surgery import cut_units, mask_units, prove

IDS = torch.arange(16).reshape(2, 8)
SMALL = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}
MODELS = {
    "llama": lambda **k: transformers.LlamaConfig(**SMALL, **{"num_key_value_heads": 2, **k}),
    "llama_mha": lambda **k: transformers.LlamaConfig(**SMALL, num_key_value_heads=4, **k),
    "llama_mqa": lambda **k: transformers.LlamaConfig(**SMALL, num_key_value_heads=1, **k),
    "qwen3": lambda **k: transformers.Qwen3Config(
        **SMALL, num_key_value_heads=2, head_dim=4, tie_word_embeddings=True, **k
    ),
    "gpt2": lambda **k: transformers.GPT2Config(
        vocab_size=64, n_embd=16, n_layer=4, n_head=4, n_inner=24, **k
    ),
    "opt": lambda **k: transformers.OPTConfig(
        vocab_size=64,
        hidden_size=16,
        ffn_dim=24,
        num_hidden_layers=4,
        num_attention_heads=4,
        word_embed_proj_dim=16,
        **k,
    ),
}
KINDS = {
    "heads": ["heads", "kv_groups"],
    "neurons": ["neurons"],
    "hidden": ["hidden"],
    "layers": ["layers"],
    "all": None,
}


def build(name, attention="sdpa", **changes):
    torch.manual_seed(0)
    config = MODELS[name](**changes)
    config._attn_implementation = attention
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for p in model.parameters():
        p.data.normal_(0, 0.2)
    return model


def half(graph, kinds=None):
    """Every second unit."""
    return {g.name: torch.arange(g.size % 2, g.size, 2) for g in graph.prunable(kinds)}


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def shapes(model):
    return {n: tuple(p.shape) for n, p in model.named_parameters(remove_duplicate=False)}


def generated(model, use_cache):
    return model.generate(
        IDS, max_new_tokens=5, do_sample=False, use_cache=use_cache, eos_token_id=None, pad_token_id=0
    )


@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_cut(name, attention, kinds):
    model = build(name, attention)
    graph = trace(model, {"input_ids": IDS})
    keep = half(graph, KINDS[kinds])
    assert prove(model, graph, keep, {"input_ids": IDS}) == {}
    cut = copy.deepcopy(model)
    changes = cut_units(cut, graph, keep)
    assert sum(p.numel() for p in cut.parameters()) == graph.params(keep)
    if kinds not in ("hidden", "all"):
        masked = copy.deepcopy(model)
        mask_units(masked, graph, keep)
        torch.testing.assert_close(logits(cut), logits(masked), rtol=1e-5, atol=1e-5)
        assert (logits(cut) - logits(model)).abs().max() > 1e-3
    assert torch.equal(generated(cut, True), generated(cut, False))
    if changes.uniform:
        rebuilt = type(cut)(cut.config)
        assert shapes(rebuilt) == shapes(cut)
        rebuilt.load_state_dict(cut.state_dict())
        torch.testing.assert_close(logits(rebuilt.eval()), logits(cut))
    else:
        assert name in ("gpt2", "opt") and kinds in ("heads", "hidden")
    fresh = build(name, attention)
    reshape(fresh, compare(cut, build(name, attention), changes.layers))
    fresh.load_state_dict(cut.state_dict())
    assert torch.equal(logits(fresh), logits(cut))


def test_layers_that_differ():
    model = build("llama")
    graph = trace(model, {"input_ids": IDS})
    keep = {
        "model.layers.0.self_attn:kv_groups": torch.tensor([1]),
        "model.layers.1.mlp:neurons": torch.arange(5),
        "model.layers.3.mlp:neurons": torch.arange(20),
        "model.layers:layers": torch.tensor([0, 1, 3]),
    }
    assert prove(model, graph, keep, {"input_ids": IDS}) == {}
    dense = model.config.to_dict()
    masked = copy.deepcopy(model)
    mask_units(masked, graph, keep)
    changes = cut_units(model, graph, keep)
    torch.testing.assert_close(logits(model), logits(masked), rtol=1e-5, atol=1e-5)
    assert changes.uniform is False and changes.layers == {"model.layers": [0, 1, 3]}
    assert model.config.intermediate_size == dense["intermediate_size"]
    assert model.config.num_key_value_heads == dense["num_key_value_heads"]
    assert model.config.num_hidden_layers == 3
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1, 2]
    assert model.model.layers[2].mlp.down_proj.in_features == 20
    assert torch.equal(generated(model, True), generated(model, False))
    fresh = build("llama")
    reshape(fresh, compare(model, build("llama"), changes.layers))
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(logits(fresh), logits(model))


def test_kept_weights_are_the_dense_ones():
    model = build("llama")
    graph = trace(model, {"input_ids": IDS})
    cut = copy.deepcopy(model)
    cut_units(cut, graph, {"model.layers.2.self_attn:kv_groups": torch.tensor([1])})
    dense, small = model.model.layers[2].self_attn, cut.model.layers[2].self_attn
    assert torch.equal(small.q_proj.weight, dense.q_proj.weight[8:])
    assert torch.equal(small.k_proj.weight, dense.k_proj.weight[4:])
    assert torch.equal(small.o_proj.weight, dense.o_proj.weight[:, 8:])
    assert (small.q_proj.out_features, small.o_proj.in_features, small.num_key_value_groups) == (8, 8, 2)


def test_tied_embeddings_stay_tied_and_types_stay():
    model = build("qwen3").to(torch.bfloat16)
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    graph = trace(model, {"input_ids": IDS})
    cut_units(model, graph, half(graph))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.model.layers[0].mlp.up_proj.weight.requires_grad is False
    assert model.model.layers[0].mlp.gate_proj.weight.requires_grad is True
    assert torch.isfinite(logits(model)).all()


def test_keeping_all_changes_nothing():
    model = build("llama")
    graph = trace(model, {"input_ids": IDS})
    keep = {g.name: torch.arange(g.size) for g in graph.prunable()}
    before, config = copy.deepcopy(model.state_dict()), model.config.to_dict()
    changes = cut_units(model, graph, keep)
    assert all(torch.equal(a, before[n]) for n, a in model.state_dict().items())
    assert model.config.to_dict() == config and not changes.shapes and not changes.attributes


def test_nonsense_is_refused_and_leaves_the_model():
    model = build("llama")
    graph = trace(model, {"input_ids": IDS})
    before = copy.deepcopy(model.state_dict())
    frozen = next(g.name for g in graph.groups if g.reason)
    for keep in (
        {"nowhere:neurons": torch.tensor([0])},
        {frozen: torch.tensor([0])},
        {"stem:hidden": torch.tensor([99])},
        {"stem:hidden": torch.tensor([], dtype=torch.long)},
        {"stem:hidden": torch.tensor([1, 1])},
    ):
        for action in (cut_units, mask_units):
            with pytest.raises(SecateurError):
                action(model, graph, keep)
    assert all(torch.equal(a, before[n]) for n, a in model.state_dict().items())


def test_a_trained_cut_model():
    model = build("llama")
    graph = trace(model, {"input_ids": IDS})
    cut_units(model, graph, half(graph))
    loss = model(IDS, labels=IDS).loss
    loss.backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())


def test_smollm2_shape():
    config = transformers.LlamaConfig(
        hidden_size=576, num_attention_heads=9, num_key_value_heads=3, intermediate_size=1536, num_hidden_layers=2,
        vocab_size=49152, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    graph = trace(model, {"input_ids": IDS})
    assert graph["model.layers.1.self_attn:kv_groups"].size == 3
    keep = {g.name: torch.arange(1) for g in graph.prunable("kv_groups")}
    changes = cut_units(model, graph, keep)
    assert changes.uniform and changes.config == {"num_attention_heads": 3, "num_key_value_heads": 1}
    assert model.model.layers[0].self_attn.q_proj.weight.shape == (192, 576)


@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp:neurons", "model.layers.0.self_attn:kv_groups", "stem:hidden"]
)
def test_a_wrong_graph_is_found_out(name):
    model = build("llama")
    graph = trace(model, {"input_ids": IDS})
    group = graph[name]
    last = group.slices[-1]
    moved = dataclasses.replace(last, index=last.index.roll(1, 0))
    group.slices = (*group.slices[:-1], moved)
    keep = {g.name: torch.arange(g.size // 2) for g in graph.prunable(["kv_groups", "neurons", "hidden"])}
    bad = prove(model, graph, keep, {"input_ids": IDS})
    assert list(bad) == [name] and ("differ" in bad[name])


def test_proving_leaves_the_model_as_it_was():
    model = build("llama").train()
    graph = trace(model, {"input_ids": IDS})
    before = copy.deepcopy(model.state_dict())
    prove(model, graph, half(graph), {"input_ids": IDS})
    assert model.training and model.config.use_cache is True
    assert all(torch.equal(a, before[n]) for n, a in model.state_dict().items())
