"""Occlusion: what the logit loses while a square of the picture is covered.

Zeiler and Fergus 2013, https://arxiv.org/abs/1311.2901.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from secateur.errors import require
from secateur.method import register
from secateur.saliency.forward import captum, forward_of
from secateur.saliency.method import Drawn, SaliencyMethod
from secateur.taxonomy import record

AT_ONCE = 16
"""Places of the square that are in one batch."""


@register
@dataclass
class Occlusion(SaliencyMethod):
    """The logit less that with a square covered, at each pixel the mean over the squares that cover it.

    >>> secateur.saliency(model, image, method="occlusion", target=281, window=32).values  # doctest: +SKIP
    """

    info = record("occlusion")
    runs = "a forward for each place of the square"
    words = True

    window: int | None = field(
        default=None,
        metadata={"help": "side of the square, pixels; default: an eighth of the shorter side", "min": 1},
    )
    stride: int | None = field(
        default=None, metadata={"help": "pixels from one place to the next; default: half a square", "min": 1}
    )
    fill: float = field(default=0.0, metadata={"help": "what covers it, normalised; 0 is the mean colour"})

    def draw(self, model: nn.Module, image: Tensor, target: Any) -> Drawn:
        colours, *sides = image.shape[1:]
        square = self.window or -(-min(sides) // 8)
        require(
            (self.stride or 1) <= square,
            f"with a stride of {self.stride} and a square of {square}, some pixels are never covered",
            where="occlusion",
            fix=f"a stride of at most {square}, or a larger window",
        )
        window = [min(side, square) for side in sides]
        stride = [min(side, self.stride or -(-side // 2)) for side in window]
        with forward_of(model, image, target) as (f, x, targets):
            lost = captum().Occlusion(f).attribute(
                x, (colours, *window), (colours, *stride), self.fill, targets, perturbations_per_eval=AT_ONCE
            )  # fmt: skip
        each = lost.float() / colours  # captum gives the whole of it to every colour
        return Drawn(each.sum(1), targets, attribution=each, additive=True)
