"""The worked examples and invariants of prumerge."""

import math

import pytest
import torch
from token_examples import CLIP

from secateur.method import make_method
from secateur.methods.prumerge import outliers
from secateur.testing import token_sets

X = torch.tensor([[1.0], [2.0], [4.0], [8.0], [16.0]])
KEYS = torch.tensor([[1, 0.2], [1, 0], [0.1, 1], [0, 1], [0.9, 1]])
SEEN = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15])


def merged(x, keys, seen, keep, **settings):
    places, features = make_method("prumerge", **settings).merge(x, keys, seen, keep)
    return places.tolist(), features[:, 0].tolist()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1, 2, 3, 4, 100], 1),  # quartiles 2 and 4: above 7
        ([1, 2, 3, 4, 7], 0),  # 7 is not above 7
        ([-100, 2, 3, 4, 5], 0),  # below doesn't count
        ([1, 1, 1, 1, 1, 1, 1, 1, 2, 3], 2),
    ],
)
def test_outliers_lie_above_the_upper_fence(values, expected):
    assert outliers(torch.tensor(values, dtype=torch.float32)) == expected


def test_the_nearest_by_key_are_added_with_their_attention_and_the_rest_is_one_token():
    """1 and 3 have the most attention; nearest by key is 0 to 1, and 2 to 3; 0, 2 and 4 make the last token."""
    places, features = merged(X, KEYS, SEEN, 3, cluster=1)
    assert places == [1, 3, 0]
    assert features == pytest.approx([2 + 0.1 * 1, 8 + 0.05 * 4, 0.1 * 1 + 0.05 * 4 + 0.15 * 16])


def test_a_token_that_stays_is_merged_into_others_too():
    features = merged(X, KEYS, SEEN, 3, cluster=32)[1]
    rest = 0.1 * 1 + 0.05 * 4 + 0.15 * 16
    assert features == pytest.approx([2 + 0.3 * 8 + rest, 8 + 0.4 * 2 + rest, rest])


def test_attention_is_one_head_over_the_whole_width():
    """Two heads of two: dots 0 (CLS itself), 2 and 4 over sqrt(4): softmax of 0, 1, 2."""
    sets = token_sets(
        torch.zeros(1, 2, 1),
        1,
        queries={("encoder:-1", "cls"): torch.tensor([[[1.0, 0], [0, 1.0]]])},
        keys={
            "encoder:-1": torch.tensor([[[[2.0, 9], [1, 9]], [[9, 0.0], [9, 3]]]]),
            ("encoder:-1", "cls"): torch.zeros(1, 2, 2),
        },
        facts=CLIP,
    )
    total = 1 + math.e + math.e**2
    expected = torch.tensor([[math.e / total, math.e**2 / total]])
    torch.testing.assert_close(make_method("prumerge").attention(sets), expected)


def outlier_at(n, *places):
    seen = torch.full((n,), 0.01) + torch.linspace(0, 0.001, n)
    seen[list(places)] = 0.5
    return torch.arange(float(n))[:, None], torch.ones(n, 2), seen


def test_without_a_target_outliers_stay_and_plus_adds_every_sth_patch():
    """20 patches, one outlier: int(int(20 / 1) / 3) = 6, the last place left out as released."""
    x, keys, seen = outlier_at(20, 6)
    assert merged(x, keys, seen, None)[0] == [6, 0]
    assert merged(x, keys, seen, None, plus=True)[0] == [6, 0, 12, 18, 1]
    assert merged(*outlier_at(19, 6), None, plus=True)[0] == [6, 0, 12, 1]


@pytest.mark.parametrize("plus", [False, True])
def test_without_an_outlier_the_rest_token_is_alone(plus):
    places, features = merged(X, KEYS, torch.tensor([0.1, 0.2, 0.1, 0.2, 0.1]), None, plus=plus)
    assert places == [0] and features == pytest.approx([0.1 + 0.4 + 0.4 + 1.6 + 1.6])


def test_plus_fills_a_target_with_one_by_attention_to_three_spread():
    """Nine: eight patches, two of them by attention (19 and 3), six at every third of the 18 others, and the rest token."""
    x, keys, seen = outlier_at(20, 19, 3)
    assert merged(x, keys, seen, 9, plus=True)[0] == [3, 19, 0, 4, 7, 10, 13, 16, 1]


@pytest.mark.parametrize("plus", [False, True])
def test_every_budget_is_met(plus):
    generator = torch.Generator().manual_seed(2)
    x, keys, seen = torch.randn(16, 3), torch.randn(16, 4), torch.rand(16, generator=generator)
    for keep in range(1, 16):
        places, features = make_method("prumerge", plus=plus).merge(x, keys, seen, keep)
        assert len(set(places.tolist())) == keep == len(features)
