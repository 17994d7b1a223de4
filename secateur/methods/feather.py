"""FEATHER: FastV's criterion without rotary positions, a uniform grid beside it, and two stages.

Endo et al. 2025, "Feather the Throttle: Revisiting Visual Token Pruning for Vision-Language Model Acceleration",
https://arxiv.org/abs/2412.13180. Spec: feather.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import Tensor

from secateur.method import register
from secateur.taxonomy import record
from secateur.tokens.grid import strided_grid
from secateur.tokens.method import Facts, Stage, TokenMethod
from secateur.tokens.select import top_per_row
from secateur.tokens.state import TokenSets


@register
@dataclass
class Feather(TokenMethod):
    """Attention of the last prompt token, computed without RoPE: r of the tokens and a strided grid stay, later r^2 of those.

    >>> with secateur.attach(vlm, "feather", target="30%") as attached:  # doctest: +SKIP
    ...     vlm.generate(**inputs)

    The target is r = 1 - R, the share that ranks in the first stage (the paper: 30%); the grid's tokens come on top, and
    the second stage keeps r^2 of what is left. Layers are the paper's for 32, scaled to the model's depth.
    stride: of the grid, in tokens, from the top left.
    """

    layers: tuple[int, ...] = (8, 16)
    stride: int = 3
    scope: ClassVar[str] = "image"
    positions: ClassVar[str] = "original"

    info = record("feather")

    def stages(self, facts: Facts) -> list[Stage]:
        first, second = facts.spread(self.layers, of=32)
        return [
            Stage(f"layer:{first}", partial(self.cut, first - 1, grid=True), (f"layer:{first - 1}:raw",)),
            Stage(f"layer:{second}", partial(self.cut, second - 1), (f"layer:{second - 1}:raw",)),
        ]

    def cut(self, layer: int, sets: TokenSets, grid: bool = False) -> Tensor:
        scores = sets.attention(f"layer:{layer}:raw", rows="last", over="visual")
        share = sets.share if sets.share is not None else sets.keep.double() / sets.total
        count = sets.valid.sum(1) * (share if grid else share * share)
        best = top_per_row(scores, count.long().clamp(min=1), sets.valid)
        return best | strided_grid(sets.grid_row, sets.grid_col, self.stride) & sets.valid if grid else best
