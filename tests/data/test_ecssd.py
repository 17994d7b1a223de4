"""Photographs with masks: counts, the split, and squeezing by hand."""

import pytest
import torch

from secateur import SecateurError
from secateur.data.ecssd import at_size, load_ecssd


@pytest.mark.needs_data
def test_all_pictures_have_a_mask_of_their_size_and_the_split_parts_them() -> None:
    pictures, masks = load_ecssd()
    assert len(pictures) == len(masks) == 250
    assert all(p.shape == (3, *m.shape) and p.dtype == torch.uint8 for p, m in zip(pictures, masks))
    assert all(m.dtype == torch.bool and 0 < m.float().mean() < 1 for m in masks)
    parts = [load_ecssd(split, seed=3)[0] for split in ("train", "test")]
    assert [len(part) for part in parts] == [200, 50]
    assert {id(p) for part in parts for p in part} == {id(p) for p in pictures}
    assert [id(p) for p in parts[1]] != [id(p) for p in load_ecssd("test", seed=4)[0]]
    with pytest.raises(SecateurError, match="no split 'val'"):
        load_ecssd("val")


def test_a_pixel_belongs_to_a_squeezed_mask_where_half_of_what_it_stands_for_does() -> None:
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 1]]).bool()
    x, y = at_size([torch.full((3, 2, 4), 51, dtype=torch.uint8)], [mask], (1, 2))
    assert y.tolist() == [[[True, False]]]
    assert x.shape == (1, 3, 1, 2) and x.flatten().tolist() == pytest.approx([0.2] * 6)
