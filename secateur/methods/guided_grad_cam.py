"""Guided Grad-CAM: guided backpropagation times Grad-CAM.

Selvaraju et al. 2017, https://arxiv.org/abs/1610.02391.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from secateur.method import register
from secateur.methods.grad_cam import GradCam
from secateur.methods.guided_backprop import GuidedBackprop
from secateur.saliency.maps import resize
from secateur.saliency.method import Drawn, SaliencyMethod
from secateur.taxonomy import record


@register
@dataclass
class GuidedGradCam(SaliencyMethod):
    """Guided backpropagation times Grad-CAM.

    >>> secateur.saliency(model, image, method="guided-grad-cam", target=281).values  # doctest: +SKIP
    """

    info = record("guided-grad-cam")

    layers: str | tuple[str, ...] = field(default="last", metadata={"help": "last, or the name of one layer"})

    def draw(self, model: nn.Module, image: Tensor, target: Any) -> Drawn:
        places = GradCam(layers=self.layers).draw(model, image, target)
        pixels = GuidedBackprop().draw(model, image, places.targets)
        assert pixels.attribution is not None
        each = pixels.attribution * resize(places.values, image.shape[2:])[:, None]
        return Drawn(each.abs().amax(1), places.targets, places.layers, each)
