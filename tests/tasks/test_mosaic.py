"""Mosaics of scenes: where the objects are, and that a seed is a picture."""

import pytest
import torch

from secateur import SecateurError
from secateur.tasks.scenes.draw import COLOURS, decode
from secateur.tasks.scenes.mosaic import draw_mosaics, empty_tiles


def colourful(picture):
    """[side, side] how far the tiles are from grey."""
    return (
        (picture.float().amax(0) - picture.float().amin(0)).unfold(0, 64, 64).unfold(1, 64, 64).amax((2, 3))
    )


def test_four_tiles_hold_one_object_each():
    background = torch.full((3, 3, 64, 64), 100, dtype=torch.uint8)
    drawn = draw_mosaics(4, 5, torch.Generator().manual_seed(0), background)
    assert drawn.pictures.shape == (4, 3, 320, 320) and drawn.pictures.dtype == torch.uint8
    palette = torch.tensor(list(COLOURS.values())).float()
    for picture, tiles, question, answer in zip(drawn.pictures, drawn.tiles, drawn.questions, drawn.answers):
        grey = (picture.unfold(1, 64, 64).unfold(2, 64, 64) == 100).all(0).all((2, 3))  # [5, 5]
        assert sorted((~grey).flatten().nonzero()[:, 0].tolist()) == sorted(tiles.tolist())
        row, col = divmod(int(tiles[0]), 5)
        tile = picture[:, row * 64 : row * 64 + 64, col * 64 : col * 64 + 64].float()
        spread = tile.amax(0) - tile.amin(0)
        colour = tile[:, spread > 60].mean(1)
        nearest = (palette / palette.norm(dim=1, keepdim=True) @ (colour / colour.norm())).argmax()
        assert decode([int(answer)]) == list(COLOURS)[nearest]
        assert decode(question)[:17] == "what color is the"


def test_a_seed_is_a_picture_and_small_ones_are_refused():
    generators = (torch.Generator().manual_seed(7) for _ in range(2))
    first, second = (draw_mosaics(1, 2, generator) for generator in generators)
    assert torch.equal(first.pictures, second.pictures) and first.questions == second.questions
    assert (
        colourful(draw_mosaics(1, 8, torch.Generator().manual_seed(1)).pictures[0])
        .flatten()
        .topk(4)
        .values.min()
        > 60
    )
    assert colourful(empty_tiles(1, torch.Generator().manual_seed(1))[0]).max() < 60
    with pytest.raises(SecateurError, match="fewer than 4 objects"):
        draw_mosaics(1, 1, torch.Generator())
