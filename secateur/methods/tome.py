"""ToMe: merge the most alike tokens, a few in every block.

Bolya et al. 2023, "Token Merging: Your ViT But Faster", https://arxiv.org/abs/2210.09461. There is no sheet: a baseline.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

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
    the block that made the keys see every token. compat: "paper" (default) lets the patches alternate between the two
    sides in their own order; "code", as released, counts CLS among them, so that the other patches go, and puts what took
    tokens in behind what didn't, so that the next block divides anew. The release, run on timm's blocks with as many
    pairs a block and random inputs, gives what "code" gives (60 of 60 models, 12 of them without CLS).
    """

    proportional: bool = True
    exact: bool = True
    compat: str = field(default="paper", metadata={"choices": ("paper", "code")})
    scope: ClassVar[str] = "crop"
    one_crop: ClassVar[str] = "tokens merge within a crop of the tower"
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
        keys = sets.keys(f"encoder:{block}").mean(1)
        sources, into = self._pairs(sets, keys, leave)
        size = sets.carried.get("size", torch.ones_like(sets.valid, dtype=torch.float32)).nan_to_num(1.0)
        sums, mass = pour(sets.features, into, sources, size)
        whole = sets.carried["size"] = size + mass
        merged = (sets.features.float() * size[..., None] + sums) / whole[..., None]
        return in_order([sets.valid & ~sources], merged.to(sets.features.dtype))

    def _pairs(self, sets: TokenSets, keys: Tensor, leave: Tensor) -> tuple[Tensor, Tensor]:
        """Which tokens go, and where to."""
        if self.compat == "paper":
            return match_pairs(keys, sets.valid, leave)[:2]
        prefix, n = sets.facts.prefix, sets.valid.shape[1]
        # a tower keeps the order of its patches, which its attention doesn't see; the release's is a number beside them
        order = sets.carried.get("order", sets.index.float()).masked_fill(~sets.valid, torch.inf)
        rank = _rank(order)
        sources, into, near = match_pairs(keys, sets.valid, leave, rank + prefix)
        # with a CLS token the release sorts what didn't merge, so that it is first; without one the nearest come first
        before = rank if prefix else _rank(-near)
        sets.carried["order"] = torch.where(near.isneginf(), rank + n, before).float()
        return sources, into


def _rank(values: Tensor) -> Tensor:
    """[S, n] -> the place of each in its set, the smallest 0."""
    return values.argsort(dim=1, stable=True).argsort(dim=1)
