"""Tokens by a map of the picture that the caller gives: what it says of each token's cell."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from secateur.errors import SecateurError, require
from secateur.tokens.grid import cell_means
from secateur.tokens.state import Missing, TokenSets

FIX = 'attach(..., given={"map": [height, width], [masks, height, width], or a list of one of these for each picture})'


def marked(sets: TokenSets, who: str) -> tuple[Tensor, Tensor]:
    """[S, n] float64: the mean of its picture's map over each token's cell; [S, n] int64: which grid that is a cell of.

    The map is `given["map"]`: [H, W] or [masks, H, W], floats in 0..1 or bool, for all pictures, or a list with one for each,
    row by row. who: the method, for errors. Raises `SecateurError` where there is none, it is no map, or crops lie over one another.
    """
    row = sets.row[:, None].expand_as(sets.index)
    where = torch.stack([row, sets.image_of, sets.frame_of, sets.level, sets.grid_row, sets.grid_col], 2)[
        sets.valid
    ]
    if len(where.unique(dim=0)) < len(where):
        raise Missing(
            "known place of a picture's crops: they lie over one another",
            where=who,
            fix='given={"pyramid": ...} with the levels of each picture, or a processor that makes no crops',
        )
    pictures, picture = where[:, :2].unique(dim=0, return_inverse=True)
    maps = read_maps(sets.given.get("map"), len(pictures), sets.device, who)
    grids, grid = where[:, :4].unique(dim=0, return_inverse=True)
    score = torch.zeros(len(where), dtype=torch.float64, device=sets.device)
    for number in range(len(grids)):
        mine = grid == number
        place = where[mine, 4:]
        height, width = (place.amax(0) + 1).tolist()
        cells = cell_means(maps[int(picture[mine][0])], height, width)
        score[mine] = cells[place[:, 0], place[:, 1]]
    scores, planes = score.new_zeros(sets.valid.shape), torch.zeros_like(sets.index)
    scores[sets.valid], planes[sets.valid] = score, grid
    return scores, planes


def read_maps(given: Any, pictures: int, device: torch.device, who: str) -> list[Tensor]:
    """The map [H, W] of each picture. Raises `SecateurError` where there is none, or it is no map."""
    require(given is not None, "there is no map of the picture", where=who, fix=FIX)
    if not isinstance(given, list | tuple):
        return [read_map(given, "map", device)] * pictures
    said = f"{len(given)} maps for {pictures} picture{'s' * (pictures != 1)}"
    require(len(given) == pictures, said, where="map", fix="one for each picture, row by row, or one for all")
    return [read_map(one, f"map {number}", device) for number, one in enumerate(given)]


def read_map(given: Any, where: str, device: torch.device) -> Tensor:
    """One picture's map [H, W], the largest of several opinions."""
    try:
        values = torch.as_tensor(given, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise SecateurError(f"it is no array of numbers ({error})", where=where, fix=FIX) from error
    require(
        values.dim() in (2, 3) and values.numel() > 0,
        f"its shape is {list(values.shape)}",
        where=where,
        fix=FIX,
    )
    require(
        values.dtype == torch.bool or values.is_floating_point(),
        f"it holds {str(values.dtype).removeprefix('torch.')}",
        where=where,
        fix="bool, such as mask > 0, or floats in 0..1",
    )
    require(
        values.dtype == torch.bool or bool(((values >= 0) & (values <= 1 + 1e-6)).all()),
        "it holds numbers outside 0..1, or NaN",
        where=where,
        fix="divide it by its maximum; secateur's maps: found.unit()",
    )
    return values.double() if values.dim() == 2 else values.double().amax(0)
