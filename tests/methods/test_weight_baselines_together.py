"""The worked examples and invariants of weight baselines together."""

from itertools import pairwise

import pytest
import torch
from weight_examples import TOKENS, W, kept, stats_of

from secateur.method import make_method
from secateur.pruning.select import Pattern


def test_n_of_m_for_each_score():
    """2:4 of the example: the two best of every row."""
    pattern = Pattern(4, "row", (2, 4))
    stats = stats_of(TOKENS)
    assert kept(make_method("magnitude").solve(W, stats, pattern)[1]) == [[1, 3], [2, 3]]
    assert kept(make_method("wanda").solve(W, stats, pattern)[1]) == [[2, 3], [2, 3]]
    assert kept(make_method("ria").solve(W, stats, pattern)[1]) == [[1, 3], [2, 3]]


@pytest.mark.parametrize("name", ["random", "magnitude", "wanda", "ria", "sparsegpt", "owl"])
def test_keeping_everything_is_the_identity(name):
    method = make_method(name)
    weight, mask = method.solve(W, stats_of(TOKENS * torch.tensor([1, 0, 1, 1])), Pattern(8, method.scope))
    assert torch.equal(weight, W) and mask.all()


@pytest.mark.parametrize("name", ["random", "magnitude", "wanda", "ria"])
def test_masks_are_nested(name):
    torch.manual_seed(0)
    weight, stats = torch.randn(9, 20), stats_of(torch.randn(30, 20))
    method = make_method(name)
    masks = [method.solve(weight, stats, Pattern(keep, method.scope))[1] for keep in range(0, 181, 9)]
    assert all((large | ~small).all() for small, large in pairwise(masks))


def test_bfloat16_weights_stay_bfloat16_and_zero():
    weight = W.bfloat16()
    for name in ("wanda", "sparsegpt", "ria", "magnitude"):
        new, mask = make_method(name).solve(weight, stats_of(TOKENS, 4), Pattern(4, "layer"))
        assert new.dtype == torch.bfloat16 and not new[~mask].any()
