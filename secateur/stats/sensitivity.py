"""How much the loss of the whole model hangs on each matrix: by random steps and forwards alone, or by gradients.

ECoFLaP, arXiv 2310.02998 (spec: ecoflap, stage 1); the step is that of MeZO, arXiv 2305.17333.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.graph.blocks import Matrix
from secateur.stats.collect import Loss, collect, default_loss
from secateur.utils.batches import as_batches
from secateur.utils.inputs import map_tensors
from secateur.utils.random import seeded
from secateur.utils.running import device_of, evaluating


@dataclass(frozen=True)
class Sensitivity:
    """scores: by parameter name, 0 or more. swallowed: the share of weights that a step left as they were, since their
    dtype is too coarse for it."""

    scores: dict[str, float]
    swallowed: float


@torch.no_grad()
def zeroth_order(
    model: nn.Module,
    batches: Any,
    matrices: Mapping[str, Matrix],
    *,
    loss: Loss | None = None,
    epsilon: float = 1e-3,
    noises: int = 1,
    batch_size: int | None = 8,
    seed: int = 0,
    progress: Callable[..., Iterable] | None = None,
) -> Sensitivity:
    """|L(w + eps z) - L(w - eps z)| / 2 eps of each matrix, summed over batches and draws of z ~ N(0, 1).

    >>> zeroth_order(model, ids, find_matrices(model)).scores["model.layers.0.mlp.up_proj.weight"]  # doctest: +SKIP
    0.31

    Two forwards for each matrix, batch and draw; no gradients. Steps are made in the weights' own dtype and taken back to
    the bit, whatever happens. loss: (model, batch) -> scalar; None: as for `collect`.

    Raises `SecateurError` where the loss isn't finite, or where half of the steps or more are swallowed by the dtype.
    """
    if not (epsilon > 0 and noises >= 1):
        raise SecateurError(
            f"epsilon {epsilon}, noises {noises}", where="zeroth_order", fix="above 0; 1 or more"
        )
    device = device_of(model)
    chunks = [map_tensors(batch, lambda t: t.to(device)) for batch in as_batches(batches, batch_size)]
    of_loss = loss or default_loss(model, chunks[0])
    scores, same, steps = dict.fromkeys(matrices, 0.0), 0, 0
    with evaluating(model):
        every = progress(matrices.items(), "sensitivity", len(matrices)) if progress else matrices.items()
        for name, matrix in every:
            weight = matrix.parameter
            before = weight.detach().clone()
            try:
                for number, batch in enumerate(chunks):
                    for draw in range(noises):
                        noise = _normal(weight, seed, name, number, draw)
                        losses = []
                        for sign in (1, -1):
                            weight.copy_(before + sign * epsilon * noise)
                            same += int((weight == before).sum())
                            steps += weight.numel()
                            losses.append(_value(of_loss, model, batch, name))
                        scores[name] += abs(losses[0] - losses[1]) / (2 * epsilon)
            finally:
                weight.copy_(before)
    swallowed = same / max(1, steps)
    if swallowed >= 0.5:
        raise SecateurError(
            f"steps of {epsilon:g} are lost in the rounding of {swallowed:.0%} of the weights",
            where="zeroth_order",
            fix="a larger epsilon, a model in float32, or the first order",
        )
    return Sensitivity(scores, swallowed)


def first_order(
    model: nn.Module,
    batches: Any,
    matrices: Mapping[str, Matrix],
    *,
    loss: Loss | None = None,
    batch_size: int | None = 8,
    square: bool = False,
) -> Sensitivity:
    """|w| times the mean over batches of |dL/dw|, or w^2 times that of its square, summed over each matrix.

    >>> first_order(model, ids, find_matrices(model)).scores  # doctest: +SKIP
    """
    total: dict[str, Tensor] = {}
    chunks = list(as_batches(batches, batch_size))
    for batch in chunks:
        for name, stats in collect(model, [batch], {"gradient"}, matrices, loss=loss).items():
            size = stats.gradient.square() if square else stats.gradient.abs()
            total[name] = total[name] + size if name in total else size
    found = {}
    for name, matrix in matrices.items():
        weight = matrix.weight().float()
        size = weight.square() if square else weight.abs()
        found[name] = (size * total[name] / len(chunks)).sum().item()
    return Sensitivity(found, 0.0)


def _normal(like: Tensor, *parts: object) -> Tensor:
    """Normal numbers of the weight's shape and dtype, a function of the parts alone, on any device."""
    generator = seeded(0, "sensitivity", *parts)
    return torch.randn(like.shape, generator=generator, dtype=torch.float32).to(like)


def _value(loss: Loss, model: nn.Module, batch: Any, name: str) -> float:
    value = float(loss(model, batch))
    if not math.isfinite(value):
        raise SecateurError(
            f"the loss is {value} when it is moved", where=name, fix="check the data, or a smaller epsilon"
        )
    return value
