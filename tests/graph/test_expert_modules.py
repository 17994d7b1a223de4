"""Experts that are modules of a list: they leave with their router rows, where the code treats all of them alike."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import secateur
from secateur.graph import trace
from secateur.io.reshape import compare, reshape
from secateur.pruning.plan import Plan
from secateur.surgery import cut_units, mask_units, prove


class Expert(nn.Module):
    def __init__(self, width, inner):
        super().__init__()
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


class Mixture(nn.Module):
    def __init__(self, style, width=8, inner=12, count=5):
        super().__init__()
        self.gate = nn.Linear(width, count, bias=False)
        self.experts = nn.ModuleList(Expert(width, inner) for _ in range(count))
        self.num_experts, self.style = count, style

    def forward(self, x):
        shape, x = x.shape, x.reshape(-1, x.shape[-1])
        weights, picked = torch.topk(F.softmax(self.gate(x), -1), 2, -1)
        out = torch.zeros_like(x)
        if self.style in ("range", "hit"):
            mask = F.one_hot(picked, num_classes=self.num_experts).permute(2, 1, 0)
            numbers = range(self.num_experts)
            if self.style == "hit":
                numbers = (mask.sum(dim=(-1, -2)) > 0).nonzero()
            for e in numbers:
                place, token = torch.where(mask[e].reshape(mask.shape[1:]))
                out.index_add_(0, token, self.experts[e](x[token]) * weights[token, place, None])
        else:
            for e, expert in enumerate(self.experts):
                if self.style == "shared first" and e == 0:
                    continue
                token, place = torch.where(picked == e)
                out[token] += expert(x[token]) * weights[token, place, None]
        return out.view(shape)


class Network(nn.Module):
    def __init__(self, style):
        super().__init__()
        self.stem, self.head = nn.Linear(6, 8), nn.Linear(8, 3)
        self.blocks = nn.ModuleList(Mixture(style) for _ in range(2))

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def build(style):
    torch.manual_seed(0)
    return Network(style).eval(), torch.randn(2, 20, 6)


@pytest.mark.parametrize("style", ["range", "hit", "enumerate"])
def test_modules_leave_with_their_rows(style):
    model, x = build(style)
    graph = trace(model, x)
    groups = graph.prunable("experts")
    assert [(g.name, g.size, g.least, g.exact) for g in groups] == [
        ("blocks.0.experts:experts", 5, 2, True),
        ("blocks.1.experts:experts", 5, 2, True),
    ]
    assert groups[0].modules == tuple(f"blocks.0.experts.{e}" for e in range(5))
    keep = {groups[0].name: torch.tensor([0, 2, 3]), groups[1].name: torch.tensor([1, 4])}
    assert prove(model, graph, keep, x) == {}
    masked = copy.deepcopy(model)
    mask_units(masked, graph, keep)
    dense = copy.deepcopy(model)
    changes = cut_units(model, graph, keep)
    torch.testing.assert_close(model(x), masked(x), rtol=1e-5, atol=1e-5)
    one = 8 + 12 * 8 + 12 + 8 * 12 + 8  # router row, up and its bias, down and its bias
    assert graph.params() - sum(p.numel() for p in model.parameters()) == 5 * one
    first = model.blocks[0]
    assert (len(first.experts), first.num_experts, first.gate.out_features) == (3, 3, 3)
    assert torch.equal(first.experts[1].up.weight, dense.blocks[0].experts[2].up.weight)
    fresh, _ = build(style)
    reshape(fresh, compare(model, build(style)[0], changes.layers))
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), model(x))


def test_the_answer_by_hand():
    model, x = build("enumerate")
    graph = trace(model, x)
    keep = {g.name: torch.tensor([1, 2, 4]) for g in graph.prunable("experts")}
    with torch.no_grad():
        h = model.stem(x)
        for block in model.blocks:
            logits = block.gate(h)[..., [1, 2, 4]]
            share, best = logits.softmax(-1).sort(-1, descending=True)
            answers = torch.stack([block.experts[e](h) for e in (1, 2, 4)], -2)
            two = torch.take_along_dim(answers, best[..., :2, None], -2) * share[..., :2, None]
            h = h + two.sum(-2)
        expected = model.head(h)
    cut_units(model, graph, keep)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


def test_an_expert_that_is_treated_apart_stays():
    model, x = build("shared first")
    graph = trace(model, x)
    assert not graph.prunable("experts")
    frozen = [g for g in graph.groups if g.kind == "experts"]
    assert len(frozen) == 2 and all("told apart by number" in g.reason for g in frozen)
    assert not graph["blocks:layers"].reason and "blocks.0.experts:layers" not in [
        g.name for g in graph.groups
    ]


def test_an_expert_that_no_token_reached_follows_the_others():
    model, x = build("hit")
    with torch.no_grad():
        model.blocks[1].gate.weight[3] = 0
        model.blocks[1].gate.weight[:3] = model.blocks[1].gate.weight[:3].abs() + 1
    x = x.abs()
    model.stem.weight.data.abs_()
    model.stem.bias.data.abs_()
    for name in ("up", "down"):
        for expert in model.blocks[0].experts:
            getattr(expert, name).weight.data.abs_()
    calls = []
    handle = model.blocks[1].experts[3].register_forward_hook(lambda *_: calls.append(1))
    graph = trace(model, x)
    handle.remove()
    assert not calls
    hidden = next(
        g for g in graph.prunable() if any(s.name == "head.weight" and s.dim == 1 for s in g.slices)
    )
    names = {s.name for s in hidden.slices}
    assert all(f"blocks.1.experts.{e}.up.weight" in names for e in range(5))


@pytest.mark.parametrize("kinds", [("experts",), ("experts", "layers", "neurons"), None])
def test_pruned_saved_loaded_and_planned_again(kinds, tmp_path):
    model, x = build("range")
    pruned = secateur.prune(model, x, method="group-magnitude", target="60%", kinds=kinds)
    experts = [(g["size"], g["kept"]) for g in pruned.report["groups"] if g["kind"] == "experts"]
    assert experts == [(5, 3), (5, 3)]
    pruned.save(tmp_path / "out")
    loaded, _ = secateur.load(tmp_path / "out", model=build("range")[0])
    torch.testing.assert_close(loaded(x), pruned.model(x))
    fresh, _ = build("range")
    secateur.apply_plan(fresh, Plan.load(tmp_path / "out"))
    torch.testing.assert_close(fresh(x), pruned.model(x))


def test_scores_count_what_is_in_the_modules():
    model, x = build("range")
    graph = trace(model, x)
    group = graph["blocks.1.experts:experts"]
    ones = {n: torch.ones_like(p) for n, p in model.named_parameters()}
    assert group.reduce(ones).tolist() == [8.0 + 2 * 96 + 12 + 8] * 5
    assert group.reduce(ones, roles=("out", "in")).tolist() == [8.0 + 2 * 96] * 5
    model.blocks[1].experts[2].down.weight.data.mul_(100)
    small = secateur.prune(model, x, method="group-magnitude", target="40%", kinds=("experts",))
    assert 2 in small.plan.keep["blocks.1.experts:experts"].tolist()
