"""What reaches each expert: against a loop over tokens, stacked and listed, with padding, shared experts and grouped choice."""

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from secateur import SecateurError
from secateur.graph import trace
from secateur.stats.experts import collect_experts, members

IDS = torch.arange(48).reshape(3, 16)
SMALL = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "num_experts_per_tok": 2, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4}
SHARED = {
    "n_routed_experts": 12,
    "n_shared_experts": 1,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 0,
}
MODELS = {
    "mixtral": lambda: transformers.MixtralConfig(**SMALL, num_local_experts=6),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        **SMALL, num_experts=6, moe_intermediate_size=24, head_dim=4, norm_topk_prob=True
    ),
    "deepseek_v3": lambda: transformers.DeepseekV3Config(
        **SMALL, **LATENT, **SHARED, n_group=6, topk_group=2
    ),
    "glm4_moe": lambda: transformers.Glm4MoeConfig(**SMALL, **SHARED, n_group=1, topk_group=1, head_dim=4),
}


def build(name):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(MODELS[name]()).eval()
    for p in model.parameters():
        p.data.normal_(0, 0.2)
    for n, b in model.named_buffers():
        if "correction" in n:
            b.normal_(0, 0.3)
    return model


def by_tokens(model, ids, mask):
    """tokens, weights, weighted of the first layer, expert by expert and token by token, from the states that enter it."""
    layer, seen = model.model.layers[0].mlp, []
    handle = layer.experts.register_forward_pre_hook(lambda m, args: seen.append(args))
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask)
    handle.remove()
    ((states, numbers, weights),) = seen
    up, down = layer.experts.gate_up_proj, layer.experts.down_proj
    sums = torch.zeros(3, len(up))
    for x, own, share, counts in zip(states, numbers, weights, mask.flatten()):
        for e, w in zip(own, share):
            if counts:
                gate, value = (up[e] @ x).chunk(2)
                out = down[e] @ (F.silu(gate) * value)
                sums[:, e] += torch.stack([torch.tensor(1.0), w, w * out.norm()]).detach()
    return sums


@pytest.mark.parametrize("name", MODELS)
def test_against_a_loop_over_tokens(name):
    model = build(name)
    mask = torch.ones_like(IDS)
    mask[0, 10:] = mask[2, 3:] = 0
    groups = trace(model, {"input_ids": IDS}).prunable("experts")
    batches = [{"input_ids": IDS, "attention_mask": mask}]
    found = collect_experts(model, batches, groups)[groups[0].name]
    tokens, weights, weighted = by_tokens(model, IDS, mask)
    assert torch.equal(found.tokens.float(), tokens) and tokens.sum() == 2 * (10 + 16 + 3)
    torch.testing.assert_close(found.weights.float(), weights)
    torch.testing.assert_close(found.weighted.float(), weighted)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_units_of_a_grouped_choice_are_several_experts():
    model = build("deepseek_v3")
    (group, _) = trace(model, {"input_ids": IDS}).prunable("experts")
    assert members(model, group).tolist() == [[2 * g, 2 * g + 1] for g in range(6)]


class Listed(nn.Module):
    """Experts `x -> number * x` behind a router that looks at the first input, and a shared expert `x -> 100 x`."""

    def __init__(self, twist=False):
        super().__init__()
        self.gate = nn.Linear(2, 3, bias=False)
        self.gate.weight.data = torch.tensor([[1.0, 0.0], [0.0, 0.0], [-1.0, 0.0]])
        self.experts = nn.ModuleList(nn.Linear(2, 2, bias=False) for _ in range(3))
        for number, expert in enumerate(self.experts):
            expert.weight.data = torch.eye(2) * (number + 1)
        self.twist = twist

    def forward(self, x):
        weights, picked = torch.topk(F.softmax(self.gate(x), -1), 2, -1)
        weights = weights / weights.sum(-1, keepdim=True)
        out = 100 * x
        for e, expert in enumerate(self.experts):
            token, place = torch.where(picked == e)
            out[token] += expert(x[token]) * weights[token, place, None]
        return out.tanh() if self.twist else out


def test_listed_experts_by_hand():
    model = Listed().eval()
    x = torch.tensor([[1.0, 0.0], [-3.0, 4.0]])
    group = trace(model, x)["experts:experts"]
    found = collect_experts(model, [x], [group])[group.name]
    # logits (1, 0, -1) and (-3, 0, 3): experts 0 and 1, then 2 and 1
    a, b = 1 / (1 + torch.e**-1), 1 / (1 + torch.e**-3)
    assert found.tokens.tolist() == [1, 2, 1]
    assert found.weights.tolist() == pytest.approx([a, (1 - a) + (1 - b), b], rel=1e-5)
    assert found.norms.tolist() == pytest.approx([1, 2 + 10, 15])
    assert found.weighted.tolist() == pytest.approx([a, (1 - a) * 2 + (1 - b) * 10, b * 15], rel=1e-5)
    assert found.outputs.flatten().tolist() == pytest.approx([1, 0, 2 - 6, 8, -9, 12])


def test_routing_that_is_not_a_weighted_sum_is_refused():
    model, x = Listed(twist=True).eval(), torch.tensor([[0.01, 0.0], [-0.03, 0.04]])
    group = trace(model, x)["experts:experts"]
    with pytest.raises(SecateurError, match="can't be seen"):
        collect_experts(model, [x], [group])
    assert all("forward" not in expert.__dict__ for expert in model.experts) and not model._forward_hooks
