"""Context-aware saliency of a map: the sheet's numbers and invariants."""

import importlib

import pytest
import torch

from secateur.errors import SecateurError
from secateur.saliency.regions import at_scale, lab, lift, sr_map

ONE = {"longer": None, "scales": (1,), "candidates": (1,)}


def spot():
    m = torch.zeros(3, 3)
    m[1, 1], m[0, 0] = 1.0, 0.2
    return m


def blob(row, column, second=None):
    m = torch.zeros(21, 21)
    for shift in (0, second) if second else (0,):
        m[row : row + 3, column + shift : column + shift + 3] = 1
    return m


def test_the_sheets_three_by_three():
    s, _ = at_scale(spot()[None], 1, [1], 1, 1, 3)
    expected = torch.zeros(3, 3)
    expected[1, 1], expected[0, 0] = 0.320637, 0.056931
    assert torch.allclose(s, expected, atol=1e-6)
    unit = s / s.max()
    assert unit[0, 0].item() == pytest.approx(0.177556, abs=1e-5)
    final = torch.zeros(3, 3)
    final[1, 1] = 1
    assert torch.allclose(sr_map(spot(), patch=1, neighbours=3, **ONE), final, atol=1e-6)


def test_the_sheets_five_by_five():
    m = torch.zeros(5, 5)
    m[2, 2], m[2, 3] = 1.0, 0.5
    s, _ = at_scale(m[None], 1, [1], 3, 1, 4)
    outer, middle = [0.186719, 0.203695, 0.191695], [0.198934, 0.226835, 0.203374]
    assert torch.allclose(s, torch.tensor([outer, middle, outer]), atol=1e-6)


def test_a_moved_blob_and_a_second_one():
    first, moved = (at_scale(blob(at, at)[None], 1, [1], 3, 1, 64)[0] for at in (6, 10))
    assert first[6, 6].item() == pytest.approx(0.293259, abs=1e-6)
    assert first.argmax() == 6 * 19 + 6 and moved.argmax() == 10 * 19 + 10
    assert (first[:-4, :-4] - moved[4:, 4:]).abs().max().item() == pytest.approx(0.0337, abs=1e-4)
    for apart, expected in ((5, 0.287790), (8, 0.283384), (11, 0.276903)):
        s, _ = at_scale(blob(6, 6, apart)[None], 1, [1], 3, 1, 64)
        assert s[6, 6].item() == pytest.approx(expected, abs=1e-6)


def test_scale_of_the_numbers_is_no_matter_and_a_constant_is_zeros():
    torch.manual_seed(0)
    m = torch.rand(3, 30, 40)
    found = sr_map(m, longer=40)
    assert found.shape == (30, 40) and found.min() >= 0 and found.max() <= 1
    assert torch.allclose(found, sr_map(m * 17, longer=40), atol=1e-5)
    assert not sr_map(torch.full((20, 20), 3.0)).any()


def test_candidates_of_other_scales_and_few_patches():
    m = torch.rand(16, 16, generator=torch.Generator().manual_seed(0))
    assert sr_map(m, longer=None, neighbours=10_000).max() > 0
    fine, coarse = (sr_map(m, longer=None, candidates=c, scales=(1,)) for c in ((1,), (1, 0.5)))
    assert not torch.allclose(fine, coarse)


def test_distances_are_the_same_in_chunks(monkeypatch):
    m = torch.rand(1, 30, 30, generator=torch.Generator().manual_seed(0))
    whole, _ = at_scale(m, 1, [1, 0.5], 5, 2, 8)
    monkeypatch.setattr(importlib.import_module("secateur.saliency.regions"), "CHUNK", 500)
    parts, _ = at_scale(m, 1, [1, 0.5], 5, 2, 8)
    assert torch.allclose(whole, parts, atol=1e-4)


def test_lift_falls_off_from_the_foci():
    s = torch.tensor([[1.0, 0.5, 0.5, 0.5]])
    assert torch.allclose(lift(s), torch.tensor([[1, 0.5 * 2 / 3, 0.5 / 3, 0]]))
    assert torch.equal(lift(torch.ones(2, 2)), torch.ones(2, 2))


def test_lab_of_known_colours():
    """CIE L*a*b* (D65) of sRGB red and of a mid grey."""
    rgb = torch.tensor([[1.0, 0.5], [0.0, 0.5], [0.0, 0.5]])[:, None]
    light, a, b = lab(rgb)
    assert torch.allclose(light * 100, torch.tensor([[53.24, 53.39]]), atol=0.02)
    assert torch.allclose(a * 255 - 128, torch.tensor([[80.09, 0.0]]), atol=0.05)
    assert torch.allclose(b * 255 - 128, torch.tensor([[67.20, 0.0]]), atol=0.05)


@pytest.mark.parametrize(
    ("m", "match"),
    [
        (torch.zeros(2, 2, 2, 2), "no map"),
        (-torch.ones(9, 9), "negative"),
        (torch.rand(3, 3), "smaller than a patch"),
    ],
)
def test_what_is_no_map_is_named(m, match):
    with pytest.raises(SecateurError, match=match):
        sr_map(m, longer=None)
