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
from torch.overrides import TorchFunctionMode

from secateur.errors import SecateurError
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
    """One call of the library's attention: q [B, H, N, d], k and v [B, G, M, d]; may: bool, may be read, spreads to [B, H, N, M]."""

    q: Tensor
    k: Tensor
    v: Tensor
    may: Tensor
    scale: float | None


class Instead(TorchFunctionMode):
    """Hands every `scaled_dot_product_attention` to `answer`."""

    def __init__(self, answer: Callable[[Asked], Tensor]):
        super().__init__()
        self.answer = answer
        self.calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        self.calls += 1
        return self._attention(*args, **(kwargs or {}))

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if dropout_p:
            raise SecateurError(
                f"attention drops {dropout_p:g} of its weights at random",
                where="attention",
                fix="model.eval()",
            )
        may = as_bool(attn_mask, query.shape[2], key.shape[2], is_causal, query.device)
        return self.answer(Asked(query, key, value, may, scale))


def as_bool(
    mask: Tensor | None, queries: int, keys: int, causal: bool, device: torch.device | str = "cpu"
) -> Tensor:
    """bool [.., N, M]: what an attention mask lets be read.

    >>> as_bool(None, 2, 2, causal=True).tolist()
    [[[[True, False], [True, True]]]]

    Raises `SecateurError` for one that adds anything else than a large negative number.
    """
    if mask is None:
        whole = torch.ones(1, 1, queries, keys, dtype=torch.bool, device=device)
        return whole.tril() if causal else whole
    if mask.dtype == torch.bool:
        return mask
    may = mask == 0
    if bool((mask[~may] > -1e4).any()):
        raise SecateurError(
            "its mask adds a bias to the logits", where="attention", fix="leave window and heads out"
        )
    return may


def attend(asked: Asked, may: Tensor | None = None) -> Tensor:
    """Plain attention; `may` in place of its own mask."""
    same = asked.q.shape[1] == asked.k.shape[1]
    return F.scaled_dot_product_attention(
        asked.q,
        asked.k,
        asked.v,
        attn_mask=asked.may if may is None else may,
        scale=asked.scale,
        **({} if same else {"enable_gqa": True}),
    )


def of_heads(asked: Asked, heads: list[int]) -> Asked:
    """The same for some of its heads; each has a head of keys of its own."""
    index = torch.tensor(heads, device=asked.q.device)
    group = asked.q.shape[1] // asked.k.shape[1]
    may = asked.may[:, index] if asked.may.shape[1] > 1 else asked.may
    shared = torch.div(index, group, rounding_mode="floor")
    return Asked(asked.q[:, index], asked.k[:, shared], asked.v[:, shared], may, asked.scale)


def excused(
    asked: Asked, visual: Tensor, keys: Tensor, pruned: list[int], silent: bool, text: Tensor | None = None
) -> Tensor:
    """Attention [B, H, N, d] in which the heads `pruned` do no visual work.

    visual: bool [B, N], keys: bool [B, M]. Visual keys weigh nothing after the softmax, which isn't normalised again.
    silent: visual queries are given nothing. text: int64 [B, T] slots of all other queries, -1 padding: those alone are computed.
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
        out = attend(Asked(heads.q, heads.k, value, heads.may, heads.scale))
        if silent:
            out = out.masked_fill(visual[:, None, :, None], 0)
    if not kept:
        return out
    both = torch.cat([attend(of_heads(asked, kept)), out], 1)
    order = torch.tensor(kept + pruned, device=both.device).argsort()
    return both[:, order]
