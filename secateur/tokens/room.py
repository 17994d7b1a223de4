"""Room in a prompt for the tiles of a pyramid, where the prompt came with places for the thumbnails alone.

Shapes: B rows, L columns as given, L' with a place for every tile's tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from secateur.errors import SecateurError


def room(here: Tensor, mask: Tensor, tiles: Sequence[int], each: int) -> Tensor | None:
    """[B, L'] the column as given of each column with room for all tiles, -1 padding; None: all have their places, or too few.

    >>> here = torch.tensor([[False, True, True, False]])  # a thumbnail of two tokens, and three tiles more
    >>> room(here, torch.ones(1, 4), [4], 2).tolist()
    [[0, 1, 2, 2, 2, 2, 2, 2, 2, 3]]

    here: bool [B, L], the places of pictures; mask [B, L]; tiles: of each pyramid, with its thumbnail; each: tokens of a tile.
    New places follow the last of their thumbnail's. Rows are padded on the side where `mask` pads them.
    """
    row_counts = here.sum(1)
    if (
        sum(tiles) == len(tiles)
        or int(row_counts.sum()) != each * len(tiles)
        or bool((row_counts % each).any())
    ):
        return None
    number = here.flatten().cumsum(0).view_as(here)
    last = here & (number % each == 0)
    more = torch.tensor([each * (n - 1) for n in tiles], device=here.device)
    times = torch.ones_like(number)
    times[last] += more[number[last] // each - 1]
    columns = torch.arange(here.shape[1], device=here.device)
    rows = [columns.repeat_interleave(each_row) for each_row in times]
    right = not bool(mask[:, -1].all()) and bool(mask[:, 0].all())
    wide = torch.full((len(rows), max(map(len, rows))), -1, device=here.device)
    for one, source in zip(wide, rows):
        one[slice(0, len(source)) if right else slice(len(one) - len(source), None)] = source
    return wide


def widened(kwargs: Mapping[str, Any], source: Tensor, shape: torch.Size, pad: int) -> dict[str, Any]:
    """Arguments whose tensors of the prompt's `shape` follow `source` [B, L'], as `room` gives it.

    Raises `SecateurError` for positions, which new places don't have.
    """
    if kwargs.get("position_ids") is not None:
        raise SecateurError(
            "positions came with a prompt that has places for thumbnails alone",
            where="position_ids",
            fix="leave them out, or give a prompt with a place for every token of every tile",
        )
    fills = {"input_ids": pad, "labels": -100}
    index, padding = source.clamp(min=0), source < 0
    return {
        name: value.gather(1, index).masked_fill(padding, fills.get(name, 0))
        if isinstance(value, Tensor) and value.shape == shape
        else value
        for name, value in kwargs.items()
    }
