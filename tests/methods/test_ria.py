"""The worked examples and invariants of ria."""

import torch
from weight_examples import TOKENS, W, near, stats_of

from secateur.method import make_method
from secateur.pruning.select import Pattern
from secateur.stats.layer import InputStats, LayerStats


def test_ria():
    expected = [[1.34474, 1.52588, 0.94357, 1.40895], [0.61637, 0.27837, 2.63347, 0.61871]]
    assert near(make_method("ria").score(W, stats_of(TOKENS)), expected)


def test_ria_lets_no_expert_compete_with_another():
    """Two experts with equal weights: the one that saw a hundred times the activations doesn't take the other's share."""
    inputs = InputStats(4, frozenset({"input_norm"}), parts=2)
    inputs.add(TOKENS)
    inputs.add(100 * TOKENS, 1)
    inputs.sequences = 1
    both, alone = LayerStats(inputs, name="experts"), stats_of(TOKENS)
    method = make_method("ria")
    mask = method.solve(torch.cat([W, W]), both, Pattern(8, "layer"))[1]
    expected = method.solve(W, alone, Pattern(4, "layer"))[1]
    assert torch.equal(mask[:2], expected) and torch.equal(mask[2:], expected)
    odd = method.solve(torch.cat([W, W]), both, Pattern(9, "layer"))[1]
    assert [int(odd[:2].sum()), int(odd[2:].sum())] == [4, 5]


def test_ria_without_its_exponent_ignores_the_data():
    method = make_method("ria", a=0.0)
    assert torch.equal(method.score(W, stats_of(TOKENS)), method.score(W, stats_of(TOKENS * 7 + 1)))
    assert not torch.equal(make_method("ria").score(W, stats_of(TOKENS)), method.score(W, stats_of(TOKENS)))
