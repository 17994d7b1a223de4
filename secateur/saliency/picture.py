"""Pictures in and out: a file as a network wants it, and a map in colour over it."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from secateur.errors import SecateurError
from secateur.utils.files import atomic_write_bytes
from secateur.utils.pictures import open_picture

WARM = (
    (0.0, (30, 15, 60)),
    (0.3, (130, 35, 110)),
    (0.6, (230, 90, 55)),
    (0.85, (252, 180, 50)),
    (1.0, (252, 250, 165)),
)
COLD = ((0.0, (20, 30, 70)), (0.4, (40, 90, 170)), (0.75, (80, 165, 220)), (1.0, (205, 240, 255)))


def read_picture(
    path: str | Path, size: Sequence[int], mean: Sequence[float], std: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """(float32 [3, height, width], normalised, uint8 [height, width, 3]): the shorter side resized, the centre cut out.

    >>> x, pixels = read_picture("cat.jpg", (224, 224), (0.5,) * 3, (0.5,) * 3)  # doctest: +SKIP

    Raises `SecateurError` where there is no picture, or Pillow isn't installed.
    """
    image_module, image = _pillow(), open_picture(path)
    height, width = size
    factor = max(height / image.height, width / image.width)
    if factor != 1:
        sides = max(width, round(image.width * factor)), max(height, round(image.height * factor))
        image = image.resize(sides, image_module.Resampling.BICUBIC)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    pixels = torch.from_numpy(np.array(image.crop((left, top, left + width, top + height))))
    x = pixels.permute(2, 0, 1).float() / 255
    return (x - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None], pixels


def overlay(values: Tensor, image: Tensor) -> Tensor:
    """uint8 [H, W, 3]: the picture in grey, what is salient in colour over it: warm, or, where negative, cold.

    values: [H, W]. image: [3 or 1, H, W], [1, C, H, W] or uint8 [H, W, 3]; floats in any range.
    """
    pixels = _as_pixels(image)
    if pixels.shape[:2] != values.shape:
        raise SecateurError(
            f"the map is {tuple(values.shape)}, the picture {tuple(pixels.shape[:2])}",
            where="overlay",
            fix="give the same picture",
        )
    v = values.detach().float().cpu()
    if (v < 0).any():
        strength = v.abs() / _top(v.abs())
    else:
        strength = (v - v.min()) / _top(v - v.min())
    strength = strength.clamp(0, 1)
    colour = torch.where((v < 0)[..., None], _colours(strength, COLD), _colours(strength, WARM))
    grey = (pixels.float() @ torch.tensor([0.299, 0.587, 0.114]))[..., None].expand(-1, -1, 3)
    share = (0.15 + 0.75 * strength)[..., None]
    return (grey * (1 - share) + colour * share).round().clamp(0, 255).to(torch.uint8)


def save_png(pixels: Tensor, path: str | Path) -> None:
    """uint8 [H, W, 3] as a PNG, written beside and renamed."""
    image_module = _pillow()
    data = io.BytesIO()
    image_module.fromarray(pixels.numpy()).save(data, format="PNG", optimize=True)
    atomic_write_bytes(Path(path).expanduser(), data.getvalue())


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise SecateurError("Pillow isn't installed", where="picture", fix="pip install pillow") from error
    return Image


def _top(v: Tensor) -> Tensor:
    """What counts as the strongest: all but the last thousandth, so that single pixels don't hide the rest."""
    sample = v.flatten()[:: max(1, v.numel() // 1_000_000)]
    top = sample.quantile(0.999)
    return (top if top > 0 else v.max()).clamp_min(torch.finfo(torch.float32).tiny)


def _colours(strength: Tensor, scale: Sequence[tuple[float, tuple[int, int, int]]]) -> Tensor:
    at, colours = [s for s, _ in scale], np.array([c for _, c in scale], np.float32)
    flat = strength.flatten().numpy()
    bands = [np.interp(flat, at, colours[:, band]) for band in range(3)]
    return torch.from_numpy(np.stack(bands, -1)).float().reshape(*strength.shape, 3)


def _as_pixels(image: Tensor) -> Tensor:
    if image.dtype == torch.uint8 and image.dim() == 3 and image.shape[-1] == 3:
        return image.cpu()
    x = image.detach().float().cpu()
    x = x[0] if x.dim() == 4 else x
    if x.dim() != 3 or x.shape[0] not in (1, 3):
        raise SecateurError(f"{tuple(image.shape)} is no picture", where="overlay", fix="give [3, H, W]")
    x = x - x.min()
    x = x / x.max().clamp_min(1e-12)
    return (x.expand(3, -1, -1).permute(1, 2, 0) * 255).round().to(torch.uint8)
