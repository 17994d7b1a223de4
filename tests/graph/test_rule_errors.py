"""A rule that fails is a defect that is counted and said; an operation without a rule is not."""

import pytest
import torch
from torch import nn

from secateur.graph import trace
from secateur.graph.rules import RULES
from secateur.graph.run import STRICT, RuleFailure


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.two(self.one(x).flip(0))


def broken(t, c):
    raise KeyError("dims")


def test_a_failing_rule_freezes_says_why_and_is_counted(monkeypatch):
    monkeypatch.delenv(STRICT, raising=False)
    monkeypatch.setitem(RULES, "flip", broken)
    graph = trace(Net(), torch.randn(2, 6))
    (error,) = graph.rule_errors
    assert (error.op, error.module, error.error) == ("flip", "", "KeyError 'dims'")
    reason = next(g.reason for g in graph.groups if g.size == 8)
    assert "no rule for this flip: KeyError 'dims'" in reason and "self.two(self.one(x).flip(0))" in reason


def test_strict_raises_what_the_rule_raised(monkeypatch):
    monkeypatch.setenv(STRICT, "1")
    monkeypatch.setitem(RULES, "flip", broken)
    with pytest.raises(RuleFailure, match="flip") as caught:
        trace(Net(), torch.randn(2, 6))
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize("strict", ["0", "1"])
def test_an_operation_without_a_rule_is_no_error(monkeypatch, strict):
    monkeypatch.setenv(STRICT, strict)
    monkeypatch.delitem(RULES, "flip")
    graph = trace(Net(), torch.randn(2, 6))
    assert graph.rule_errors == [] and "flip" in graph.unknown
    assert "no rule for this flip (flip" in next(g.reason for g in graph.groups if g.size == 8)
