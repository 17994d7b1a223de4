"""Grad-CAM: channels weighted by their mean gradient.

Selvaraju et al. 2017, https://arxiv.org/abs/1610.02391.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from secateur.method import register
from secateur.saliency.maps import as_names, combine, grids
from secateur.saliency.method import Drawn, SaliencyMethod
from secateur.saliency.record import record as look
from secateur.taxonomy import record


def cam(x: Tensor, g: Tensor) -> Tensor:
    """[N, H, W]: Grad-CAM of activations and gradients, [N, C, H, W].

    Selvaraju et al. 2017, https://arxiv.org/abs/1610.02391.
    """
    return (x.float() * g.float().mean((2, 3), keepdim=True)).sum(1).clamp(min=0)


@register
@dataclass
class GradCam(SaliencyMethod):
    """Channels weighted by their mean gradient, where the sum is positive.

    >>> secateur.saliency(model, image, method="grad-cam", target=281).values  # doctest: +SKIP
    """

    info = record("grad-cam")

    layers: str | tuple[str, ...] = field(default="last", metadata={"help": "last, or the name of one layer"})

    def draw(self, model: nn.Module, image: Tensor, target: Any) -> Drawn:
        seen = look(model, image, target, as_names(self.layers))
        maps = [cam(x, g) for x, g in grids(seen)]
        return Drawn(maps[0] if len(maps) == 1 else combine(maps), seen.targets, tuple(seen.activations))
