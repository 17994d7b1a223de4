"""How far apart two trainings of the same (sub)network end: distance, angle, and the error on the line between them.

Frankle, Dziugaite, Roy, Carbin 2019, "Stabilizing the Lottery Ticket Hypothesis", arXiv 1903.01611 (distance, angle);
2020, "Linear Mode Connectivity and the Lottery Ticket Hypothesis", arXiv 1912.05671 (error barrier).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from secateur.errors import SecateurError


def distance(first: Mapping[str, Tensor], second: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> float:
    """|m * W - m * W'|_2 over the tensors that have a mask; what a mask removed doesn't count.

    >>> m = {"w": torch.tensor([1, 0, 1, 1]).bool()}
    >>> distance({"w": torch.tensor([1, 2, -3, 0.5])}, {"w": torch.tensor([1.5, 9, -1, 0.5])}, m)
    2.0615528128088303
    """
    a, b = _masked(first, masks), _masked(second, masks)
    return (a - b).norm().item()


def angle(first: Mapping[str, Tensor], second: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> float:
    """The angle between m * W and m * W', in degrees (float64, the cosine clamped to -1..1); NaN where one is zero.

    >>> m = {"w": torch.tensor([1, 0, 1, 1]).bool()}
    >>> round(angle({"w": torch.tensor([1, 2, -3, 0.5])}, {"w": torch.tensor([1.5, 9, -1, 0.5])}, m), 6)
    37.529041
    """
    a, b = _masked(first, masks), _masked(second, masks)
    norms = a.norm() * b.norm()
    if not norms:
        return math.nan
    if torch.equal(a, b):
        return 0.0
    return math.degrees(math.acos(max(-1.0, min(1.0, (a.dot(b) / norms).item()))))


@torch.no_grad()
def interpolate(
    model: nn.Module, first: Mapping[str, Tensor], second: Mapping[str, Tensor], at: float
) -> None:
    """The model's parameters and float buffers become (1 - at) * first + at * second; other buffers `second`'s."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        a, b = first[name], second[name]
        tensor.copy_(torch.lerp(a.double(), b.double(), at) if tensor.is_floating_point() else b)


def barrier(
    model: nn.Module,
    first: Mapping[str, Tensor],
    second: Mapping[str, Tensor],
    error: Callable[[nn.Module], float],
    points: int = 11,
    prepare: Callable[[nn.Module], object] | None = None,
) -> tuple[float, list[float]]:
    """(the error barrier on the line from one set of weights to another, the error at each point).

    >>> barrier(net, run_a, run_b, error=lambda net: 1 - accuracy(net, x, y))[0]  # doctest: +SKIP

    The barrier is max over the line of error(W_t) minus the mean of the errors at both ends; near 0: the two runs lie in
    one linearly connected basin. prepare: run before each error, such as a new estimate of BatchNorm's statistics,
    which are otherwise interpolated too. The model is left unchanged.

    Raises `SecateurError` for fewer than 3 points.
    """
    if points < 3:
        raise SecateurError(f"{points} points", where="barrier", fix="give 3 or more, such as 11")
    working = copy.deepcopy(model)
    errors = []
    for i in range(points):
        interpolate(working, first, second, i / (points - 1))
        if prepare is not None:
            prepare(working)
        errors.append(float(error(working)))
    return max(errors) - (errors[0] + errors[-1]) / 2, errors


def _masked(weights: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> Tensor:
    return torch.cat(
        [(weights[n].detach() * m.to(weights[n].device)).flatten().double() for n, m in masks.items()]
    )
