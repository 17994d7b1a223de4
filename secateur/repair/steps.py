"""A few steps of an optimiser on what a block gives, masks fixed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.stats.stream import Given, states_of
from secateur.utils.random import seeded

Case = tuple[Given, Sequence[Tensor], Tensor | None]
"""A batch: what the block is given, the states [..., width] that it should give, and which tokens count (bool)."""
WARM = 0.1
"""The share of the steps in which the rate rises."""
MANY = 32
"""With fewer steps than these the rate is smaller by as much: a first step of Adam goes as far for every weight."""
JUDGED = 8
"""Batches on which the error before and after is taken."""

TOKENS = 512
"""About how many tokens a step sees: fewer make more steps of the same data, which bring more than exact ones do."""


def step_size(data: Any) -> int | None:
    """How many samples of `data` make a step; None where they come in batches already."""
    if not isinstance(data, Tensor) or not data.dim() or not len(data):
        return None
    return 4 if data.is_floating_point() else max(1, TOKENS // data[0].numel())


def fit_block(
    block: nn.Module,
    case: Callable[[int], Case],
    batches: int,
    parameters: Sequence[nn.Parameter],
    masks: Mapping[nn.Parameter, Tensor],
    *,
    passes: int,
    rate: float,
    seed: int = 0,
    name: str = "",
) -> tuple[float, float]:
    """Fits parameters of a block to the states it should give, in place; its error before and after.

    >>> before, after = fit_block(block, case, 8, [*block.parameters()], masks, passes=2, rate=0.012)  # doctest: +SKIP

    case(number): batch `number`. masks: what may not be zero of a parameter. rate: of the steps, as a share of the root mean
    square of what a parameter has left. Adam, the batches in another order each pass; a token's error is counted relative to
    what its state should be, since a few tokens with massive states would else rule. The error is that share of the square, the
    mean over the tokens of the first batches; where it hasn't fallen the parameters are as they were.

    Raises `SecateurError`, naming the block, where an error isn't finite; the parameters are then as they were.
    """
    start = [parameter.detach().clone() for parameter in parameters]
    flags = [(p, p.requires_grad) for p in block.parameters()]

    def error(number: int) -> Tensor:
        given, wanted, counts = case(number)
        value = relative_error(states_of(block(*given[0], **given[1])), wanted, counts)
        if not torch.isfinite(value):
            raise SecateurError(
                "its error isn't finite", where=name, fix="check the calibration data for NaN"
            )
        return value

    @torch.no_grad()
    def judged() -> float:
        some = range(min(batches, JUDGED))
        return sum(float(error(number)) for number in some) / len(some)

    kept = False
    before = judged()
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        for parameter in parameters:
            parameter.requires_grad_(True)
        with torch.enable_grad():
            orders = [
                torch.randperm(batches, generator=seeded(seed, "repair", name, turn))
                for turn in range(passes)
            ]
            _descend(error, torch.cat(orders).tolist(), parameters, masks, rate)
        after = judged()
        kept = after < before
    finally:
        for parameter, flag in flags:
            parameter.grad = None
            parameter.requires_grad_(flag)
        if not kept:
            with torch.no_grad():
                for parameter, value in zip(parameters, start):
                    parameter.copy_(value)
    return before, min(before, after)


def _descend(
    error: Callable[[int], Tensor],
    order: Sequence[int],
    parameters: Sequence[nn.Parameter],
    masks: Mapping[nn.Parameter, Tensor],
    rate: float,
) -> None:
    """A step of Adam for each batch in `order`; the rate rises for a tenth of them and falls to zero in a line."""
    rate *= min(1, len(order) / MANY)
    sizes = [_size(parameter, masks.get(parameter)) for parameter in parameters]
    least = min(filter(None, sizes), default=1.0)  # for biases that are zero
    rates = [rate * (size or least) for size in sizes]
    adam = torch.optim.Adam([{"params": [parameter]} for parameter in parameters], betas=(0.9, 0.95))
    for step, number in enumerate(order):
        grads = torch.autograd.grad(error(number), parameters, allow_unused=True)
        for parameter, grad in zip(parameters, grads):
            mask = masks.get(parameter)
            parameter.grad = grad if grad is None or mask is None else grad * mask
        share = min((step + 1) / (WARM * len(order)), 1 - step / len(order))
        for group, own in zip(adam.param_groups, rates):
            group["lr"] = own * share
        adam.step()


def _size(parameter: Tensor, mask: Tensor | None) -> float:
    """The root mean square of what is left of a parameter."""
    kept = parameter.detach() if mask is None else parameter.detach()[mask]
    return float(kept.float().square().mean().sqrt()) if kept.numel() else 0.0


def relative_error(found: Sequence[Tensor], wanted: Sequence[Tensor], counts: Tensor | None = None) -> Tensor:
    """The mean over tokens of ||found - wanted||² / ||wanted||², over all states [..., width].

    >>> relative_error([torch.tensor([[1.0, 1.0], [3.0, 0.0]])], [torch.tensor([[1.0, 0.0], [2.0, 0.0]])])
    tensor(0.6250)

    counts: bool [...], the tokens that are no padding.
    """
    total = wanted[0].new_zeros((), dtype=torch.float32)
    for made, should in zip(found, wanted):
        should = should.float()
        each = (made.float() - should).square().sum(-1) / should.square().sum(-1).clamp_min(1e-8)
        total = total + (each[counts] if counts is not None and counts.shape == each.shape else each).mean()
    return total / len(wanted)
