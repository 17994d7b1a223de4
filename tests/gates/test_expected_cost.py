"""What gates cost and are driven to, and what gates that read the input answer over data: by hand."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from secateur.gates.cost import ExpectedCost
from secateur.gates.reading import answers_over
from secateur.graph import trace
from secateur.graph.blocks import find_matrices
from secateur.pruning.target import parse_target
from secateur.training.price import price

NET = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 5))
"""12 + 8 + 10 multiply-adds for each of two rows; 16 + 10 + 15 parameters."""


def groups():
    graph = trace(NET, torch.randn(2, 3))
    wide, narrow = sorted(graph.prunable(), key=lambda g: -g.size)
    return graph, wide, narrow


@pytest.mark.parametrize(
    ("target", "counts", "left", "wanted"),
    [
        ("macs<=50%", "units", (6 + 3 + 7.5) / 30, 0.5),
        ("params<=20", "units", (8 + 4.5 + 12.5) / 41, 20 / 41),
        ("30%", "units", (2 + 1.5) / 6, 0.3),
        ("30%", "weights", (6 + 3 + 7.5) / 30, 0.3),
    ],
)
def test_the_price_of_each_target(target, counts, left, wanted):
    """Two of four units and one and a half of two: what is left, by hand."""
    graph, wide, narrow = groups()
    context = SimpleNamespace(
        target=parse_target(target),
        graph=graph,
        share=0.3,
        method=SimpleNamespace(share_of=counts),
        every_matrix=find_matrices(NET),
    )
    share, asked = price(context, [wide.name, narrow.name])
    keep = {wide.name: torch.tensor([1.0, 1, 0, 0]), narrow.name: torch.tensor([1.0, 0.5])}
    assert share(keep).item() == pytest.approx(left) and asked == pytest.approx(wanted)


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


def test_an_entry_that_several_units_keep_is_there_as_long_as_one_of_them_is():
    cost = ExpectedCost(groups()[0])
    keep = {"a": torch.tensor([0.5, 0.9]), "b": torch.tensor([0.25])}
    part = (2, {"a": torch.tensor([1.0, 1.0])}, [(1, [("a", 0), ("b", 0)]), (-1, [("a", 1), ("c", 0)])])
    # two that stay, two units of a, one entry that leaves with 0.5 x 0.75; one is taken off that c, without a gate, keeps
    assert cost._size(part, keep, {}).item() == pytest.approx(2 + 1.4 + (1 - 0.5 * 0.75) - 1)
