"""Magnitude: small weights leave first.

Han et al. 2015, "Learning both Weights and Connections for Efficient Neural Networks",
https://arxiv.org/abs/1506.02626. Spec: weight-baselines, item 1.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from secateur.method import register
from secateur.pruning.method import WeightMethod
from secateur.stats.layer import LayerStats
from secateur.taxonomy import record


@register
@dataclass
class Magnitude(WeightMethod):
    """|w|, compared within each layer; `scope="global"` over all layers at once, `"row"` within each output.

    >>> secateur.prune(model, method="magnitude", target="50%", scope="global")  # doctest: +SKIP
    """

    scope: str = field(
        default="layer",
        metadata={
            "help": "where weights compete: layer, global or row",
            "choices": ("layer", "row", "global"),
        },
    )

    info = record("magnitude")

    def score(self, weight: Tensor, stats: LayerStats) -> Tensor:
        return weight.abs()
