"""How many pictures a classifier gets right."""

from __future__ import annotations

import torch
from torch import Tensor, nn


@torch.no_grad()
def predictions(model: nn.Module, pictures: Tensor, batch: int = 100) -> Tensor:
    """[N] int64: the likeliest class of each picture. The model's modes come back."""
    first, modes = next(model.parameters()), {module: module.training for module in model.modules()}
    try:
        model.eval()
        return torch.cat(
            [model(x.to(first.device, first.dtype)).argmax(-1).cpu() for x in pictures.split(batch)]
        )
    finally:
        for module, mode in modes.items():
            module.training = mode


def accuracy(model: nn.Module, pictures: Tensor, labels: Tensor, batch: int = 100) -> float:
    """The share of pictures whose likeliest class is the label.

    >>> accuracy(load_network("resnet20"), *load_pictures("cifar10"))  # doctest: +SKIP
    0.9173
    """
    return (predictions(model, pictures, batch) == labels).double().mean().item()
