"""Where a model calls the library's attention, and what its mask says.

`scaled_dot_product_attention` is watched while a module runs, so that one way serves transformers, timm and diffusers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from secateur.errors import SecateurError
from secateur.utils.screen import Screen


@dataclass(frozen=True, repr=False)
class Call(Screen):
    """One self-attention: q [B, H, N, d], k and v [B, G, M, d]; real bool [B, M] or None; causal; scale."""

    q: Tensor
    k: Tensor
    v: Tensor
    real: Tensor | None
    causal: bool
    scale: float | None


def unpadded(call: Call) -> Iterator[tuple[Tensor, slice, Call]]:
    """A padded batch as its rows are alone, those of one length together: (which rows, their queries, the call)."""
    assert call.real is not None
    spans: dict[tuple[int, int], list[int]] = {}
    for row, real in enumerate(call.real):
        at = real.nonzero().flatten().tolist()
        if at:
            spans.setdefault((at[0], at[-1] + 1), []).append(row)
    ahead = call.k.shape[2] - call.q.shape[2]
    for (start, stop), found in spans.items():
        rows, own = torch.tensor(found, device=call.q.device), slice(max(start - ahead, 0), stop - ahead)
        if own.stop <= own.start:
            continue
        keys, values, real = (
            call.k[rows, :, start:stop],
            call.v[rows, :, start:stop],
            call.real[rows, start:stop],
        )
        holes = None if bool(real.all()) else real
        yield rows, own, Call(call.q[rows, :, own], keys, values, holes, call.causal, call.scale)


def dense(call: Call) -> Tensor:
    """Every key that a query may read, read."""
    queries, keys = call.q.shape[2], call.k.shape[2]
    may = torch.ones(queries, keys, dtype=torch.bool, device=call.q.device)
    mask = may.tril(keys - queries) if call.causal else may
    if call.real is not None:
        mask = mask & call.real[:, None, None]
    return F.scaled_dot_product_attention(
        call.q, call.k, call.v, attn_mask=mask, scale=call.scale, enable_gqa=True
    )


Answer = Callable[[Call], "Tensor | None"]
"""What a call gives instead; None: as it was."""


@dataclass(frozen=True, repr=False)
class Given(Screen):
    """The arguments of `scaled_dot_product_attention`."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False

    def check(self) -> None:
        """Raises `SecateurError` for dropout."""
        if self.dropout_p:
            raise SecateurError(
                f"attention drops {self.dropout_p:g} of its weights at random",
                where="attention",
                fix="model.eval()",
            )


class Between(TorchFunctionMode):
    """Stands between a module and the library's attention, and counts its calls. Write `attention`."""

    calls = 0

    def attention(self, given: Given) -> Tensor | None:
        """What a call gives instead; None: as it was."""
        return None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        self.calls += 1
        found = self.attention(Given(*args, **(kwargs or {})))
        return func(*args, **(kwargs or {})) if found is None else found


class Watch(Between):
    """Hands every self-attention over more than one query to `answer`; all else runs as it was.

    groups: how many heads share one of keys, as `groups_of` finds it. One query of grouped heads may come as that many queries
    of one head (transformers 5.24, while it writes); where that can't be told from so many tokens, it runs as it was.
    """

    def __init__(self, answer: Answer, groups: Collection[int] = ()):
        super().__init__()
        self.answer, self.groups = answer, groups
        self._read: dict[tuple[int, int, int], tuple[Tensor, tuple[Tensor | None, bool]]] = {}
        """Masks that were read in this run, by identity and what was read: layers share them."""

    def attention(self, given: Given) -> Tensor | None:
        query, key, value, mask = given.query, given.key, given.value, given.attn_mask
        if query.dim() != 4 or query.shape[2] == 1 or self._grouped(given):
            return None
        given.check()
        queries, keys = query.shape[2], key.shape[2]
        if mask is None:
            if queries != keys:
                return None  # attention across: other keys than its own
            real, causal = None, given.is_causal
        else:
            name = id(mask), queries, keys
            if name not in self._read:
                self._read[name] = mask, read_mask(mask, queries, keys)
            real, causal = self._read[name][1]
            if not causal and queries != keys:
                return None
        if real is not None:
            if queries < keys:
                held = int(real.any(0).nonzero()[-1]) + 1  # a static cache is longer than what it holds
                key, value, real = key[:, :, :held], value[:, :, :held], real[:, :held]
            real = None if bool(real.all()) else real.expand(len(query), -1)
        return self.answer(Call(query, key, value, real, causal, given.scale))

    def _grouped(self, given: Given) -> bool:
        """It may be one query: as many as a group has heads, and no mask that tells one of them from another."""
        mask = given.attn_mask
        alike = (
            not given.is_causal
            if mask is None
            else mask.dim() == 4 and (mask.shape[1] > 1 or mask.shape[2] == 1)
        )
        return alike and given.query.shape[2] in self.groups


def groups_of(module: nn.Module) -> set[int]:
    """How many heads share one of keys, in each attention of a model of transformers."""
    return {int(getattr(part, "num_key_value_groups", 1)) for part in module.modules()}


def may_read(mask: Tensor, fix: str) -> Tensor:
    """bool of a mask's shape: what may be read. Raises `SecateurError` where it adds anything else than a large negative number."""
    if mask.dtype == torch.bool:
        return mask
    may = mask == 0
    if bool((mask[~may] > -1e4).any()):
        raise SecateurError("its mask adds a bias to the logits", where="attention", fix=fix)
    return may


def read_mask(mask: Tensor, queries: int, keys: int) -> tuple[Tensor | None, bool]:
    """(which keys are real, bool [B, keys]; whether a query sees only keys up to its own place).

    >>> read_mask(torch.ones(3, 3, dtype=torch.bool).tril(), 3, 3)
    (tensor([[True, True, True]]), True)

    mask: bool, or float that is 0 or a large negative number, [.., queries, keys]. Rows of queries that are padding may hold anything.
    Raises `SecateurError` for one that is anything else: a bias, a window, blocks.
    """
    may = may_read(mask, "leave this module out: part=")
    may = may.expand(*[1] * (4 - may.dim()), *may.shape[:-2], queries, keys) if may.dim() < 4 else may
    if may.shape[1] > 1 and not bool((may == may[:, :1]).all()):
        raise SecateurError(
            "its mask isn't the same for all heads", where="attention", fix="leave this module out: part="
        )
    may = may[:, 0].expand(-1, queries, keys)
    places = torch.arange(keys, device=mask.device)
    for real in (may[:, -1], may.any(1)):
        padded = queries == keys or not bool(real.any())
        held = keys if padded else int(real.any(0).nonzero()[-1]) + 1
        own = held - queries + torch.arange(queries, device=mask.device)
        asks = real[:, own] if held >= queries else torch.ones_like(may[..., 0])
        for causal in (True, False):
            wanted = real[:, None] & (places <= own[:, None]) if causal else real[:, None].expand_as(may)
            if bool(asks.any(1).all()) and bool(((may == wanted).all(-1) | ~asks).all()):
                return real, causal
    raise SecateurError(
        "its mask is neither causal nor whole: windows and blocks of their own aren't known",
        where="attention",
        fix="leave this module out: part=",
    )
