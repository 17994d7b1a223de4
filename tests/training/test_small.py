"""Small pieces of training, by hand: patterns, journals, ramps, halves, shares of a batch, orders and schedules."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from secateur.errors import SecateurError
from secateur.training import parallel
from secateur.training.batches import Draw, check_classes, length
from secateur.training.fit import fit, schedule
from secateur.training.journal import Journal
from secateur.training.masks import (
    below_sampled_threshold,
    check_masks,
    density,
    fit_pattern,
    full_masks,
    prune_smallest,
    smallest_of_groups,
)
from secateur.training.ramp import Ramp
from secateur.training.recipe import Recipe
from secateur.training.second import halves


def test_the_smallest_of_every_group_leave_ties_by_index():
    weight = torch.tensor([[0.9, -0.1, 0.2, 0.3], [0.5, 0.5, -0.5, 0.5]])
    assert smallest_of_groups(weight, 2, 4).int().tolist() == [[0, 1, 1, 0], [1, 1, 0, 0]]
    assert smallest_of_groups(weight, 1, 2).int().tolist() == [[0, 1, 1, 0], [1, 0, 1, 0]]


@pytest.mark.parametrize(("ratio", "rank"), [(0.5, 3), (0.51, 4), (0.0, 1), (1.0, 6)])
def test_a_threshold_is_sampled(ratio, rank):
    weight, g = torch.randn(4, 5), torch.Generator().manual_seed(3)
    drawn = weight.abs().flatten()[torch.randint(20, (6,), generator=torch.Generator().manual_seed(3))]
    threshold = sorted(drawn.tolist())[rank - 1]
    found = below_sampled_threshold(weight, ratio, 6, g)
    assert found.flatten().tolist() == [abs(w) < threshold for w in weight.flatten().tolist()]


def test_patterns_fit_all_layers():
    assert fit_pattern(2, 4, [10, 20]) == (3, 5) and fit_pattern(2, 4, [16, 24]) == (2, 4)
    for sizes in ([8, 12], [6, 9]):
        with pytest.raises(SecateurError, match="greatest common divisor"):
            fit_pattern(1, 4, sizes)


def test_a_weight_is_removed_once_and_layers_and_rates_are_counted():
    weights = {"a": torch.tensor([1.0, -2, 3, 4]), "b": torch.tensor([0.5, 5, 6, 7])}
    masks = full_masks(weights)
    masks["a"][1] = False
    assert density(masks) == 7 / 8
    one = prune_smallest(weights, masks, 1 / 7)  # 1 of 7 survivors, also in floating point
    assert (one["a"].int().tolist(), one["b"].int().tolist()) == ([1, 0, 1, 1], [0, 1, 1, 1])
    each = prune_smallest(weights, masks, {"a": 0.5, "b": 0.25}, scope="layer")  # 1.5 goes to the even 2, 1
    assert (each["a"].int().tolist(), each["b"].int().tolist()) == ([0, 0, 0, 1], [0, 1, 1, 1])
    kept = prune_smallest(weights, masks, keep={"a": 2, "b": 4}, scope="layer")
    assert (kept["a"].int().tolist(), kept["b"].int().tolist()) == ([0, 0, 1, 1], [1, 1, 1, 1])
    assert masks["a"].int().tolist() == [1, 0, 1, 1]
    for settings, message in (
        ({"scope": "rows"}, "no scope"),
        ({"rate": 1.0}, "7 of 7 weights would leave"),
        ({"keep": 2, "compat": "x"}, "no compat"),
    ):
        with pytest.raises(SecateurError, match=message):
            prune_smallest(weights, masks, **settings)


def test_a_mask_may_leave_one_weight_but_not_none():
    net = nn.Linear(2, 1, bias=False)
    check_masks(net, {"weight": torch.tensor([[True, False]])})
    with pytest.raises(SecateurError, match="empties the layer"):
        check_masks(net, {"weight": torch.zeros(1, 2, dtype=torch.bool)})


def test_a_journal_measures_once(tmp_path):
    file, seen = tmp_path / "j.json", []

    def measure():
        seen.append(len(seen))
        return {"n": len(seen)}

    first = Journal(file)
    assert [first(measure), first(measure)] == [{"n": 1}, {"n": 2}]
    assert json.loads(file.read_text()) == {"results": [{"n": 1}, {"n": 2}]}
    again = Journal(file)
    assert [again(measure) for _ in range(3)] == [{"n": 1}, {"n": 2}, {"n": 3}] and len(seen) == 3
    assert Journal(None)(measure) == {"n": 4}


def test_a_ramp_rises_to_one_and_is_kept():
    ramp = Ramp(0.5)
    weights = []
    for step in range(8):
        ramp(SimpleNamespace(step=step, steps=8))
        weights.append(ramp.weight)
    assert weights == [0.25, 0.5, 0.75, 1, 1, 1, 1, 1] and Ramp(0.0).weight == 1 and Ramp(0.1).weight == 0
    later = Ramp(0.5)
    later.load_state_dict({"step": 3, "steps": 8})
    assert later.weight == 0.75 and later.state_dict() == {"step": 3, "steps": 8}


def test_halves_hold_every_sample_once():
    first, second = halves((torch.arange(5), torch.arange(5) * 2), torch.Generator().manual_seed(1))
    assert len(first[0]) == 2 and sorted([*first[0].tolist(), *second[0].tolist()]) == [0, 1, 2, 3, 4]
    assert torch.equal(first[1], first[0] * 2)
    a, b = halves(["p", "q"], torch.Generator())
    assert sorted(a + b) == ["p", "q"] and len(a) == 1
    with pytest.raises(SecateurError, match="no halves"):
        halves(torch.zeros(1, 3), torch.Generator())


def test_a_batch_is_shared_in_equal_consecutive_pieces():
    batch = {"x": torch.arange(6), "y": torch.arange(12).reshape(6, 2)}
    parts = [parallel.part(batch, rank, 3) for rank in range(3)]
    assert [p["x"].tolist() for p in parts] == [[0, 1], [2, 3], [4, 5]]
    assert parts[1]["y"].tolist() == [[4, 5], [6, 7]] and parallel.part(batch, 0, 1) is batch
    for size in (4, 7):
        with pytest.raises(SecateurError, match="multiple of"):
            parallel.part(batch, 0, size)


def test_a_part_of_a_run_without_torchrun_is_the_main_process(monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert parallel.join(torch.device("cpu")) == (0, 1) and parallel.is_main()
    assert parallel.local_device("cpu") == torch.device("cpu")
    assert parallel.mean(torch.tensor(3.0, dtype=torch.float64), 1).dtype == torch.float32
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert parallel.join(torch.device("cpu")) == (0, 1)
    monkeypatch.setenv("RANK", "1")
    assert not parallel.is_main()


def test_batches_reach_over_the_end_of_an_epoch():
    draw = Draw(torch.arange(5) * 10, 2, seed=1)
    seen = torch.cat([draw.indices(step) for step in range(5)])
    assert sorted(seen[:5].tolist()) == sorted(seen[5:].tolist()) == [0, 1, 2, 3, 4]
    assert seen[:5].tolist() != seen[5:].tolist()  # another order in each
    assert torch.equal(draw(2), torch.stack([draw.data[i] for i in draw.indices(2)]))
    assert torch.equal(draw.indices(0), Draw(torch.arange(5), 2, seed=1).indices(0))
    large = Draw(torch.arange(3), 7, seed=0)
    assert sorted(large.indices(1).tolist()) == sorted(
        [*large.order(2)[1:].tolist(), *range(3), *large.order(4)[:2].tolist()]
    )
    ready = Draw(["a", "b", "c"], 5, seed=0)
    assert sorted(ready(step) for step in range(3)) == ["a", "b", "c"]


def test_fingerprints_tell_data_and_batches_apart():
    x = torch.arange(6.0)
    prints = [
        Draw(x, 2, 0),
        Draw(x.double(), 2, 0),
        Draw(x + 1, 2, 0),
        Draw(x.reshape(6, 1), 2, 0),
        Draw(x, 3, 0),
    ]
    assert len({draw.fingerprint for draw in prints}) == 5
    assert Draw(x.clone(), 2, 1).fingerprint == prints[0].fingerprint


def test_lengths_and_classes():
    assert length((torch.zeros(3, 2), torch.zeros(3))) == 3 and length([1, 2]) == 2
    for data, message in (
        ([], "no samples"), (torch.zeros(0, 2), "no samples"), ((torch.zeros(3), torch.zeros(2)), r"\[2, 3\] samples"),
        (torch.tensor(1.0), "no samples"), ((torch.zeros(0), torch.zeros(2)), r"\[0, 2\] samples"),
    ):  # fmt: skip
        with pytest.raises(SecateurError, match=message):
            length(data)
    check_classes(torch.tensor([0, 1, 2]), 3)
    for labels, message in (
        ([0, 1, 3], "from 0 to 3 in 3"),
        ([-1, 0, 1, 2], "from -1"),
        ([0, 2], "class 1"),
        ([0, 0], "1, 2"),
    ):
        with pytest.raises(SecateurError, match=message):
            check_classes(torch.tensor(labels), 3)


def test_the_rate_at_every_step():
    assert [schedule(step, 4, 0.5) for step in range(4)] == pytest.approx([0.5, 1, 1, 0.5])
    assert schedule(0, 10) == 1.0 and schedule(0, 10, 0.0) == 1.0  # a warm-up of one step is none
    recipe = Recipe(lr=2.0, lr_schedule="constant", warmup=1.0)
    assert [recipe.rate(step, 4) for step in range(4)] == [0.5, 1, 1.5, 2]
    assert [Recipe(lr_schedule="linear", warmup=0).factor(s, 2) for s in (0, 1)] == [1, 0.5]
    drops = Recipe(lr_schedule="milestones", milestones=(0.25, 0.5), gamma=0.5, warmup=0.0)
    assert [drops.factor(step, 4) for step in range(4)] == [1, 0.5, 0.25, 0.25]


@pytest.mark.parametrize(
    "change", [{"batch": 0}, {"lr": 0.0}, {"lr": float("inf")}, {"warmup": -0.1}, {"warmup": 1.1}, {"momentum": -1e-9},
               {"weight_decay": float("nan")}, {"clip": float("inf")}, {"nesterov": True, "momentum": 0.0}],
)  # fmt: skip
def test_recipes_at_their_bounds(change):
    with pytest.raises(SecateurError):
        Recipe().replace(**change)


def test_bounds_are_allowed():
    Recipe(batch=1, warmup=0.0, momentum=0.0, weight_decay=0.0, clip=0.0), Recipe(warmup=1.0, nesterov=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"steps": 0}, "less than 1"), ({"steps": 2, "every": 0}, "less than 1"), ({"steps": 2, "start": 3}, "part of 2"),
     ({"steps": 2, "until": 3}, "part of 2"), ({"steps": 4, "start": 2, "until": 1}, "part of 4"), ({"steps": 2, "start": -1}, "part")],
)  # fmt: skip
def test_parts_of_a_run(settings, message):
    net = nn.Linear(2, 2)
    with pytest.raises(SecateurError, match=message):
        fit(net, (torch.zeros(2, 2), torch.tensor([0, 1])), **settings)


def test_a_part_without_steps_changes_nothing():
    net = nn.Linear(2, 2)
    before = net.weight.clone()
    assert fit(net, (torch.randn(2, 2), torch.tensor([0, 1])), steps=2, start=1, until=1) == []
    assert torch.equal(net.weight, before) and net.weight.grad is None
