"""Static caches between layers: buffers of a fixed size, so that all steps after the prompt have the same shapes and can be compiled.

A buffer holds a layer's tokens in the order in which they arrived, so what a step must know is the column of each arrival:
a table that is made once, after the prompt. No step reads a number off a tensor, which would break a compiled graph.
Shapes: B rows, C places of the table, q tokens of this forward.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from secateur.errors import SecateurError
from secateur.tokens.shorten import additive


@dataclass(eq=False)
class Arrivals:
    """The tokens of the layers from one stage to the next, in order of arrival."""

    columns: Tensor
    """[B, C] the column that each had at first; behind the prompt they follow one by one, also beyond the table."""
    valid: Tensor
    """[B, C] bool; False is padding of the prompt."""
    gone: Tensor
    """[B] how many tokens of the row have left in all."""
    identity: bool
    """Nothing has left."""


@dataclass(eq=False)
class Buffers:
    """Kept on a static cache."""

    seen: int
    """Columns of the prompt."""
    arrivals: dict[int, Arrivals] = field(default_factory=dict)
    """By the layer of the stage each begins at."""
    sizes: dict[int, int] = field(default_factory=dict)
    """Places that layers had before their buffers became shorter."""


@dataclass(eq=False)
class Step:
    """One forward after the prompt."""

    buffers: Buffers
    given: Tensor | None
    """[B, columns] the mask as given; None: all are there."""
    memo: dict[Any, Any] = field(default_factory=dict)
    """Masks and rotary tables, which layers share."""

    def stage(self, number: int) -> int | None:
        """The stage before a layer; None where nothing has left."""
        before = [k for k in self.buffers.arrivals if k <= number]
        stage = max(before) if before else None
        return None if stage is None or self.buffers.arrivals[stage].identity else stage


def is_static(cache: Any) -> bool:
    """Whether all layers of a cache have buffers of a fixed size.

    >>> is_static(None)
    False
    """
    from transformers.cache_utils import StaticLayer

    layers: Any = getattr(cache, "layers", None)
    return layers is not None and len(layers) > 0 and all(isinstance(layer, StaticLayer) for layer in layers)


def buffers_of(cache: Any) -> Buffers | None:
    """What the prompt left on a static cache; a cache that was reset since then forgets it."""
    held = getattr(cache, "_secateur_layers", None)
    if not isinstance(held, Buffers):
        return None
    # not while compiling, where `visible` does without
    if not torch.compiler.is_compiling() and not int(cache.get_seq_length()):
        for number, size in held.sizes.items():
            _resize(cache.layers[number], size)
        del cache._secateur_layers
        return None
    return held


def _resize(layer: Any, size: int) -> None:
    """A layer's buffer is made when it first runs; one that was made at another size is made again."""
    layer.max_cache_len = size
    if layer.is_initialized and layer.keys.shape[-2] != size:
        layer.keys = layer.values = None
        layer.is_initialized = False


def hold(
    cache: Any, layers: range, seen: int, columns: Tensor, valid: Tensor, gone: Tensor, identity: bool
) -> None:
    """After the stage before `layers`: what later steps must know, and shorter buffers.

    `columns` and `valid` [B, n] of the tokens that are left of `seen`.
    """
    held = getattr(cache, "_secateur_layers", None)
    if not isinstance(held, Buffers):
        held = cache._secateur_layers = Buffers(seen)
    rows, count = columns.shape
    for number in layers:
        layer = cache.layers[number]
        if not layer.is_sliding:
            size = held.sizes.setdefault(number, layer.max_cache_len)
            _resize(layer, size - (seen - count))
    more = max(int(cache.get_max_length()) - count, 1)
    columns = torch.cat([columns, (seen + torch.arange(more, device=columns.device)).expand(rows, -1)], 1)
    valid = torch.cat([valid, valid.new_ones(rows, more)], 1)
    held.arrivals[layers.start] = Arrivals(columns, valid, gone, identity)


def padded(mask: Tensor, cache: Any) -> Tensor:
    """A 2-D mask that grows from step to step -> one of a size that stays: what is behind its end comes later."""
    size = max(int(cache.get_max_length()), -(-mask.shape[1] // 256) * 256)
    return torch.nn.functional.pad(mask, (0, size - mask.shape[1]))


def left(step: Step, stage: int, layer: Any) -> Tensor:
    """[B, 1] how many tokens have left before those of this forward. `layer` is the cache's."""
    return (step.buffers.arrivals[stage].gone * (layer.get_seq_length() != 0))[:, None]


def visible(
    step: Step, stage: int, layer: Any, queries: int, window: int | None, eager: torch.dtype | None
) -> Tensor:
    """The mask [B, 1, q, keys] of a layer; additive where `eager` has a dtype. `layer` is the cache's."""
    arrivals, given = step.buffers.arrivals[stage], step.given
    table, there = arrivals.columns, arrivals.valid
    if given is not None and given.shape[1] <= step.buffers.seen:
        raise SecateurError(
            f"a mask of {given.shape[1]} columns came after a prompt of {step.buffers.seen}",
            where="layer drop",
            fix="give the mask of the whole conversation",
        )
    # a compiled step can't ask whether the cache was reset, so the answer stays a tensor (sliding layers have a number)
    empty, last = layer.get_seq_length() == 0, table.shape[1] - 1
    table = table + (torch.arange(last + 1, device=table.device) - table) * empty
    there = there | empty

    def column(arrival: Tensor) -> Tensor:
        return table[:, arrival.clamp(max=last)] + (arrival - last).clamp(min=0)

    length, offset = layer.get_mask_sizes(queries)
    arrival = torch.arange(length, device=table.device) + offset
    mine = torch.arange(queries, device=table.device) + layer.get_seq_length()
    keys, own = column(arrival), column(mine)
    there = there[:, arrival.clamp(max=last)]
    if given is not None:
        end = given.shape[1] - 1
        there = there & given.bool().gather(1, keys.clamp(max=end)) & (keys <= end)
    keys, own = keys[:, None, None, :], own[:, None, :, None]
    mask = (keys <= own) & there[:, None, None, :]
    if window is not None:
        mask = mask & (keys > own - window)
    # padding sees itself: a row that sees nothing would be NaN
    mask = mask | (keys == own)
    return mask if eager is None else additive(mask, eager)
