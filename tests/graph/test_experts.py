"""Experts as units: routed by top-k, cut with their router rows, equal to a router that never picks them."""

import copy

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

import secateur
from secateur.errors import SecateurError
from secateur.graph import trace
from secateur.surgery import cut_units, mask_units, prove, unmask_units

IDS = torch.arange(32).reshape(2, 16)
SMALL = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_experts_per_tok": 2,
}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4}
MODELS = {
    "mixtral": lambda: transformers.MixtralConfig(**SMALL, num_local_experts=6),
    "qwen2_moe": lambda: transformers.Qwen2MoeConfig(
        **SMALL, num_experts=6, moe_intermediate_size=24, shared_expert_intermediate_size=12
    ),
    "gpt_oss": lambda: transformers.GptOssConfig(**SMALL, num_local_experts=6, head_dim=4),
    "granitemoe": lambda: transformers.GraniteMoeConfig(**SMALL, num_local_experts=6),
    "ernie4_5_moe": lambda: transformers.Ernie4_5_MoeConfig(
        **{k: v for k, v in SMALL.items() if k != "num_experts_per_tok"}, moe_k=2, moe_num_experts=6,
        moe_intermediate_size=24, moe_layer_start_index=0, moe_layer_end_index=1,
    ),
    "phimoe": lambda: transformers.PhimoeConfig(**SMALL, num_local_experts=6),
    "deepseek_v3": lambda: transformers.DeepseekV3Config(
        **SMALL, **LATENT, n_routed_experts=12, n_group=6, topk_group=2, moe_intermediate_size=24, first_k_dense_replace=0,
    ),
}  # fmt: skip


def build(name, implementation="grouped_mm"):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(MODELS[name]()).eval()
    model.set_experts_implementation(implementation)
    for p in model.parameters():
        p.data.normal_(0, 0.2)
    for n, b in model.named_buffers():
        if "correction" in n:
            b.normal_(0, 0.5)
    return model


def without_kernel(monkeypatch):
    """Older PyTorch and some devices have no grouped matrix product; transformers then loops inside an operation."""
    monkeypatch.setattr("transformers.integrations.moe._can_use_grouped_mm", lambda *args: False)


def logits(model):
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def routed_to(model, keep):
    """What a router picks when the logits of the other experts are minus infinity: by hooks on the routers."""

    def hook(units):
        gone = [e for e in range(6) if e not in units.tolist()]

        def replace(module, args, output):
            picked = output[2]
            assert not torch.isin(picked, torch.tensor(gone)).any()

        return replace

    for name, units in keep.items():
        owner = model.get_submodule(name.partition(":")[0])
        router = getattr(owner, "gate", None) or owner.router
        router.register_forward_hook(hook(units))


CASES = [(name, "grouped_mm") for name in MODELS] + [
    (name, way)
    for name in ("mixtral", "gpt_oss", "deepseek_v3")
    for way in ("eager", "batched_mm", "fallback")
]


@pytest.mark.parametrize(("name", "implementation"), CASES)
def test_experts_of_a_language_model(name, implementation, monkeypatch):
    if implementation == "fallback":
        without_kernel(monkeypatch)
    model = build(name, implementation.replace("fallback", "grouped_mm"))
    graph = trace(model, {"input_ids": IDS})
    groups = graph.prunable("experts")
    assert [(g.size, g.exact) for g in groups] == [(6, True)] * 2
    keep = {g.name: torch.tensor([0, 2, 5]) for g in groups}
    assert prove(model, graph, keep, {"input_ids": IDS}) == {}
    masked, cut = copy.deepcopy(model), copy.deepcopy(model)
    mask_units(masked, graph, keep)
    if name != "deepseek_v3":
        routed_to(masked, keep)
    changes = cut_units(cut, graph, keep)
    torch.testing.assert_close(logits(cut), logits(masked), rtol=1e-5, atol=1e-5)
    assert (logits(cut) - logits(model)).abs().max() > 1e-3
    assert sum(p.numel() for p in cut.parameters()) == graph.params(keep)
    assert changes.uniform
    rebuilt = type(cut)(cut.config)
    rebuilt.load_state_dict(cut.state_dict())
    torch.testing.assert_close(logits(rebuilt.eval()), logits(cut), rtol=1e-5, atol=1e-5)


def test_what_leaves_with_an_expert():
    model = build("gpt_oss")
    graph = trace(model, {"input_ids": IDS})
    group = graph["model.layers.1.mlp:experts"]
    assert group.least == 2
    assert {(s.name.rpartition("mlp.")[2], s.dim, s.index.shape) for s in group.slices} == {
        (n, 0, (6, 1))
        for n in ("router.weight", "router.bias", "experts.gate_up_proj", "experts.gate_up_proj_bias",
                  "experts.down_proj", "experts.down_proj_bias")
    }  # fmt: skip
    keep = {group.name: torch.tensor([1, 4])}
    one = 16 + 1 + 16 * 48 + 48 + 24 * 16 + 16  # router row and bias, gate-up, its bias, down, its bias
    assert graph.params() - graph.params(keep) == 4 * one
    cut_units(model, graph, keep)
    layer = model.model.layers[1].mlp
    assert layer.router.num_experts == layer.experts.num_experts == 2
    assert layer.router.weight.shape == (2, 16) and layer.experts.gate_up_proj.shape == (2, 16, 48)
    assert model.model.layers[0].mlp.experts.num_experts == 6
    assert torch.isfinite(logits(model)).all()


def test_experts_and_their_neurons_at_once():
    model = build("mixtral")
    graph = trace(model, {"input_ids": IDS})
    inner = [g for g in graph.prunable() if g.name.endswith("experts:neurons")]
    assert [g.size for g in inner] == [24, 24]
    keep = {g.name: torch.arange(3) for g in graph.prunable("experts")}
    keep |= {g.name: torch.arange(8) for g in inner}
    assert prove(model, graph, keep, {"input_ids": IDS}) == {}
    cut_units(model, graph, keep)
    assert model.model.layers[0].mlp.experts.gate_up_proj.shape == (3, 16, 16)
    assert model.model.layers[0].mlp.experts.down_proj.shape == (3, 16, 8)


def test_groups_of_experts_leave_whole():
    model = build("deepseek_v3")
    graph = trace(model, {"input_ids": IDS})
    group = graph["model.layers.0.mlp:experts"]
    assert (group.size, group.least) == (6, 2)
    router = next(s for s in group.slices if s.name.endswith("gate.weight"))
    assert router.index.tolist() == [[2 * g, 2 * g + 1] for g in range(6)]
    keep = {g.name: torch.tensor([0, 3, 4]) for g in graph.prunable("experts")}
    dense = model.model.layers[0].mlp.gate.weight.detach().clone()
    cut_units(model, graph, keep)
    gate = model.model.layers[0].mlp.gate
    assert (gate.num_experts, gate.num_group, gate.e_score_correction_bias.shape) == (6, 3, (6,))
    assert torch.equal(gate.weight, dense[[0, 1, 6, 7, 8, 9]])
    assert (model.config.n_routed_experts, model.config.n_group) == (6, 3)


def test_never_fewer_than_the_router_picks():
    model = build("mixtral")
    graph = trace(model, {"input_ids": IDS})
    with pytest.raises(SecateurError, match="picks among 2"):
        cut_units(model, graph, {"model.layers.0.mlp:experts": torch.tensor([3])})
    assert {g.least for g in trace(build("phimoe"), {"input_ids": IDS}).prunable("experts")} == {
        2
    }  # max, twice
    model.config.num_experts_per_tok = 6
    for layer in model.model.layers:
        layer.mlp.gate.top_k = 6
    frozen = trace(model, {"input_ids": IDS})["model.layers.0.mlp:experts"]
    assert frozen.reason == "the model picks 6 of 6 units, which is all"


def test_prune_keeps_the_floor_and_loads_again(tmp_path):
    model = build("mixtral")
    pruned = secateur.prune(
        model, {"input_ids": IDS}, method="group-magnitude", target="10%", kinds=("experts",)
    )
    assert [g["kept"] for g in pruned.report["groups"] if g["kind"] == "experts"] == [2, 2]
    pruned.save(tmp_path / "small")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert loaded.config.num_local_experts == 2
    torch.testing.assert_close(logits(loaded), logits(pruned.model))


class Mixture(nn.Module):
    """Two inputs, three experts of 2 x 2, the best one's answer times its share of the softmax."""

    def __init__(self, factor: int = 1):
        super().__init__()
        self.router = nn.Linear(2, 3, bias=False)
        self.experts = nn.Parameter(
            torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[9.0, 9.0], [9.0, 9.0]], [[0.0, 1.0], [7.0, 0.0]]])
        )
        self.router.weight.data = torch.tensor([[2.0, 0.0], [3.0, 0.0], [1.0, 5.0]])
        self.factor = factor

    def forward(self, x):
        share, number = torch.topk(F.softmax(self.router(x), -1), 1, -1)
        chosen = self.experts[
            (number[:, 0] * self.factor) // self.factor if self.factor > 1 else number[:, 0]
        ]
        return share * torch.bmm(chosen, x[:, :, None])[:, :, 0]


def test_by_hand():
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    model = Mixture().eval()
    graph = trace(model, x)
    (group,) = graph.prunable()
    assert (group.kind, group.size, group.least, group.exact) == ("experts", 3, 1, True)
    keep = {group.name: torch.tensor([0, 2])}
    # without expert 1: logits (2, 1) and (0, 5), the winners are 0 with 1 / (1 + e^-1) and 2 with 1 / (1 + e^-5)
    expected = torch.tensor([[0.7310586 * 1, 0.7310586 * 3], [0.9933071 * 1, 0.0]])
    masked = copy.deepcopy(model)
    mask_units(masked, graph, keep)
    torch.testing.assert_close(masked(x), expected)
    cut_units(model, graph, keep)
    assert model.experts.shape == (2, 2, 2) and model.router.out_features == 2
    torch.testing.assert_close(model(x), expected)


def test_numbers_that_are_calculated_with_freeze_the_experts():
    graph = trace(Mixture(factor=2).eval(), torch.eye(2))
    assert not graph.prunable("experts")
    reasons = [
        g.reason for g in graph.groups if any(s.name == "router.weight" and s.dim == 0 for s in g.slices)
    ]
    assert len(reasons) == 1 and "calculates with the numbers of units" in reasons[0]


def test_a_masked_model_can_be_traced_and_cut():
    model = build("mixtral")
    graph = trace(model, {"input_ids": IDS})
    keep = {g.name: torch.tensor([0, 2, 5]) for g in graph.prunable("experts")}
    cut = copy.deepcopy(model)
    cut_units(cut, graph, keep)
    mask_units(model, graph, keep)
    again = trace(model, {"input_ids": IDS})
    assert [g.name for g in again.prunable()] == [g.name for g in graph.prunable()]
    cut_units(model, again, keep)
    assert torch.equal(logits(model), logits(cut))
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_rows_stay_aligned_for_the_kernel():
    model = build("mixtral")
    graph = trace(model, {"input_ids": IDS})
    # grouped_mm reads rows of a multiple of 16 bytes: 4 numbers of 4 bytes
    assert graph["stem:hidden"].multiple == graph["model.layers.0.mlp.experts:neurons"].multiple == 4
    assert graph["model.layers.0.self_attn:heads"].multiple == 1
    pruned = secateur.prune(
        model, {"input_ids": IDS}, method="group-magnitude", target="60%", kinds=("neurons", "hidden")
    )
    assert {g["name"]: g["kept"] for g in pruned.report["groups"] if g["kept"] < g["size"]} == {
        "model.layers.0.mlp.experts:neurons": 12,
        "model.layers.1.mlp.experts:neurons": 12,
        "stem:hidden": 8,
    }
    assert pruned.report["notes"] == []


def test_unmasked_routers_pick_any_expert_again():
    model = build("mixtral")
    before, dense = copy.deepcopy(model.state_dict()), logits(model)
    graph = trace(model, {"input_ids": IDS})
    keep = {g.name: torch.tensor([0, 2]) for g in graph.prunable("experts")}
    mask_units(model, graph, {**keep, "model.layers:layers": torch.tensor([1])})
    assert not torch.allclose(logits(model), dense)
    unmask_units(model)
    model.load_state_dict(before)
    assert torch.equal(logits(model), dense)
