"""VisionDrop: importance is attention between image tokens alone; the rest merges into a few contextual tokens.

Xu et al. 2025, "Rethinking Visual Token Reduction in LVLMs under Cross-modal Misalignment",
https://arxiv.org/abs/2506.22283. Spec: visiondrop.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from secateur.method import register
from secateur.methods.visionzip import reduce, zipped
from secateur.taxonomy import record
from secateur.tokens.counts import geometric
from secateur.tokens.method import Facts, Stage, TokenMethod
from secateur.tokens.state import Reduction, TokenSets


@register
@dataclass
class VisionDrop(TokenMethod):
    """Keeps the tokens that other image tokens attend to and merges the rest by their keys: once before, three times in the LLM.

    >>> with secateur.attach(vlm, "visiondrop", target="25%") as attached:  # doctest: +SKIP
    ...     vlm.generate(**inputs)

    The target is the mean over the LLM's layers: the stages keep 1.5, 1.10, 0.81 and 0.59 of it (the paper's schedule for
    32 tokens; the geometric rule for others is a reconstruction), one in eight of them merged. Before the LLM the CLS
    token ranks the patches and is itself passed on; a tower without one is ranked by attention received. Tokens merge
    before the projector there, or after one that joins tokens.
    first: the first stage's share of the target; the paper has 1.5 for images, 3 for video.
    The released functions (the tower's, and those after layers), run inside random models of one picture a row, without
    padding and with as many key heads as query heads, gave the same features and logits in 40 of 40.
    """

    layers: tuple[int, ...] = (8, 16, 24)
    first: float = 1.5
    scope: ClassVar[str] = "image"
    one_crop: ClassVar[str] = "tokens merge within one crop before the language model"
    positions: ClassVar[str] = "compact"

    info = record("visiondrop")

    def stages(self, facts: Facts) -> list[Stage]:
        inside = [
            Stage(
                f"layer:{layer}", partial(self.within, f"layer:{layer}:peek", stage), (f"layer:{layer}:peek",)
            )
            for stage, layer in enumerate(facts.spread(self.layers, of=32), 1)
        ]
        return [Stage("input", self.before, ("encoder:-2",)), *inside]

    def counts(self, sets: TokenSets, stage: int) -> tuple[Tensor, Tensor]:
        """Dominant and contextual tokens of a stage, [S] each."""
        size = (sets.asked.double() * geometric(len(self.layers) + 1, self.first)[stage]).round().long()
        size = torch.minimum(size, sets.count)
        contextual = torch.where(size < sets.count, (size + 7) // 8, 0)
        return size - contextual, contextual

    def before(self, sets: TokenSets) -> Reduction | Tensor:
        return zipped(sets, "encoder:-2", *self.counts(sets, 0))

    def within(self, peek: str, stage: int, sets: TokenSets) -> Reduction | Tensor:
        scores = sets.attention(peek, rows="visual")
        return reduce(sets, scores, sets.keys(peek).mean(1), *self.counts(sets, stage))
