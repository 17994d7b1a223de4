"""NIRVANA: the sheet's worked examples (a)-(e), and the plans it makes."""

import copy

import pytest
import torch

import secateur
from secateur import SecateurError
from secateur.graph import Group, Slice
from secateur.methods.nirvana import (
    Nirvana,
    peak_logits,
    ratio_path,
    unit_budget,
)
from secateur.pruning.allocate import Competitor, lowest, spare_last, spare_to_multiple
from secateur.stats.windows import draw_windows, kl_divergence
from secateur.surgery import mask_units


def test_a_group_scores_of_the_sheet():
    def rows(units, k):
        return torch.arange(units * k).reshape(units, k)

    group = Group(
        name="attn:kv_groups",
        kind="kv_groups",
        size=2,
        slices=(
            Slice("q", 0, rows(2, 2), "out"),
            Slice("k", 0, rows(2, 1), "out"),
            Slice("v", 0, rows(2, 1), "out"),
            Slice("o", 1, rows(2, 2), "in"),
        ),
    )
    values = {
        "q": torch.tensor([[1.0, 1], [2, 0], [0, 1], [1, 0]]),
        "k": torch.tensor([[1.0, 0], [0, 2]]),
        "v": torch.tensor([[1.0, 1], [0, 1]]),
        "o": torch.tensor([[1.0, 0, 2, 1], [0, 1, 1, 1]]),
    }
    assert group.reduce(values, roles=("out", "in")).tolist() == [9, 10]


@pytest.mark.parametrize(
    "removed, gamma, expected, share",
    [(0.5, 3.36, (44, 265197), 0.49997), (0.2, 3.36, (17, 106078), 0.1995), (0.5, 1.0, (128, 229376), 0.5)],
)
def test_b_budget_of_the_sheet(removed, gamma, expected, share):
    """Llama-3.1-8B: 32 layers of 8 groups of 2·128·5 and 14336 neurons of 3 hidden widths."""
    found = unit_budget(removed, 32 * 8, 32 * 14336, gamma, 1280, 3)
    assert found == expected
    total = 1280 * 256 + 3 * 32 * 14336
    assert (1280 * found[0] + 3 * found[1]) / total == pytest.approx(share, abs=6e-5)


@pytest.mark.parametrize(
    "width, candidates, kept",
    [(32, 13, 24), (32, 16, 16), (32, 30, 8), (32, 32, 8), (32, 5, 32), (30, 1, 30)],
)
def test_c_rounding_of_the_sheet(width, candidates, kept):
    scores = torch.randn(width).abs()
    gone = torch.zeros(width, dtype=torch.bool)
    gone[scores.topk(candidates, largest=False).indices] = True
    left = spare_to_multiple(scores, gone)
    assert int((~left).sum()) == kept
    assert torch.equal(left, left & gone)
    if left.any():  # the best candidates are spared
        assert scores[left].max() < scores[~left].min()


def test_d_thresholds_and_guard():
    scores = [torch.tensor([3.0, 1.0]), torch.tensor([2.0, 0.0])]
    assert [mask.tolist() for mask in lowest(scores, 0)] == [[False, False], [False, False]]
    assert [mask.tolist() for mask in lowest(scores, 2)] == [[False, True], [False, True]]
    assert spare_last(torch.tensor([True, True])).tolist() == [True, False]
    assert spare_last(torch.tensor([False, True])).tolist() == [False, True]


@pytest.fixture
def model(tiny_llama):
    return tiny_llama(num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4)


@pytest.fixture
def ids():
    return torch.randint(0, 64, (40, 24), generator=torch.Generator().manual_seed(1))


def test_e_the_objective_takes_the_maximum_over_positions(model, ids):
    batch = {"input_ids": ids[:3]}
    with torch.no_grad():
        logits = model(**batch).logits
        assert peak_logits(model, batch).item() == pytest.approx(logits.max(1).values.mean().item())
        one = {"input_ids": ids[:3, :1]}
        assert peak_logits(model, one).item() == pytest.approx(model(**one).logits.mean().item(), abs=1e-7)


def test_e_padding_has_no_part_in_the_objective(model, ids):
    padded = {
        "input_ids": torch.cat([ids[:2], torch.zeros_like(ids[:2])], 1),
        "attention_mask": torch.cat([torch.ones_like(ids[:2]), torch.zeros_like(ids[:2])], 1),
    }
    with torch.no_grad():
        assert peak_logits(model, padded).item() == pytest.approx(
            peak_logits(model, {"input_ids": ids[:2]}).item(), abs=1e-6
        )


def test_e_finite_differences(model, ids):
    """Moving one weight by ±0.01·w changes f by about ±0.01·w·∂f/∂w."""
    weight = model.model.layers[1].mlp.up_proj.weight
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    batch = {"input_ids": ids[:4]}
    gradient = torch.autograd.grad(peak_logits(model, batch), weight)[0]
    with torch.no_grad():
        for index in (weight * gradient).abs().flatten().topk(3).indices:
            w, found = weight.flatten()[index].item(), []
            for factor in (1.01, 0.99):
                weight.view(-1)[index] = factor * w
                found.append(model(**batch).logits.double().amax(1).mean().item())
            weight.view(-1)[index] = w
            assert found[0] - found[1] == pytest.approx(0.02 * w * gradient.flatten()[index].item(), rel=0.05)


def scores_by_hand(model, ids):
    """|w·∂f/∂w| of the neurons of every layer and of its groups of 2 query heads, 1 key and 1 value head of 4."""
    with torch.enable_grad():
        model(ids).logits.amax(1).mean().backward()
    neurons, groups = [], []
    for block in model.model.layers:
        s = {name: (p * p.grad).abs().detach() for name, p in block.named_parameters()}
        neurons.append(
            s["mlp.gate_proj.weight"].sum(1)
            + s["mlp.up_proj.weight"].sum(1)
            + s["mlp.down_proj.weight"].sum(0)
        )
        out = [s[f"self_attn.{n}_proj.weight"].sum(1).reshape(4, -1).sum(1) for n in "qkv"]
        groups.append(sum(out) + s["self_attn.o_proj.weight"].sum(0).reshape(4, -1).sum(1))
    model.zero_grad()
    return torch.stack(groups), torch.stack(neurons)


def test_the_published_rule_against_scores_and_thresholds_by_hand(model, ids, plan_of):
    """All windows are drawn, so the scores are those of all the data; each layer: 4 groups of 24, 48 neurons of 3."""
    keep = plan_of(model, "nirvana", "60%", ids, windows=40, length=24, gamma=1.5, rounding="paper").keep
    groups, neurons = scores_by_hand(model, ids)
    k_groups, k_neurons = unit_budget(0.4, 16, 192, 1.5, 24, 3)
    assert (k_groups, k_neurons) == (4, 88)  # x = 0.4·960 / (24 + 3·18) = 4.923, 18 neurons a group: 88.6
    attention = groups <= groups.flatten().kthvalue(4).values
    mlp = neurons <= neurons.flatten().kthvalue(88).values
    for layer in range(4):
        kept = keep.get(f"model.layers.{layer}.self_attn:kv_groups", torch.arange(4))
        assert kept.tolist() == ((~attention[layer]).nonzero().flatten().tolist() or [3])
        kept = keep.get(f"model.layers.{layer}.mlp:neurons", torch.arange(48))
        wanted = -(-int((~mlp[layer]).sum()) // 8) * 8
        wanted = wanted if wanted - int((~mlp[layer]).sum()) < int(mlp[layer].sum()) else 48
        assert torch.equal(kept, neurons[layer].topk(wanted).indices.sort().values)


def test_neurons_leave_gamma_times_as_fast():
    attention = Competitor("a", "kv_groups", torch.arange(10.0))
    mlp = Competitor("m", "neurons", torch.arange(100.0))
    path = ratio_path([attention, mlp], gamma=4.0)
    gone = [name for step in path for name, _ in step]
    first = gone[: gone.index("a") + 1]
    assert first.count("m") == 20  # the first of 10 groups leaves at 0.05·4 of the neurons
    half = gone[:62]
    assert (half.count("a"), half.count("m")) == (2, 60)
    assert [unit for step in path for name, unit in step if name == "a"] == list(range(9))


def test_the_default_ratio_is_that_of_the_weights(tiny_llama, ids, plan_of):
    model = tiny_llama(num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4)
    attention = sum(p.numel() for n, p in model.named_parameters() if "self_attn" in n)
    mlp = sum(p.numel() for n, p in model.named_parameters() if ".mlp." in n)
    default, same, other = (
        plan_of(model, "nirvana", "60%", ids, gamma=gamma).keep for gamma in (None, mlp / attention, 6.0)
    )
    assert default.keys() == same.keys() and all(torch.equal(default[n], same[n]) for n in same)
    assert sum(map(len, other.values())) != sum(map(len, default.values()))


def test_any_target_and_uniform_layers(model, ids, plan_of):
    params = sum(p.numel() for p in model.parameters())
    pruned = secateur.prune(model, method="nirvana", target="params<=75%", data=ids)
    after = sum(p.numel() for p in pruned.model.parameters())
    assert 0.75 * params - 96 < after <= 0.75 * params
    keep = plan_of(model, "nirvana", "70%", ids, allocation="uniform").keep
    for end in (":neurons", ":kv_groups"):
        assert len({len(units) for name, units in keep.items() if name.endswith(end)}) <= 1


def test_scaling_the_output_leaves_the_plan(model, ids, plan_of):
    plan = plan_of(model, "nirvana", "60%", ids)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    again = plan_of(model, "nirvana", "60%", ids)
    assert all(torch.equal(plan.keep[n], again.keep[n]) for n in plan.keep)


def test_permuted_neurons_permute_the_plan(model, ids, plan_of):
    plan = plan_of(model, "nirvana", "60%", ids)
    order = torch.randperm(48)
    mlp = model.model.layers[2].mlp
    with torch.no_grad():
        for linear in (mlp.gate_proj, mlp.up_proj):
            linear.weight.copy_(linear.weight[order])
        mlp.down_proj.weight.copy_(mlp.down_proj.weight[:, order])
    again = plan_of(model, "nirvana", "60%", ids)
    name = "model.layers.2.mlp:neurons"
    assert torch.equal(order[again.keep[name]].sort().values, plan.keep[name])


def test_kl_divergence_by_hand(model, tiny_llama, ids):
    other = tiny_llama(num_hidden_layers=1)
    with torch.no_grad():
        p, q = (m(ids).logits.log_softmax(-1) for m in (model, other))
    expected = (p.exp() * (p - q)).sum(-1).mean().item()
    assert kl_divergence(model, other, ids) == pytest.approx(expected, rel=1e-4)
    assert kl_divergence(model, model, ids) == 0


def test_candidates_pick_the_draw_that_diverges_least(model, ids, plan_of):
    settings = {"windows": 2, "length": 8}
    chosen = plan_of(model, "nirvana", "60%", ids, candidates=4, **settings)
    assert "draw" in chosen.notes["calibration"]
    alone = plan_of(model, "nirvana", "60%", ids, **settings)
    graph = secateur.trace(model, {"input_ids": ids[:2]})

    def divergence(plan):
        masked = copy.deepcopy(model)
        mask_units(masked, graph, plan.keep)
        return kl_divergence(model, masked, ids)

    assert divergence(chosen) <= divergence(alone) * 1.02


def test_windows_are_drawn_without_repeats():
    data = torch.arange(60).reshape(6, 10)
    generator = torch.Generator().manual_seed(0)
    drawn = draw_windows(data, 4, 5, generator)
    assert drawn.shape == (4, 5) and len(set((drawn // 10)[:, 0].tolist())) == 4
    assert torch.equal(drawn - drawn[:, :1], torch.arange(5).expand(4, 5))
    assert sorted(draw_windows(data, 12, 5, generator)[:, 0].tolist()) == list(range(0, 60, 5))
    assert draw_windows(data, 4, 20, generator).shape == (4, 10)
    items = [{"input_ids": row[None], "attention_mask": torch.ones(1, 10)} for row in data]
    cut = draw_windows(items, 2, 3, generator)
    assert [tuple(item["input_ids"].shape) for item in cut] == [(1, 3), (1, 3)]
    assert all(item["attention_mask"].shape == (1, 3) for item in cut)
    with pytest.raises(SecateurError):
        draw_windows([], 1, 1, generator)


def test_nonsense_is_refused():
    for wrong in ({"gamma": 0.0}, {"candidates": 0}, {"rounding": "up"}):
        with pytest.raises(SecateurError):
            Nirvana(**wrong)
