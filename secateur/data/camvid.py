"""Street scenes with a label for every pixel: 30 pictures of CamVid's test split."""

from __future__ import annotations

import functools
import io
import tarfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from secateur.errors import SecateurError
from secateur.utils.files import require_data

CLASSES = (
    "sky",
    "building",
    "pole",
    "road",
    "pavement",
    "tree",
    "sign",
    "fence",
    "car",
    "pedestrian",
    "cyclist",
)
IGNORED = -100
"""The label of pixels that nobody labelled: what torch's cross-entropy leaves out."""
MEAN, STD = (110.5, 109.1, 106.1), (77.6, 78.6, 78.3)
"""Of BGR, in 0..255."""
SPLITS = {"train": slice(0, 15), "val": slice(15, 20), "test": slice(20, 30), "all": slice(0, 30)}


def load_camvid(split: str = "all", limit: int | None = None) -> tuple[Tensor, Tensor]:
    """(pictures, labels): float32 [N, 3, 360, 480] BGR, (x - mean) / std / 255, and int64 [N, 360, 480].

    >>> x, y = load_camvid("test")  # doctest: +SKIP

    There are 30 pictures, all of the published test split, in the order of their file names. `all` are these: what a
    network that was trained elsewhere is judged by. To train here, `train` (15), `val` (5) and `test` (10) part them.
    Labels 0..10 as in CLASSES, IGNORED where there is none.

    Raises `SecateurError` for another split and missing data.
    """
    if split not in SPLITS:
        raise SecateurError(f"there is no split {split!r}", where="camvid", fix=", ".join(SPLITS))
    pictures, labels = _decoded(require_data("camvid/camvid_test_subset.tar"))
    chosen = slice(SPLITS[split].start, SPLITS[split].stop)
    x = torch.from_numpy(pictures[chosen][:limit]).float()
    x = x.sub_(torch.tensor(MEAN)).div_(torch.tensor(STD) * 255).permute(0, 3, 1, 2).contiguous()
    y = torch.from_numpy(labels[chosen][:limit].astype(np.int64))
    return x, y.masked_fill_(y >= len(CLASSES), IGNORED)


@functools.cache
def _decoded(file: Path) -> tuple[np.ndarray, np.ndarray]:
    from PIL import Image

    pictures, labels = [], []
    with tarfile.open(file) as archive:

        def read(member: str) -> Image.Image:
            data = archive.extractfile(member)
            assert data is not None
            return Image.open(io.BytesIO(data.read()))

        for member in sorted(n for n in archive.getnames() if n.startswith("images/")):
            name = Path(member).stem
            pictures.append(np.asarray(read(member).convert("RGB"))[:, :, ::-1])
            labels.append(np.asarray(read(f"labels/{name}.png")))
    return np.stack(pictures), np.stack(labels)
