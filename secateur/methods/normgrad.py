"""NormGrad: the norm of the contribution of each place to the gradient of an imaginary identity layer.

Rebuffi et al. 2020, "There and Back Again: Revisiting Backpropagation Saliency Methods",
https://arxiv.org/abs/2004.02866. Spec: normgrad.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.method import register
from secateur.saliency.maps import COMBINE, as_names, combine, grids
from secateur.saliency.method import Drawn, SaliencyMethod
from secateur.saliency.record import record as look
from secateur.taxonomy import record

CONTRIBUTIONS = ("conv1", "conv3", "scaling", "bias")
REDUCTIONS = ("norm", "positive", "sum", "max")


def contribution_map(
    x: Tensor, g: Tensor, contribution: str = "conv1", reduction: str = "norm", kernel: int = 3
) -> Tensor:
    """[N, H, W]: how much each place contributes to the gradient of an imaginary identity layer's weights.

    >>> x = torch.tensor([[1.0, 0, 2], [2, 1, -1]])[None, :, None]
    >>> g = torch.tensor([[0.5, 1, -1], [-1, 0, 2]])[None, :, None]
    >>> contribution_map(x, g)
    tensor([[[2.5000, 1.0000, 5.0000]]])

    x, g: activations and their gradients, [N, C, H, W]. contribution: of the identity as a 1 x 1 convolution (x gᵀ), as a
    convolution of size `kernel` (`conv3`), as a scaling (x g) or as a bias (g); reduction: its Frobenius norm, the
    norm of its positive part, its sum, or its greatest entry. conv1 + norm is NormGrad, scaling + positive selective
    NormGrad, scaling + sum the linear approximation, bias + max the largest gradient.

    Source: Rebuffi et al. 2020, https://arxiv.org/abs/2004.02866.
    """
    if contribution not in CONTRIBUTIONS or reduction not in REDUCTIONS:
        raise SecateurError(
            f"there is no contribution {contribution!r} with reduction {reduction!r}",
            where="normgrad",
            fix=f"one of {', '.join(CONTRIBUTIONS)} with one of {', '.join(REDUCTIONS)}",
        )
    x, g = x.float(), g.float()
    if contribution == "conv3":
        if kernel % 2 == 0:
            raise SecateurError(f"kernel {kernel} has no middle", where="normgrad", fix="give an odd size")
        # of the zero-padded neighbourhood only norms, sums and extremes over it are needed
        pad = kernel // 2

        def around(t: Tensor) -> Tensor:
            return F.avg_pool2d(t, kernel, 1, pad) * kernel**2

        def extreme(t: Tensor) -> Tensor:
            return F.max_pool2d(F.pad(t, (pad,) * 4), kernel, 1).amax(1)

        if reduction == "norm":
            return around(x.square().sum(1, keepdim=True)).squeeze(1).sqrt() * g.norm(dim=1)
        if reduction == "positive":
            up, down = (
                around(p.square().sum(1, keepdim=True)).squeeze(1) for p in (x.clamp(min=0), x.clamp(max=0))
            )
            return (up * g.clamp(min=0).square().sum(1) + down * g.clamp(max=0).square().sum(1)).sqrt()
        if reduction == "sum":
            return around(x.sum(1, keepdim=True)).squeeze(1) * g.sum(1)
        ends = extreme(x), -extreme(-x)
        return torch.stack([a * b for a in ends for b in (g.amax(1), g.amin(1))]).amax(0)
    if contribution == "conv1":
        if reduction == "norm":
            return x.norm(dim=1) * g.norm(dim=1)
        if reduction == "positive":
            up, down = x.clamp(min=0).norm(dim=1), x.clamp(max=0).norm(dim=1)
            return (
                (up * g.clamp(min=0).norm(dim=1)).square() + (down * g.clamp(max=0).norm(dim=1)).square()
            ).sqrt()
        if reduction == "sum":
            return x.sum(1) * g.sum(1)
        return torch.stack([a * b for a in (x.amax(1), x.amin(1)) for b in (g.amax(1), g.amin(1))]).amax(0)
    each = x * g if contribution == "scaling" else g
    if reduction == "norm":
        return each.norm(dim=1)
    if reduction == "positive":
        return each.clamp(min=0).norm(dim=1)
    return each.sum(1) if reduction == "sum" else each.amax(1)


@register
@dataclass
class NormGrad(SaliencyMethod):
    """How much each place contributes to the gradient of an imaginary identity layer's weights.

    >>> secateur.saliency(model, image, method="normgrad", target=281).values  # doctest: +SKIP

    Layers of several depths can be combined: `layers="all"`.
    """

    info = record("normgrad")

    contribution: str = field(
        default="conv1", metadata={"help": ", ".join(CONTRIBUTIONS), "choices": CONTRIBUTIONS}
    )
    reduction: str = field(default="norm", metadata={"help": ", ".join(REDUCTIONS), "choices": REDUCTIONS})
    kernel: int = field(default=3, metadata={"help": "size of the convolution of conv3"})
    layers: str | tuple[str, ...] = field(
        default="last",
        metadata={"help": "last, all (the end of every stage of convolutions), or names with commas"},
    )
    combine: str = field(
        default="product", metadata={"help": "of several layers: product or sum", "choices": COMBINE}
    )
    weights: tuple[float, ...] | None = field(
        default=None, metadata={"help": "of the layers, shallow to deep"}
    )

    def draw(self, model: nn.Module, image: Tensor, target: Any) -> Drawn:
        seen = look(model, image, target, as_names(self.layers))
        maps = [self.of(x, g) for x, g in grids(seen)]
        values = maps[0] if len(maps) == 1 else combine(maps, self.weights, self.combine)
        return Drawn(values, seen.targets, tuple(seen.activations))

    def of(self, x: Tensor, g: Tensor) -> Tensor:
        return contribution_map(x, g, self.contribution, self.reduction, self.kernel)
