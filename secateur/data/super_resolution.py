"""Pairs of small and large pictures: Set5 to judge by, Set14 to train on."""

from __future__ import annotations

import functools
import io
import tarfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from secateur.errors import SecateurError, choose
from secateur.utils.files import require_data

SETS = ("set5", "set14")
HELD_OUT = 2
"""Pictures of Set14, the last, that aren't trained on."""


def load_pairs(
    name: str, scale: int, luma: bool = False, peak: float = 1.0, enlarged: bool = False
) -> list[tuple[Tensor, Tensor]]:
    """(small, large) of each picture, float32 [1, channels, h, w] and [1, channels, scale * h, scale * w].

    >>> small, large = load_pairs("set5", 2)[0]  # doctest: +SKIP

    name: `set5` (5 pictures, with their own small versions), `set14` (14, reduced bicubically by Pillow, 47 dB and more
    from the stored ones). scale: 2, 3 or 4. luma: brightness alone (BT.601, 16..235 scale). peak: the value of 255.
    enlarged: the small picture comes bicubically enlarged (by Pillow, in RGB) to the size of the large one.

    Raises `SecateurError` for another name or scale, and missing data.
    """
    return [prepare(*pair, luma, peak, enlarged) for pair in pixels(name, scale)]


def patches(
    name: str,
    scale: int,
    luma: bool = False,
    peak: float = 1.0,
    enlarged: bool = False,
    *,
    size: int = 64,
    limit: int | None = None,
    held_out: int = HELD_OUT,
) -> tuple[Tensor, Tensor]:
    """Squares to train on, (small, large), from all but the last `held_out` pictures of a set.

    >>> x, y = patches("set14", 2)  # doctest: +SKIP
    >>> x.shape[1:], y.shape[1:]  # doctest: +SKIP
    (torch.Size([3, 32, 32]), torch.Size([3, 64, 64]))

    size: side of the large square, rounded down to a multiple of the scale; squares lie on a grid of half their size, in
    a seeded order. limit: at most so many. As `load_pairs` otherwise.
    """
    side = size // scale
    small: list[Tensor] = []
    large: list[Tensor] = []
    pairs = load_pairs(name, scale, luma, peak, enlarged)
    for pair in pairs[: len(pairs) - held_out]:
        for kept, picture in zip((small, large), pair):
            times = 1 if picture is pair[0] and not enlarged else scale
            width, step = side * times, side // 2 * times
            cut = picture[0].unfold(1, width, step).unfold(2, width, step)
            kept.append(cut.permute(1, 2, 0, 3, 4).flatten(0, 1))
    x, y = torch.cat(small), torch.cat(large)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:limit]
    return x[order], y[order]


def prepare(
    small: np.ndarray, large: np.ndarray, luma: bool, peak: float, enlarged: bool
) -> tuple[Tensor, Tensor]:
    """uint8 [h, w, 3] pictures as a network reads and should write them, float32 [1, channels, h, w]."""
    if enlarged:
        from PIL import Image

        size = (large.shape[1], large.shape[0])
        small = np.asarray(Image.fromarray(small).resize(size, Image.Resampling.BICUBIC))
    first, second = (torch.from_numpy(a.copy()).permute(2, 0, 1)[None].float() for a in (small, large))
    if luma:
        first, second = to_luma(first), to_luma(second)
    return first * (peak / 255), second * (peak / 255)


def to_luma(rgb: Tensor) -> Tensor:
    """RGB [N, 3, h, w] in 0..255 -> Y [N, 1, h, w] in 16..235 (ITU-R BT.601).

    >>> to_luma(torch.full((1, 3, 1, 1), 255.0)).item()
    235.0
    """
    weights = torch.tensor([65.481, 128.553, 24.966], dtype=torch.float64, device=rgb.device) / 255
    return (16 + torch.einsum("nchw,c->nhw", rgb.double(), weights))[:, None].to(rgb.dtype)


def pixels(name: str, scale: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """uint8 [h, w, 3] pairs of a set."""
    choose(name, SETS, error="no set of pairs has this name", where=name)
    if scale not in (2, 3, 4):
        raise SecateurError(f"there is no scale {scale}", where=name, fix="2, 3 or 4")
    return _pixels(require_data("super_resolution/set5_set14.tar"), name, scale)


@functools.cache
def _pixels(file: Path, name: str, scale: int) -> list[tuple[np.ndarray, np.ndarray]]:
    from PIL import Image

    folder = f"Set5/x{scale}/" if name == "set5" else "Set14/x4/"
    pairs = []
    with tarfile.open(file) as archive:

        def picture(member: str) -> Image.Image:
            data = archive.extractfile(member)
            assert data is not None
            return Image.open(io.BytesIO(data.read())).convert("RGB")

        for member in archive.getnames():
            if not (member.startswith(folder) and member.endswith("_HR.webp")):
                continue
            large = picture(member)
            if name == "set5":
                small = picture(member.replace("_HR", "_LR"))
            else:
                width, height = (side // scale for side in large.size)
                large = large.crop((0, 0, width * scale, height * scale))
                small = large.resize((width, height), Image.Resampling.BICUBIC)
            pairs.append((np.asarray(small), np.asarray(large)))
    return pairs
