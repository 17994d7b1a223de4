"""Attention over pooled keys as one Triton kernel: what `pyramid.gathered` gives, without fetching the keys first.

Each program takes a block of queries of one head and walks over the pieces of keys that it reads, with a running softmax.
"""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from typing import Any

import torch
from torch import Tensor

from secateur.attention.layout import Layout
from secateur.attention.pyramid import check, packed, pieces, resolutions
from secateur.errors import SecateurError

WIDTHS = (16, 32, 64, 128, 256)
TYPES = (torch.float16, torch.bfloat16, torch.float32)


def unfit(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> str:
    """Why the kernel can't serve these; empty where it can."""
    if q.device.type != "cuda":
        return f"on {q.device.type}"
    return _unfit(q, k, v, layout)


def _unfit(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> str:
    if importlib.util.find_spec("triton") is None:
        return "triton isn't installed"
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        return "it has no gradients"
    if q.dtype not in TYPES or not q.dtype == k.dtype == v.dtype:
        return f"{q.dtype}, {k.dtype} and {v.dtype} aren't one of half, bfloat16 or float32"
    if q.shape[3] not in WIDTHS or v.shape[3] != q.shape[3]:
        return f"heads of {q.shape[3]} and {v.shape[3]} numbers aren't both one of {WIDTHS}"
    if layout.block_q not in WIDTHS:
        return f"blocks of {layout.block_q} queries aren't one of {WIDTHS}"
    return ""


def fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    levels: Tensor,
    layout: Layout,
    *,
    scale: float | None = None,
    real: Tensor | None = None,
) -> Tensor:
    """What `masked` gives, in one kernel on a CUDA device (or under TRITON_INTERPRET=1, where it is tested without one).

    Arguments as those of `masked`. Raises `SecateurError` for what `unfit` names: gradients, other types and sizes.
    """
    check(q, k, v, levels, layout)
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if reason := _unfit(q, k, v, layout) if interpreted else unfit(q, k, v, layout):
        raise SecateurError(f"the kernel can't serve this: {reason}", where="attention", fix="gathered(...)")
    parts = resolutions(k, v, levels, layout, real)
    if not parts:
        return q.new_zeros(*q.shape[:3], v.shape[3])
    piece = layout.block_k // parts[-1].level
    keys, values, counts, level, block, last = pieces(parts, layout, piece)
    wanted = (levels[..., block] == level).to(torch.int8)
    index, _ = packed(wanted)
    fill = index.shape[-1] - wanted.sum(-1)
    out = torch.empty(*q.shape[:3], v.shape[3], dtype=q.dtype, device=q.device)
    heads, groups = q.shape[1], k.shape[1]
    _kernel()[(layout.rows, len(q) * heads)](
        q.contiguous(),
        keys.contiguous(),
        values.contiguous(),
        counts.float().log().contiguous(),
        last.to(torch.int32).contiguous(),
        index.to(torch.int32).contiguous(),
        fill.to(torch.int32).contiguous(),
        out,
        layout.queries,
        layout.offset,
        len(block),
        index.shape[-1],
        (q.shape[-1] ** -0.5 if scale is None else scale),
        heads,
        groups,
        piece,
        layout.causal,
        layout.block_q,
        32 if q.shape[3] > 128 or q.dtype == torch.float32 else 64,
        q.shape[3],
    )
    return out


@cache
def _kernel() -> Any:
    import triton
    import triton.language as tl

    @triton.jit
    def attend(  # type: ignore[no-untyped-def]
        q_at, k_at, v_at, weight_at, last_at, index_at, fill_at, out_at,
        queries, offset, total, most, scale,
        heads: tl.constexpr, groups: tl.constexpr, piece: tl.constexpr, causal: tl.constexpr,
        rows: tl.constexpr, columns: tl.constexpr, width: tl.constexpr,
    ):  # fmt: skip
        row, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
        group = head // heads * groups + head % heads // (heads // groups)
        place = row * rows + tl.arange(0, rows)
        across = tl.arange(0, width)
        inside = place[:, None] < queries
        mine = head * queries * width + place[:, None] * width + across[None, :]
        q = tl.load(q_at + mine, mask=inside, other=0.0)
        listed = (head * tl.num_programs(0) + row) * most
        largest = tl.full([rows], -float("inf"), tl.float32)
        mass = tl.zeros([rows], tl.float32)
        summed = tl.zeros([rows, width], tl.float32)
        start = tl.load(fill_at + head * tl.num_programs(0) + row) * piece
        for first in range(start, most * piece, columns):
            at = first + tl.arange(0, columns)
            there = at < most * piece
            which = tl.load(index_at + listed + at // piece, mask=there, other=0)
            key = which.to(tl.int64) * piece + at % piece
            found = (group * total * piece + key)[:, None] * width + across[None, :]
            k = tl.load(k_at + found, mask=there[:, None], other=0.0)
            weight = tl.load(weight_at + group * total * piece + key, mask=there, other=-float("inf"))
            dots = tl.dot(q, tl.trans(k), input_precision="ieee") * scale + weight[None, :]
            if causal:
                last = tl.load(last_at + key, mask=there, other=0)
                dots = tl.where(last[None, :] <= place[:, None] + offset, dots, -float("inf"))
            higher = tl.maximum(largest, tl.max(dots, 1))
            safe = tl.where(higher == -float("inf"), 0.0, higher)
            weights = tl.exp(dots - safe[:, None])
            shrink = tl.exp(largest - safe)
            mass = mass * shrink + tl.sum(weights, 1)
            v = tl.load(v_at + found, mask=there[:, None], other=0.0)
            summed = summed * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
            largest = higher
        out = summed / tl.where(mass > 0, mass, 1.0)[:, None]
        tl.store(out_at + mine, out.to(q.dtype), mask=inside)

    return attend
