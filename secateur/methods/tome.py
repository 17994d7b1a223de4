"""ToMe: merge the most alike tokens, a few in every block.

Bolya et al. 2023, "Token Merging: Your ViT But Faster", https://arxiv.org/abs/2210.09461. There is no sheet: a baseline.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch

from secateur.method import register
from secateur.taxonomy import record
from secateur.tokens.method import Facts, Stage, TokenMethod
from secateur.tokens.reduce import in_order, match_pairs, pour
from secateur.tokens.state import Reduction, TokenSets


@register
@dataclass
class ToMe(TokenMethod):
    """Bipartite soft matching by keys inside the tower's blocks; a token weighs as much as the patches in it.

    >>> with secateur.attach(vit, "tome", target="50%") as attached:  # doctest: +SKIP
    ...     vit(images)

    The target is the share of the tokens left at the end; every block merges equally many, at most half of what it has.
    Merged tokens are means over their patches, and count as many in the attention that follows (`proportional`).
    The paper merges between a block's attention and its MLP (`exact`); merging between blocks instead lets the MLP of
    the block that made the keys see every token.
    """

    proportional: bool = True
    exact: bool = True
    scope: ClassVar[str] = "crop"
    positions: ClassVar[str] = "original"

    info = record("tome")

    def stages(self, facts: Facts) -> list[Stage]:
        last = facts.block(facts.feature_block) if facts.layers else facts.blocks - 1
        blocks = range(last + 1 if self.exact else last)
        bias = "size" if self.proportional else None
        return [
            Stage(
                f"encoder:{block}:mlp" if self.exact else f"encoder:{block + 1}",
                partial(self.merge, block, len(blocks)),
                (f"encoder:{block}",),
                bias=bias,
            )
            for block in blocks
        ]

    def merge(self, block: int, steps: int, sets: TokenSets) -> Reduction:
        left = sets.total - ((sets.total - sets.keep) * (block + 1) / steps).round().long()
        leave = (sets.count - left).clamp(min=0)
        sources, into = match_pairs(sets.keys(f"encoder:{block}").mean(1), sets.valid, leave)
        size = sets.carried.get("size", torch.ones_like(sets.valid, dtype=torch.float32)).nan_to_num(1.0)
        sums, mass = pour(sets.features, into, sources, size)
        whole = sets.carried["size"] = size + mass
        merged = (sets.features.float() * size[..., None] + sums) / whole[..., None]
        return in_order([sets.valid & ~sources], merged.to(sets.features.dtype))
