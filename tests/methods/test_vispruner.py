"""The worked examples and invariants of vispruner."""

import math

import pytest
import torch
from token_examples import CLIP, SITE, kept

from secateur.methods.vispruner import thinned
from secateur.testing import token_sets

DEGREES = [0, 90, 91, 95, 45, 10]


def circle(degrees):
    angles = torch.tensor([math.radians(a) for a in degrees])
    return torch.stack([angles.cos(), angles.sin()], 1)


def test_one_leaves_at_a_time_and_the_compared_go_on_by_likeness():
    """0, 91 and 45 degrees against 90, 95, 10: 91 leaves, and 45, 0, 90, 95, 10 are left as 0, 45, 90, 95, 10 (10 and 35
    degrees from another). Then 0, 90, 10 against 45 and 95: 90 leaves. In the first order it would be 95."""
    rows = circle(DEGREES)
    assert thinned(torch.arange(6), rows @ rows.T, 5, 1).tolist() == [0, 4, 1, 3, 5]
    assert set(thinned(torch.arange(6), rows @ rows.T, 4, 1).tolist()) == {0, 3, 4, 5}


def test_several_leave_at_once():
    """91 and 0 degrees, the two of three that are nearest to one of the others."""
    rows = circle(DEGREES)
    assert thinned(torch.arange(6), rows @ rows.T, 4, 8).tolist() == [4, 1, 3, 5]


@pytest.mark.parametrize(("at_once", "expected"), [(1, [0, 3, 4, 5, 6, 7]), (8, [1, 3, 4, 5, 6, 7])])
def test_attention_chooses_first_and_orders_the_others(at_once, expected):
    """Two of six by attention, 7 and 6; the other six stand in the order of the example above."""
    hidden = torch.cat([circle(DEGREES), circle([200, 210])])[None]
    scores = torch.tensor([[0.08, 0.07, 0.06, 0.05, 0.04, 0.03, 0.3, 0.37]])
    sets = token_sets(
        torch.zeros(1, 8, 3), 6, attention={(SITE, "cls"): scores}, hidden={SITE: hidden}, facts=CLIP
    )
    assert kept("vispruner", sets, important=0.34, at_once=at_once) == [expected]


@pytest.mark.parametrize("important", [0, 0.5, 1])
@pytest.mark.parametrize("at_once", [1, 8])
def test_every_budget_is_met_and_the_most_attended_stay(important, at_once):
    generator = torch.Generator().manual_seed(1)
    scores = torch.rand(1, 17, generator=generator)
    for keep in range(1, 18):
        sets = token_sets(
            torch.zeros(1, 17, 3),
            keep,
            attention={(SITE, "cls"): scores},
            hidden={SITE: torch.randn(1, 17, 4, generator=generator)},
            facts=CLIP,
        )
        found = kept("vispruner", sets, important=important, at_once=at_once)[0]
        best = scores[0].topk(int(keep * important)).indices.tolist()
        assert len(found) == keep and set(best) <= set(found)


def test_of_many_copies_one_stays():
    """Eight different patches and eight copies of the first: all copies but one leave before any other."""
    rows = torch.eye(8)[torch.tensor([*range(8), *[0] * 8])]
    left = thinned(torch.arange(16), rows @ rows.T, 8, 1)
    assert rows[left].sum(0).tolist() == [1.0] * 8
