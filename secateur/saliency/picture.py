"""Pictures in and out: a file as a network wants it, and a map in colour over it."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
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
SMALL, STRIP = 320, 256
"""Pixels of the longer side below which a picture is enlarged, and rows that are coloured at once."""
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


def window(sides: Sequence[int], size: Sequence[int]) -> tuple[int, int, int, int]:
    """(top, left, height, width), in a picture's own pixels, of what `read_picture` takes of it for a network of `size`.

    >>> window((600, 800), (224, 224))
    (0, 100, 600, 600)
    """
    factor = max(size[0] / sides[0], size[1] / sides[1])
    height, width = (min(side, round(wanted / factor)) for side, wanted in zip(sides, size, strict=True))
    return (sides[0] - height) // 2, (sides[1] - width) // 2, height, width


def draw_map(
    values: Tensor, picture: Tensor, at: Sequence[int] | None = None, lines: Sequence[str] = ()
) -> Tensor:
    """The picture and the map over it, side by side at the picture's own size, with a scale of colours: uint8 [h, w, 3].

    >>> draw_map(torch.eye(8), torch.zeros(300, 400, 3, dtype=torch.uint8), lines=["cat, 93 %"]).shape
    torch.Size([349, 940, 3])

    values: [H, W], signed or not. picture: uint8 [H, W, 3] of any size; one whose longer side is below 320 pixels is enlarged
    by a whole number. at: `window`; the map lies there, and what the network did not see is dark. lines: above it.
    """
    times = -(-SMALL // max(picture.shape[:2])) if max(picture.shape[:2]) < SMALL else 1
    picture = picture.repeat_interleave(times, 0).repeat_interleave(times, 1)
    tall, wide = picture.shape[:2]
    top, left, height, width = (times * side for side in at) if at else (0, 0, tall, wide)
    strength = _signed_strength(values)
    fine = F.interpolate(strength[None, None], size=(height, width), mode="bilinear", align_corners=False)[
        0, 0
    ]
    drawn = _greyed(picture).mul(0.35).round().to(torch.uint8)
    inside = drawn[top : top + height, left : left + width]
    for start in range(0, height, STRIP):  # a photograph is large
        rows = picture[top + start : top + min(height, start + STRIP), left : left + width]
        inside[start : start + STRIP] = _coloured(fine[start : start + STRIP], rows)
    return _laid_out([picture, drawn], bool((strength < 0).any()), lines)


def _laid_out(panels: Sequence[Tensor], signed: bool, lines: Sequence[str]) -> Tensor:
    """Panels of one size side by side on white, lines of text above, the scale of colours on the right."""
    image_module = _pillow()
    from PIL import ImageDraw

    tall, wide = panels[0].shape[:2]
    letters = font(size := max(14, min(tall, wide) // 28))
    gap, line = size, round(1.5 * size)
    words = ("for it", "0", "against it") if signed else ("most", "", "least")
    edge = gap + line * len(lines)
    right = len(panels) * (wide + gap) + gap
    needed = max([round(letters.getlength(text)) + 2 * gap for text in lines], default=0)
    canvas = torch.full((edge + tall + gap, max(needed, right + 7 * size), 3), 255, dtype=torch.uint8)
    for place, panel in enumerate(panels):
        canvas[edge : edge + tall, gap + place * (wide + gap) :][:, :wide] = panel
    scale = torch.linspace(1, -1 if signed else 0, tall)[:, None].expand(-1, size)
    canvas[edge : edge + tall, right : right + size] = _coloured(
        scale, torch.full((tall, size, 3), 127, dtype=torch.uint8)
    )
    image = image_module.fromarray(canvas.numpy())
    pen = ImageDraw.Draw(image)
    for place, text in enumerate(lines):
        pen.text((gap, gap // 2 + place * line), text, fill=(0, 0, 0), font=letters)
    for text, y in zip(words, (0, (tall - size) // 2, tall - round(1.2 * size)), strict=True):
        pen.text((right + round(1.4 * size), edge + y), text, fill=(0, 0, 0), font=letters)
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(canvas.shape)


def font(size: int) -> Any:
    """Pillow's own letters; those of one size where it has no others."""
    from PIL import ImageFont

    try:
        return ImageFont.load_default(size)
    except TypeError:  # before Pillow 10.1
        return ImageFont.load_default()


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
    return _coloured(_signed_strength(values), pixels)


def _signed_strength(values: Tensor) -> Tensor:
    """[H, W] from 0 to 1, or from -1 to 1 where values have both signs."""
    v = values.detach().float().cpu()
    if (v < 0).any():
        return (v / _top(v.abs())).clamp(-1, 1)
    return ((v - v.min()) / _top(v - v.min())).clamp(0, 1)


def _coloured(strength: Tensor, pixels: Tensor) -> Tensor:
    """The picture in grey, and over it the colours of strengths [H, W] in -1..1: uint8 [H, W, 3]."""
    size = strength.abs()
    colour = torch.where((strength < 0)[..., None], _colours(size, COLD), _colours(size, WARM))
    share = (0.15 + 0.75 * size)[..., None]
    return (_greyed(pixels) * (1 - share) + colour * share).round().clamp(0, 255).to(torch.uint8)


def _greyed(pixels: Tensor) -> Tensor:
    return (pixels.float() @ torch.tensor([0.299, 0.587, 0.114]))[..., None].expand(-1, -1, 3)


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
