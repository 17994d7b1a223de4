"""Pictures moved, mirrored and turned: whole batches at once on their device, by chance from a seeded CPU generator."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

Batch = tuple[Tensor, Tensor]


def shift(
    x: Tensor, generator: torch.Generator, pad: int = 4, fill: Tensor | float = 0.0, flip: bool = False
) -> Tensor:
    """Each picture of [N, C, h, w] moved by up to `pad` pixels in both directions.

    >>> shift(torch.rand(8, 3, 32, 32), torch.Generator().manual_seed(0), flip=True).shape
    torch.Size([8, 3, 32, 32])

    fill: what comes in at the border, a number or [C]. flip: mirrored every second time as well.
    """
    n, _, height, width = x.shape
    fill = torch.as_tensor(fill, dtype=x.dtype).to(x.device).reshape(1, -1, 1, 1)
    padded = F.pad(x - fill, (pad, pad, pad, pad)) + fill
    draws = torch.randint(0, 2 * pad + 1, (2, n), generator=generator)
    mirrored = (torch.rand(n, generator=generator) < 0.5) & flip
    down, across, mirrored = draws[0].to(x.device), draws[1].to(x.device), mirrored.to(x.device)
    columns = torch.arange(width, device=x.device).expand(n, width)
    columns = torch.where(mirrored[:, None], columns.flip(1), columns) + across[:, None]
    rows = torch.arange(height, device=x.device) + down[:, None]
    every = torch.arange(n, device=x.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[every, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def turn(batch: Batch, generator: torch.Generator) -> Batch:
    """Both pictures of each pair [N, C, h, h] mirrored, or turned by a quarter, half or three quarters: eight ways.

    >>> x, y = turn((torch.rand(8, 1, 4, 4), torch.rand(8, 1, 8, 8)), torch.Generator().manual_seed(0))
    """
    draws = torch.rand(3, len(batch[0]), generator=generator) < 0.5

    def apply(x: Tensor) -> Tensor:
        down, across, swapped = (d.to(x.device)[:, None, None, None] for d in draws)
        x = torch.where(down, x.flip(2), x)
        x = torch.where(across, x.flip(3), x)
        return torch.where(swapped, x.transpose(2, 3), x)

    return apply(batch[0]), apply(batch[1])


def mirror(batch: Batch, generator: torch.Generator) -> Batch:
    """Pictures [N, C, h, w] and their labels [N, h, w], mirrored every second time."""
    x, y = batch
    swapped = (torch.rand(len(x), generator=generator) < 0.5).to(x.device)
    x = torch.where(swapped[:, None, None, None], x.flip(3), x)
    return x, torch.where(swapped[:, None, None], y.flip(2), y)
