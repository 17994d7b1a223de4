"""DivPrune: the subset of visual tokens that lie farthest from each other.

Alvar et al. 2025, "DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models",
https://arxiv.org/abs/2503.02175. Spec: divprune.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from secateur.method import register
from secateur.taxonomy import record
from secateur.tokens.greedy import cosine_distance, max_min
from secateur.tokens.method import TokenMethod
from secateur.tokens.state import TokenSets


@register
@dataclass
class DivPrune(TokenMethod):
    """Farthest first by 1 - cosine of the projected features, started with the token whose nearest neighbour is farthest.

    >>> with secateur.attach(vlm, "divprune", target="9.8%") as attached:  # doctest: +SKIP
    ...     vlm.generate(**inputs)

    Reads neither attention nor the question. All tokens of an image (its crops, newline tokens and video frames
    included) are one set. Position ids are counted anew. The greedy form is the paper's algorithm, not the exact
    solution it speaks of; a token is never chosen twice, as the released code may do with exact duplicates.
    """

    scope: ClassVar[str] = "image"
    positions: ClassVar[str] = "compact"
    newlines: ClassVar[str] = "compete"

    info = record("divprune")

    def select(self, sets: TokenSets) -> Tensor:
        distance = cosine_distance(sets.features, sets.valid)
        return max_min(distance, sets.keep, sets.valid).mask(sets.valid.shape[1])
