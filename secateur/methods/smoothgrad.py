"""SmoothGrad: the mean gradient over noisy copies of the picture.

Smilkov et al. 2017, https://arxiv.org/abs/1706.03825.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from secateur.method import register
from secateur.saliency.forward import captum, forward_of
from secateur.saliency.method import Drawn, SaliencyMethod
from secateur.taxonomy import record

AT_ONCE = 8
"""Noisy copies that are in one batch."""


@register
@dataclass
class SmoothGrad(SaliencyMethod):
    """The largest absolute mean gradient over the colours of a pixel.

    >>> secateur.saliency(model, image, method="smoothgrad", target=281, samples=20).values  # doctest: +SKIP
    """

    info = record("smoothgrad")
    words = True
    runs = "a forward and a backward for each noisy copy"

    samples: int = field(default=50, metadata={"help": "noisy copies", "min": 1})
    noise: float = field(
        default=0.15, metadata={"help": "sigma as a share of the range of the picture's numbers", "above": 0}
    )
    seed: int = field(default=0, metadata={"help": "of the noise, the same for each picture", "min": 0})

    def draw(self, model: nn.Module, image: Tensor, target: Any) -> Drawn:
        with forward_of(model, image, target) as (f, x, targets):
            tunnel = captum().NoiseTunnel(captum().Saliency(f))
            parts = []
            for one, own in zip(x[:, None], targets[:, None], strict=True):
                with torch.random.fork_rng([one.device] if one.is_cuda else []):
                    torch.manual_seed(self.seed)
                    parts.append(tunnel.attribute(
                        one, nt_samples=self.samples, nt_samples_batch_size=min(AT_ONCE, self.samples),
                        stdevs=self.noise * float(one.max() - one.min()), target=own, abs=False,
                    ))  # fmt: skip
        each = torch.cat(parts).float()
        return Drawn(each.abs().amax(1), targets, attribution=each)
