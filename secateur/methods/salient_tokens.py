"""Salient tokens: the tokens on what a map of the picture says stands out.

No paper: a baseline of this library. Spec: none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from secateur.errors import SecateurError, require
from secateur.method import register
from secateur.taxonomy import record
from secateur.tokens.counts import ceils
from secateur.tokens.grid import cell_means, z_order
from secateur.tokens.method import TokenMethod
from secateur.tokens.state import Missing, TokenSets

FIX = 'attach(..., given={"map": [height, width], [masks, height, width], or a list of one of these for each picture})'


@register
@dataclass
class SalientTokens(TokenMethod):
    """The tokens whose cells a map of the picture marks most, before the language model.

    >>> found = load_objects("out/connnet").find([picture])[0]  # of secateur.tasks.sod  # doctest: +SKIP
    >>> with secateur.attach(vlm, "salient-tokens", target="25%", given={"map": found.saliency[0]}):  # doctest: +SKIP
    ...     vlm.generate(**inputs)

    `map`: [H, W], floats in 0..1 or bool, of any size, over the picture as the processor hands it on (after it crops);
    [masks, H, W] are several opinions, of which the largest counts; a list has one of these for each picture, row by row, else
    all have the same one. A video's map is that of each of its frames. A token's score is the mean of the map over its cell;
    tiles of a picture share its map, and so does the thumbnail. Where a processor's crops count as pictures
    (`attached.coordinates` tells), each has a map of its own.

    `surround` of the budget is spread evenly over what is left, as context (on scenes it helped nowhere: 0). Of equal scores those stay that lie evenly,
    along a curve that goes through the grid quarter by quarter. Tokens of score 0 are on no object: what the objects
    don't fill is spread evenly too, so a map of zeros gives an even spread.

    Without a target all tokens stay whose cells are on the object by at least `on`, and as many around as `surround` says;
    one at least, also of a map of zeros.
    """

    on: float = field(
        default=0.25,
        metadata={
            "help": "without a target: least mean of the map over a token's cell",
            "above": 0,
            "max": 1,
        },
    )
    surround: float = field(
        default=0.0,
        metadata={"help": "share of the budget that is spread evenly as context", "min": 0, "below": 1},
    )
    scope: ClassVar[str] = "image"
    newlines: ClassVar[str] = "drop"
    adaptive: ClassVar[bool] = True
    asks: ClassVar[Mapping[str, Any]] = {"map": torch.eye(4)}

    info = record("salient-tokens")

    def select(self, sets: TokenSets) -> Tensor:
        score, plane = marked(sets)
        curve = (plane << 30) + z_order(sets.grid_row, sets.grid_col)
        keep = sets.keep if sets.target is not None else self.found(score, sets)
        kept = torch.zeros_like(sets.valid)
        for i, (count, most) in enumerate(zip(sets.count.tolist(), keep.tolist())):
            mine, order = score[i, :count], curve[i, :count].argsort()
            best = min(most - int(self.surround * most + 1e-9), int((mine > 0).sum()))
            stays = torch.zeros_like(mine, dtype=torch.bool)
            if best:
                least = mine.sort(descending=True).values[best - 1]
                stays = mine > least
                stays = stays | evenly(mine == least, order, best - int(stays.sum()))
            kept[i, :count] = stays | evenly(~stays, order, most - int(stays.sum()))
        return kept

    def found(self, score: Tensor, sets: TokenSets) -> Tensor:
        """[S] int64: how many tokens the picture asks for."""
        on = ((score >= self.on) & sets.valid).sum(1)
        return torch.minimum(ceils(on / (1 - self.surround)).clamp(min=1), sets.count)


def evenly(among: Tensor, order: Tensor, count: int) -> Tensor:
    """bool [n]: `count` of the tokens `among` [n], at even distances in the order [n]."""
    there = order[among[order]]
    step = (torch.arange(count, device=order.device) * 2 + 1) * len(there) // max(2 * count, 1)
    return torch.zeros_like(among).index_fill_(0, there[step], True)


def marked(sets: TokenSets) -> tuple[Tensor, Tensor]:
    """[S, n] float64: the mean of its picture's map over each token's cell; [S, n] int64: which grid that is a cell of."""
    row = sets.row[:, None].expand_as(sets.index)
    where = torch.stack([row, sets.image_of, sets.frame_of, sets.level, sets.grid_row, sets.grid_col], 2)[
        sets.valid
    ]
    if len(where.unique(dim=0)) < len(where):
        raise Missing(
            "known place of a picture's crops: they lie over one another",
            where="salient-tokens",
            fix='given={"pyramid": ...} with the levels of each picture, or a processor that makes no crops',
        )
    pictures, picture = where[:, :2].unique(dim=0, return_inverse=True)
    maps = read_maps(sets.given.get("map"), len(pictures), sets.device)
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


def read_maps(given: Any, pictures: int, device: torch.device) -> list[Tensor]:
    """The map [H, W] of each picture. Raises `SecateurError` where there is none, or it is no map."""
    require(given is not None, "there is no map of the picture", where="salient-tokens", fix=FIX)
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
