"""`scenes:mosaic`: large pictures made of 64-pixel tiles, of which a few hold one object each, and a question about one of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.errors import SecateurError
from secateur.tasks.scenes.draw import COLOURS, ID, SHAPES, SIZE, draw_scenes, render
from secateur.utils.screen import Screen

OTHERS = 3
"""Objects that aren't asked about."""
EMPTY = 256
"""Tiles without an object that are drawn."""


@dataclass(repr=False)
class Mosaics(Screen):
    """Pictures uint8 [B, 3, 64 side, 64 side], questions as word numbers, answers [B], and which tiles hold objects
    [B, 1 + OTHERS], the one that is asked about first."""

    pictures: Tensor
    questions: list[list[int]]
    answers: Tensor
    tiles: Tensor


def empty_tiles(count: int, generator: torch.Generator) -> Tensor:
    """Scenes without an object, uint8 [count, 3, 64, 64]."""
    empty = draw_scenes(count, generator)
    empty.there[:] = False
    return render(empty, generator)[0]


def draw_mosaics(
    count: int, side: int, generator: torch.Generator, background: Tensor | None = None
) -> Mosaics:
    """`count` pictures of side x side tiles, each with a question: "what color is the circle ?".

    >>> drawn = draw_mosaics(2, 8, torch.Generator().manual_seed(0))
    >>> drawn.pictures.shape, drawn.tiles.shape
    (torch.Size([2, 3, 512, 512]), torch.Size([2, 4]))

    Objects are 16 pixels large; no other has the shape or the colour of the one that is asked about. background: `empty_tiles`
    to repeat in random order, in place of new ones.
    Raises `SecateurError` for fewer tiles than objects.
    """
    if side * side <= OTHERS:
        raise SecateurError(f"{side} x {side} tiles hold fewer than {1 + OTHERS} objects", where="mosaic")
    if background is None:
        background = empty_tiles(EMPTY, generator)
    colour = torch.rand(count, len(COLOURS), generator=generator).argsort(1)[:, : 1 + OTHERS]
    shape = torch.rand(count, len(SHAPES), generator=generator).argsort(1)
    held = draw_scenes(count * (1 + OTHERS), generator)
    held.there[:] = torch.arange(held.there.shape[1]) == 0
    held.colour[:, 0], held.shape[:, 0] = colour.flatten(), shape[:, : 1 + OTHERS].flatten()
    objects, _ = render(held, generator)
    chosen = torch.randint(len(background), (count, side * side), generator=generator)
    tiles = torch.rand(count, side * side, generator=generator).argsort(1)[:, : 1 + OTHERS]
    every = background[chosen]  # [B, tiles, 3, 64, 64]
    every[torch.arange(count)[:, None], tiles] = objects.view(count, 1 + OTHERS, 3, SIZE, SIZE)
    pictures = every.view(count, side, side, 3, SIZE, SIZE).permute(0, 3, 1, 4, 2, 5)
    names = list(COLOURS)
    return Mosaics(
        pictures.reshape(count, 3, side * SIZE, side * SIZE),
        [[ID[word] for word in f"what color is the {SHAPES[s]} ?".split()] for s in shape[:, 0].tolist()],
        torch.tensor([ID[names[c]] for c in colour[:, 0].tolist()]),
        tiles,
    )
