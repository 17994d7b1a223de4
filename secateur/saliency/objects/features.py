"""Maps of any network as a pyramid: read from its layers, joined from coarse to fine, with relations over long ranges.

Lin et al. 2017, https://arxiv.org/abs/1612.03144; Wang et al. 2018, https://arxiv.org/abs/1711.07971.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.saliency.maps import as_grid
from secateur.saliency.record import Layers
from secateur.utils.running import evaluating


def feature_maps(model: nn.Module, pictures: Tensor, layers: Sequence[str] | str = "all") -> list[Tensor]:
    """The model's maps [N, C, h, w], fine to coarse; before them the pictures at half size where no map is that fine.

    >>> [tuple(m.shape[1:]) for m in feature_maps(resnet, torch.zeros(1, 3, 64, 64))]  # doctest: +SKIP
    [(3, 32, 32), (64, 16, 16), (128, 8, 8), (256, 4, 4), (512, 2, 2)]

    layers: names of modules, fine to coarse, or `all`: the ends of the stages of convolutions. Tokens of a vision
    transformer go on their grid. Without gradients; the model is left as it was. Raises `SecateurError`: no such layer, and
    one that is no map.
    """
    first = next(model.parameters(), pictures)
    x = pictures.to(first.device, first.dtype)
    caught = Layers()
    with evaluating(model), torch.no_grad(), caught.catch(model, layers):
        model(x)
    maps = [as_grid(found, x, name).detach() for name, found in caught.found.items()]
    half = (x.shape[2] // 2, x.shape[3] // 2)
    if maps[0].shape[2] < half[0]:
        maps.insert(0, F.interpolate(x, half, mode="area"))
    return maps


class Relations(nn.Module):
    """Every place of a map is told what all others hold: x + W g(x) softmax(theta(x)' phi(x))', at first x itself.

    >>> x = torch.randn(2, 8, 5, 5)
    >>> torch.equal(Relations(8)(x), x)
    True
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = max(1, channels // 2)
        self.theta, self.phi, self.g = (nn.Conv2d(channels, inner, 1) for _ in range(3))
        self.out = nn.Conv2d(inner, channels, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (part(x).flatten(2) for part in (self.theta, self.phi, self.g))
        share = (query.mT @ key).softmax(-1)  # [N, places, places]
        return x + self.out((value @ share.mT).unflatten(2, x.shape[2:]))


class Pyramid(nn.Module):
    """Maps of one width, fine to coarse, each of its own place and all that is coarser.

    >>> maps = [torch.zeros(1, 16, 8, 8), torch.zeros(1, 32, 4, 4), torch.zeros(1, 64, 4, 4)]
    >>> [tuple(m.shape[1:]) for m in Pyramid((16, 32, 64), width=6)(maps)]
    [(6, 16, 16), (6, 8, 8), (6, 4, 4)]

    A map that isn't finer than the one behind it, as of a vision transformer, is enlarged to twice the size of that one.
    relations: whether the coarsest map sees itself as a whole (`Relations`).
    """

    def __init__(self, channels: Sequence[int], width: int, relations: bool = True) -> None:
        super().__init__()
        self.sides = nn.ModuleList(nn.Conv2d(c, width, 1) for c in channels)
        self.norms = nn.ModuleList(nn.GroupNorm(1, c) for c in channels)
        self.join = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(2, width), nn.ReLU())
            for _ in channels
        )
        self.relations = Relations(width) if relations else nn.Identity()

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        if len(maps) != len(self.sides):
            raise SecateurError(
                f"{len(maps)} maps for {len(self.sides)}",
                where="Pyramid",
                fix="give those of the network that it was built for",
            )
        dtype = next(self.parameters()).dtype
        found: list[Tensor] = []
        for level in reversed(range(len(maps))):
            own = self.sides[level](self.norms[level](maps[level].to(dtype)))
            if not found:
                found.append(self.join[level](self.relations(own)))
                continue
            behind = found[-1]
            finer = own.shape[2] > behind.shape[2]
            size = tuple(own.shape[2:]) if finer else tuple(2 * side for side in behind.shape[2:])
            own = own if finer else F.interpolate(own, size, mode="bilinear")
            found.append(self.join[level](own + F.interpolate(behind, size, mode="bilinear")))
        return found[::-1]


def smaller(masks: Tensor, size: Sequence[int]) -> Tensor:
    """bool [N, G, h, w] of masks [N, G, H, W]: a pixel is what covers half of it.

    >>> smaller(torch.tensor([[[[1, 1, 0, 0], [0, 1, 0, 0]]]]), (1, 2)).tolist()
    [[[[True, False]]]]
    """
    if tuple(masks.shape[2:]) == tuple(size):
        return masks.bool()
    return F.interpolate(masks.float(), tuple(size), mode="area") >= 0.5
