"""VFlowOpt: importance from the tokens that matter, recycling of what leaves, two plain drops deeper, found by search.

Yang et al. 2025, "VFlowOpt: A Token Pruning Framework for LMMs with Visual Information Flow-Guided Optimization",
https://arxiv.org/abs/2508.05211. Spec: vflowopt. `secateur.tokens.search` has the search.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from secateur.errors import SecateurError
from secateur.method import register
from secateur.taxonomy import record
from secateur.tokens.counts import last_ratio
from secateur.tokens.method import Facts, Stage, TokenMethod
from secateur.tokens.reduce import in_order, recycle_cells
from secateur.tokens.scores import over_crop, patch_entropy
from secateur.tokens.select import top_per_row
from secateur.tokens.state import Reduction, TokenSets

FOUND = {
    0.5: (28.683048, 11.756787, 0.7233201, 0.7487476),
    0.25: (34.759553, 15.580797, 0.2651026, 0.9833433),
    0.1: (39.264928, 17.386982, 0.1166153, 1.0),
}
"""mean share -> t, a, R1, R2 that the authors' search found for LLaVA-OneVision-7B (alpha: 0)."""


def important(received: Tensor, crop: Tensor, valid: Tensor, t: Tensor | float) -> Tensor:
    """Weights of the query rows, [S, n]: 1 / |K| for K, what receives more than t times its crop's mean; 0 where K is empty."""
    chosen = valid & (received > t * over_crop(received, crop, valid) / over_crop(valid.float(), crop, valid))
    return chosen / over_crop(chosen.float(), crop, valid).clamp(min=1)


@register
@dataclass
class VFlowOpt(TokenMethod):
    """Attention received from important tokens ranks; pruned tokens are recycled per grid cell, then dropped in the LLM.

    >>> with secateur.attach(vlm, "vflowopt", target="25%") as attached:  # doctest: +SKIP
    ...     vlm.generate(**inputs)

    The target is the mean over the LLM's layers. t: a token is important when it receives more than t times the mean
    attention (none: all count). alpha: weight of the patches' entropy. a: side of a recycling cell in tokens.
    r1, r2: shares kept before the LLM and at the second stage; the third follows from the target. None: the values the
    authors found for the nearest target; `calibrate` searches them for your model. Counts are rounded as the authors do it:
    what leaves is round(n * (1 - share)), half to even, and a cell's extra tokens are floor(n / a^2); so the mean can miss
    the target by part of a token a stage.
    """

    t: float | None = None
    alpha: float = 0.0
    a: float | None = None
    r1: float | None = None
    r2: float | None = None
    layers: tuple[int, ...] = (9, 18)
    scope: ClassVar[str] = "image"
    positions: ClassVar[str] = "original"

    info = record("vflowopt")

    def stages(self, facts: Facts) -> list[Stage]:
        second, third = facts.spread(self.layers, of=28)
        depths = (second, third - second, facts.layers - third)
        return [
            Stage("input", partial(self.before, depths), ("encoder:-2",)),
            Stage(f"layer:{second}", partial(self.within, depths, 1)),
            Stage(f"layer:{third}", partial(self.within, depths, 2)),
        ]

    def settings(
        self, share: float, depths: Sequence[int]
    ) -> tuple[float, float, tuple[float, float, float]]:
        """t, a, and the shares the three stages keep, for a mean share over the layers."""
        near = min(FOUND, key=lambda known: abs(math.log(known / share)))
        t, a, first, second = FOUND[near]
        r1 = min(1.0, first / near * share) if self.r1 is None else self.r1
        r2 = second if self.r2 is None else self.r2
        r3 = last_ratio(share, (r1, r2), depths)
        if r3 == 0:
            raise SecateurError(
                f"r1={r1:g} and r2={r2:g} keep more than {share:.0%} before the third stage",
                where="vflowopt",
                fix="lower r1 or r2, or raise the target",
            )
        return t if self.t is None else self.t, a if self.a is None else self.a, (r1, r2, r3)

    def importance(self, sets: TokenSets, t: Tensor) -> Tensor:
        patches = sets.valid & ~sets.newline
        received = sets.attention("encoder:-2", rows="all")
        weights = important(received, sets.home, patches, t)
        some = over_crop(weights, sets.home, patches) > 0.5
        scores = torch.where(some, sets.attention("encoder:-2", rows=weights), received)
        if self.alpha:
            spread = patch_entropy(sets.pixels()).exp()
            scores = scores + self.alpha * spread / over_crop(spread, sets.home, patches)
        return scores.masked_fill(sets.newline, 1.0)

    def before(self, depths: Sequence[int], sets: TokenSets) -> Reduction | Tensor:
        chosen = [self.settings(share, depths) for share in (sets.keep.double() / sets.total).tolist()]
        t, side, first = (
            torch.tensor(column, device=sets.device)[:, None]
            for column in zip(*((t, a, shares[0]) for t, a, shares in chosen))
        )
        scores = sets.carried["importance"] = self.importance(sets, t)
        count = sets.count[:, None]
        leave = (count * (1 - first.double())).round().long()
        alone = (sets.row[:, None] == sets.row).sum(1, keepdim=True) == 1
        extra = torch.where(alone & (leave > 0), (count / side**2).long(), 0)
        best = top_per_row(scores, (count - leave - extra).clamp(min=1)[:, 0], sets.valid)
        low = sets.valid & ~best & alone & (leave > 0)
        # the base crop, the tiles that make one picture, or a frame
        apart = (sets.image_of, sets.frame_of, sets.crop_of.clamp(max=1))
        cells = torch.stack([*apart, *((g / side).floor().long() for g in (sets.grid_row, sets.grid_col))], 2)
        cells = cells.flatten(0, 1).unique(dim=0, return_inverse=True)[1].view_as(sets.crop_of)
        kept, merged = recycle_cells(sets.features, scores, cells, low)
        return in_order([best | kept], merged)

    def within(self, depths: Sequence[int], stage: int, sets: TokenSets) -> Tensor:
        shares = (sets.keep.double() / sets.total).tolist()
        keep = [self.settings(share, depths)[2][stage] for share in shares]
        count = sets.valid.sum(1).tolist()
        stay = torch.tensor([max(1, n - round(n * (1 - r))) for n, r in zip(count, keep)])
        return top_per_row(sets.carried["importance"], stay, sets.valid)
