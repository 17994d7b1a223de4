"""FasterVLM: keep the patches that the vision encoder's CLS token attends to.

Zhang et al. 2024, "[CLS] Attention is All You Need for Training-Free Visual Token Pruning: Make VLM Inference Faster",
https://arxiv.org/abs/2412.01818 (v1). Spec: fastervlm.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from secateur.method import register
from secateur.taxonomy import record
from secateur.tokens.method import Facts, Stage, TokenMethod
from secateur.tokens.scores import cls_or_received
from secateur.tokens.select import top_per_row
from secateur.tokens.state import TokenSets


@register
@dataclass
class FasterVLM(TokenMethod):
    """Attention of CLS in the block that feeds the projector, mean over heads; each crop keeps its best.

    >>> with secateur.attach(vlm, "fastervlm", target="25%") as attached:  # doctest: +SKIP
    ...     vlm.generate(**inputs)

    Doesn't read the question. Position ids are counted anew, newline tokens dropped, as in the released code. A tower
    without CLS is ranked by the attention each token receives from all (a stand-in, not the paper's).
    """

    scope: ClassVar[str] = "crop"
    positions: ClassVar[str] = "compact"
    newlines: ClassVar[str] = "drop"

    info = record("fastervlm")

    def stages(self, facts: Facts) -> list[Stage]:
        return [Stage("input", self.select, (f"encoder:{facts.feature_block}",))]

    def select(self, sets: TokenSets) -> Tensor:
        scores = cls_or_received(sets, f"encoder:{sets.facts.feature_block}")
        return top_per_row(scores, sets.keep, sets.valid)
