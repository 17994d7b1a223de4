"""The worked examples and invariants of wanda."""

import torch
from weight_examples import TOKENS, W, kept, near, stats_of

from secateur.method import make_method
from secateur.pruning.select import Pattern


def test_wanda():
    method = make_method("wanda")
    stats = stats_of(TOKENS)
    expected = [[2.44949, 3.46410, 4.12432, 4.24264], [0.97980, 0.51962, 9.16515, 1.41421]]
    assert near(method.score(W, stats), expected)
    weight, mask = method.solve(W, stats, Pattern(4, "row"))
    assert kept(~mask) == [[0, 1], [0, 1]]
    assert torch.equal(weight, torch.tensor([[0, 0, 0.9, 3], [0, 0, 2, -1]]))


def test_wanda_with_equal_norms_is_magnitude_per_row():
    torch.manual_seed(0)
    weight = torch.randn(12, 16)
    equal = stats_of(torch.eye(16))
    for keep in (12, 50, 96, 130):
        wanda = make_method("wanda").solve(weight, equal, Pattern(keep, "row"))[1]
        magnitude = make_method("magnitude", scope="row").solve(weight, equal, Pattern(keep, "row"))[1]
        assert torch.equal(wanda, magnitude)
