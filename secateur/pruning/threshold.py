"""How much can leave before a model breaks: the cliff, found by bisection."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from secateur.errors import SecateurError
from secateur.graph.parts import resolve_parts
from secateur.pruning.prune import prune_with


@dataclass(frozen=True)
class Threshold:
    """removed: the largest share that may leave. quality: there. dense: of the whole model. slope: quality lost for each share
    that leaves beyond it, over one step. tried: quality by share removed."""

    removed: float
    quality: float
    dense: float
    slope: float
    tried: dict[float, float]


def threshold(
    model: nn.Module,
    quality: Callable[[nn.Module], float],
    *,
    method: str = "sd-prune",
    part: str | None = None,
    tolerance: float = 0.05,
    step: float = 0.025,
    **settings: Any,
) -> Threshold:
    """The largest share of the weights, in whole steps, without which the quality is within a tolerance of the dense model's.

    >>> secateur.threshold(model, task.quality, part="text_encoder", tolerance=0.02).removed  # doctest: +SKIP
    0.475

    quality: higher is better; it must be a function of the model alone (seed what it draws). part: as a target names it;
    None: the whole model. tolerance: how much less than the dense model's quality is well, absolutely. settings: what
    `prune` takes. The quality is taken to fall with the share, so that log2(1 / step) models are judged.

    Raises `SecateurError` for a step or a tolerance that makes no sense, a part that there isn't, and where two dense runs
    differ by more than the tolerance.
    """
    if not (0 < step < 1 and tolerance >= 0):
        raise SecateurError(
            f"step {step}, tolerance {tolerance}", where="threshold", fix="0 < step < 1, 0 or more"
        )
    if part and isinstance(model, nn.Module):
        resolve_parts(model, [part])  # before anything is judged
    dense, again = (float(quality(model)) for _ in range(2))
    if not abs(dense - again) <= tolerance or math.isnan(dense):
        raise SecateurError(
            f"the quality of the same model is {dense:.4g} and then {again:.4g}",
            where="threshold",
            fix="seed what it draws, or a larger tolerance",
        )
    tried = {0.0: dense}

    def at(count: int) -> float:
        removed = round(count * step, 12)
        if removed not in tried:
            share = f"{(1 - removed) * 100:.10g}%"
            target = f"{part}={share}" if part else share
            tried[removed] = float(quality(prune_with(model, method=method, target=target, **settings).model))
        return tried[removed]

    low, high = 0, math.ceil(1 / step - 1e-9)  # nothing is left at the end, which isn't tried
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if at(middle) >= dense - tolerance else (low, middle)
    beyond = at(high) if high * step < 1 - 1e-9 else math.nan
    removed = round(low * step, 12)
    return Threshold(
        removed, tried[removed], dense, (tried[removed] - beyond) / step, dict(sorted(tried.items()))
    )
