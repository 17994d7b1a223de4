"""Masked least squares against a hand computation and torch.linalg.lstsq, row by row."""

import pytest
import torch

from secateur import SecateurError
from secateur.repair.squares import masked_least_squares


def test_the_example_worked_out_by_hand():
    """X xᵀ over x = (1, 0, 1), (0, 1, 1), (1, 1, 0), (2, 0, 1): W x = 0, 1, 3, 1 for W = (1, 2, -1). Without the first input the
    normal equations of (w2, w3) are [2 1; 1 3] w = (4, 2), so w = (2, 0)."""
    X = torch.tensor([[1.0, 0, 1, 2], [0, 1, 1, 0], [1, 1, 0, 1]])
    W, kept = torch.tensor([[1.0, 2, -1]]), torch.tensor([[False, True, True]])
    found = masked_least_squares(W, kept, X @ X.T, damping=0)
    assert torch.allclose(found, torch.tensor([[0.0, 2, 0]]), atol=1e-6)


@pytest.mark.parametrize("alike", [False, True])
@pytest.mark.parametrize("own", [False, True])
def test_every_row_is_the_least_squares_solution_on_its_own_inputs(alike, own):
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(12, 200, generator=generator, dtype=torch.float64) * torch.arange(1, 13)[:, None]
    W = torch.randn(5, 12, generator=generator, dtype=torch.float64)
    T = W @ X if own else torch.randn(5, 200, generator=generator, dtype=torch.float64)
    mask = torch.rand(1 if alike else 5, 12, generator=generator).expand(5, 12) > 0.5
    found = masked_least_squares(W, mask, X @ X.T, None if own else T @ X.T, damping=0, steps=60)
    assert not found[~mask].any()
    for row in range(5):
        kept = mask[row]
        expected = torch.linalg.lstsq(X[kept].T, T[row]).solution
        assert torch.allclose(found[row][kept], expected, rtol=1e-3, atol=1e-4)


def test_damping_pulls_towards_the_dense_weight():
    """One input, H = 4, target 4 w' = 8 from a dense w = 1: (8 + λ) / (4 + λ) with λ = 0.5 * 4 is 10 / 6."""
    one = torch.ones(1, 1)
    found = masked_least_squares(one, one.bool(), 4 * one, 8 * one, damping=0.5)
    assert torch.allclose(found, torch.tensor([[10 / 6]]))


def test_inputs_that_never_come_and_rows_that_keep_nothing_are_no_trouble():
    H = torch.diag(torch.tensor([2.0, 0.0, 3.0]))
    W = torch.ones(3, 3)
    mask = torch.tensor([[True, True, False], [False, False, False], [True, False, True]])
    found = masked_least_squares(W, mask, H, damping=0)
    assert torch.equal(found, torch.tensor([[1.0, 1, 0], [0, 0, 0], [1, 0, 1]]))
    assert torch.isfinite(masked_least_squares(W, torch.zeros_like(mask), H)).all()


def test_it_gives_the_weight_s_type_and_refuses_what_does_not_fit():
    W = torch.ones(2, 3, dtype=torch.bfloat16)
    assert masked_least_squares(W, W.bool(), torch.eye(3)).dtype == torch.bfloat16
    with pytest.raises(SecateurError, match="masked_least_squares"):
        masked_least_squares(W, W.bool(), torch.eye(2))
    with pytest.raises(SecateurError, match="isn't finite"):
        masked_least_squares(W, W.bool(), torch.full((3, 3), torch.nan))
