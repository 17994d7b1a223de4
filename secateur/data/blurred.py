"""Photographs of which a part was in motion: squares of Set14 and the ImageNet sample, sharp, with a region blurred, and its mask."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from secateur.data.pictures import load_pictures
from secateur.data.super_resolution import HELD_OUT, pixels
from secateur.errors import SecateurError

PICTURES = 80
"""Of the ImageNet sample, in each split."""
SPLITS = ("train", "val", "test")


def load_blurred(
    split: str = "test", count: int = 32, size: int = 128, angle: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(blurred [N, 3, size, size], sharp, bool mask [N, size, size] of what is blurred), in 0..1, always the same.

    >>> blurred, sharp, mask = load_blurred("test", count=4, size=64)  # doctest: +SKIP

    train: squares of 12 pictures of Set14 and 80 of the ImageNet sample; val and test: of 40 others each, and the last two of
    Set14. The region is an ellipse whose half-axes are a sixth to a third of the square; it is moved along a line of 9 to 15 pixels, with a soft
    edge that counts as blurred. angle: of every line, in radians, 0 across; None: each has its own.
    Raises `SecateurError` for another split and missing data.
    """
    if split not in SPLITS:
        raise SecateurError(f"there is no split {split!r}", where="blur", fix=", ".join(SPLITS))
    generator = torch.Generator().manual_seed(SPLITS.index(split))
    pictures = _pictures(split)
    sharp = torch.stack([_square(pictures, size, generator) for _ in range(count)])
    made = [regional_blur(picture, generator, angle) for picture in sharp]
    return torch.stack([blurred for blurred, _ in made]), sharp, torch.stack([mask for _, mask in made])


def regional_blur(
    picture: Tensor, generator: torch.Generator, angle: float | None = None
) -> tuple[Tensor, Tensor]:
    """(picture [3, h, w] with an ellipse moved along a line, bool [h, w] where it differs by the edge's weight)."""
    height, width = picture.shape[-2:]
    draws = torch.rand(7, generator=generator).tolist()
    across, down = (width * (0.25 + 0.5 * draws[0]), height * (0.25 + 0.5 * draws[1]))
    wide, high = (width * (1 + draws[2]) / 6, height * (1 + draws[3]) / 6)
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    inside = (((x - across) / wide) ** 2 + ((y - down) / high) ** 2 <= 1).float()
    weight = F.avg_pool2d(inside[None], 3, 1, 1)
    kernel = line(9 + 6 * draws[4], math.pi * draws[5] if angle is None else angle)
    pad = kernel.shape[-1] // 2
    moved = F.conv2d(F.pad(picture[:, None], (pad,) * 4, mode="reflect"), kernel[None, None])[:, 0]
    return picture + weight * (moved - picture), weight[0] > 0


def line(length: float, angle: float) -> Tensor:
    """A kernel [k, k] of sum 1: a line of so many pixels through its middle.

    >>> line(3, 0.0).tolist()[1] == line(3, math.pi / 2).T.tolist()[1]
    True
    """
    side = 2 * math.ceil(length / 2) + 1
    along = torch.linspace(-(length - 1) / 2, (length - 1) / 2, 101)
    place = torch.stack([along * math.sin(angle), along * math.cos(angle)]).round().long() + side // 2
    kernel = torch.zeros(side, side).index_put((place[0], place[1]), torch.ones(101), accumulate=True)
    return kernel / kernel.sum()


def _pictures(split: str) -> list[Tensor]:
    half = "train" if split == "train" else "test"
    found, _ = load_pictures("imagenet-sample", PICTURES, split=half)
    part = {"train": slice(None), "val": slice(0, PICTURES // 2), "test": slice(PICTURES // 2, None)}[split]
    natural = [
        torch.from_numpy(large.copy()).permute(2, 0, 1).float() / 255 for _, large in pixels("set14", 4)
    ]
    return [*(found[part] * 0.5 + 0.5), *(natural[:-HELD_OUT] if split == "train" else natural[-HELD_OUT:])]


def _square(pictures: list[Tensor], size: int, generator: torch.Generator) -> Tensor:
    """A square of one of the pictures that are large enough."""
    large = [picture for picture in pictures if min(picture.shape[1:]) >= size]
    picture = large[int(torch.randint(len(large), (), generator=generator))]
    top, left = (int(torch.randint(n - size + 1, (), generator=generator)) for n in picture.shape[1:])
    return picture[:, top : top + size, left : left + size].clamp(0, 1)
