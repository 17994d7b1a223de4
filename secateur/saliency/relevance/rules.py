"""The rules themselves: relevance of an operation's inputs from that of its output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from secateur.saliency.relevance.composite import Composite


class Rule(torch.autograd.Function):
    """An operation whose backward carries relevance: `back(R, *inputs)` gives that of every input."""

    @staticmethod
    def forward(ctx: Any, value: list[Tensor], back: Callable[..., Any], *inputs: Tensor) -> Tensor:
        ctx.back = back
        ctx.save_for_backward(*inputs)
        return value.pop()

    @staticmethod
    def backward(ctx: Any, relevance: Tensor) -> Any:
        found = ctx.back(relevance, *ctx.saved_tensors)
        return (None, None, *(found if isinstance(found, tuple) else (found,)))


def stable(z: Tensor, epsilon: float) -> Tensor:
    return z + torch.where(z < 0, -epsilon, epsilon)


def share(f: Callable[[Tensor], Tensor], x: Tensor, relevance: Tensor, epsilon: float) -> Tensor:
    """Relevance of x where f is linear: x * vjp(R / f(x))."""
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        z = f(x)
        s = relevance / stable(z.detach(), epsilon)
        (c,) = torch.autograd.grad(z, x, s)
    return x.detach() * c


def through_softmax(relevance: Tensor, value: Tensor, dim: int) -> Tensor:
    """What multiplies the input of a softmax of this value to give its relevance: R - s * sum(R), a Taylor step at the input.

    Achtibat et al. 2024, https://arxiv.org/abs/2402.05602.
    """
    return relevance - value * relevance.sum(dim, keepdim=True)


def parts(
    f: Callable[..., Tensor],
    pairs: Sequence[tuple[Tensor, Tensor, Tensor | None]],
    relevance: Tensor,
    epsilon: float,
    signs: tuple[float, ...] | None = None,
) -> Tensor:
    """Relevance of the x of several (x, w, bias) whose outputs f(x, w) + bias add up, with these signs."""
    signs = signs or (1.0,) * len(pairs)
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_(True) for x, _, _ in pairs]
        outputs = [f(x, w) for x, (_, w, _) in zip(leaves, pairs)]
        total = sum(sign * z.detach() for sign, z in zip(signs, outputs))
        for _, _, bias in pairs:
            total = total if bias is None else total + bias
        s = relevance / stable(total, epsilon)  # type: ignore[arg-type]
        found = torch.autograd.grad(outputs, leaves, [s] * len(outputs))
    return sum(sign * x.detach() * c for sign, x, c in zip(signs, leaves, found))  # type: ignore[return-value]


def layer_relevance(
    rule: str,
    f: Callable[..., Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    relevance: Tensor,
    composite: Composite,
) -> Tensor:
    """Relevance of a layer's input x from that of its output f(x, weight) + bias; f is linear in both.

    >>> x, w = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    >>> layer_relevance("z+", F.linear, x, w, None, torch.ones(1, 2), Composite())
    tensor([[1.3333, 0.6667]])
    """
    if rule == "epsilon":
        return parts(f, [(x, weight, bias)], relevance, composite.epsilon)
    tiny, zeros = composite.stabiliser, torch.zeros_like(x)
    if rule == "flat":
        ones = torch.ones_like(x)
        return parts(f, [(ones, torch.ones_like(weight), None)], relevance, tiny)
    plus, minus = weight.clamp(min=0), weight.clamp(max=0)
    if rule == "box":
        low = zeros + (x.min() if composite.low is None else composite.low)
        high = zeros + (x.max() if composite.high is None else composite.high)
        pairs = [(x, weight, None), (low, plus, None), (high, minus, None)]
        return parts(f, pairs, relevance, tiny, (1.0, -1.0, -1.0))
    up, down = x.clamp(min=0), x.clamp(max=0)
    signed = bool((x < 0).any())
    more = bias.clamp(min=0) if bias is not None and composite.biases else None
    less = bias.clamp(max=0) if bias is not None and composite.biases else None

    def part(for_up: Tensor, for_down: Tensor, b: Tensor | None) -> Tensor:
        pairs = [(up, for_up, b), *([(down, for_down, None)] if signed else [])]
        return parts(f, pairs, relevance, tiny)

    positive = part(plus, minus, more)
    if rule == "z+":
        return positive
    return composite.alpha * positive - composite.beta * part(minus, plus, less)
