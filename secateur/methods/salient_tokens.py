"""Salient tokens: the tokens on what a map of the picture says stands out.

No paper: a baseline of this library. Spec: none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from secateur.method import register
from secateur.taxonomy import record
from secateur.tokens.counts import ceils
from secateur.tokens.grid import z_order
from secateur.tokens.maps import marked
from secateur.tokens.method import TokenMethod
from secateur.tokens.state import TokenSets


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
        score, plane = marked(sets, self.name)
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
