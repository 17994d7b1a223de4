"""MoNE: scores and vectors by hand, stacked and listed, where routers choose among groups, saved, and refused."""

import pytest
import torch
import transformers
from test_expert_stats import IDS, SMALL, Listed, build

import secateur
from secateur import SecateurError
from secateur.methods.mone import redundancy
from secateur.stats.experts import collect_experts
from secateur.surgery import mask_units
from secateur.surgery.changes import set_values

X = torch.tensor([[1.0, 0.0], [3.0, 0.0], [-2.0, 1.0]])
"""Expert 0 sees the first two tokens, expert 1 all, expert 2 the last, of which no variance is known."""


def kept(pruned):
    return {name: units.tolist() for name, units in pruned.plan.keep.items()}


def test_spread_times_weight_by_hand():
    model = Listed().eval()
    group = secateur.trace(model, X)["experts:experts"]
    scores = redundancy(collect_experts(model, [X], [group])[group.name])
    # expert 0 gives 1 and 3: variance 2; weights 0.731 and 0.953
    # expert 1 gives (2, 0), (6, 0), (-4, 2): variances 25.33 and 1.33; weights 0.269, 0.047 and 0.119
    assert scores.tolist() == pytest.approx([2**0.5 * 1.6837, (80 / 3) ** 0.5 * 0.4355, 0], rel=1e-3)


def test_the_vector_is_the_mean_output_and_the_router_stays():
    """By weights alone expert 1 would leave first, by variance expert 0 before 1."""
    model = Listed().eval()
    small = secateur.prune(model, [X], method="mone", target="67%", data=[X])
    assert kept(small) == {"experts:novices": [0, 1]}
    smaller = secateur.prune(model, [X], method="mone", target="34%", data=[X])
    assert kept(smaller) == {"experts:novices": [0]}
    first, second = (smaller.model.get_parameter(f"experts.{n}.constant").tolist() for n in (1, 2))
    assert first == pytest.approx([4 / 3, 2 / 3]) and second == pytest.approx([-6, 3])
    share = 1 / (1 + torch.e**-1)
    out = smaller.model(torch.tensor([[1.0, 0.0]]))[0].tolist()
    assert out == pytest.approx([100 + share + (1 - share) * 4 / 3, (1 - share) * 2 / 3], rel=1e-5)
    assert (
        torch.equal(smaller.model.gate.weight, model.gate.weight) and smaller.report["after"]["params"] == 14
    )


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
def test_stacked_experts_become_rows_and_it_loads_again(name, tmp_path):
    model = build(name)
    pruned = secateur.prune(model, method="mone", target="10%", data=IDS, seqlen=16)
    assert all(len(units) == 1 for units in pruned.plan.keep.values())  # fewer than the router picks
    group = next(iter(pruned.plan.keep))
    with torch.no_grad():
        layer, small = model.model.layers[0].mlp, pruned.model.model.layers[0].mlp
        x = torch.randn(1, 5, 16)
        (stays,) = kept(pruned)[group]
        seen = []
        handle = layer.experts.register_forward_pre_hook(lambda m, args: seen.append(args))
        layer(x)
        handle.remove()
        ((states, numbers, weights),) = seen
        rows = pruned.plan.values[f"{group.split(':')[0]}.experts.constants"]
        expected = torch.zeros_like(states)
        for token in range(len(states)):
            for number, weight in zip(numbers[token], weights[token]):
                ones = torch.ones(1, 1)
                own = layer.experts(states[token, None], number[None, None], ones)[0]
                expected[token] += weight * (own if number == stays else rows[number])
        torch.testing.assert_close(small.experts(states, numbers, weights), expected)
        about = pruned.save(tmp_path / "small")
        loaded = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "small", trust_remote_code=True
        ).eval()
        torch.testing.assert_close(loaded(IDS).logits, pruned.model(IDS).logits)
        ours, _ = secateur.load(tmp_path / "small")
        torch.testing.assert_close(ours(IDS).logits, pruned.model(IDS).logits)
    assert about is None and "vectors that no config says" in (tmp_path / "small/report.json").read_text()
    with pytest.raises(SecateurError, match="vectors already|can't be cut|can be cut"):
        secateur.prune(ours, method="mone", target="50%", data=IDS, seqlen=16)


def test_listed_experts_masked_saved_and_planned_again(tmp_path):
    model = Listed().eval()
    pruned = secateur.prune(model, [X], method="mone", target="34%", data=[X])
    masked, again = Listed().eval(), Listed().eval()
    set_values(masked, pruned.plan.values)
    mask_units(masked, pruned.graph, pruned.plan.keep)
    torch.testing.assert_close(masked(X), pruned.model(X))
    secateur.apply_plan(again, pruned.plan, [X])
    assert torch.equal(again(X), pruned.model(X))
    pruned.save(tmp_path / "small")
    loaded, _ = secateur.load(tmp_path / "small", model=Listed())
    assert torch.equal(loaded(X), pruned.model(X))


def test_parameters_count_the_vectors():
    model = build("mixtral")
    size = sum(p.numel() for p in model.parameters())
    expert, row = 3 * 16 * 24, 16
    pruned = secateur.prune(
        model, method="mone", target=f"params<={size - 6 * (expert - row)}", data=IDS, seqlen=16
    )
    assert sum(p.numel() for p in pruned.model.parameters()) == size - 6 * (expert - row)
    assert sum(map(len, pruned.plan.keep.values())) == 6


def test_what_cannot_be_is_refused_and_the_model_untouched():
    model = build("mixtral")
    before = {n: p.clone() for n, p in model.state_dict().items()}
    for match, settings in {
        "params is left": {"target": "params<=5%"},
        "means of the dense experts": {"target": "50%", "schedule": "iterative:2"},
        "take one of them": {"target": "50%", "kinds": ("experts", "novices")},
        "takes none": {"target": "50%", "repair": "bias"},
    }.items():
        with pytest.raises(SecateurError, match=match):
            secateur.prune(model, method="mone", data=IDS, seqlen=16, **settings)
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    single = transformers.MixtralConfig(**{**SMALL, "num_experts_per_tok": 1}, num_local_experts=1)
    with pytest.raises(SecateurError, match="nothing can be cut"):
        secateur.prune(
            transformers.MixtralForCausalLM(single).eval(), method="mone", target="50%", data=IDS, seqlen=16
        )


def test_multiply_adds_of_stacked_experts_are_no_target():
    with pytest.raises(SecateurError, match="depends on how many tokens are sent to them"):
        secateur.prune(build("mixtral"), method="mone", target="macs<=80%", data=IDS, seqlen=16)
