"""Salient relevance: context-aware saliency detection on the relevance of the pixels.

Li et al. 2017, "Beyond saliency: understanding convolutional neural networks from saliency prediction on layer-wise
relevance propagation", https://arxiv.org/abs/1712.08268. Spec: salient-relevance.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from secateur.method import register
from secateur.methods.lrp import Lrp
from secateur.saliency.method import Drawn, SaliencyMethod
from secateur.saliency.regions import sr_map
from secateur.saliency.relevance import COMPOSITES
from secateur.taxonomy import record


@register
@dataclass
class SalientRelevance(SaliencyMethod):
    """Areas that stand out in the relevance of the pixels, by context-aware saliency detection.

    >>> secateur.saliency(model, image, method="salient-relevance", target=281).values  # doctest: +SKIP
    """

    info = record("salient-relevance")

    composite: str = field(
        default="z-conv", metadata={"help": ", ".join(COMPOSITES), "choices": tuple(COMPOSITES)}
    )
    colour: bool = field(
        default=True, metadata={"help": "look at the relevance of the colours as an L*a*b picture"}
    )
    longer: int = field(default=250, metadata={"help": "longer side at which patches are compared, pixels"})

    def draw(self, model: nn.Module, image: Tensor, target: Any) -> Drawn:
        found = Lrp(composite=self.composite, start="logit").draw(model, image, target)
        assert found.attribution is not None
        maps = [sr_map(one.abs(), colour=self.colour, longer=self.longer) for one in found.attribution]
        return Drawn(torch.stack(maps), found.targets, attribution=found.attribution)
