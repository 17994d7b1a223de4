"""Branches that the example inputs don't take: further inputs, a run in train mode, and what is said of the rest."""

import copy

import pytest
import torch
from torch import nn

import secateur
from secateur.errors import SecateurError
from secateur.graph import trace
from secateur.report.terminal import report_tables
from secateur.surgery import cut_units, prove


class Branches(nn.Module):
    """fc1 -> fc2; where the first input is negative the other head reads the same ten neurons."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2, self.other = nn.Linear(6, 10), nn.Linear(10, 4), nn.Linear(10, 4)

    def forward(self, x):
        hidden = self.fc1(x).relu()
        return self.other(hidden) if float(x[0, 0]) < 0 else self.fc2(hidden)


class Auxiliary(nn.Module):
    """A head for training only, behind a batch norm and dropout."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, 10), nn.Linear(10, 4)
        self.aux = nn.Sequential(nn.BatchNorm1d(10), nn.Dropout(0.5), nn.Linear(10, 4))

    def forward(self, x):
        hidden = self.fc1(x).relu()
        return (self.fc2(hidden), self.aux(hidden)) if self.training else self.fc2(hidden)


POSITIVE, NEGATIVE = torch.ones(2, 6), -torch.ones(2, 6)
KEEP = {"fc1:neurons": torch.arange(5)}


def test_a_branch_not_taken_is_named_and_the_target_is_not_said_to_be_met():
    model = Branches().eval()
    graph = trace(model, POSITIVE)
    assert graph.unreached == ("other.weight", "other.bias")
    assert "not reached by the trace: other.weight [4, 10]" in graph.explain().splitlines()[0]
    assert graph.endangered(KEEP) == ["other.weight"]
    pruned = secateur.prune(model, POSITIVE, method="group-magnitude", target="50%")
    assert pruned.report["met"] is False and pruned.report["unreached"] == ["other.weight"]
    assert "other.weight" in str(report_tables(pruned.report)[1])
    with pytest.raises(RuntimeError):
        pruned.model(NEGATIVE)


def test_further_inputs_tie_what_their_branch_reads():
    model = Branches().eval()
    graph = trace(model, POSITIVE, also=[NEGATIVE])
    assert graph.unreached == ()
    assert graph.macs() == trace(model, POSITIVE).macs() == 2 * (6 * 10 + 10 * 4)
    pruned = secateur.prune(model, POSITIVE, also=[NEGATIVE], method="group-magnitude", target="50%")
    assert pruned.report["met"] and pruned.model.other.weight.shape == (4, 5)
    assert pruned.model(POSITIVE).shape == pruned.model(NEGATIVE).shape == (2, 4)
    again = copy.deepcopy(model)
    secateur.apply_plan(again, pruned.plan, POSITIVE, also=[NEGATIVE])
    assert torch.equal(again(NEGATIVE), pruned.model(NEGATIVE))
    with pytest.raises(SecateurError, match="don't reach other.weight"):
        secateur.apply_plan(copy.deepcopy(model), pruned.plan, POSITIVE, also=[POSITIVE])


def test_the_proof_runs_the_further_inputs():
    model = Branches().eval()
    blind = trace(model, POSITIVE)
    assert prove(model, blind, KEEP, POSITIVE) == {}
    assert list(prove(model, blind, KEEP, POSITIVE, also=[NEGATIVE])) == ["fc1:neurons"]


def test_a_head_for_training_is_cut_along_and_the_model_is_left_as_it_was():
    model = Auxiliary().train()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    graph = trace(model, POSITIVE)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state()) and all(m.training for m in model.modules())
    assert graph.unreached == ()
    cut_units(model, graph, KEEP)
    assert [tuple(v.shape) for v in model(torch.randn(3, 6))] == [(3, 4), (3, 4)]


def test_parameters_that_nothing_reaches_endanger_only_cuts_of_their_width():
    model = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 4)).eval()
    model.spare = nn.Parameter(torch.zeros(7))
    model.forward = lambda x: model[2](model[1](model[0](x)))
    graph = trace(model, POSITIVE)
    assert graph.unreached == ("spare",)
    assert graph.endangered({"0:neurons": torch.arange(5)}) == []
