"""Photographs of which a part is blurred, made sharp by a small U-shaped transformer of windows. PSNR over held-out squares.

There is no ReLoBlur here: the blur is drawn (`secateur.data.blurred`), and the network has a hundredth of the paper's parameters.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from secateur.data.blurred import load_blurred
from secateur.errors import SecateurError
from secateur.families.windowed import WindowedUNet
from secateur.training.losses import reconstruction
from secateur.training.recipe import Recipe
from secateur.training.task import Task
from secateur.utils.running import evaluating

TRAINED, HELD_OUT = 512, 24


def build() -> WindowedUNet:
    """Three resolutions, ten blocks, 8 channels at first."""
    return WindowedUNet(8, (2, 2, 2, 2, 2), (1, 2, 4, 4, 2))


def load_network(name: str = "windowed-unet") -> nn.Module:
    """Raises `SecateurError`: nobody published such a network."""
    raise SecateurError(
        "there is no trained network",
        where=name,
        fix="train one: secateur train-prune blur --method lmd-vit --out DIR",
    )


def loss(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    return reconstruction(model(batch[0]), batch[1])


@torch.no_grad()
def psnr(
    model: nn.Module, blurred: Tensor, sharp: Tensor, where: Tensor | None = None, batch: int = 8
) -> float:
    """Mean over the pictures, in dB; where: bool [N, h, w] of the pixels that count."""
    first = next(model.parameters())
    with evaluating(model):
        made = torch.cat([model(x.to(first.device, first.dtype)).cpu().float() for x in blurred.split(batch)])
    error = (made.clamp(0, 1) - sharp).square().mean(1)
    counts = torch.ones_like(error) if where is None else where.float()
    each = (error * counts).flatten(1).sum(1) / counts.flatten(1).sum(1)
    return float((-10 * each.clamp(min=1e-10).log10()).mean())


def task(network: str, split: str, train: int | None, test: int | None) -> Task:
    """Squares of 64 pixels to train on; of 128 to be judged by."""
    blurred, sharp, _ = load_blurred(split, test or HELD_OUT, 128)
    return Task(
        name=f"blur:{network}",
        build=build,
        train=load_blurred("train", train or TRAINED, 64),
        quality=lambda model: psnr(model, blurred, sharp),
        inputs=blurred[:1],
        metric="psnr",
        loss=loss,
        recipe=Recipe(optimizer="adamw", lr=3e-3, batch=4, warmup=0.05, precision="float32"),
        epochs=3,
    )
