"""The gradient of the class's logit at every pixel.

Simonyan et al. 2013, https://arxiv.org/abs/1312.6034.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from secateur.method import register
from secateur.saliency.method import Drawn, SaliencyMethod
from secateur.saliency.record import Record
from secateur.saliency.record import record as look
from secateur.taxonomy import record


@register
@dataclass
class Gradient(SaliencyMethod):
    """The largest absolute gradient over the colours of a pixel.

    >>> secateur.saliency(model, image, method="gradient", target=281).values  # doctest: +SKIP
    """

    info = record("gradient")
    words = True

    times_input: bool = field(default=False, metadata={"help": "multiply the gradient with the pixel"})

    def draw(self, model: nn.Module, image: Tensor, target: Any) -> Drawn:
        seen = look(model, image, target, pixels=True)
        return self.of(seen)

    def of(self, seen: Record) -> Drawn:
        assert seen.input_gradient is not None
        each = seen.input_gradient.float()
        if self.times_input:
            each = each * seen.input.float()
        return Drawn(each.abs().amax(1), seen.targets, attribution=each, additive=self.times_input)
