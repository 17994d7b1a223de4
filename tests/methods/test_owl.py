"""The worked examples and invariants of owl."""

import pytest
import torch

from secateur.method import make_method
from secateur.pruning.allocate import owl_shares


def test_owl():
    shares = owl_shares([2, 5, 3], 0.3, make_method("owl").lam)
    assert [1 - share for share in shares] == pytest.approx([0.77111, 0.61111, 0.71778], abs=1e-5)
    # mean of the ten scores 2.8: one of them is above 5 * 2.8
    scores = [torch.tensor([[1.0, 1, 1, 1, 19]]), torch.tensor([[1.0], [1.0], [1.0], [1.0], [1.0]])]
    assert make_method("owl").outliers(scores) == 10.0
    assert make_method("owl", M=7).outliers(scores) == 0.0
