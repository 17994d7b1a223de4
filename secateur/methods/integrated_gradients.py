"""Integrated gradients: the gradient on the straight way from a baseline to the picture, times that way.

Sundararajan et al. 2017, https://arxiv.org/abs/1703.01365.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from secateur.method import register
from secateur.saliency.forward import captum, forward_of
from secateur.saliency.method import Drawn, SaliencyMethod
from secateur.taxonomy import record

AT_ONCE = 8
"""Steps of the way that are in one batch."""


@register
@dataclass
class IntegratedGradients(SaliencyMethod):
    """What each pixel adds to the logit on the way from a baseline: over all pixels it is the logit less the baseline's.

    >>> secateur.saliency(model, image, method="integrated-gradients", target=281).values  # doctest: +SKIP

    The integral is captum's Gauss-Legendre sum; more steps bring the map's sum closer to the difference of the logits.
    """

    info = record("integrated-gradients")
    runs = "a forward and a backward for each step"
    words = True

    steps: int = field(default=50, metadata={"help": "points on the way from the baseline", "min": 1})
    baseline: float = field(
        default=0.0, metadata={"help": "every number of the baseline, normalised; 0 is the mean colour"}
    )

    def draw(self, model: nn.Module, image: Tensor, target: Any) -> Drawn:
        with forward_of(model, image, target) as (f, x, targets):
            each = captum().IntegratedGradients(f).attribute(
                x, self.baseline, targets, n_steps=self.steps, internal_batch_size=AT_ONCE * len(x)
            )  # fmt: skip
        return Drawn(each.float().sum(1), targets, attribution=each.float(), additive=True)
