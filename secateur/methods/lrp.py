"""Layer-wise relevance propagation.

Bach et al. 2015, https://doi.org/10.1371/journal.pone.0130140. Spec: lrp-pruning (its rules).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from secateur.method import register
from secateur.saliency.method import Drawn, SaliencyMethod
from secateur.saliency.record import as_targets
from secateur.saliency.relevance import COMPOSITES, as_composite, propagate
from secateur.taxonomy import record


@register
@dataclass
class Lrp(SaliencyMethod):
    """Layer-wise relevance: what each pixel has in the class's logit, by rules that hand all of it on.

    >>> secateur.saliency(model, image, method="lrp", target=281).values  # doctest: +SKIP
    """

    info = record("lrp")
    words = True

    composite: str = field(
        default="epsilon-plus-flat", metadata={"help": ", ".join(COMPOSITES), "choices": tuple(COMPOSITES)}
    )
    start: str = field(
        default="one", metadata={"help": "what is handed on: one, or the logit", "choices": ("one", "logit")}
    )
    low: float | None = field(
        default=None, metadata={"help": "least pixel, for a box rule; default: of the picture"}
    )
    high: float | None = field(default=None, metadata={"help": "greatest pixel"})

    def draw(self, model: nn.Module, image: Tensor, target: Any) -> Drawn:
        composite = as_composite(self.composite, low=self.low, high=self.high)
        targets: list[Tensor] = []

        def start(logits: Tensor) -> Tensor:
            targets.append(as_targets(target, logits))
            one = F.one_hot(targets[0], logits.shape[1]).to(logits)
            return logits * one if self.start == "logit" else one

        each = propagate(model, image, start, composite)
        assert each is not None
        return Drawn(each.float().sum(1), targets[0], attribution=each.float(), additive=True)
