import pytest
import torch

from secateur.errors import SecateurError
from secateur.pruning.select import Pattern, exact_rows, n_of_m, top_k, top_k_rows


def reference(scores, k):
    """A stable descending sort: of equal scores the earlier stays."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    mask = [False] * len(scores)
    for i in order[:k]:
        mask[i] = True
    return mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("levels", [3, 1000])
def test_rows_agree_with_a_stable_sort(levels, dtype):
    scores = torch.randint(0, levels, (7, 41), generator=torch.Generator().manual_seed(levels)).to(dtype)
    for k in (0, 1, 20, 40, 41):
        mask = top_k_rows(scores, k)
        assert mask.tolist() == [reference(row.tolist(), k) for row in scores]


def test_top_k_of_a_matrix_is_over_all_its_weights():
    scores = torch.tensor([[1.0, 5.0, 2.0], [4.0, 4.0, 0.0]])
    assert top_k(scores, 2).tolist() == [[False, True, False], [True, False, False]]


def test_exact_rows_give_the_remainder_to_the_rows_with_the_best_next_weight():
    scores = torch.tensor([[9.0, 8.0, 1.0], [7.0, 2.0, 1.5], [6.0, 5.0, 4.0]])
    mask = exact_rows(scores, 5)  # one each, then 8 and 5
    assert mask.tolist() == [[True, True, False], [True, False, False], [True, True, False]]


def test_negative_scores_and_minus_infinity():
    scores = torch.tensor([[-1.0, -torch.inf, -3.0, -2.0]])
    assert top_k_rows(scores, 2).tolist() == [[True, False, False, True]]
    assert exact_rows(scores, 3).tolist() == [[True, False, True, True]]


def test_n_of_m_by_hand():
    scores = torch.tensor([[1.0, 4.0, 3.0, 2.0, 5.0, 5.0, 5.0, 5.0]])
    assert n_of_m(scores, 2, 4).int().tolist() == [[0, 1, 1, 0, 1, 1, 0, 0]]
    assert n_of_m(scores, 4, 8).int().tolist() == [[0, 0, 0, 0, 1, 1, 1, 1]]
    with pytest.raises(SecateurError, match="2:4: a row of 6 weights"):
        n_of_m(torch.rand(1, 6), 2, 4)


def test_patterns_choose_their_scope():
    scores = torch.tensor([[4.0, 3.0], [2.0, 1.0]])
    assert Pattern(2, "layer").select(scores).tolist() == [[True, True], [False, False]]
    assert Pattern(2, "row").select(scores).tolist() == [[True, False], [True, False]]
