"""Salient tokens: what a map says stands out stays, worked out by hand."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from token_examples import kept

from secateur.errors import SecateurError
from secateur.method import make_method
from secateur.testing import token_sets
from secateur.tokens.attach import attach
from secateur.tokens.grid import cell_means, z_order

sys.path.insert(0, str(Path(__file__).parents[1] / "tokens"))
from tiny_models import inputs_for, make

BARE = {"surround": 0.0}
SQUARE = torch.zeros(8, 8)
SQUARE[2:6, 2:6] = 1
"""Over a grid of 4 x 4: the four tokens of the middle, 5, 6, 9 and 10."""


def sets_of(given, keep, n=16, target=0.25, **more):
    rows = more.pop("rows", 1)
    return token_sets(torch.zeros(rows, n, 1), keep, given={"map": given}, target=target, **more)


def test_the_mean_over_a_cell_is_exact_for_all_sizes():
    values = torch.rand(12, 8)
    pooled = torch.nn.functional.avg_pool2d(values[None].double(), (3, 4))[0]
    assert torch.allclose(cell_means(values, 4, 2), pooled, atol=1e-8)
    # three pixels over two cells: the one in the middle is half of each's third
    assert cell_means(torch.tensor([[0.0, 0.5, 1.0]]), 1, 2)[0].tolist() == pytest.approx([1 / 6, 5 / 6])
    # a map that is coarser than the grid, and any two grids have the same mean
    assert cell_means(torch.tensor([[0.25, 1.0]]), 2, 4).tolist() == [[0.25, 0.25, 1, 1]] * 2
    assert cell_means(values, 5, 7).mean().item() == pytest.approx(values.mean().item())


def test_the_curve_goes_quarter_by_quarter():
    row, column = (torch.arange(16) // 4, torch.arange(16) % 4)
    assert z_order(row, column).view(4, 4).tolist() == [
        [0, 1, 4, 5],
        [2, 3, 6, 7],
        [8, 9, 12, 13],
        [10, 11, 14, 15],
    ]


def test_the_object_stays():
    assert kept("salient-tokens", sets_of(SQUARE, 4), **BARE) == [[5, 6, 9, 10]]
    assert kept("salient-tokens", sets_of(SQUARE > 0, 4), **BARE) == [[5, 6, 9, 10]]
    assert kept("salient-tokens", sets_of(np.float16(SQUARE), 4), **BARE) == [[5, 6, 9, 10]]
    weak = torch.arange(16).view(4, 4) / 16  # each token another score
    assert kept("salient-tokens", sets_of(weak, 3), **BARE) == [[13, 14, 15]]


def test_the_larger_of_several_opinions_counts():
    opinions = torch.zeros(2, 4, 4)
    opinions[0, 0, 0], opinions[0, 3, 3], opinions[1, 3, 3], opinions[1, 0, 3] = 0.9, 0.2, 0.6, 0.3
    found = [kept("salient-tokens", sets_of(opinions, keep), **BARE)[0] for keep in (1, 2, 3)]
    assert found == [[0], [0, 15], [0, 3, 15]]
    assert kept("salient-tokens", sets_of(torch.stack([SQUARE > 0, SQUARE < 0]), 4), **BARE) == [
        [5, 6, 9, 10]
    ]


def test_ties_lie_evenly():
    """Along the curve 0 1 4 5 2 3 6 7 8 ...: equal scores within an object, beside it, and of an empty map."""
    full = kept("salient-tokens", sets_of(torch.ones(2, 2), 4), **BARE)
    assert full == kept("salient-tokens", sets_of(torch.zeros(2, 2), 4)) == [[4, 6, 12, 14]]
    # one token of each 2 x 2, the third on its curve: the bottom left one
    top = torch.tensor([[1.0], [0.0]])  # eight tokens of score 1, half of them in each upper quarter
    assert kept("salient-tokens", sets_of(top, 2), **BARE) == [[4, 6]]
    # beside four tokens of an object the twelve others on the curve: 0 1 4 | 2 3 7 | 8 12 13 | 11 14 15
    assert kept("salient-tokens", sets_of(SQUARE, 8), **BARE) == [[1, 3, 5, 6, 9, 10, 12, 14]]


def test_a_share_of_the_budget_is_spread_around():
    """What is left is spread along 0 1 4 5 2 3 6 7 8 9 12 13 10 11 14 15."""
    # two of 5, 6, 9 and 10, which are equal: every second; left 0 1 4 | 5 2 3 7 8 9 12 | 13 11 14 15
    assert kept("salient-tokens", sets_of(SQUARE, 4), surround=0.5) == [[5, 6, 10, 13]]
    grown = torch.zeros(4, 4)
    grown[:2] = torch.tensor([0.9, 0.8, 0.7, 0.6])  # the upper half
    # six of eight on the object; left 3 7 | 8 9 12 13 10 | 11 14 15
    assert kept("salient-tokens", sets_of(grown, 8), surround=0.25) == [[0, 1, 2, 4, 5, 6, 8, 11]]
    assert kept("salient-tokens", sets_of(grown, 8), **BARE) == [list(range(8))]


def test_without_a_target_the_picture_says_how_many():
    alone = {"target": None}
    assert kept("salient-tokens", sets_of(SQUARE, 16, **alone), **BARE) == [[5, 6, 9, 10]]
    assert len(kept("salient-tokens", sets_of(SQUARE, 16, **alone), surround=0.25)[0]) == 6  # 4 / .75, up
    assert len(kept("salient-tokens", sets_of(SQUARE, 16, **alone), surround=0.9)[0]) == 16
    corner = torch.zeros(8, 8)
    corner[0, 0], corner[0, 2:4] = 1, 1  # a quarter of token 0, half of token 1
    for on, expected in ((0.25, [0, 1]), (0.26, [1]), (0.5, [1]), (0.6, [1])):
        assert kept("salient-tokens", sets_of(corner, 16, **alone), on=on, **BARE) == [expected]
    assert len(kept("salient-tokens", sets_of(torch.zeros(2, 2), 16, **alone))[0]) == 1


def test_every_picture_has_its_own_map():
    """Two rows: one with two pictures, one with a picture, four tokens each; pictures count row by row."""
    maps = [torch.zeros(2, 2) for _ in range(3)]
    for number, one in enumerate(maps):
        one.view(-1)[number] = 1
    places = {"grid": (2, 2), "image_of": torch.tensor([[0], [1], [0]]), "row": torch.tensor([0, 0, 1])}
    sets = sets_of(maps, 1, n=4, rows=3, **places)
    assert kept("salient-tokens", sets, **BARE) == [[0], [1], [2]]
    same = sets_of(maps[2], 1, n=4, rows=3, **places)
    assert kept("salient-tokens", same, **BARE) == [[2], [2], [2]]
    with pytest.raises(SecateurError, match="2 maps for 3 pictures"):
        kept("salient-tokens", sets_of(maps[:2], 1, n=4, rows=3, **places))


def test_a_thumbnail_and_its_tiles_share_the_map_and_crops_of_no_known_place_are_refused():
    """One token of the whole, and two of its halves; the right half stands out."""
    three = {
        "grid_row": torch.zeros(1, 3, dtype=torch.int64),
        "grid_col": torch.tensor([[0, 0, 1]]),
        "crop_of": torch.tensor([[0, 1, 2]]),
        "grid": (1, 3),
    }
    half = torch.tensor([[0.0, 1.0]])
    levels = {"level": torch.tensor([[0, 1, 1]])}
    assert kept("salient-tokens", sets_of(half, 1, n=3, **three, **levels), **BARE) == [[2]]
    assert kept("salient-tokens", sets_of(half, 2, n=3, **three, **levels), **BARE) == [[0, 2]]
    with pytest.raises(SecateurError, match="lie over one another"):
        kept("salient-tokens", sets_of(half, 1, n=3, **three))


def test_every_frame_of_a_video_has_the_map_of_its_video():
    frames = {"frame_of": torch.tensor([[0] * 4 + [1] * 4]), "grid": (2, 4)}
    place = torch.arange(8) % 4
    frames |= {"grid_row": place[None] // 2, "grid_col": place[None] % 2}
    half = torch.tensor([[0.0, 1.0]])
    assert kept("salient-tokens", sets_of(half, 4, n=8, **frames), **BARE) == [[1, 3, 5, 7]]


def test_no_map_and_what_is_no_map_is_refused_by_name():
    good = torch.zeros(2, 2)
    for wrong, match in (
        (None, "no map of the picture.*given="),
        (torch.zeros(4), r"its shape is \[4\]"),
        (torch.zeros(1, 1, 2, 2), r"its shape is \[1, 1, 2, 2\]"),
        (torch.zeros(0, 4), r"its shape is \[0, 4\]"),
        (torch.zeros(0, 4, 4), r"its shape is \[0, 4, 4\]"),
        (torch.ones(2, 2, dtype=torch.int64), "holds int64.*mask > 0"),
        (np.full((2, 2), 255, np.uint8), "holds uint8.*mask > 0"),
        (good.to(torch.complex64), "holds complex64"),
        (good + math.nan, "or NaN"),
        (good + math.inf, "outside 0..1"),
        (good - 0.1, "outside 0..1"),
        (good + 1.5, "outside 0..1.*maximum"),
        ("mask.png", "map.*no array of numbers"),
        ([good, good], "2 maps for 1 picture"),
        ([], "0 maps for 1 picture"),
        ([good - 1], "map 0.*outside"),
    ):
        with pytest.raises(SecateurError, match=match):
            kept("salient-tokens", sets_of(wrong, 4))
    for name, value in (("surround", 1.0), ("surround", -0.1), ("on", 0.0), ("on", 1.1)):
        with pytest.raises(SecateurError, match=f"salient-tokens.{name}"):
            make_method("salient-tokens", **{name: value})


def test_a_model_answers_with_each_pictures_own_budget():
    """Two pictures in one row and one in the next, without a target: 4, 1 and 16 of 16 tokens, on the objects."""
    model, inputs = make("llava-clip", torch.float32), inputs_for("llava-clip", torch.float32)
    small = torch.zeros(4, 4, dtype=torch.bool)
    small[3, 0] = True
    maps = [SQUARE, small, torch.stack([SQUARE == 0, SQUARE > 0])]
    with torch.no_grad(), attach(model, "salient-tokens", given={"map": maps}, **BARE) as attached:
        model(**inputs)
    assert [row.tolist() for row in attached.kept["input"]] == [[5, 6, 9, 10, 16 + 12], list(range(16)), []]
    with (
        pytest.raises(SecateurError, match="no map of the picture"),
        torch.no_grad(),
        attach(model, "salient-tokens", target="25%"),
    ):
        model(**inputs)
    with torch.no_grad(), attach(model, "salient-tokens", target="25%", budget="all", given={"map": maps}):
        assert model(**inputs).logits.isfinite().all()
