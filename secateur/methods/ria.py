"""RIA: a weight's share of its row and of its column, times a power of its input's norm.

Zhang et al. 2024, "Plug-and-Play: An Efficient Post-training Pruning Method for Large Language Models", ICLR 2024
(relative importance and activations). Spec: weight-baselines, items 9 and 10. The channel permutation that the paper
adds for N:M is left out: its masks follow N:M only after the inputs are reordered, which a plan for the model as it is
can't say.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from secateur.method import register
from secateur.pruning.method import WeightMethod
from secateur.stats.layer import LayerStats
from secateur.taxonomy import record


@register
@dataclass
class RIA(WeightMethod):
    """(|w| / sum of its column + |w| / sum of its row) * norm of its input ** a; compared within each layer.

    >>> secateur.prune(model, method="ria", target="50%", data=ids)  # doctest: +SKIP

    An expert is a layer of its own, and so is a group of a convolution: their norms are over different tokens.
    """

    a: float = field(default=0.5, metadata={"help": "exponent of the input's norm; 0 ignores the data"})
    scope: str = field(
        default="layer",
        metadata={"help": "where weights compete: layer or row", "choices": ("layer", "row", "global")},
    )

    needs: ClassVar[frozenset[str]] = frozenset({"input_norm"})

    info = record("ria")

    def score(self, weight: Tensor, stats: LayerStats) -> Tensor:
        size = weight.abs().float()
        least = torch.finfo(size.dtype).tiny
        relative = size / size.sum(0, keepdim=True).clamp_min(least) + size / size.sum(
            1, keepdim=True
        ).clamp_min(least)
        return relative * stats.input_norm**self.a
