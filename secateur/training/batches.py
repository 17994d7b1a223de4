"""Batches in a seeded order, and the checks of what is trained on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from secateur.errors import SecateurError
from secateur.utils.inputs import map_tensors
from secateur.utils.random import seed_of

Augment = Callable[[Any, torch.Generator], Any]
"""A batch (on the model's device) and a seeded CPU generator -> the batch, changed."""


class Draw:
    """Batches in a seeded order: `draw(step)` depends on the seed and the step alone, so a resumed run needs no more.

    An epoch takes each sample once; a batch may reach over the end of an epoch.
    """

    def __init__(self, data: Any, batch: int, seed: int):
        self.ready = isinstance(data, list)
        self.data, self.seed = data, seed
        self.batch = 1 if self.ready else batch
        self.count = length(data)
        self._orders: dict[int, Tensor] = {}

    @property
    def fingerprint(self) -> str:
        return digest([self.count, self.batch, _describe(self.data)])

    def order(self, epoch: int) -> Tensor:
        if epoch not in self._orders:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._orders = {
                **{e: o for e, o in self._orders.items() if e == epoch - 1},
                epoch: torch.randperm(self.count, generator=generator),
            }
        return self._orders[epoch]

    def indices(self, step: int) -> Tensor:
        """int64 [batch]: which samples a step sees."""
        first, last = step * self.batch, (step + 1) * self.batch
        return torch.cat(
            [
                self.order(epoch)[max(first - epoch * self.count, 0) : last - epoch * self.count]
                for epoch in range(first // self.count, (last - 1) // self.count + 1)
            ]
        )

    def __call__(self, step: int) -> Any:
        rows = self.indices(step)
        return self.data[int(rows[0])] if self.ready else take(self.data, rows)


def step_seed(seed: int, step: int, rank: int = 0) -> int:
    """What torch's random state is set to before a step: what is drawn depends on nothing that came before."""
    return seed_of(seed, step, rank)


def check_classes(labels: Tensor, classes: int) -> None:
    """Refuse labels outside 0..classes-1, and a class without a sample."""
    counts = torch.bincount(labels[(labels >= 0) & (labels < classes)].flatten().cpu(), minlength=classes)
    if int(counts.sum()) < labels.numel():
        raise SecateurError(
            f"labels reach from {int(labels.min())} to {int(labels.max())} in {classes} classes",
            where="data",
            fix=f"use labels 0..{classes - 1}",
        )
    if empty := (counts == 0).nonzero().flatten().tolist():
        raise SecateurError(
            f"there is no sample of class {', '.join(map(str, empty[:8]))}",
            where="data",
            fix="give samples of every class, or a model with fewer classes",
        )


def length(data: Any) -> int:
    """How many samples (or ready batches) there are; refuses none, and tensors of different lengths."""
    lengths: set[int] = {len(data)} if isinstance(data, list) else set()
    if not lengths:
        map_tensors(data, lambda tensor: lengths.add(tensor.shape[0] if tensor.ndim else 0))
    if len(lengths) != 1 or 0 in lengths:
        raise SecateurError(
            "there are no samples" if lengths <= {0} else f"its tensors hold {sorted(lengths)} samples",
            where="data",
            fix="token ids [samples, length], a tuple or dict of tensors of equal length, or a list of batches",
        )
    return lengths.pop()


def part_of(data: Any, share: float, generator: torch.Generator) -> Any:
    """A share of the samples (or ready batches), drawn once: one at least; all of them, as they are, where it is 1.

    >>> len(part_of(torch.arange(100), 0.03, torch.Generator()))
    3
    """
    if share >= 1:
        return data
    count = length(data)
    return take(
        data, torch.randperm(count, generator=generator)[: max(1, round(share * count))].sort().values
    )


def take(data: Any, rows: Tensor) -> Any:
    """These samples (or ready batches), int64 [rows]."""
    if isinstance(data, list):
        return [data[row] for row in rows.tolist()]
    return map_tensors(data, lambda tensor: tensor[rows.to(tensor.device)])


def _describe(data: Any) -> Any:
    return map_tensors(data, lambda t: [list(t.shape), str(t.dtype), t.sum(dtype=torch.float64).item()])


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]
