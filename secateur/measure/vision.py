"""How well networks see: pictures and pixels named rightly, and the signal-to-noise ratio of enlarged pictures."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from secateur.data.super_resolution import to_luma
from secateur.utils.running import evaluating


@torch.no_grad()
def predictions(model: nn.Module, pictures: Tensor, batch: int = 100) -> Tensor:
    """[N] int64: the likeliest class of each picture. The model's modes come back."""
    first = next(model.parameters())
    with evaluating(model):
        return torch.cat(
            [model(x.to(first.device, first.dtype)).argmax(-1).cpu() for x in pictures.split(batch)]
        )


def accuracy(model: nn.Module, pictures: Tensor, labels: Tensor, batch: int = 100) -> float:
    """The share of pictures whose likeliest class is the label.

    >>> accuracy(load_network("resnet20"), *load_pictures("cifar10"))  # doctest: +SKIP
    0.9173
    """
    return (predictions(model, pictures, batch) == labels).double().mean().item()


@torch.no_grad()
def psnr(model: nn.Module, pairs: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Mean peak signal-to-noise ratio in dB of what `model` makes of small pictures, on luma.

    >>> psnr(load_model("vdsr")[0], load_pairs("set5", 2, luma=True, enlarged=True))  # doctest: +SKIP
    37.56

    pairs: (small, large) [1, channels, h, w], as the model reads and writes them. The protocol of the literature: RGB is
    rounded to 8 bits and brought to ITU-R BT.601 luma, `scale` pixels are cut off at each border, the peak is 255.
    model: with the attributes `scale`, `luma` and `peak` (see families.super_resolution).
    """
    scale, peak = int(model.scale), float(model.peak)  # type: ignore[arg-type]
    first, values = next(model.parameters()), []
    with evaluating(model):
        for small, large in pairs:
            made = model(small.to(first.device, first.dtype)).double() * (255 / peak)
            wanted = large.to(first.device).double() * (255 / peak)
            made = made.clamp(0, 255)
            if not model.luma:
                made, wanted = to_luma(made.round()), to_luma(wanted)
            error = (made - wanted)[..., scale:-scale, scale:-scale].square().mean()
            values.append((10 * torch.log10(255**2 / error)).item())
    return sum(values) / len(values)


@torch.no_grad()
def segmentation(
    model: nn.Module, pictures: Tensor, labels: Tensor, classes: int, batch: int = 1
) -> dict[str, float]:
    """{"miou", "acc"}: intersection over union, averaged over the classes that occur, and the share of pixels named rightly.

    >>> segmentation(load_model("espnet")[0], *load_camvid(), 11)["miou"]  # doctest: +SKIP
    0.553

    labels int64 [N, h, w] in 0..classes-1; other pixels don't count. A pixel that a model puts into a class beyond these
    is wrong.
    """
    first = next(model.parameters())
    table = torch.zeros(classes, classes + 1, dtype=torch.int64)
    with evaluating(model):
        for x, y in zip(pictures.split(batch), labels.split(batch)):
            guess = model(x.to(first.device, first.dtype)).argmax(1).clamp_max(classes)
            y = y.to(guess.device)
            known = (y >= 0) & (y < classes)
            pairs = y[known] * (classes + 1) + guess[known]
            table += torch.bincount(pairs, minlength=table.numel()).view_as(table).cpu()
    hits, wanted = table.diagonal().double(), table.sum(1)
    union = wanted + table[:, :classes].sum(0) - hits
    occurs = wanted > 0
    return {
        "miou": (hits[occurs] / union[occurs]).mean().item(),
        "acc": (hits.sum() / table.sum()).item(),
    }
