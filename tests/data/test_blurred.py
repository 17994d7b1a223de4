"""Squares with a blurred region: what is outside of the mask is untouched, and the blur is a mean along a line."""

import math

import pytest
import torch

from secateur import SecateurError
from secateur.data.blurred import line, load_blurred, regional_blur


def test_a_line_is_a_mean_along_it() -> None:
    flat = line(5, 0.0)
    assert flat.sum().item() == pytest.approx(1) and flat.shape == (7, 7)
    assert (flat[3, 1:6] > 0).all() and flat[3, 0] == 0 and not flat[[0, 1, 2, 4, 5, 6]].any()
    torch.testing.assert_close(line(5, math.pi / 2), flat.T)


def test_only_the_region_changes() -> None:
    picture = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))
    blurred, mask = regional_blur(picture, torch.Generator().manual_seed(1))
    assert torch.equal(blurred[:, ~mask], picture[:, ~mask])
    assert 0.05 < mask.float().mean() < 0.45
    assert blurred[:, mask].var() < 0.5 * picture[:, mask].var()


def test_motion_across_leaves_rows_apart() -> None:
    """A picture whose rows are flat is untouched by it, one whose columns are flat isn't."""
    rows = torch.rand(3, 64, 1, generator=torch.Generator().manual_seed(0)).expand(3, 64, 64)
    blurred, _ = regional_blur(rows, torch.Generator().manual_seed(1), angle=0.0)
    torch.testing.assert_close(blurred, rows)
    other, mask = regional_blur(rows.mT, torch.Generator().manual_seed(1), angle=0.0)
    assert (other - rows.mT)[:, mask].abs().mean() > 0.05


@pytest.mark.needs_data
def test_splits_are_apart_and_always_the_same() -> None:
    blurred, sharp, mask = load_blurred("test", 3, 64)
    assert blurred.shape == (3, 3, 64, 64) and mask.shape == (3, 64, 64) and mask.dtype == torch.bool
    assert torch.equal(load_blurred("test", 3, 64)[0], blurred)
    assert not torch.equal(load_blurred("train", 3, 64)[1], sharp)
    assert 0 <= blurred.min() and blurred.max() <= 1
    with pytest.raises(SecateurError, match="train, val, test"):
        load_blurred("all")
