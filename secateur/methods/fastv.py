"""FastV: after K layers, keep the image tokens that the last prompt token attends to.

Chen et al. 2024, "An Image is Worth 1/2 Tokens After Layer 2: Plug-and-Play Inference Acceleration for Large
Vision-Language Models", https://arxiv.org/abs/2403.06764. Spec: fastv.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from secateur.method import register
from secateur.taxonomy import record
from secateur.tokens.method import Facts, Stage, TokenMethod
from secateur.tokens.select import top_per_row
from secateur.tokens.state import TokenSets


@register
@dataclass
class FastV(TokenMethod):
    """Attention from the last prompt token at layer K - 1 ranks the image's tokens; layers K and later see the best.

    >>> with secateur.attach(vlm, "fastv", target="50%") as attached:  # doctest: +SKIP
    ...     vlm.generate(**inputs)

    The target is the share kept from layer `k` on (1 - R): the layers before it still see everything. `k` counts the
    layers that do. Released code takes the last token's attention where the paper says all tokens': so does this.
    rounding: how a share becomes a count: "round" (half to even) or "int" (down), both in released code.
    """

    k: int = 2
    rounding: str = field(default="round", metadata={"choices": ("round", "int")})
    scope: ClassVar[str] = "image"
    positions: ClassVar[str] = "original"

    info = record("fastv")

    def stages(self, facts: Facts) -> list[Stage]:
        return [Stage(f"layer:{self.k}", self.select, (f"layer:{self.k - 1}",))]

    def select(self, sets: TokenSets) -> Tensor:
        keep = sets.keep
        if self.rounding == "int" and sets.share is not None:
            keep = (sets.total * sets.share).long().clamp(min=1)
        return top_per_row(sets.attention(f"layer:{self.k - 1}", rows="last"), keep, sets.valid)
