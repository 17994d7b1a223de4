"""Common corruptions of pictures at five severities: noise, blur, weather, and what cameras and files do.

The nineteen kinds and their strengths are those of the public benchmarks (Hendrycks, Dietterich 2019, https://arxiv.org/abs/1903.12261):
of CIFAR-10-C for pictures below 96 pixels, of ImageNet-C above. The code is our own, so the pictures aren't those of the published
files; frost and spatter are drawn textures, where the benchmark lays photographs and filtered edges over a picture, and glass
moves every pixel on its own. Spec: robustness-lottery.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Generator, Tensor

from secateur.errors import SecateurError, choose
from secateur.utils.random import seeded

SEVERITIES = (1, 2, 3, 4, 5)
LARGE = 96
"""Pixels of the shorter side from which the strengths for large pictures count."""
Change = Callable[..., Tensor]
KINDS: dict[str, tuple[Change, tuple, tuple]] = {}
"""Name -> (what it does, its strengths for small pictures, and for large ones)."""
EXTRA = ("speckle_noise", "gaussian_blur", "spatter", "saturate")
"""Held out of the common fifteen by the benchmark, to choose settings by."""
COLOUR = ("saturate",)
"""Nothing for pictures without colours."""


def corrupt(pixels: Tensor, name: str, severity: int, seed: int = 0) -> Tensor:
    """Pictures float32 [N, C, H, W] in 0..1 under a corruption, in the 256 levels of a file.

    >>> corrupt(torch.full((1, 1, 8, 8), 0.5), "brightness", 5).mean()
    tensor(0.8000)

    name: of `common(channels)`. severity: 1 to 5. seed: of what is drawn by chance; the same draw at all severities.
    Raises `SecateurError` for another name or severity, for what isn't a batch of pictures in 0..1, and for colours that aren't there.
    """
    choose(name, tuple(KINDS), what="corruption", where="corrupt", near=2)
    if severity not in SEVERITIES:
        raise SecateurError(f"there is no severity {severity!r}", where=name, fix="1, 2, 3, 4 or 5")
    if pixels.ndim != 4 or not pixels.numel() or not 0 <= float(pixels.min()) <= float(pixels.max()) <= 1:
        raise SecateurError(
            f"{tuple(pixels.shape)} are no pictures in 0..1", where=name, fix="give [N, C, H, W] in 0..1"
        )
    if name in COLOUR and pixels.shape[1] != 3:
        raise SecateurError("the pictures have no colours", where=name, fix="leave it out")
    change, small, large = KINDS[name]
    strength = (large if min(pixels.shape[2:]) >= LARGE else small)[severity - 1]
    arguments = strength if isinstance(strength, tuple) else (strength,)
    found = change(pixels.float(), seeded(seed, name), *arguments)
    return (found.clamp(0, 1) * 255).round() / 255


def common(channels: int = 3, extra: bool = False) -> tuple[str, ...]:
    """The names of the fifteen common corruptions; with `extra` also the four held out, where the pictures have what they change."""
    names = tuple(name for name in KINDS if extra or name not in EXTRA)
    return tuple(name for name in names if channels == 3 or name not in COLOUR)


def kind(small: tuple, large: tuple) -> Callable[[Change], Change]:
    """Registers a change under its name, with its five strengths for small and for large pictures."""

    def enter(change: Change) -> Change:
        KINDS[change.__name__] = (change, small, large)
        return change

    return enter


def _normal(like: Tensor, draw: Generator) -> Tensor:
    return torch.randn(like.shape, generator=draw)


@kind((0.04, 0.06, 0.08, 0.09, 0.10), (0.08, 0.12, 0.18, 0.26, 0.38))
def gaussian_noise(x: Tensor, draw: Generator, deviation: float) -> Tensor:
    return x + deviation * _normal(x, draw)


@kind((500, 250, 100, 75, 50), (60, 25, 12, 5, 3))
def shot_noise(x: Tensor, draw: Generator, photons: float) -> Tensor:
    return torch.poisson(x * photons, generator=draw) / photons


@kind((0.01, 0.02, 0.03, 0.05, 0.07), (0.03, 0.06, 0.09, 0.17, 0.27))
def impulse_noise(x: Tensor, draw: Generator, share: float) -> Tensor:
    hit = torch.rand(x.shape, generator=draw) < share
    return torch.where(hit, (torch.rand(x.shape, generator=draw) < 0.5).float(), x)


@kind((0.06, 0.10, 0.12, 0.16, 0.20), (0.15, 0.20, 0.35, 0.45, 0.60))
def speckle_noise(x: Tensor, draw: Generator, deviation: float) -> Tensor:
    return x + x * deviation * _normal(x, draw)


def _blurred(x: Tensor, sigma: float) -> Tensor:
    return torch.from_numpy(ndimage.gaussian_filter(x.numpy(), (0, 0, sigma, sigma), mode="nearest"))


@kind((0.4, 0.6, 0.7, 0.8, 1.0), (1, 2, 3, 4, 6))
def gaussian_blur(x: Tensor, draw: Generator, sigma: float) -> Tensor:
    return _blurred(x, sigma)


@kind(((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)), ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)))  # fmt: skip
def defocus_blur(x: Tensor, draw: Generator, radius: float, soft: float) -> Tensor:
    """Each point becomes a disc, with an edge that is itself a little blurred."""
    reach = max(8, math.ceil(radius)) if radius > 8 else max(3, math.ceil(radius) + 2)
    places = torch.arange(-reach, reach + 1).float()
    disc = (places[:, None] ** 2 + places**2 <= radius**2).float()[None, None]
    disc = _blurred(disc / disc.sum(), soft)
    weight = disc.expand(x.shape[1], 1, -1, -1).contiguous()
    return F.conv2d(F.pad(x, (reach,) * 4, mode="replicate"), weight, groups=x.shape[1])


@kind(((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)), ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)))  # fmt: skip
def glass_blur(x: Tensor, draw: Generator, sigma: float, reach: int, times: int) -> Tensor:
    """Each pixel is taken from a place nearby, some times over, between two blurs."""
    x = _blurred(x, sigma)
    for _ in range(times):
        x = _taken(
            x,
            *torch.randint(-reach, reach, (2, len(x), *x.shape[2:]), generator=draw).unbind(),
        )
    return _blurred(x, sigma)


def _taken(x: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """x [N, C, H, W], each pixel from so many pixels below and to the right ([N, H, W] or what spreads to it), within the picture."""
    high, wide = x.shape[2:]
    rows = (torch.arange(high)[:, None] + down).clamp(0, high - 1)
    columns = (torch.arange(wide) + right).clamp(0, wide - 1)
    return x[torch.arange(len(x))[:, None, None], :, rows, columns].permute(0, 3, 1, 2)


@kind(((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)), ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)))
def motion_blur(x: Tensor, draw: Generator, radius: int, sigma: float) -> Tensor:
    angle = (torch.rand(len(x), generator=draw) - 0.5) * math.pi / 2
    return _dragged(x, radius, sigma, angle)


def _dragged(x: Tensor, radius: int, sigma: float, angle: Tensor) -> Tensor:
    """Along a direction each (radians, [N]), with weights that fall from the pixel itself on."""
    steps = torch.arange(2 * radius + 1).float()
    weights = torch.exp(-(steps**2) / (2 * sigma**2))
    found = torch.zeros_like(x)
    for step, weight in zip(steps, weights / weights.sum()):
        down, right = ((step * f(angle)).round().long()[:, None, None] for f in (torch.sin, torch.cos))
        found += weight * _taken(x, down, right)
    return found


@kind(((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)), ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)))  # fmt: skip
def zoom_blur(x: Tensor, draw: Generator, most: float, step: float) -> Tensor:
    """The mean of the picture and of what a lens shows that comes closer."""
    factors = np.arange(1, most, step)
    return (x + sum(_zoomed(x, float(f)) for f in factors)) / (len(factors) + 1)


def _zoomed(x: Tensor, factor: float) -> Tensor:
    frame = torch.eye(2, 3).mul(1 / factor).expand(len(x), 2, 3)
    return _sampled(x, F.affine_grid(frame, list(x.shape), align_corners=False))


def _sampled(x: Tensor, grid: Tensor) -> Tensor:
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


@kind(((0.1, 0.2, 1, 0.6, 8, 3, 0.95), (0.1, 0.2, 1, 0.5, 10, 4, 0.9), (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9), (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85), (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8)), ((0.1, 0.3, 3, 0.5, 10, 4, 0.8), (0.2, 0.3, 2, 0.5, 12, 4, 0.7), (0.55, 0.3, 4, 0.9, 12, 8, 0.7), (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65), (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55)))  # fmt: skip
def snow(x: Tensor, draw: Generator, mean: float, deviation: float, zoom: float, least: float, radius: int, sigma: float, stays: float) -> Tensor:  # fmt: skip
    """A whitened picture under flakes that were dragged down by the wind."""
    flakes = mean + deviation * torch.randn((len(x), 1, *x.shape[2:]), generator=draw)
    flakes = _zoomed(flakes, zoom)
    flakes = torch.where(flakes < least, 0, flakes).clamp(0, 1)
    angle = -(0.25 + 0.5 * torch.rand(len(x), generator=draw)) * math.pi
    flakes = _dragged(flakes, radius, sigma, angle)
    white = torch.maximum(x, x.mean(1, keepdim=True) * 1.5 + 0.5)
    return stays * x + (1 - stays) * white + flakes + flakes.flip(2, 3)


@kind(((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)), ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)))  # fmt: skip
def frost(x: Tensor, draw: Generator, stays: float, ice: float) -> Tensor:
    """Under a drawn texture of bright bluish ridges."""
    ridges = 1 - (2 * _plasma(x, draw, 1.6) - 1).abs()
    tint = torch.tensor([0.8, 0.9, 1.0])[:, None, None] if x.shape[1] == 3 else torch.tensor(0.9)
    return stays * x + ice * tint * ridges**3


@kind(((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)), ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)))  # fmt: skip
def fog(x: Tensor, draw: Generator, much: float, decay: float) -> Tensor:
    most = x.amax((1, 2, 3), keepdim=True)
    return (x + much * _plasma(x, draw, decay)) * most / (most + much)


def _plasma(x: Tensor, draw: Generator, decay: float) -> Tensor:
    """[N, 1, H, W] in 0..1: noise of all lengths, each half as long with a `decay`-th of the height."""
    size, height = tuple(x.shape[2:]), 1.0
    made = torch.zeros(len(x), 1, *size)
    side = 2
    while side <= 2 * max(size):
        noise = torch.rand(len(x), 1, side, side, generator=draw) - 0.5
        made += height * F.interpolate(noise, size, mode="bilinear", align_corners=False)
        side, height = 2 * side, height / decay
    made -= made.amin((2, 3), keepdim=True)
    return made / made.amax((2, 3), keepdim=True).clamp_min(1e-12)


@kind(((0.62, 0.1, 0.7, 0.7, 0.5, 0), (0.65, 0.1, 0.8, 0.7, 0.5, 0), (0.65, 0.3, 1, 0.69, 0.5, 0), (0.65, 0.1, 0.7, 0.69, 0.6, 1), (0.65, 0.1, 0.5, 0.68, 0.6, 1)), ((0.65, 0.3, 4, 0.69, 0.6, 0), (0.65, 0.3, 3, 0.68, 0.6, 0), (0.65, 0.3, 2, 0.68, 0.5, 0), (0.65, 0.3, 1, 0.65, 1.5, 1), (0.67, 0.4, 1, 0.65, 1.5, 1)))  # fmt: skip
def spatter(x: Tensor, draw: Generator, mean: float, deviation: float, sigma: float, least: float, much: float, mud: int) -> Tensor:  # fmt: skip
    """Drops of water, or of mud, on the lens: where smooth noise is high."""
    drops = _blurred(mean + deviation * torch.randn((len(x), 1, *x.shape[2:]), generator=draw), sigma)
    wet = (drops >= least).float()
    if mud:  # small spots don't stick
        wet = _blurred(wet, much)
        wet = torch.where(wet < 0.8, 0, wet)
    else:
        wet = wet * much / 2
    colour = torch.tensor([63, 42, 20] if mud else [175, 238, 238]) / 255
    colour = colour[:, None, None] if x.shape[1] == 3 else colour.mean()
    return x * (1 - wet) + colour * wet


@kind((0.05, 0.1, 0.15, 0.2, 0.3), (0.1, 0.2, 0.3, 0.4, 0.5))
def brightness(x: Tensor, draw: Generator, more: float) -> Tensor:
    """The value of hue, saturation and value; colours keep their hue."""
    value = x.amax(1, keepdim=True)
    lighter = (value + more).clamp(max=1)
    return torch.where(value > 0, x * lighter / value.clamp_min(1e-12), lighter)


@kind((0.75, 0.5, 0.4, 0.3, 0.15), (0.4, 0.3, 0.2, 0.1, 0.05))
def contrast(x: Tensor, draw: Generator, share: float) -> Tensor:
    mean = x.mean((2, 3), keepdim=True)
    return mean + share * (x - mean)


@kind(((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)), ((2, 0.7, 0.1), (2, 0.08, 0.2), (0.05, 0.01, 0.02), (0.07, 0.01, 0.02), (0.12, 0.01, 0.02)))  # fmt: skip
def elastic_transform(x: Tensor, draw: Generator, far: float, smooth: float, skew: float) -> Tensor:
    """Skewed by three points that move, then by a smooth field; all lengths are shares of the side."""
    high, wide = x.shape[2:]
    corners = torch.tensor([[-1.0, -1], [1, -1], [-1, 1]]) * 2 / 3
    moved = corners + 2 * skew * (2 * torch.rand(len(x), 3, 2, generator=draw) - 1)
    ones = torch.ones(len(x), 3, 1)
    frame = torch.linalg.solve(torch.cat((moved, ones), 2), corners.expand(len(x), 3, 2))
    grid = F.affine_grid(frame.transpose(1, 2).contiguous(), list(x.shape), align_corners=False)
    if far:
        field = 2 * torch.rand(len(x), 2, high, wide, generator=draw) - 1
        field = torch.from_numpy(
            ndimage.gaussian_filter(
                field.numpy(), (0, 0, smooth * high, smooth * wide), mode="reflect", truncate=3
            )
        )
        grid = grid + 2 * far * field.permute(0, 2, 3, 1)
    return _sampled(x, grid)


def _as_images(x: Tensor, change: Callable[[Any], Any]) -> Tensor:
    """Each picture as Pillow's, changed, and back."""
    from PIL import Image

    found = []
    for picture in (x * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy():
        image = Image.fromarray(picture[:, :, 0] if picture.shape[2] == 1 else picture)
        back = np.asarray(change(image)).reshape(picture.shape)
        found.append(torch.from_numpy(back.copy()).permute(2, 0, 1))
    return torch.stack(found).float() / 255


@kind((0.95, 0.9, 0.85, 0.75, 0.65), (0.6, 0.5, 0.4, 0.3, 0.25))
def pixelate(x: Tensor, draw: Generator, share: float) -> Tensor:
    from PIL.Image import Resampling

    def change(image: Any) -> Any:
        small = image.resize([max(1, int(side * share)) for side in image.size], Resampling.BOX)
        return small.resize(image.size, Resampling.NEAREST)

    return _as_images(x, change)


@kind((80, 65, 58, 50, 40), (25, 18, 15, 10, 7))
def jpeg_compression(x: Tensor, draw: Generator, quality: int) -> Tensor:
    from PIL import Image

    def change(image: Any) -> Any:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality)
        return Image.open(file)

    return _as_images(x, change)


@kind(((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)), ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2)))
def saturate(x: Tensor, draw: Generator, times: float, more: float) -> Tensor:
    """The saturation of hue, saturation and value; what is grey turns red."""
    value = x.amax(1, keepdim=True)
    spread = value - x.amin(1, keepdim=True)
    saturation = spread / value.clamp_min(1e-12)
    wanted = (saturation * times + more).clamp(0, 1)
    red = value * torch.cat((torch.zeros_like(wanted), wanted, wanted), 1)
    return value - torch.where(saturation > 0, (value - x) * wanted / saturation.clamp_min(1e-12), red)
