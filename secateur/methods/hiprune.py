"""HiPrune: anchors of a middle encoder block, their neighbours, and registers of a deep block.

Liu et al. 2025, "HiPrune: Training-Free Visual Token Pruning via Hierarchical Attention in Vision-Language Models",
https://arxiv.org/abs/2508.00553. Spec: hiprune.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from secateur.method import register
from secateur.taxonomy import record
from secateur.tokens.grid import neighbours
from secateur.tokens.method import Facts, Stage, TokenMethod
from secateur.tokens.select import complement, top_per_row
from secateur.tokens.state import TokenSets


@register
@dataclass
class HiPrune(TokenMethod):
    """Most attended tokens of a middle block with their four neighbours, then the most attended of the deep block.

    >>> with secateur.attach(vlm, "hiprune", target="25%") as attached:  # doctest: +SKIP
    ...     vlm.generate(**inputs)

    Attention received is a mean over heads and all queries, so no CLS is needed. round(keep * alpha / 5) tokens are
    anchors. layer: of the anchors, counted from 1; None: block 9 of 24 of a tower with CLS (CLIP), 16 of 32 of one
    without (Qwen2.5-VL), scaled to the depth. edges: "wrap", as released: the neighbour right of the last column is the
    next row's first; "clip" stops there. Windowed blocks are scored by the attention they compute.
    Where anchors and neighbours are more than may stay, anchors go first, then the most attended in the middle block
    (the released code fails; a reconstruction).
    """

    alpha: float = 0.1
    layer: int | None = None
    edges: str = field(default="wrap", metadata={"choices": ("wrap", "clip")})
    scope: ClassVar[str] = "crop"
    one_crop: ClassVar[str] = "neighbours lie on the grid of one crop"
    positions: ClassVar[str] = "compact"
    newlines: ClassVar[str] = "drop"

    info = record("hiprune")

    def sites(self, facts: Facts) -> tuple[str, str]:
        """Middle and deep block."""
        middle = facts.block(9, of=24) if facts.has_cls else facts.block(16, of=32)
        return (
            f"encoder:{max(0, (middle if self.layer is None else self.layer) - 1)}",
            f"encoder:{facts.feature_block}",
        )

    def stages(self, facts: Facts) -> list[Stage]:
        return [Stage("input", self.select, self.sites(facts))]

    def select(self, sets: TokenSets) -> Tensor:
        middle, deep = (sets.attention(site, rows="all") for site in self.sites(sets.facts))
        anchors = top_per_row(middle, (sets.keep * self.alpha / 5).round().long(), sets.valid)
        height, width = sets.grid.unbind(1)
        places = torch.where(sets.valid, sets.grid_row * width[:, None] + sets.grid_col, -1)
        cross = neighbours(anchors, places, width, height, self.edges) & sets.valid
        cross = top_per_row(middle.masked_fill(anchors, torch.inf), sets.keep, cross)
        registers = top_per_row(deep, sets.keep - cross.sum(1), complement(cross, sets.valid))
        return cross | registers
