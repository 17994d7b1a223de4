"""The worked examples and invariants of vflowopt."""

import pytest
import torch

from secateur.errors import SecateurError
from secateur.method import make_method
from secateur.methods.vflowopt import important
from secateur.tokens.counts import last_ratio
from secateur.tokens.scores import patch_entropy


def row(*numbers):
    return torch.tensor([numbers], dtype=torch.float32)


MAP = torch.tensor([[0.10, 0.60, 0.20, 0.10], [0.05, 0.70, 0.20, 0.05], [0.30, 0.30, 0.30, 0.10], [0.25] * 4])


@pytest.mark.parametrize(
    ("t", "expected"), [(0.9, [0.175, 0.5, 0.25, 0.075]), (1.2, [0.05, 0.70, 0.20, 0.05])]
)
def test_vflowopt_importance(t, expected):
    """Spec: vflowopt (a)."""
    crop, valid = torch.zeros(1, 4, dtype=torch.long), torch.ones(1, 4, dtype=torch.bool)
    weights = important(MAP.mean(0)[None], crop, valid, t)
    torch.testing.assert_close(weights @ MAP, row(*expected))


def test_vflowopt_entropy():
    """Spec: vflowopt (a): a softmax of the patches' entropies, times alpha, is added."""
    scores = row(0.175, 0.5, 0.25, 0.075) + 0.5 * row(1, 2, 0, 3).softmax(1)
    torch.testing.assert_close(scores, row(0.218572, 0.618441, 0.266029, 0.396957), atol=1e-6, rtol=0)
    pixels = torch.cat([torch.zeros(1, 1, 98), torch.full((1, 1, 98), 255.0)], 2)
    assert patch_entropy(pixels).item() == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize(("share", "mean"), [(0.5, 0.500773), (0.25, 0.250685), (0.1, 0.100002)])
def test_vflowopt_shipped_settings_meet_their_budget(share, mean):
    """Spec: vflowopt (a): the shipped third ratios give these means over 9, 9 and 10 layers; the derived one gives `share`."""
    _, _, (r1, r2, r3) = make_method("vflowopt").settings(share, (9, 9, 10))
    shipped = {0.5: 0.487, 0.25: 0.8773258, 0.1: 0.6011}[share]
    over = lambda last: (9 * r1 + 9 * r1 * r2 + 10 * r1 * r2 * last) / 28
    assert over(shipped) == pytest.approx(mean, abs=1e-6)
    assert over(r3) == pytest.approx(share, abs=1e-9)
    assert last_ratio(share, (r1, r2), (9, 9, 10)) == r3


def test_vflowopt_refuses_shares_that_leave_nothing_for_the_last_stage():
    with pytest.raises(SecateurError, match="third stage"):
        make_method("vflowopt", r1=0.9).settings(0.25, (9, 9, 10))
