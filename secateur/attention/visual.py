"""Attention in which visual tokens take part less: only near ones, only in some heads.

Letters in shapes: B rows, H heads, G heads of keys, N queries, M keys, n tokens of pictures.
YOPO, https://arxiv.org/abs/2410.06169. Spec: yopo.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from secateur.attention.reach import Between, Given, may_read
from secateur.utils.screen import Screen


def neighbours(row: Tensor, column: Tensor, picture: Tensor, window: int) -> Tensor:
    """bool [..., n, n]: which tokens lie at most (window - 1) / 2 rows and columns apart on the grid of one picture.

    >>> place = torch.arange(9)
    >>> near = neighbours(place // 3, place % 3, torch.zeros(9), 3)
    >>> near[0].nonzero()[:, 0].tolist(), near[4].sum().item()
    ([0, 1, 3, 4], 9)

    row, column, picture: [..., n].
    """
    reach = (window - 1) // 2
    apart = ((x[..., :, None] - x[..., None, :]).abs() for x in (row, column))
    same = picture[..., :, None] == picture[..., None, :]
    return torch.stack([distance <= reach for distance in apart]).all(0) & same


@dataclass(frozen=True, repr=False)
class Asked(Screen):
    """One call of the library's attention: q [B, H, N, d], k and v [B, G, M, d]; may: bool, may be read, spreads to [B, H, N, M].

    causal: a query may read what stands before it and nothing else, which is computed without a mask, in half of the time.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    may: Tensor
    scale: float | None
    causal: bool = False


class Instead(Between):
    """Hands every `scaled_dot_product_attention` to `answer`. `masks`: those that were read, which layers share."""

    def __init__(self, answer: Callable[[Asked], Tensor], masks: dict[Any, tuple[Any, Tensor]]):
        super().__init__()
        self.answer, self.masks = answer, masks

    def attention(self, given: Given) -> Tensor:
        given.check()
        query, key, value, mask = given.query, given.key, given.value, given.attn_mask
        sizes = (query.shape[2], key.shape[2], given.is_causal)
        name = sizes if mask is None else id(mask)
        if name not in self.masks:
            self.masks[name] = mask, as_bool(mask, *sizes, query.device)
        causal = mask is None and given.is_causal
        return self.answer(Asked(query, key, value, self.masks[name][1], given.scale, causal))


def as_bool(
    mask: Tensor | None, queries: int, keys: int, causal: bool, device: torch.device | str = "cpu"
) -> Tensor:
    """bool [.., N, M]: what an attention mask lets be read.

    >>> as_bool(None, 2, 2, causal=True).tolist()
    [[[[True, False], [True, True]]]]

    Raises `SecateurError` for one that adds anything else than a large negative number.
    """
    if mask is not None:
        return may_read(mask, "leave window and heads out")
    whole = torch.ones(1, 1, queries, keys, dtype=torch.bool, device=device)
    return whole.tril() if causal else whole


def attend(asked: Asked) -> Tensor:
    """Plain attention."""
    same = asked.q.shape[1] == asked.k.shape[1]
    return F.scaled_dot_product_attention(
        asked.q,
        asked.k,
        asked.v,
        attn_mask=None if asked.causal else asked.may,
        is_causal=asked.causal,
        scale=asked.scale,
        **({} if same else {"enable_gqa": True}),
    )


def of_heads(asked: Asked, heads: list[int]) -> Asked:
    """The same for some of its heads; each has a head of keys of its own."""
    index = torch.tensor(heads, device=asked.q.device)
    group = asked.q.shape[1] // asked.k.shape[1]
    may = asked.may[:, index] if asked.may.shape[1] > 1 else asked.may
    shared = torch.div(index, group, rounding_mode="floor")
    return Asked(asked.q[:, index], asked.k[:, shared], asked.v[:, shared], may, asked.scale, asked.causal)


@dataclass(frozen=True, repr=False)
class Bands(Screen):
    """G groups of visual queries that see few keys: the rows of each picture's grid; and all other queries."""

    row: Tensor
    """[G] of the batch."""
    queries: Tensor
    """[G, Q] slots, -1 padding."""
    keys: Tensor
    """[G, K] slots of all keys that any of them may see, -1 padding."""
    rest: Tensor
    """[B, T] slots of the other queries, -1 padding."""


def banded(asked: Asked, bands: Bands) -> Tensor:
    """Plain attention [B, H, N, d] whose mask lets each group read its keys alone, which are all that is computed."""
    rows = torch.arange(len(asked.q), device=asked.q.device)
    parts = [(bands.row, bands.queries, bands.keys)]
    parts.append((rows, bands.rest, torch.arange(asked.k.shape[2], device=rows.device).expand(len(rows), -1)))
    length = asked.q.shape[2]
    out = None
    for row, queries, keys in parts:
        at, of, own = queries.clamp(min=0), keys.clamp(min=0), row[:, None]
        may = asked.may[:, 0].expand(len(rows), length, -1)[row[:, None, None], at[:, :, None], of[:, None]]
        # padding reads anything, since a row that reads nothing has no gradient
        may = (may & (keys >= 0)[:, None] | (queries < 0)[:, :, None])[:, None]
        q, k, v = (
            x.transpose(1, 2)[own, slots].transpose(1, 2)
            for x, slots in ((asked.q, at), (asked.k, of), (asked.v, of))
        )
        found = attend(Asked(q, k, v, may, asked.scale)).transpose(1, 2)[queries >= 0]  # [slots, H, d]
        if out is None:
            out = found.new_zeros(len(rows) * length, *found.shape[1:])
        out = out.index_copy(0, (own * length + queries)[queries >= 0], found)
    assert out is not None
    return out.unflatten(0, (len(rows), length)).transpose(1, 2)


def excused(
    asked: Asked,
    visual: Tensor,
    keys: Tensor,
    pruned: list[int],
    silent: bool,
    text: Tensor | None = None,
    bands: Bands | None = None,
) -> Tensor:
    """Attention [B, H, N, d] in which the heads `pruned` do no visual work.

    visual: bool [B, N], keys: bool [B, M]. Visual keys weigh nothing after the softmax, which isn't normalised again.
    silent: visual queries are given nothing. text: int64 [B, T] slots of all other queries, -1 padding: those alone are computed.
    bands: what the mask lets the other heads read, where it isn't much.
    """
    kept = [head for head in range(asked.q.shape[1]) if head not in pruned]
    heads = of_heads(asked, pruned)
    # what has no value adds nothing to the sum, and stays in the denominator
    value = heads.v.masked_fill(keys[:, None, :, None], 0)
    if silent and text is not None:
        at = text.clamp(min=0)
        wide = heads.may.expand(len(at), *heads.may.shape[1:3], -1).expand(-1, -1, heads.q.shape[2], -1)
        rows = Asked(
            heads.q.gather(2, at[:, None, :, None].expand(-1, len(pruned), -1, heads.q.shape[3])),
            heads.k,
            value,
            wide.gather(2, at[:, None, :, None].expand(-1, wide.shape[1], -1, wide.shape[3])),
            heads.scale,
        )
        own = attend(rows).transpose(1, 2)[text >= 0]  # [rows, heads, d]
        length = heads.q.shape[2]
        flat = (torch.arange(len(text), device=text.device)[:, None] * length + text)[text >= 0]
        out = own.new_zeros(len(text) * length, *own.shape[1:]).index_copy(0, flat, own)
        out = out.unflatten(0, (len(text), length)).transpose(1, 2)
    else:
        out = attend(Asked(heads.q, heads.k, value, heads.may, heads.scale, heads.causal))
        if silent:
            out = out.masked_fill(visual[:, None, :, None], 0)
    if not kept:
        return out
    others = of_heads(asked, kept)
    both = torch.cat([attend(others) if bands is None else banded(others, bands), out], 1)
    order = torch.tensor(kept + pruned, device=both.device).argsort()
    return both[:, order]
