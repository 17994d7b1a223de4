"""Handwritten digits that scikit-learn carries: real pictures for a machine without any data."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from secateur.errors import SecateurError

MEAN, STD = 4.88, 6.02
SPLITS = {"train": slice(0, 1200), "val": slice(1200, 1400), "test": slice(1400, 1797)}


def load_digits(split: str = "test", limit: int | None = None) -> tuple[Tensor, Tensor]:
    """(pictures, labels): float32 [N, 1, 8, 8], 0..16 brought to mean 0 and deviation 1, and int64 [N].

    >>> x, y = load_digits("train")
    >>> x.shape
    torch.Size([1200, 1, 8, 8])

    The 1,797 pictures of the UCI set (Alpaydin, Kaynak 1998) in a seeded order: train 1,200, val 200, test 397.

    Raises `SecateurError` for another split, and without scikit-learn.
    """
    if split not in SPLITS:
        raise SecateurError(f"there is no split {split!r}", where="digits", fix=", ".join(SPLITS))
    pictures, labels = _read()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[SPLITS[split]][:limit]
    x = (torch.from_numpy(pictures).float()[:, None] - MEAN) / STD
    return x[order], torch.from_numpy(labels).long()[order]


@functools.cache
def _read() -> tuple[np.ndarray, np.ndarray]:
    try:
        from sklearn import datasets
    except ImportError as error:
        raise SecateurError(
            "the digits come with scikit-learn, which isn't installed",
            where="digits",
            fix="pip install 'secateur[digits]'",
        ) from error
    found = datasets.load_digits()
    return found.images, found.target
