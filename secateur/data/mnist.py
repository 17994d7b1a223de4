"""Handwritten digits of MNIST: 8,000 of the test pictures (LeCun, Cortes and Burges 1998)."""

from __future__ import annotations

import gzip

import numpy as np
import torch
from torch import Tensor

from secateur.errors import SecateurError
from secateur.utils.files import require_data

SIZES = {"train": (0, 7_000), "test": (7_000, 8_000), "all": (0, 8_000)}


def load_mnist(split: str = "all", limit: int | None = None) -> tuple[Tensor, Tensor]:
    """(pictures, labels): float32 [N, 1, 28, 28] in 0..1, ink is bright, and int64 [N].

    >>> load_mnist("test")[0].shape  # doctest: +SKIP
    torch.Size([1000, 1, 28, 28])

    Raises `SecateurError` for another split, and missing or damaged data.
    """
    if split not in SIZES:
        raise SecateurError(f"there is no split {split!r}", where="mnist", fix=", ".join(SIZES))
    start, stop = SIZES[split]
    if limit is not None:
        stop = min(stop, start + limit)
    pixels, labels = _idx("images-idx3-ubyte.gz", 2051), _idx("labels-idx1-ubyte.gz", 2049)
    x = torch.from_numpy(pixels[start:stop].copy()).float().div_(255)
    return x[:, None], torch.from_numpy(labels[start:stop].copy()).long()


def _idx(name: str, magic: int) -> np.ndarray:
    """An IDX file of bytes: magic number, sizes, values."""
    path = require_data(f"mnist/{name}")
    content = gzip.decompress(path.read_bytes())
    dims = magic % 256
    head = np.frombuffer(content[: 4 + 4 * dims], ">u4")
    if len(head) != 1 + dims or head[0] != magic or int(np.prod(head[1:])) != len(content) - 4 - 4 * dims:
        raise SecateurError("it isn't an IDX file, or is cut short", where=str(path), fix="fetch it again")
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dims).reshape(head[1:].astype(int))
