"""The worked examples and invariants of random."""

import torch
from weight_examples import W

from secateur.method import make_method
from secateur.stats.layer import LayerStats


def test_random_is_the_seeds_and_the_layers():
    stats = LayerStats(name="a")
    one = make_method("random", seed=1).score(W, stats)
    assert torch.equal(one, make_method("random", seed=1).score(W, stats))
    assert not torch.equal(one, make_method("random", seed=2).score(W, stats))
    assert not torch.equal(one, make_method("random", seed=1).score(W, LayerStats(name="b")))
