"""The worked examples and invariants of sparsevlm."""

import math

import pytest
import torch
from token_examples import CLIP

from secateur.families.vlm import Facts
from secateur.method import make_method
from secateur.methods.sparsevlm import left_after, merged, raters, recycled
from secateur.testing import token_sets
from secateur.tokens.reduce import density_clusters
from secateur.tokens.state import Missing

FIRST = "layer:0:entry"


@pytest.mark.parametrize(
    ("setting", "table", "after"),
    [  # the release's tables; what each cut leaves with them: what stays, and int(int(.3 n) + 1) / 10) + 1 of the n that do not
        (192, (300, 200, 110), (309, 204, 113)),
        (128, (303, 110, 36), (312, 117, 39)),
        (96, (238, 48, 26), (249, 55, 27)),
        (64, (66, 30, 17), (82, 32, 18)),
    ],
)
def test_the_published_settings_come_out_to_the_token(setting, table, after):
    assert tuple(left_after(number, after[2], 576) for number in range(3)) == after
    method, size = make_method("sparsevlm"), 576
    for stay, left in zip(table, after):
        scores, x = torch.arange(size).float(), torch.randn(size, 4)
        places, made = method.reduce(x, scores, left)
        assert len(places) == left == len(made)
        assert torch.equal(made[:stay], x[size - stay :])  # the best as they are, and then others
        assert not (places[stay:] >= size - stay).any()
        size = left


def test_targets_between_the_published_ones_lie_between_them():
    for number in range(3):
        counts = [left_after(number, asked, 576) for asked in (1, 10, 18, 30, 39, 80, 113, 300, 576)]
        assert counts[-1] == 576 and min(counts) >= 1
        assert all(count >= asked for count, asked in zip(counts, (1, 10, 18, 30, 39, 80, 113, 300, 576)))
    assert left_after(0, 76, 576) == round(312 - 3 * 37 / 74) and left_after(1, 76, 576) == round(
        117 + 87 / 2
    )
    assert left_after(0, 9, 288) == 41 and left_after(1, 9, 288) == 16  # half of everything


def test_how_many_are_merged():
    assert [recycled(n) for n in (1, 3, 4, 10, 276)] == [1, 1, 2, 4, 83]
    assert [merged(n) for n in (1, 29, 30, 31, 276)] == [1, 1, 2, 2, 9]


def test_words_that_match_rate():
    """Two image tokens (ln 4, 0) and (0, 0), words at (1, 0), (0, 1), (0, 0): softmax 4:1:1 and 1:1:1, mean 1/2, 1/4, 1/4."""
    image = torch.tensor([[[math.log(4), 0.0], [0.0, 0.0]]])
    words = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]])
    sets = token_sets(
        torch.zeros(1, 2, 2),
        1,
        hidden={FIRST: image},
        text={FIRST: words, "columns": torch.tensor([[7, 8, 9]])},
    )
    assert raters(sets).tolist() == [[7, -1, -1]]
    alike = token_sets(
        torch.zeros(1, 2, 2),
        1,
        hidden={FIRST: image * 0},
        text={FIRST: words, "columns": torch.tensor([[7, 8, 9]])},
    )
    assert raters(alike).tolist() == [[7, 8, 9]]
    none = token_sets(
        torch.zeros(1, 2, 2),
        1,
        hidden={FIRST: image},
        text={FIRST: (words, torch.zeros(1, 3).bool())},
    )
    with pytest.raises(Missing, match="rate"):
        raters(none)


def test_only_what_the_rating_words_attend_to_counts_and_they_are_chosen_once():
    n, site = 6, "layer:2"
    maps = torch.tensor([[[0.9, 0, 0, 0, 0, 0.1], [0.0, 0.5, 0.3, 0.1, 0.06, 0.04]]])
    sets = token_sets(
        torch.arange(n).float()[None, :, None],
        3,
        attention={(site, "each column"): maps},
        facts=CLIP,
        noted={"raters": torch.tensor([[-1, 1]])},
    )
    found = make_method("sparsevlm").cut(2, site, sets)
    # two stay; of the four others int(1.2) + 1 = 2 are merged into one at the better one's place: (3 + 4) / 2
    assert found.index.tolist() == [[1, 2, 3]]
    assert torch.allclose(found.features.flatten(), torch.tensor([1.0, 2.0, 3.5]), atol=1e-5)


def test_density_peaks_by_hand():
    """0, 1, 2.5, 10 and 10.5 on a line. The two nearest, itself one: squares 1, 1, 2.25, .25, .25, halved.

    Densities exp(-1/2), exp(-1/2), exp(-9/8), exp(-1/8), exp(-1/8): nothing is denser than 3, which gets the largest distance;
    4 is .5 from 3, 0 is 10 from it (6.07 with its density), 1 is 1 from 0, its equal and first.
    """
    centres, means = density_clusters(torch.tensor([[0.0], [1.0], [2.5], [10.0], [10.5]]), 2)
    assert centres.tolist() == [3, 0]
    assert torch.allclose(means, torch.tensor([[20.5 / 2], [3.5 / 3]]), atol=1e-4)


def test_where_it_cuts():
    for layers, expected in ((32, [3, 7, 16]), (4, [1, 2, 3])):
        stages = make_method("sparsevlm").stages(Facts(layers=layers, blocks=24))
        assert [stage.at for stage in stages] == [f"layer:{n}" for n in expected]
        assert [stage.records for stage in stages] == [(f"layer:{n - 1}", FIRST) for n in expected]
