"""The worked examples and invariants of flowcut."""

import math

import pytest
import torch

from secateur.methods.flowcut import FlowCut, removed, strength
from secateur.tokens.scores import likeness
from secateur.tokens.state import Facts


def row(*numbers):
    return torch.tensor([numbers], dtype=torch.float32)


def test_flowcut_removes_by_entropy():
    """Spec: flowcut (a): N = 8, T = 2."""
    attention = row(0.40, 0.20, 0.10, 0.05, 0.05, 0.05, 0.05, 0.05)
    valid = torch.ones_like(attention, dtype=torch.bool)
    found = [int(removed(attention, valid, torch.tensor([2]), left)) for left in (20, 4, 2, 0)]
    assert found == [0, 1, 1, 6]


@pytest.mark.parametrize(
    ("ratio", "expected"),
    [
        (0.95, [565, 553, 541, 529, 516, 502, 487, 470, 450, 423, 64]),
        (0.85, [544, 513, 482, 451, 420, 389, 357, 324, 288, 244, 64]),
    ],
)
def test_flowcut_schedule(ratio, expected, monkeypatch):
    """Spec: flowcut (a): N = 576, T = 64, 24 blocks."""
    monkeypatch.setattr(
        "secateur.methods.flowcut.entropy_share",
        lambda weights, valid: torch.tensor([1 - ratio**2], dtype=torch.float64),
    )
    count, counts = 576, []
    for block in range(1, 22, 2):
        some = torch.ones(1, count, dtype=torch.bool)
        count -= int(removed(some.float(), some, torch.tensor([64]), 22 - block - 1))
        counts.append(count)
    assert counts == expected


def test_flowcut_score_runs_over_the_blocks():
    """Spec: flowcut (a)."""
    values = row([1, -1], [0.5, 0.5], [1.9, 0], [0, -0.5])
    density = values.abs().sum(2)
    valid = torch.ones(1, 4, dtype=torch.bool)
    first = strength(*[row(0.05, 0.80, 0.05, 0.10)] * 2, density, valid)
    second = strength(row(0.3, 0.2, 0.3, 0.2), row(0.25, 0.25, 0.25, 0.25), density, valid)
    torch.testing.assert_close(first, row(0.20, 1.60, 0.19, 0.10))
    torch.testing.assert_close(second, row(1.10, 0.45, 1.045, 0.225))
    torch.testing.assert_close(0.5 * first + 0.5 * second, row(0.650, 1.025, 0.6175, 0.1625))


def test_flowcut_drops_at_every_second_block():
    facts = Facts(layers=32, blocks=24, feature_block=-2, has_cls=True)
    stages = [stage.at for stage in FlowCut().stages(facts)]
    assert stages[:-1] == [f"encoder:{block}" for block in range(1, 23)] and stages[-1] == "layer:2"


def test_likeness_counts_the_token_itself_when_asked():
    one, others = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[[0.0, 1.0], [1.0, 0.0]]]])
    valid = torch.ones(1, 2, dtype=torch.bool)
    e = math.e
    torch.testing.assert_close(likeness(one, others, valid), row(1 / (1 + e), e / (1 + e)))
    torch.testing.assert_close(
        likeness(one, others, valid, itself=True), row(1 / (1 + 2 * e), e / (1 + 2 * e))
    )
