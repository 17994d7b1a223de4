"""Random weights: the control that every weight method must beat.

No paper. Spec: weight-baselines.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from secateur.method import register
from secateur.pruning.method import WeightMethod
from secateur.stats.layer import LayerStats
from secateur.taxonomy import record
from secateur.utils.random import seeded


@register
@dataclass
class Random(WeightMethod):
    """Weights leave in random order, the same share from every row.

    >>> secateur.prune(model, method="random", target="50%", seed=1)  # doctest: +SKIP
    """

    seed: int | None = field(default=None, metadata={"help": "None: the run's seed"})

    info = record("random")

    def score(self, weight: Tensor, stats: LayerStats) -> Tensor:
        seed = stats.seed if self.seed is None else self.seed
        return torch.rand(weight.shape, generator=seeded(seed, "random", stats.name)).to(weight.device)
