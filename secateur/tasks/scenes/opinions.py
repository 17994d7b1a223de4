"""Drawn pictures in which several objects may each be what stands out: every object is an opinion."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from secateur.tasks.scenes.draw import COLOURS, STAMPS


def draw_opinions(count: int, seed: int, size: int = 160) -> tuple[list[Tensor], list[Tensor]]:
    """(pictures, masks): uint8 [3, size, size] and bool [objects, size, size] each, two or three objects that don't touch.

    >>> pictures, masks = draw_opinions(2, seed=0, size=64)
    >>> pictures[0].shape, masks[0].shape[1:]
    (torch.Size([3, 64, 64]), torch.Size([64, 64]))

    Circles, squares, triangles and crosses of six colours, each in a quarter of its own, over a grey gradient with noise.
    """
    generator = torch.Generator().manual_seed(seed)

    def chance(low: float = 0.0, high: float = 1.0) -> float:
        return low + (high - low) * torch.rand((), generator=generator).item()

    palette = torch.tensor(list(COLOURS.values())) / 255
    ramp, half = torch.linspace(-1, 1, size), size // 2
    pictures, masks = [], []
    for _ in range(count):
        picture = chance(0.2, 0.7) + chance(-0.15, 0.15) * ramp + chance(-0.15, 0.15) * ramp[:, None]
        picture = picture.expand(3, -1, -1) + 0.04 * torch.randn(3, 1, 1, generator=generator)
        own = []
        for quarter in torch.randperm(4, generator=generator)[: 2 + (chance() < 0.5)].tolist():
            side = int(chance(0.5, 0.95) * half)
            top, left = (int(chance(0, half - side)) + half * part for part in (quarter // 2, quarter % 2))
            stamp = STAMPS[int(chance(0, len(STAMPS)))][None, None]
            cover = torch.zeros(size, size)
            cover[top : top + side, left : left + side] = F.interpolate(
                stamp, (side, side), mode="bilinear", antialias=True
            )[0, 0]
            tint = palette[int(chance(0, len(palette)))] * chance(0.8, 1.1)
            picture = torch.lerp(picture, tint.clamp(0, 1)[:, None, None], cover)
            own.append(cover >= 0.5)
        picture = picture + 0.03 * torch.randn(3, size, size, generator=generator)
        pictures.append((picture.clamp(0, 1) * 255).round().to(torch.uint8))
        masks.append(torch.stack(own))
    return pictures, masks
