"""What the proof asks of a cut model beyond its values: other batch sizes, and `torch.export`."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import secateur
from secateur.graph import trace
from secateur.surgery import cut_units, prove
from secateur.surgery.prove import _rebatched, _smaller, largest_gap


class Net(nn.Module):
    """6 -> 8 -> 4. With more than one example it counts on 8 neurons."""

    def __init__(self, counts: bool, when=lambda batch: batch > 1):
        super().__init__()
        self.a, self.c, self.counts, self.when = nn.Linear(6, 8), nn.Linear(8, 4), counts, when

    def forward(self, x):
        h = F.relu(self.a(x))
        if self.counts and self.when(len(x)):
            h = h.reshape(-1, h.shape[1])[:, : self.c.weight.shape[1]]
            return self.c(h)[:, : 4 if h.shape[1] == 8 else 3]
        return self.c(h)


@pytest.mark.parametrize(("batch", "when"), [(1, lambda b: b > 1), (3, lambda b: b == 1)])
def test_another_batch_size(batch, when):
    x = torch.randn(batch, 6)
    for counts in (False, True):
        model = Net(counts, when)
        graph = trace(model, x)
        bad = prove(model, graph, {"a:neurons": torch.arange(4)}, x)
        assert ("a:neurons" in bad) == counts
        assert not counts or "another batch size" in bad["a:neurons"]


class Exported(nn.Module):
    """A network that `torch.export` takes as long as it has all eight neurons."""

    def __init__(self):
        super().__init__()
        self.a, self.c = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x):
        h = F.relu(self.a(x))
        if h.shape[1] < 8 and torch.compiler.is_compiling():
            h = h * float(h.sum() * 0 + 1)
        return self.c(h)


def test_export_is_asked_for_on_request():
    x = torch.randn(2, 6)
    model = Exported()
    graph = trace(model, x)
    keep = {"a:neurons": torch.arange(4)}
    assert prove(model, graph, keep, x) == {}
    bad = prove(model, graph, keep, x, export=True)
    assert "torch.export no longer takes it" in bad["a:neurons"]
    plain = Net(False)
    assert prove(plain, trace(plain, x), keep, x, export=True) == {}


def test_a_pruned_model_is_exported():
    x = torch.randn(2, 6)
    result = secateur.prune(Net(False), x, method="group-magnitude", target="50%", prove_export=True)
    program = torch.export.export(result.model, (x,), strict=False).module()
    torch.testing.assert_close(program(x), result.model(x))


def test_without_the_proof_anything_goes():
    x = torch.randn(1, 6)
    model = Net(True)
    result = secateur.prune(model, x, method="group-magnitude", target="50%", prove=False)
    assert result.model.a.out_features == 4
    changes = cut_units(model, trace(model, x), {"a:neurons": torch.arange(4)})
    assert not changes.uniform  # no config builds it
    assert tuple(model(torch.randn(2, 6)).shape) == (2, 3)


@pytest.mark.parametrize(
    ("got", "expected", "gap"),
    [
        ([1.0, 2.0, 7.0], [1.0, 2.5, 7.0], 0.5),
        ([1.0, 2.0001], [1.0, 2.0], None),
        ([1000.05, 0.001], [1000.0, 0.001], None),  # rounding is measured at the largest
        ([1000.15, 0.001], [1000.0, 0.001], 0.15),
        ([1e-6, 0.0], [0.0, 0.0], 1e-6),
        ([5.0, 3.0], [math.nan, 3.0], None),
        ([math.nan, 3.0], [5.0, 3.0], math.nan),
    ],
)
def test_the_gap_is_the_largest_difference(got, expected, gap):
    found = largest_gap([torch.tensor(got)], [torch.tensor(expected)])
    assert found is None if gap is None else found == pytest.approx(gap, rel=1e-2, nan_ok=True)


def test_whole_numbers_are_equal_or_not():
    assert largest_gap([torch.tensor([1, 2])], [torch.tensor([1, 2])]) is None
    assert largest_gap([torch.tensor([1, 2])], [torch.tensor([1, 3])]) == math.inf


def test_another_batch_is_the_first_example_or_one_twice():
    rows = torch.arange(6.0).reshape(3, 2)
    assert torch.equal(_rebatched(rows[:2]), rows[:1])
    assert torch.equal(_rebatched(rows[1:2]), rows[[1, 1]])


class Detector(nn.Module):
    """Returns those of its places that score above nothing: how many follows from the values."""

    def __init__(self, norm=False):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.score, self.box = nn.Linear(6, 8), nn.Linear(8, 1), nn.Linear(8, 4)
        self.norm = nn.LayerNorm(8) if norm else nn.Identity()

    def forward(self, x):
        y = self.norm(self.body(x)).relu()
        found = self.score(y)[..., 0] > 0.1
        return self.box(y)[found], self.score(y)[found]


@pytest.mark.parametrize("norm", [False, True])
def test_sizes_that_follow_from_values_are_those_of_the_masked_model(norm):
    model, x = Detector(norm).eval(), torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    graph = trace(model, x)
    (group,) = graph.prunable()
    keep = {group.name: torch.tensor([0, 1, 6])}
    cut = copy.deepcopy(model)
    cut_units(cut, graph, keep)
    assert group.exact != norm and len(model(x)[0]) != len(cut(x)[0]) > 0
    assert prove(model, graph, keep, x) == {}


def test_a_size_that_only_the_cut_changes_is_found_out():
    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 4)

        def forward(self, x):
            y = self.a(x)
            return self.b(y), torch.zeros(y.shape[-1])

    model, x = Whole().eval(), torch.randn(4, 6)
    graph = trace(model, x)
    group = next(g for g in graph.groups if g.size == 8)
    group.reason = None
    assert "output shapes" in prove(model, graph, {group.name: torch.tensor([0, 1, 6])}, x)[group.name]


def test_a_detector_that_finds_nothing_proves_nothing():
    model, x = Detector().eval(), torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    model.score.bias.data.fill_(-1e3)
    (group,) = (graph := trace(model, x)).prunable()
    reasons = prove(model, graph, {group.name: torch.tensor([0, 1, 6])}, x)
    assert "nothing is left to compare" in reasons[group.name]


def test_a_proof_makes_do_with_less_of_long_inputs_only():
    """From 96 pixels and 48 tokens on; where all inputs are sequences of one length."""
    for size, less in ((95, None), (96, 64)):
        found = _smaller(torch.zeros(2, 3, 100, size))
        assert found is None if less is None else found.shape == (2, 3, 64, 64)
    ids = torch.arange(48)[None].repeat(2, 1)
    found = _smaller({"input_ids": ids, "attention_mask": ids})
    assert found["input_ids"].tolist() == [list(range(32))] * 2 and found["attention_mask"].shape == (2, 32)
    assert _smaller(ids[:, :47]) is None and _smaller({"a": ids, "b": ids[:, :40]}) is None
    assert _smaller({"a": ids, "b": torch.zeros(2, 3)}) is None and _smaller(torch.zeros(2, 96)) is None
