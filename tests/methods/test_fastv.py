"""The worked examples and invariants of fastv."""

import torch

from secateur.method import make_method
from secateur.testing import token_sets


def row(*numbers):
    return torch.tensor([numbers], dtype=torch.float32)


def kept(mask):
    return mask[0].nonzero().squeeze(1).tolist()


def test_fastv_keeps_what_the_last_token_attends_to():
    """Spec: fastv (a)."""
    a = row(0.10, 0.02, 0.05, 0.03, 0.20, 0.01, 0.04, 0.06)
    sets = token_sets(torch.zeros(1, 8, 2), keep=4, attention={("layer:1", "last"): a})
    assert kept(make_method("fastv").select(sets)) == [0, 2, 4, 7]


def test_fastv_counts_by_rounding_or_down():
    """Spec: fastv (a): n = 576, R = .9: 58 or 57."""
    scores = torch.rand(1, 576, generator=torch.Generator().manual_seed(0))
    for rounding, count in (("round", 58), ("int", 57)):
        method = make_method("fastv", rounding=rounding)
        share = 1 - 0.9
        sets = token_sets(
            torch.zeros(1, 576, 1),
            keep=round(576 * share),
            target=share,
            attention={("layer:1", "last"): scores},
        )
        assert len(kept(method.select(sets))) == count
