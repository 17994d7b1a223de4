"""The width of heads as units: the same entry of every head, with its rotary partner, at the dense model's scale."""

import copy

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import secateur
from secateur.graph import trace
from secateur.pruning.plan import Plan
from secateur.surgery import cut_units, mask_units, prove

IDS = {"input_ids": torch.arange(32).reshape(2, 16)}
PIXELS = {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)}
SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
HALF = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
DECODER = {**SMALL, "vocab_size": 64, "num_key_value_heads": 2, "head_dim": 8}


def decoder(config, attention="sdpa"):
    config._attn_implementation = attention
    return transformers.AutoModelForCausalLM.from_config(config)


def timm_vit(**settings):
    import timm

    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, embed_dim=32, depth=2, num_heads=4, num_classes=5, **settings
    )


MODELS = {
    "llama": lambda: decoder(transformers.LlamaConfig(**DECODER)),
    "llama_eager": lambda: decoder(transformers.LlamaConfig(**DECODER), "eager"),
    "qwen3": lambda: decoder(transformers.Qwen3Config(**DECODER)),
    "gpt_neox": lambda: decoder(transformers.GPTNeoXConfig(**{**SMALL, "hidden_size": 32}, vocab_size=64, rope_parameters=HALF)),
    "gpt2": lambda: decoder(transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_inner=24)),
    "bert": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**{**SMALL, "hidden_size": 32}, vocab_size=64)),
    "vit": lambda: transformers.ViTForImageClassification(
        transformers.ViTConfig(**{**SMALL, "hidden_size": 32}, image_size=32, patch_size=16)
    ),
    "timm_vit": timm_vit,
}  # fmt: skip


def build(name):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    for p in model.parameters():
        p.data.normal_(0, 0.2)
    return model, PIXELS if name == "vit" else PIXELS["pixel_values"] if name == "timm_vit" else IDS


def output(model, inputs):
    with torch.no_grad():
        out = model(**inputs, **({"use_cache": False} if "llama" in type(model).__name__.lower() else {})) if isinstance(inputs, dict) else model(inputs)  # fmt: skip
    return out if isinstance(out, torch.Tensor) else out.logits


def counts(group):
    return {(s.name.rpartition("attn.")[2], s.dim): s.index.shape[1] for s in group.slices}


@pytest.mark.parametrize("name", MODELS)
def test_half_the_width(name):
    model, inputs = build(name)
    graph = trace(model, inputs, inner=True)
    groups = graph.prunable("head_dim")
    # rotary tables are shared by all layers: one group of pairs; elsewhere one group a layer
    units = {"llama": [4], "llama_eager": [4], "qwen3": [4], "gpt_neox": [2]}.get(name, [8, 8])
    assert [g.size for g in groups] == units
    keep = {g.name: torch.arange(g.size)[1::2] for g in groups}
    assert prove(model, graph, keep, inputs) == {}
    assert all(g.exact for g in groups) == (name != "qwen3")  # norms of queries and keys
    masked = copy.deepcopy(model)
    mask_units(masked, graph, keep)
    cut = copy.deepcopy(model)
    cut_units(cut, graph, keep)
    assert sum(p.numel() for p in cut.parameters()) == graph.params(keep)
    if name != "qwen3":
        torch.testing.assert_close(output(cut, inputs), output(masked, inputs), rtol=1e-5, atol=1e-5)
    assert (output(cut, inputs) - output(model, inputs)).abs().max() > 1e-3


def test_what_leaves_with_a_pair_of_rotated_entries():
    model, inputs = build("llama")
    group = trace(model, inputs, inner=True)["model.layers:head_dim"]
    first = {(s.name, s.dim): s.index[1].tolist() for s in group.slices if "layers.1" not in s.name}
    two = [1, 5, 9, 13]  # entries 1 and 1 + 8 / 2 of two heads of width 8
    four = [*two, 17, 21, 25, 29]
    assert first == {
        ("model.layers.0.self_attn.q_proj.weight", 0): four,
        ("model.layers.0.self_attn.k_proj.weight", 0): two,
        ("model.layers.0.self_attn.v_proj.weight", 0): two,
        ("model.layers.0.self_attn.o_proj.weight", 1): four,
        ("model.rotary_emb.inv_freq", 0): [1],
    }


def test_heads_are_the_units_otherwise():
    model, inputs = build("llama")
    kinds = {g.kind for g in trace(model, inputs).prunable()}
    assert "kv_groups" in kinds and "head_dim" not in kinds
    kinds = {g.kind for g in trace(model, inputs, inner=True).prunable()}
    assert "head_dim" in kinds and not kinds & {"kv_groups", "heads"}


def test_predicted_macs():
    model, inputs = build("llama_eager")
    graph = trace(model, inputs, inner=True)
    keep = {"model.layers:head_dim": torch.tensor([0, 3])}
    cut_units(model, graph, keep)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**inputs, use_cache=False)
    assert graph.macs(keep) == counter.get_total_flops() // 2


class Attention(nn.Module):
    """One token attends to two: two heads of width 2, scores divided by the root of the width inside the operation."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(1, 4) for _ in range(3))
        self.o = nn.Linear(4, 1, bias=False)
        for layer in (self.q, self.k, self.v, self.o):
            layer.weight.data.zero_()
        self.heads, self.width = 2, 2
        for layer in (self.q, self.k, self.v):
            layer.bias.data.zero_()

    def forward(self, x):
        shape = (x.shape[0], x.shape[1], self.heads, self.width)
        q, k, v = (f(x).view(shape).transpose(1, 2) for f in (self.q, self.k, self.v))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_scale_by_hand():
    model = Attention().eval()
    model.q.weight.data[:, 0] = torch.tensor([2**0.5, 9.0, 0.0, 9.0])
    model.q.bias.data[:] = torch.tensor([2**0.5, 0.0, 0.0, 0.0])
    model.k.weight.data[:, 0] = torch.tensor([1.0, 9.0, 1.0, 9.0])
    model.v.weight.data[:, 0] = torch.tensor([1.0, 9.0, 4.0, 9.0])
    model.o.weight.data[0] = torch.tensor([1.0, 9.0, 1.0, 9.0])
    x = torch.tensor([[[0.0], [1.0]], [[0.0], [1.0]]])
    graph = trace(model, x, inner=True)
    (group,) = graph.prunable("head_dim")
    assert group.size == 2 and len(group.slices) == 7
    cut_units(model, graph, {group.name: torch.tensor([0])})
    assert (model.width, model.heads) == (1, 2)
    # entry 0 of each head stays. Head 0: q = (1 + x) sqrt 2, k = v = x, scores q k / sqrt 2 = (1 + x) k as before the cut;
    # head 1 sees equal scores: (0 + 4) / 2. Token 0: softmax (0, 1), token 1: softmax (0, 2).
    first = torch.tensor([0.7310586, 0.8807971]) + 2
    torch.testing.assert_close(model(x)[0, :, 0], first)


def test_a_scale_that_cannot_be_kept_is_a_reason():
    torch.manual_seed(0)
    model = timm_vit(qk_norm=True).eval()
    graph = trace(model, PIXELS["pixel_values"], inner=True)
    frozen = [g for g in graph.groups if g.kind == "head_dim"]
    assert len(frozen) == 2 and not graph.prunable("head_dim")
    assert all("the width of a head sets the scale of attention" in g.reason for g in frozen)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "vit", "timm_vit"])
def test_pruned_saved_loaded_and_planned_again(name, tmp_path):
    model, inputs = build(name)
    pruned = secateur.prune(
        model, inputs, method="group-magnitude", target="50%", kinds=("head_dim", "neurons")
    )
    cut = [g for g in pruned.report["groups"] if g["kept"] < g["size"]]
    assert {g["kind"] for g in cut} == {"head_dim", "neurons"}
    assert all(g["kept"] == g["size"] // 2 for g in cut)
    pruned.save(tmp_path / "out")
    loaded, _ = secateur.load(tmp_path / "out", model=build(name)[0] if name == "timm_vit" else None)
    torch.testing.assert_close(output(loaded, inputs), output(pruned.model, inputs))
    fresh, _ = build(name)
    secateur.apply_plan(fresh, Plan.load(tmp_path / "out"))
    torch.testing.assert_close(output(fresh, inputs), output(pruned.model, inputs))


def test_a_pruned_decoder_generates_with_its_cache():
    model, inputs = build("llama")
    graph = trace(model, inputs, inner=True)
    cut_units(model, graph, {"model.layers:head_dim": torch.tensor([1, 2])})
    tokens = [
        model.generate(**inputs, max_new_tokens=4, do_sample=False, use_cache=cache, eos_token_id=None, pad_token_id=0)
        for cache in (True, False)
    ]  # fmt: skip
    assert torch.equal(*tokens)
    assert model.model.layers[0].self_attn.scaling == 8**-0.5
