"""VisionZip: the patches that CLS attends to, and a few contextual tokens that all others merge into.

Yang et al. 2024, "VisionZip: Longer is Better but Not Necessary in Vision Language Models",
https://arxiv.org/abs/2412.04467. There is no sheet: the facts are those of the released code, dvlab-research/VisionZip at 3151f6d.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from secateur.method import register
from secateur.taxonomy import record
from secateur.tokens.method import Facts, Stage, TokenMethod
from secateur.tokens.reduce import in_order, merge_nearest, with_token
from secateur.tokens.select import top_per_row
from secateur.tokens.state import Missing, Reduction, TokenSets


@register
@dataclass
class VisionZip(TokenMethod):
    """Keeps CLS and the patches it attends to most in the block before the projector, and merges the others by their keys.

    >>> with secateur.attach(vlm, "visionzip", target="tokens=64") as attached:  # doctest: +SKIP
    ...     vlm.generate(**inputs)

    Of 64 tokens that stay, CLS is one, 53 are the patches with the most of its attention (sum over heads), 10 are contextual:
    of the other patches, every so many'th in raster order, plus the mean of the patches whose keys (mean over heads) are
    nearest to its own by cosine. Tokens merge before the projector, or behind one that joins tokens. Each crop has its
    own; order: CLS, patches, contextual tokens. Doesn't read the question.
    A tower without CLS is ranked by attention received (the paper's rule; the release has CLIP alone).

    Differs from the release: the split of a target is round(10/64 of it), where the release takes both numbers; an image of
    several crops keeps crop after crop, where the release puts the patches of all tiles before their CLS and contextual tokens.

    Checked: the release's own forward, run on the tower of random LLaVAs with 576 patches, several pictures and padding,
    gave the same tokens and logits in 50 of 50 runs, with 32 to 400 tokens.
    """

    contextual: float = field(
        default=10 / 64, metadata={"help": "share of what stays that is merged", "above": 0, "below": 1}
    )
    scope: ClassVar[str] = "crop"
    one_crop: ClassVar[str] = "tokens merge within one crop"
    positions: ClassVar[str] = "compact"
    newlines: ClassVar[str] = "drop"

    info = record("visionzip")

    def stages(self, facts: Facts) -> list[Stage]:
        return [Stage("input", self.select, (f"encoder:{facts.feature_block}",))]

    def select(self, sets: TokenSets) -> Reduction:
        contextual = (sets.keep * self.contextual).round().long().clamp(min=1)
        contextual = torch.minimum(contextual, sets.keep - 1) * (sets.keep < sets.count)
        return zipped(sets, f"encoder:{sets.facts.feature_block}", sets.keep - contextual, contextual)


def zipped(sets: TokenSets, site: str, dominant: Tensor, contextual: Tensor) -> Reduction:
    """CLS and the patches it attends to, `dominant` [S] together, then `contextual` [S] merged ones.

    Where all stay, and in a tower without CLS, which is ranked by attention received, there is no CLS among them.
    """
    keys = sets.keys(site).mean(1)
    try:
        scores, token = sets.attention(site), sets.project(sets.hidden(site, cls=True))
    except Missing:
        return reduce(sets, sets.attention(site, rows="all"), keys, dominant, contextual, site=site)
    cut = dominant + contextual < sets.count
    reduction = reduce(sets, scores, keys, dominant - cut.long(), contextual, site=site)
    left = sets.valid & cut[:, None]
    left = left & ~torch.zeros_like(left).scatter(1, reduction.index.clamp(min=0), True)
    return with_token(reduction, token, left, first=True)


def reduce(
    sets: TokenSets,
    scores: Tensor,
    keys: Tensor,
    dominant: Tensor,
    contextual: Tensor,
    site: str | None = None,
) -> Reduction:
    """The `dominant` [S] best stay as they are, the others merge into `contextual` [S] of them, which come after.

    site: where in the tower they merge and are projected from.
    """
    best = top_per_row(scores, dominant, sets.valid)
    left = ~best & sets.valid
    if site is not None:
        try:
            targets, hidden = merge_nearest(sets.hidden(site), keys, left, contextual)  # [S, n, C]
            made = sets.project(hidden[targets])
        except Missing:
            pass
        else:
            merged = sets.features.clone()
            merged[targets] = made.to(merged.dtype)
            return in_order([best, targets], merged)
    targets, merged = merge_nearest(sets.features, keys, left, contextual)
    return in_order([best, targets], merged)
