"""ToDRE: dissimilar visual tokens stay before the LLM, and all leave at a deep layer where text no longer reads them.

Li et al. 2025, "ToDRE: Visual Token Pruning via Diversity and Task Awareness", https://arxiv.org/abs/2505.18757 (v2).
Spec: todre.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from secateur.method import register
from secateur.taxonomy import record
from secateur.tokens.greedy import cosine_distance, max_min, max_sum
from secateur.tokens.method import Facts, Stage, TokenMethod
from secateur.tokens.state import Missing, TokenSets


@register
@dataclass
class ToDRE(TokenMethod):
    """Max-sum diversity from the token CLS attends to most; after 7/8 of the layers all visual tokens may go.

    >>> with secateur.attach(vlm, "todre", target="10%") as attached:  # doctest: +SKIP
    ...     vlm.generate(**inputs)

    The target is the share that enters the LLM; the removal comes on top, and is left out at 100%. It happens after layer
    floor(layers x depth), counted from 1 (the base is a reconstruction), where the text after the image gives less than
    `tau` of its attention to visual tokens. The paper also asks what visual tokens give to later text: nothing in a
    causal decoder, so it isn't computed. With several crops the pivot is sought in the first, the thumbnail; without
    CLS it is random. Position ids are counted anew before the LLM and stay as they are at the removal.
    criterion: "max_sum" (v2) or "k_center" (v1). removal: False for the first half alone.
    """

    criterion: str = field(default="max_sum", metadata={"choices": ("max_sum", "k_center")})
    depth: float = 7 / 8
    tau: float = 0.1
    removal: bool = True
    scope: ClassVar[str] = "image"
    positions: ClassVar[str] = "compact"
    newlines: ClassVar[str] = "drop"

    info = record("todre")

    def stages(self, facts: Facts) -> list[Stage]:
        stages = [Stage("input", self.select, ("encoder:-1",))]
        layer = int(facts.layers * self.depth)
        if self.removal and 0 < layer < facts.layers:
            record = f"layer:{layer - 1}"
            stages.append(
                Stage(
                    f"layer:{layer}",
                    partial(self.remove, record),
                    (record,),
                    scope="row",
                    keep=1.0,
                    positions="original",
                )
            )
        return stages

    def select(self, sets: TokenSets) -> Tensor:
        choose = max_sum if self.criterion == "max_sum" else max_min
        distance = cosine_distance(sets.features, sets.valid)
        return choose(distance, sets.keep, sets.valid, self.pivot(sets)).mask(sets.valid.shape[1])

    def pivot(self, sets: TokenSets) -> Tensor:
        """[S]: the first pick of each set."""
        try:
            scores = sets.attention("encoder:-1", rows="cls")
            thumbnail = sets.valid & (sets.crop_of == sets.crop_of[:, :1])
            return scores.masked_fill(~(sets.valid if sets.facts.video else thumbnail), -torch.inf).argmax(1)
        except Missing:
            draws = [int(torch.randint(max(n, 1), (), generator=sets.generator)) for n in sets.count.tolist()]
            return torch.tensor(draws, device=sets.device)

    def remove(self, site: str, sets: TokenSets) -> Tensor:
        """All of a row's visual tokens, or none."""
        share = (sets.attention(site, rows="text") * sets.valid).sum(1)
        return sets.valid & (share >= self.tau)[:, None]
