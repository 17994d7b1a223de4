"""SD-prune: plain magnitude, each part of a text-to-image model at a share of its own.

Ramesh and Zhao 2024, "Efficient Pruning of Text-to-Image Models: Insights from Pruning Stable Diffusion",
https://arxiv.org/abs/2411.15113. Spec: sd-prune.

Reconstruction from the abstract, no code is known: which layers count (every linear and convolution layer; embeddings,
norms and biases stay), that weights compete within a layer, and the meaning of the overall figure. Budgets are exact over a
part, where the sheet rounds down in each layer: a layer may lose one weight more.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from secateur.method import register
from secateur.pruning.method import WeightMethod
from secateur.stats.layer import LayerStats
from secateur.taxonomy import record

PAPER = "text_encoder=52.5%,unet=65%"
"""The target that the paper recommends: 47.5 and 35 % of the weights leave."""


@register
@dataclass
class SDPrune(WeightMethod):
    """|w| over every linear and convolution layer of the parts that the target names, within each layer.

    >>> secateur.prune(pipe, method="sd-prune", target="text_encoder=52.5%,unet=65%")  # doctest: +SKIP

    `scope="part"`: one ranking over all weights of a part, which behaves very differently. `secateur.threshold` finds the
    share below which a part breaks. Of equal weights the earlier leaves. For the activation-aware rival take
    `method="wanda", everywhere=True, data=visited(model, sampler, 20, seed=0)` (`secateur.training.sampling`): inputs of all steps.
    """

    scope: str = field(
        default="layer",
        metadata={"help": "where weights compete: layer, part", "choices": ("layer", "part")},
    )

    everywhere: ClassVar[bool] = True
    later_stays: ClassVar[bool] = True
    unrepaired: ClassVar[str] = "it prunes layers outside the repeated blocks too"
    info = record("sd-prune")

    def score(self, weight: Tensor, stats: LayerStats) -> Tensor:
        return weight.abs()
