"""FoPru: the patches, or whole rows of patches, that matter most in the vision encoder's attention map.

Jiang et al. 2024, "FoPru: Focal Pruning for Efficient Large Vision-Language Models", https://arxiv.org/abs/2411.14164.
Spec: fopru. No code of the paper was found: the equations are those of a serving engine by the same group.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from secateur.method import register
from secateur.taxonomy import record
from secateur.tokens.method import Facts, Stage, TokenMethod
from secateur.tokens.scores import given_attention
from secateur.tokens.select import top_per_row
from secateur.tokens.state import Missing, TokenSets


@register
@dataclass
class FoPru(TokenMethod):
    """Attention received or attention given, whichever varies more over the tokens, in the block before the projector.

    >>> with secateur.attach(vlm, "fopru", target="25%", strategy="row") as attached:  # doctest: +SKIP
    ...     vlm.generate(**inputs)

    A reconstruction of medium confidence. strategy: "rank" keeps the best tokens; "row" keeps whole rows of the grid by
    their sum, as many as fit into the target, at least one. scores: "softmax", what the paper calls the attention map,
    with the CLS row and column cut out; or "logits", what the engine takes. On a tie received attention counts.
    """

    strategy: str = field(default="rank", metadata={"choices": ("rank", "row")})
    scores: str = field(default="softmax", metadata={"choices": ("softmax", "logits")})
    scope: ClassVar[str] = "crop"
    one_crop: ClassVar[str] = "it ranks by attention within one crop"
    positions: ClassVar[str] = "compact"
    newlines: ClassVar[str] = "drop"

    info = record("fopru")

    def stages(self, facts: Facts) -> list[Stage]:
        return [Stage("input", self.select, (f"encoder:{facts.feature_block}",))]

    def select(self, sets: TokenSets) -> Tensor:
        score = significance(*self.candidates(sets), sets.valid)
        if self.strategy == "rank":
            return top_per_row(score, sets.keep, sets.valid)
        rows = torch.where(sets.valid, sets.grid_row, 0)
        size = torch.zeros(len(sets), int(rows.max()) + 1, device=sets.device).scatter_add_(
            1, rows, sets.valid.float()
        )
        total = torch.zeros_like(size).scatter_add_(1, rows, score * sets.valid)
        width = size.amax(1).clamp(min=1).long()
        best = top_per_row(total, torch.div(sets.keep, width, rounding_mode="floor").clamp(min=1), size > 0)
        return best.gather(1, rows) & sets.valid

    def candidates(self, sets: TokenSets) -> tuple[Tensor, Tensor]:
        """Attention received by and given by each token among the patches, mean over heads: [S, n] each."""
        site = f"encoder:{sets.facts.feature_block}"
        if self.scores == "logits":
            q, k = sets.queries(site), sets.keys(site)
            count, real = sets.count[:, None, None].clamp(min=1), sets.valid[:, None, :, None]
            mean_q, mean_k = ((part * real).sum(2) / count * q.shape[-1] ** -0.5 for part in (q, k))
            return torch.einsum("shd,shnd->sn", mean_q, k) / q.shape[1], torch.einsum(
                "shd,shnd->sn", mean_k, q
            ) / q.shape[1]
        received = sets.attention(site, rows="visual")
        try:
            cls, query, keys = sets.keys(site, cls=True)[:, :, None], sets.queries(site), sets.keys(site)
        except Missing:  # every row sums to 1: given attention doesn't vary
            return received, torch.ones_like(received)
        seen = torch.cat([torch.ones_like(sets.valid[:, :1]), sets.valid], 1)
        patches = seen & (torch.arange(seen.shape[1], device=sets.device) > 0)
        given = given_attention(query, torch.cat([cls, keys], 2), patches, mask=seen[:, None, None])
        return received, given / sets.count[:, None].clamp(min=1)


def significance(received: Tensor, given: Tensor, valid: Tensor) -> Tensor:
    """The one of the two that has the larger variance over the valid tokens, set by set: [S, n]."""

    def variance(values: Tensor) -> Tensor:
        count = valid.sum(1, keepdim=True)
        mean = (values * valid).sum(1, keepdim=True) / count.clamp(min=1)
        return (((values - mean) * valid) ** 2).sum(1, keepdim=True) / (count - 1).clamp(min=1)

    return torch.where(variance(given) > variance(received), given, received)
