"""Pictures with labels: CIFAR-10 and a sample of ImageNet."""

from __future__ import annotations

import functools
import io
import itertools
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from secateur.errors import SecateurError, choose
from secateur.utils.files import require_data
from secateur.utils.screen import Screen

SETS = ("cifar10", "imagenet-sample")
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
TRAIN = tuple(f"train_{i}" for i in range(4))
HALF = (0.5, 0.5, 0.5)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def load_pictures(name: str, limit: int | None = None, split: str = "test") -> tuple[Tensor, Tensor]:
    """(pictures, labels): float32 [N, 3, height, width], normalised as the networks want them, and int64 [N].

    >>> x, y = load_pictures("cifar10", 1000, split="train")  # doctest: +SKIP

    `cifar10`: [N, 3, 32, 32]; split test (10,000), train (35,000) or val (the other 5,000 of the 40,000 training pictures
    that are there; published networks were trained on them). `imagenet-sample`: [N, 3, 224, 224], the centre of 500
    pictures, one for each even class; split test or train are its halves (every other picture), all both.
    limit: at most so many, from the start; the pictures of CIFAR-10 are shuffled.

    Raises `SecateurError` for another name or split, and missing data.
    """
    choose(name, SETS, error="no pictures have this name", where=name)
    known = ("test", "train", "val") if name == "cifar10" else ("test", "train", "all")
    if split not in known:
        raise SecateurError(f"there is no split {split!r}", where=name, fix=", ".join(known))
    if name == "cifar10":
        pixels, labels = _cifar(split, limit)
        return normalise(pixels, IMAGENET_MEAN, IMAGENET_STD), labels
    pixels, labels = _imagenet(require_data("imagenet_sample/part_a.tar"), split, limit)
    return normalise(pixels, HALF, HALF), labels


@dataclass(repr=False)
class Pictures(Screen):
    """Pictures as they can be looked at and changed, and how a network wants them.

    >>> shown = Pictures.of(load_pictures("cifar10", 8), IMAGENET_MEAN, IMAGENET_STD, CIFAR10)  # doctest: +SKIP
    >>> shown.ready(shown.pixels)  # what load_pictures gave  # doctest: +SKIP
    """

    pixels: Tensor
    """float32 [N, C, H, W] in 0..1"""
    labels: Tensor
    """int64 [N]"""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    """of each channel, of pixels in 0..1"""
    names: tuple[str, ...] = ()
    """of the classes, where they have some"""

    @classmethod
    def of(
        cls,
        data: tuple[Tensor, Tensor],
        mean: Sequence[float],
        std: Sequence[float],
        names: Sequence[str] = (),
        limit: int | None = None,
    ) -> Pictures:
        """From normalised pictures [N, C, H, W] with their labels, at most so many."""
        x, labels = (part[:limit] for part in data)
        m, s = (torch.tensor(tuple(v))[:, None, None] for v in (mean, std))
        return cls((x * s + m).clamp(0, 1), labels, tuple(mean), tuple(std), tuple(names))

    def ready(self, pixels: Tensor) -> Tensor:
        """Pixels in 0..1 as the network wants them."""
        m, s = (torch.tensor(v)[:, None, None] for v in (self.mean, self.std))
        return (pixels - m) / s


def normalise(pixels: np.ndarray, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """uint8 [N, height, width, 3] -> float32 [N, 3, height, width], (x / 255 - mean) / std.

    >>> normalise(np.full((1, 1, 1, 3), 255, np.uint8), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)).flatten()
    tensor([1., 1., 1.])
    """
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().float().div_(255)
    return x.sub_(torch.tensor(mean)[:, None, None]).div_(torch.tensor(std)[:, None, None])


def as_pairs(data: tuple[Tensor, Tensor], batch: int = 16) -> list[tuple[Tensor, Tensor]]:
    """(pictures, labels) in batches, as `prune` takes them.

    >>> [len(x) for x, y in as_pairs((torch.zeros(5, 3), torch.zeros(5)), 2)]
    [2, 2, 1]
    """
    return list(zip(*(part.split(batch) for part in data)))


@functools.cache
def _decoded(file: Path) -> tuple[np.ndarray, np.ndarray]:
    from PIL import Image

    with np.load(file) as archive:
        offsets, strips = archive["offsets"], archive["strips"].tobytes()
        pictures = [
            np.asarray(Image.open(io.BytesIO(strips[a:b])).convert("RGB")).reshape(-1, 32, 32, 3)
            for a, b in itertools.pairwise(offsets)
        ]
        return np.concatenate(pictures), archive["labels"]


def _cifar(split: str, limit: int | None) -> tuple[np.ndarray, Tensor]:
    """uint8 [N, 32, 32, 3] and int64 [N]; files that the limit doesn't reach aren't read."""
    shards, first, count = {"test": ("test",), "val": ("train_3",)}.get(split, TRAIN), 0, 35_000
    if split == "val":
        first, count = 5_000, 5_000
    count = count if limit is None else min(count, limit)
    parts = []
    for shard in shards[: -(-(first + count) // 10_000)]:
        parts.append(_decoded(require_data(f"cifar10/{shard}.npz")))
    pictures, labels = (np.concatenate(p)[first : first + count] for p in zip(*parts))
    return pictures, torch.from_numpy(labels.astype(np.int64))


def _imagenet(file: Path, split: str, limit: int | None) -> tuple[np.ndarray, Tensor]:
    from PIL import Image

    first, step = {"train": (0, 2), "test": (1, 2), "all": (0, 1)}[split]
    pictures, labels = [], []
    with tarfile.open(file) as archive:
        for member in archive.getmembers()[first::step][:limit]:
            data = archive.extractfile(member)
            assert data is not None
            image = Image.open(io.BytesIO(data.read())).convert("RGB")
            pictures.append(np.asarray(image.crop((16, 16, 240, 240))))
            labels.append(int(member.name[:3]))
    return np.stack(pictures), torch.tensor(labels)
