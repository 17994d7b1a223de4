"""PyramidDrop: at three depths the tokens that the last prompt token attends to stay, ever fewer.

Xing et al. 2024, "PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy Reduction",
https://arxiv.org/abs/2410.17247. There is no sheet: a baseline, read from the authors' code.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import Tensor

from secateur.method import register
from secateur.taxonomy import record
from secateur.tokens.method import Facts, Stage, TokenMethod
from secateur.tokens.select import top_per_row
from secateur.tokens.state import TokenSets


@register
@dataclass
class PyramidDrop(TokenMethod):
    """Attention from the last prompt token, worked out ahead in the layer that comes, ranks the tokens at every cut.

    >>> with secateur.attach(vlm, "pyramiddrop", target="12.5%") as attached:  # doctest: +SKIP
    ...     vlm.generate(**inputs)

    The target is the share left after the last cut; each cut keeps the same part of what came to it, so that the
    published 50, 25 and 12.5 % are `target="12.5%"`. Layers are the paper's for 32, scaled to the model's depth. Counts
    are shares of the image's tokens, cut down, with newline tokens among them; positions are counted anew.
    The released function (commit 6444f30), run beside `attach` on 60 random models and inputs of one picture, kept the same
    tokens at all three cuts and gave the same logits every time. It knows one picture a row; here every picture is ranked on its own.
    """

    layers: tuple[int, ...] = (8, 16, 24)
    scope: ClassVar[str] = "image"
    positions: ClassVar[str] = "compact"
    newlines: ClassVar[str] = "compete"

    info = record("pyramiddrop")

    def stages(self, facts: Facts) -> list[Stage]:
        cuts = facts.spread(self.layers, of=32)
        return [
            Stage(
                f"layer:{cut}",
                partial(self.cut, f"layer:{cut}:peek", number / len(cuts)),
                (f"layer:{cut}:peek",),
            )
            for number, cut in enumerate(cuts, 1)
        ]

    def cut(self, peek: str, done: float, sets: TokenSets) -> Tensor:
        """done: the part of the cuts that is behind, this one counted."""
        # a power of a root may fall just short
        keep = (sets.total * sets.asked_share**done + 1e-4).long().clamp(min=1)
        return top_per_row(sets.attention(peek, rows="last"), keep, sets.valid)
