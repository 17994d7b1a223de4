"""Digits of which half are mirrored, for three tasks at once: which digit, mirrored or not, and how much ink there is."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.data.digits import load_digits
from secateur.training.recipe import Recipe
from secateur.utils.random import seeded
from secateur.utils.running import evaluating

RECIPE = Recipe(optimizer="adamw", lr=5e-3, batch=64, weight_decay=1e-2, warmup=0.1)


TASKS = {"digit": slice(0, 10), "mirrored": slice(10, 12), "ink": slice(12, 16)}
"""Where each task's logits are; the order is that of the targets."""
INK = (-0.07, 0.0, 0.07)
"""Mean of a picture between one amount of ink and the next: about its quartiles."""


def load_tasks(split: str = "test", limit: int | None = None) -> tuple[Tensor, Tensor]:
    """(pictures float32 [N, 1, 8, 8], targets int64 [N, 3]: which digit, mirrored or not, how much ink of four)."""
    x, digit = load_digits(split, limit)
    mirrored = torch.rand(len(x), generator=seeded(0, "mirrored", split)) < 0.5
    ink = torch.bucketize(x.mean((1, 2, 3)), torch.tensor(INK))
    x = torch.where(mirrored[:, None, None, None], x.flip(3), x)
    return x, torch.stack((digit, mirrored.long(), ink), 1)


def losses(model: nn.Module, batch: Any) -> dict[str, Tensor]:
    """The mean cross-entropy of each task over a batch (pictures, targets)."""
    x, wanted = batch
    made = model(x).float()
    return {
        name: F.cross_entropy(made[:, part], wanted[:, number])
        for number, (name, part) in enumerate(TASKS.items())
    }


def loss(model: nn.Module, batch: Any) -> Tensor:
    """The sum of the tasks' losses."""
    return torch.stack([*losses(model, batch).values()]).sum()


@torch.no_grad()
def scores(model: nn.Module, data: tuple[Tensor, Tensor]) -> dict[str, float]:
    """The accuracy of each task."""
    x, wanted = data
    with evaluating(model):
        made = model(x)
    right = [made[:, part].argmax(1) == wanted[:, number] for number, part in enumerate(TASKS.values())]
    return {name: hits.float().mean().item() for name, hits in zip(TASKS, right)}
