"""The worked examples and invariants of cdpruner."""

import pytest
import torch
from token_examples import CLIP, circle, kept

from secateur.method import make_method
from secateur.methods.cdpruner import over_image
from secateur.testing import token_sets
from secateur.tokens.greedy import max_determinant
from secateur.tokens.state import Missing


def sets(likeness, keep, degrees, **more):
    """The text tower says how alike patches and question are."""
    given = {"text_encoder": lambda hidden, sets: torch.tensor([likeness])}
    features = circle(degrees)
    return token_sets(features, keep, hidden={"encoder:-2": features}, given=given, facts=CLIP, **more)


def test_the_least_like_the_question_counts_most_as_released():
    """Likeness .3 .2 .1 .1 gives relevance 0 .5 1 1; the third is picked, then 2 and 4 are compared.

    The angle to the third is 90 for the second, .25 * sin^2 90 = .25; 20 for the fourth, sin^2 20 = .117.
    """
    likeness = [0.3, 0.2, 0.1, 0.1]
    assert kept("cdpruner", sets(likeness, 1, [0, 10, 100, 120])) == [[2]]
    assert kept("cdpruner", sets(likeness, 2, [0, 10, 100, 120])) == [[1, 2]]
    assert kept("cdpruner", sets(likeness, 2, [0, 10, 100, 140])) == [[2, 3]]  # sin^2 40 = .413


def test_equal_relevance_leaves_diversity_alone():
    assert kept("cdpruner", sets([0.2] * 4, 2, [0, 0, 90, 0])) == [[0, 2]]


def test_relevance_is_scaled_over_the_crops_of_one_picture():
    features = torch.zeros(3, 2, 2)
    crops = token_sets(features, 1, row=torch.tensor([0, 0, 1]), image=torch.tensor([0, 0, 0]))
    scaled = over_image(torch.tensor([[1.0, 2.0], [3.0, 5.0], [7.0, 9.0]]), crops)
    assert torch.allclose(scaled, torch.tensor([[0, 0.25], [0.5, 1], [0, 1]]), atol=1e-5)
    padded = token_sets(features, 1, valid=torch.tensor([[True, True], [True, False], [True, True]]))
    assert over_image(torch.tensor([[0.0, 1.0], [5.0, 9.0], [0.0, 1.0]]), padded)[1].tolist() == [1, 0]


def test_words_of_the_prompt_in_place_of_a_text_tower():
    text = (circle([0, 90]), torch.tensor([[True, False]]))
    plain = token_sets(circle([0, 60, 180]), 1, text={"embeddings": text})
    assert kept("cdpruner", plain, text="embeddings") == [[0]]  # cosines 1, .5, -1 with the one word there is


def test_without_a_text_tower_it_says_what_to_give():
    bare = token_sets(circle([0, 60]), 1, hidden={"encoder:-2": circle([0, 60])}, facts=CLIP)
    with pytest.raises(Missing, match="text encoder"):
        make_method("cdpruner").select(bare)


def test_every_pick_raises_the_determinant_most():
    """Beside determinants of all candidates, by torch.linalg."""
    x = torch.randn(2, 9, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    kernel = x @ x.mT
    picks = max_determinant(
        kernel, torch.tensor([5, 3]), torch.arange(9).expand(2, 9) < torch.tensor([[9], [7]])
    )
    for s, (count, n) in enumerate(((5, 9), (3, 7))):
        taken: list[int] = []
        for step in range(count):
            worth = {
                i: torch.linalg.det(kernel[s][taken + [i]][:, taken + [i]])
                for i in range(n)
                if i not in taken
            }
            taken.append(max(worth, key=worth.__getitem__))
            before = torch.linalg.det(kernel[s][taken[:-1]][:, taken[:-1]]) if step else 1.0
            assert picks.values[s, step] == pytest.approx(float(worth[taken[-1]] / before), rel=1e-3)
        assert picks.order[s].tolist() == taken + [-1] * (5 - count)


def test_more_picks_than_dimensions_are_different_tokens():
    x = torch.ones(1, 6, 3)
    order = max_determinant(x @ x.mT, 6).order[0].tolist()
    assert order == list(range(6))
    assert all(
        len(set(kept("cdpruner", sets([0.1] * 6, k, [0, 0, 0, 9, 9, 9]))[0])) == k for k in range(1, 7)
    )
