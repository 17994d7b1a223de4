"""Wanda: |weight| times the norm of its input.

Sun et al. 2023, "A Simple and Effective Pruning Approach for Large Language Models",
https://arxiv.org/abs/2306.11695. Spec: weight-baselines, items 8 and 10.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from secateur.method import register
from secateur.pruning.method import WeightMethod
from secateur.stats.layer import LayerStats
from secateur.taxonomy import record


@register
@dataclass
class Wanda(WeightMethod):
    """|w| times the input's norm, compared within each output row; no update of what is left.

    >>> secateur.prune(model, method="wanda", target="50%", data=ids)  # doctest: +SKIP

    A block's norms are taken behind the pruned blocks before it. The paper's data: 128 sequences of 2048 tokens.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"input_norm"})
    scope = "row"

    info = record("wanda")

    def score(self, weight: Tensor, stats: LayerStats) -> Tensor:
        return weight.abs().float() * stats.input_norm
