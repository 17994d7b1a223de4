"""The worked examples and invariants of feather."""

import torch

from secateur.method import make_method
from secateur.testing import token_sets


def row(*numbers):
    return torch.tensor([numbers], dtype=torch.float32)


def kept(mask):
    return mask[0].nonzero().squeeze(1).tolist()


FEATHER = row(
    0.05, 0.01, 0.02, 0.03, 0.09, 0.20, 0.04, 0.06, 0.07, 0.15, 0.02, 0.01, 0.03, 0.08, 0.10, 0.04
)  # fmt: skip


def test_feather_adds_a_grid_then_cuts_harder():
    """Spec: feather (a)."""
    method = make_method("feather")
    attention = {("layer:7:raw", "last", "visual"): FEATHER}
    first = token_sets(torch.zeros(1, 16, 1), keep=8, target=0.5, attention=attention)
    stay = kept(method.cut(7, first, grid=True))
    assert stay == [0, 3, 4, 5, 7, 8, 9, 12, 13, 14, 15]
    scores = row(3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5)
    second = token_sets(
        torch.zeros(1, 11, 1),
        keep=8,
        target=0.5,
        total=torch.tensor([16]),
        attention={("layer:15:raw", "last", "visual"): scores},
    )
    assert [stay[i] for i in kept(method.cut(15, second))] == [8, 12]
