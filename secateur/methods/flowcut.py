"""FlowCut: every second block of the vision tower drops tokens, as many as the CLS attention is concentrated.

Tong et al. 2025, "FlowCut: Rethinking Redundancy via Information Flow for Efficient Vision-Language Models",
https://arxiv.org/abs/2505.19536. Spec: flowcut.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from secateur.method import register
from secateur.taxonomy import record
from secateur.tokens.counts import entropy_share
from secateur.tokens.method import Facts, Stage, TokenMethod
from secateur.tokens.scores import likeness, normalised
from secateur.tokens.select import top_per_row
from secateur.tokens.state import Missing, TokenSets


def strength(relation: Tensor, semantic: Tensor | None, density: Tensor, valid: Tensor) -> Tensor:
    """(relation / its sum + semantic / its sum) x density, all [S, n]; without `semantic`: relation x density."""
    if semantic is None:
        return relation * density
    return (normalised(relation, valid) + normalised(semantic, valid)) * density


def removed(relation: Tensor, valid: Tensor, keep: Tensor, left: int) -> Tensor:
    """How many leave at a block with `left` more to come: [S], from the attention's entropy; all that must at left = 0.

    >>> attention = torch.tensor([[0.40, 0.20, 0.10, 0.05, 0.05, 0.05, 0.05, 0.05]])
    >>> removed(attention, attention > 0, torch.tensor([2]), left=4)
    tensor([1])
    """
    over = (valid.sum(1) - keep).clamp(min=0)
    if left == 0:
        return over
    return torch.minimum((over / math.sqrt(left) * entropy_share(relation, valid)).round().long(), over)


@register
@dataclass
class FlowCut(TokenMethod):
    """A running score of CLS attention, likeness to the CLS value and value norm, over the tower's blocks.

    >>> with secateur.attach(vlm, "flowcut", target="25%") as attached:  # doctest: +SKIP
    ...     vlm.generate(**inputs)

    Every second block lets (N - T) / sqrt(blocks left) x (1 - (entropy / its maximum)^2) tokens go, the last one all
    that are over. An image of several crops keeps half of the target in the tower, divided over them, and is cut to it
    after the LLM's second layer. A tower without CLS is scored by its mean query and the values' norms.
    A count is shared by the crops of an image only, so batching changes nothing (the code shares it over the batch).
    """

    momentum: float = 0.5
    period: int = 2
    layer: int = 2
    scope: ClassVar[str] = "crop"
    one_crop: ClassVar[str] = "its stages in the tower follow the attention of one crop"
    positions: ClassVar[str] = "compact"

    info = record("flowcut")

    def stages(self, facts: Facts) -> list[Stage]:
        last = facts.block(facts.feature_block)
        stages = [
            Stage(f"encoder:{block + 1}", partial(self.flow, block, last - block - 1), (f"encoder:{block}",))
            for block in range(last)
        ]
        if facts.layers > self.layer:
            record = f"layer:{self.layer - 1}"
            stages.append(Stage(f"layer:{self.layer}", partial(self.deep, record), (record,), scope="image"))
        return stages

    def flow(self, block: int, left: int, sets: TokenSets) -> Tensor:
        site, valid = f"encoder:{block}", sets.valid
        values = sets.values(site)
        density = values.mean(1).abs().sum(-1)
        try:
            relation = sets.attention(site, rows="cls")
            semantic = likeness(sets.values(site, cls=True), values, valid, itself=True)
        except Missing:
            query = (sets.queries(site) * valid[:, None, :, None]).sum(2) / valid.sum(1)[:, None, None]
            relation, semantic = likeness(query, sets.keys(site), valid, scaled=True), None
        score = strength(relation, semantic, density, valid)
        past = sets.carried.get("flow", score)
        score = sets.carried["flow"] = self.momentum * past + (1 - self.momentum) * score
        if left % self.period:
            return valid
        together = (sets.row[:, None] == sets.row) & (sets.image[:, None] == sets.image)
        keep = torch.where(together.sum(1) > 1, (together * sets.keep).sum(1) // 2, sets.keep)
        keep = torch.minimum(keep.clamp(min=1), valid.sum(1))
        leave = (together * removed(relation, valid, keep, left)).amax(1)
        return top_per_row(score, torch.maximum(valid.sum(1) - leave, keep), valid)

    def deep(self, site: str, sets: TokenSets) -> Tensor:
        values = sets.values(site)
        relation = sets.attention(site, rows="last", over="visual")
        semantic = likeness(sets.values(site, cls=True), values, sets.valid, scaled=True)
        score = strength(relation, semantic, values.mean(1).abs().sum(-1), sets.valid)
        return top_per_row(score, sets.keep, sets.valid)
