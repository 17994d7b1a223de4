"""ShortGPT: whole blocks that hardly turn the hidden state leave.

Men et al. 2024, "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect",
https://arxiv.org/abs/2403.03853. Spec: weight-baselines, item 13.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from secateur.graph import Group
from secateur.method import register
from secateur.pruning.context import Context
from secateur.pruning.method import UnitMethod
from secateur.scores.influence import block_influence
from secateur.taxonomy import record


@register
@dataclass
class ShortGPT(UnitMethod):
    """Block influence: 1 - the mean cosine between what enters a block and what leaves it.

    >>> secateur.prune(model, method="shortgpt", target="75%", data=ids)  # doctest: +SKIP

    One shot: the influence is not measured again after a block has left.
    """

    kinds: ClassVar[tuple[str, ...] | None] = ("layers",)
    needs: ClassVar[frozenset[str]] = frozenset({"block_influence"})
    share_of: ClassVar[str] = "weights"
    by_block: ClassVar[bool] = True
    info = record("shortgpt")

    def passes(self) -> str:
        return "batches"

    def score(self, group: Group, context: Context) -> Tensor:
        data = context.require_data()
        return block_influence(context.model, data, group.modules, context.progress, context.play)
