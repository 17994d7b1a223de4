"""Photographs with the object that people pick out: 250 pictures of ECSSD with their masks.

Shi et al. 2016, "Hierarchical Image Saliency Detection on Extended CSSD".
"""

from __future__ import annotations

import functools
import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from secateur.errors import SecateurError
from secateur.utils.files import require_data

TRAINED = 200
"""Pictures to train on; the other 50 are to be judged by."""
SPLITS = ("train", "test", "all")


def load_ecssd(
    split: str = "all", limit: int | None = None, seed: int = 0
) -> tuple[list[Tensor], list[Tensor]]:
    """(pictures, masks) at their own sizes: uint8 [3, height, width] and bool [height, width] each.

    >>> pictures, masks = load_ecssd("test")  # doctest: +SKIP
    >>> pictures[0].shape, masks[0].shape  # doctest: +SKIP
    (torch.Size([3, 300, 400]), torch.Size([300, 400]))

    split: `train` (200), `test` (the other 50) or all, in the order of their names. seed: draws which are which. limit: at
    most so many, from the start. Raises `SecateurError` for another split and missing data.
    """
    if split not in SPLITS:
        raise SecateurError(f"there is no split {split!r}", where="ecssd", fix=", ".join(SPLITS))
    pictures, masks = _decoded(require_data("ecssd/ecssd_part_a.tar"))
    order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(seed))
    part = {"train": order[:TRAINED], "test": order[TRAINED:], "all": order}[split].sort().values[:limit]
    return [pictures[i] for i in part], [masks[i] for i in part]


def at_size(
    pictures: Sequence[Tensor], masks: Sequence[Tensor], size: int | tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """(float32 [N, 3, h, w] in 0..1, bool [N, h, w]): squeezed to one size; a mask's pixel is what covers half of it.

    >>> x, y = at_size([torch.zeros(3, 4, 6, dtype=torch.uint8)], [torch.ones(4, 6, dtype=torch.bool)], 2)
    >>> x.shape, y.shape
    (torch.Size([1, 3, 2, 2]), torch.Size([1, 2, 2]))
    """
    wanted = (size, size) if isinstance(size, int) else size
    x = [
        F.interpolate(p[None].float() / 255, wanted, mode="bilinear", antialias=True)[0].clamp(0, 1)
        for p in pictures
    ]
    y = [F.interpolate(m[None, None].float(), wanted, mode="area")[0, 0] >= 0.5 for m in masks]
    return torch.stack(x), torch.stack(y)


@functools.cache
def _decoded(file: Path) -> tuple[list[Tensor], list[Tensor]]:
    from PIL import Image

    pictures, masks = [], []
    with tarfile.open(file) as archive:

        def read(member: str, mode: str) -> Tensor:
            data = archive.extractfile(member)
            assert data is not None
            return torch.from_numpy(np.array(Image.open(io.BytesIO(data.read())).convert(mode)))

        for name in sorted(Path(n).stem for n in archive.getnames() if n.startswith("images/")):
            pictures.append(read(f"images/{name}.jpg", "RGB").permute(2, 0, 1).contiguous())
            masks.append(read(f"masks/{name}.png", "L") >= 128)
    return pictures, masks
