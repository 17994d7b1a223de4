"""What gates cost and are driven to, and what gates that read the input answer over data: by hand."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from secateur.gates import ExpectedCost
from secateur.gates.cost import unit_macs
from secateur.gates.reading import answers_over
from secateur.graph import trace
from secateur.pruning.target import parse_target
from secateur.training.price import price

NET = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 5))
"""12 + 8 + 10 multiply-adds for each of two rows; 16 + 10 + 15 parameters."""


def groups():
    graph = trace(NET, torch.randn(2, 3))
    wide, narrow = sorted(graph.prunable(), key=lambda g: -g.size)
    return graph, wide, narrow


def test_a_unit_weighs_what_leaves_with_it_alone():
    """Of the first layer 3 + 2 for each row, of the second 4 + 5."""
    graph, wide, narrow = groups()
    assert unit_macs(graph, wide).tolist() == [10] * 4 and unit_macs(graph, narrow).tolist() == [18] * 2
    share = ExpectedCost(graph).share_of_units([wide.name, narrow.name])
    assert share({wide.name: torch.ones(4), narrow.name: torch.ones(2)}).item() == 1
    left = share({wide.name: torch.tensor([1, 0.5, 0, 0]), narrow.name: torch.tensor([0, 1.0])})
    assert left.item() == pytest.approx((15 + 18) / (40 + 36))


def test_the_price_of_each_target():
    graph, wide, narrow = groups()
    names = [wide.name, narrow.name]
    keep = {wide.name: torch.tensor([1.0, 1, 0, 0]), narrow.name: torch.tensor([1.0, 0.5])}

    def of(target):
        return price(SimpleNamespace(target=parse_target(target), share=0.3), graph, names)

    share, wanted = of("macs<=50%")
    assert share(keep).item() == pytest.approx((6 + 3 + 7.5) / 30) and wanted == 0.5
    share, wanted = of("params<=20")
    assert share(keep).item() == pytest.approx((8 + 4.5 + 12.5) / 41) and wanted == pytest.approx(20 / 41)
    share, wanted = of("30%")
    assert share(keep).item() == pytest.approx((20 + 27) / 76) and wanted == 0.3


def test_answers_are_counted_over_samples_and_not_over_batches():
    given = [
        (torch.tensor([[1.0, 0], [1, 1], [1, 0]]), torch.tensor([0.9, 0.3])),
        (torch.tensor([[0.0, 1]]), torch.tensor([0.1, 0.7])),
    ]
    law = SimpleNamespace(units=2, answers=lambda: now[0], probability=lambda: now[1])
    now = given[0]

    def forwards():
        nonlocal now
        for now in given:
            yield None

    ran, sure = answers_over({"g": law}, forwards())["g"]
    assert ran.tolist() == [0.75, 0.5]
    torch.testing.assert_close(sure, torch.tensor([(0.9 * 3 + 0.1) / 4, (0.3 * 3 + 0.7) / 4]))
