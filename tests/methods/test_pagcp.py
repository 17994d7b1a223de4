"""The worked examples and invariants of pagcp."""

from math import prod

import pytest
import torch
from torch import nn

import secateur
from secateur import SecateurError
from secateur.graph import trace
from secateur.scores.lift import smallest_first
from secateur.solvers.guarded import Accepted, cheapest, decay, greedy, in_order, savings
from secateur.surgery import cut_units, trial, unit_masks
from secateur.training.task import Task


@pytest.mark.parametrize(
    ("first", "count", "budget", "factor"),
    [
        (0.06, 60, 6.0, 0.973794),
        (0.05, 60, 5.0, 0.976971),
        (0.2, 3, 1.5, 0.696802),
        (0.1, 3, 1.5, 1.400447),
        (0.3, 3, 1.2, 0.0),
        (0.0, 3, 1.2, 1.0),
    ],
)
def test_the_factor_of_the_sheet(first, count, budget, factor):
    found = decay(first, count, budget)
    assert found == pytest.approx(factor, abs=1e-6)
    if 0 < found:
        assert prod(1 + first * found**i for i in range(count)) == pytest.approx(budget if first else 1.0)
    if first == 0.2:
        assert [first * found**i for i in range(3)] == pytest.approx([0.2, 0.13936, 0.09711], abs=1e-5)


FACTORS = {
    "A": {1: (1.01, 1.00), 2: (1.03, 1.01), 3: (1.04, 1.09), 4: (1.2, 1.2)},
    "B": {1: (1.00, 1.02), 2: (1.02, 1.04), 3: (1.02, 1.30), 4: (1.5, 1.5)},
}


def toy(removed):
    one, two = 10.0, 20.0
    for name, count in removed.items():
        first, second = FACTORS[name].get(count, (9.0, 9.0))
        one, two = one * first, two * second
    return {"1": one, "2": two}


@pytest.mark.parametrize("order", ["AB", "BA"])
def test_the_pass_of_the_sheet(order):
    found = {step.name: step for step in greedy(dict.fromkeys(order, 20), toy, 0.05, 0.9)}
    assert {name: step.removed for name, step in found.items()} == {"A": 2, "B": 2}
    assert found["A"].worst == found["B"].worst == "2"
    last = found[order[-1]]
    assert list(last.losses.values()) == pytest.approx([10.506, 21.008])


def test_the_guard_of_the_sum_lets_the_weak_task_suffer():
    # task 2 is a hundredth of task 1, so that its tripling is 2 % of the sum
    weak = lambda removed: {"1": 100.0, "2": 1.0 + 0.4 * removed.get("A", 0)}
    assert [s.removed for s in greedy({"A": 20}, weak, 0.05, 1.0)] == [0]
    assert [s.removed for s in greedy({"A": 20}, weak, 0.05, 1.0, guard="sum")] == [12]


def test_a_layer_that_survives_the_grid_leaves_by_its_last_step():
    harmless = lambda removed: {"1": 1.0}
    assert [s.removed for s in greedy({"A": 40, "B": 180, "C": 1}, harmless, 0.05, 1.0)] == [38, 171, 0]


def test_no_allowance_lets_nothing_leave_that_costs():
    grows = lambda removed: {"1": 1.0 + sum(removed.values())}
    assert not any(s.removed for s in greedy({"A": 40}, grows, 0.0, 1.0))
    with pytest.raises(SecateurError, match="the loss '1' is 0"):
        greedy({"A": 4}, lambda removed: {"1": 0.0}, 0.1, 1.0)
    with pytest.raises(SecateurError, match="the loss '1' is nan"):
        greedy({"A": 4}, lambda removed: {"1": float("nan")}, 0.1, 1.0)


def test_order_and_the_cheapest():
    assert in_order({"a": 2.0, "b": 3.0, "c": 1.0}, 1.0) == ["b", "a", "c"]
    assert in_order({"a": 2.0, "b": 3.0, "c": 1.0}, 1.2) == ["c", "a", "b"]
    steps = [
        Accepted(n, r, {"x": 1 + rise}, 1.0, "")
        for n, r, rise in (("a", 1, 0.3), ("b", 1, 0.1), ("c", 0, 0.0))
    ]
    saved = {"a": 10.0, "b": 10.0, "c": 10.0}
    assert [s.name for s in cheapest(steps, saved, 1.0)] == ["b", "a"]
    assert [s.name for s in cheapest(steps, saved, 0.67)] == ["b", "a"]
    assert [s.name for s in cheapest(steps, saved, 0.5)] == ["b"]


def test_a_layer_saves_what_is_left_to_save_behind_those_before_it():
    """Two layers one behind the other: 10 x 10 weights, then 8 x 10, 8 x 10 and 8 x 5."""
    steps = [Accepted(n, r, {"x": 1.0}, 1.0, "") for n, r in (("a", 2), ("b", 0), ("c", 5))]
    weights = lambda removed: (10 - removed.get("a", 0)) * (10 - removed.get("c", 0))
    assert savings(steps, weights) == {"a": 20.0, "b": 0.0, "c": 40.0}


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.even, self.large = nn.Linear(8, 2), nn.Linear(8, 2)

    def forward(self, x):
        y = torch.relu(self.conv1(x))
        y = (y + torch.relu(self.conv2(y))).mean((2, 3))  # both layers lose the same channels
        return torch.cat((self.even(y), self.large(y)), 1)


def losses(model, batch):
    x, wanted = batch
    made = model(x)
    entropy = nn.functional.cross_entropy
    return {"even": entropy(made[:, :2], wanted[:, 0]), "large": entropy(made[:, 2:], wanted[:, 1])}


def heads_task(**changed):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Heads()
        x = torch.randn(48, 1, 6, 6)
    wanted = torch.stack((torch.arange(48) % 2, (torch.arange(48) > 20).long()), 1)
    settings = {"losses": losses, "inputs": x[:1], "loss": lambda m, b: sum(losses(m, b).values())}
    return Task("heads", lambda: model, (x, wanted), pretrained=lambda: model, **{**settings, **changed})


def test_a_trial_leaves_the_model_as_it_was_and_masks_tell_where_zeros_are():
    task = heads_task()
    model = task.build()
    graph = trace(model, task.inputs)
    name = next(g.name for g in graph.prunable() if g.kind == "channels")
    before = {n: t.clone() for n, t in model.state_dict().items()}
    keep = {name: torch.tensor([0, 3, 5])}
    x = task.train[0][:2]
    with torch.no_grad():
        with trial(model, graph, keep):
            tried = model(x)
            zeros = {n: p != 0 for n, p in model.named_parameters()}
        assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
        masks = unit_masks(model, graph, keep)
        assert all(torch.equal(mask, zeros[n]) for n, mask in masks.items()) and len(masks) >= 4
        with pytest.raises(RuntimeError, match="stopped"), trial(model, graph, keep):
            raise RuntimeError("stopped")
        assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
        cut_units(model, graph, keep)
        torch.testing.assert_close(model(x), tried)


def test_sizes_are_summed_over_coupled_layers():
    model = heads_task().build()
    graph = trace(model, heads_task().inputs)
    (group,) = graph.prunable("channels")
    with torch.no_grad():
        model.conv1.weight.fill_(1.0)
        model.conv2.weight.zero_()
        model.conv2.weight[:, :, 0, 0] = torch.arange(8.0, 0, -1)[:, None]
    assert smallest_first(model, group).tolist() == [7, 6, 5, 4, 3, 2, 1, 0]


def test_it_meets_the_target_and_tells_what_each_task_lost():
    settings = {"method": "pagcp", "target": "macs<=60%", "steps": 4, "batch": 16, "lr": 0.01}
    pruned = secateur.train_prune(heads_task(), **settings)
    assert pruned.report["met"]
    assert pruned.report["after"]["macs"] <= 0.6 * pruned.report["before"]["macs"]
    rounds = [row for row in pruned.report["phases"] if "growth" in row]
    assert set(rounds[0]["growth"]) == {"even", "large"}


def test_the_worst_task_stays_within_the_product_of_allowances():
    settings = {"method": "pagcp", "target": "macs<=97%", "steps": 1, "lr": 1e-6}
    pruned = secateur.train_prune(
        heads_task(), allowance=0.1, budget=1.2, top=1.0, samples=48, batch=16, **settings
    )
    for row in pruned.report["phases"]:
        if "growth" in row:
            assert max(row["growth"].values()) <= 1.2 + 1e-6


def test_what_cannot_be_is_refused():
    settings = {"method": "pagcp", "target": "macs<=60%", "steps": 2, "batch": 16}
    with pytest.raises(SecateurError, match="one loss.*losses="):
        secateur.train_prune(heads_task(losses=None), **settings)
    assert secateur.train_prune(heads_task(losses=None), single=True, **settings).report["met"]
    with pytest.raises(SecateurError, match="its losses allow .* after 2 rounds.*raise allowance"):
        secateur.train_prune(heads_task(), allowance=1e-9, budget=1.0, rounds=2, **settings)
    negative = lambda m, b: {"even": -losses(m, b)["even"]}
    with pytest.raises(SecateurError, match="'even' is -"):
        secateur.train_prune(heads_task(losses=negative), **settings)
