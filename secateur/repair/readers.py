"""Which matrices of a block read one input, and sums over its tokens: of a pruned run, and of the dense one beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from secateur.graph.blocks import Matrix
from secateur.stats.record import Stop
from secateur.stats.stream import Given

Rows = Callable[[Matrix, Tensor], Tensor]
"""The rows [parts, tokens, in] that a matrix multiplies, of what its layer is given."""
LAYERS = ("linear", "conv1d", "conv")
"""Kinds of matrix whose layer is given one input a call; experts aren't."""


def reading_order(block: nn.Module, given: Given, modules: Mapping[str, nn.Module]) -> list[list[str]]:
    """The names of modules in the order in which the block calls them, those that are given one tensor together.

    >>> reading_order(block, call, {"q": q_proj, "k": k_proj, "o": o_proj})  # doctest: +SKIP
    [['q', 'k'], ['o']]

    What isn't called, or more than once, is left out.
    """
    seen: list[tuple[str, Tensor, int]] = []

    def hook(name: str) -> Callable[..., None]:
        def see(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            x = _input(args, kwargs)
            seen.append((name, x, x._version))

        return see

    handles = [m.register_forward_pre_hook(hook(n), with_kwargs=True) for n, m in modules.items()]
    try:
        block(*given[0], **given[1])
    finally:
        for handle in handles:
            handle.remove()
    names = [name for name, _, _ in seen]
    groups: list[tuple[Tensor, int, list[str]]] = []
    for name, x, version in seen:
        if names.count(name) > 1:
            continue
        together = next((own for other, v, own in groups if other is x and v == version), None)
        if together is None:
            groups.append((x, version, together := []))
        together.append(name)
    return [own for _, _, own in groups]


def input_of(block: nn.Module, given: Given, module: nn.Module) -> Tensor | None:
    """What a module inside the block is given; the block runs no further. None where it doesn't come by it."""
    found: list[Tensor] = []

    def see(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        found.append(_input(args, kwargs))
        raise Stop

    handle = module.register_forward_pre_hook(see, with_kwargs=True)
    try:
        block(*given[0], **given[1])
    except Stop:
        pass
    finally:
        handle.remove()
    return found[0] if found else None


def output_of(block: nn.Module, given: Given, module: nn.Module) -> tuple[Tensor, Any] | None:
    """(what a module inside the block is given, what the block gives); None where it doesn't come by it."""
    found: list[Tensor] = []

    def see(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        found.append(_input(args, kwargs))

    handle = module.register_forward_pre_hook(see, with_kwargs=True)
    try:
        output = block(*given[0], **given[1])
    finally:
        handle.remove()
    return (found[0], output) if found else None


def beside_states(states: Tensor) -> Tensor:
    """What a token's inputs [..., in] are multiplied by, [..., 1]: one over the length of its state [..., width], so that a few
    tokens with massive states don't rule the sums.

    >>> beside_states(torch.tensor([[3.0, 4.0]]))
    tensor([[0.2000]])
    """
    return states.float().square().sum(-1, keepdim=True).clamp_min(1e-8).rsqrt()


class Moments:
    """Sums over tokens, [parts, ...]: `inner` X Xᵀ of a pruned run, `cross` D Xᵀ with what a dense run gave, `total` of X and
    `dense_total` of D; without a dense run D is X, and `cross` None.

    >>> sums = Moments(); sums.add(x, dense)  # rows [parts, tokens, in]  # doctest: +SKIP
    """

    def __init__(self) -> None:
        self.inner: Tensor | None = None
        self.cross: Tensor | None = None
        self.total: Tensor | None = None
        self.dense_total: Tensor | None = None
        self.tokens = 0

    def add(self, rows: Tensor, dense: Tensor | None = None) -> None:
        """Adds rows [parts, tokens, in] of one batch, and the dense run's of the same tokens."""
        x = rows.to(torch.promote_types(rows.dtype, torch.float32))
        parts, tokens, size = x.shape
        if self.inner is None:
            self.inner = x.new_zeros(parts, size, size)
            self.total, self.dense_total = x.new_zeros(parts, size), x.new_zeros(parts, size)
        assert self.total is not None and self.dense_total is not None
        self.inner.baddbmm_(x.transpose(1, 2), x)
        self.total += x.sum(1)
        self.dense_total += (x if dense is None else dense.to(x)).sum(1)
        self.tokens += tokens
        if dense is not None:
            if self.cross is None:
                self.cross = torch.zeros_like(self.inner)
            self.cross.baddbmm_(dense.to(x).transpose(1, 2), x)


def _input(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else next(iter(kwargs.values()))
