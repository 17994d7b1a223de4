"""Attention over key blocks of several resolutions: a plain reference, and a way that computes only what is read.

A pooled key is the mean of up to 2, 4 or 8 consecutive keys, its value the mean of their values, and it weighs as many as it
stands for: log(count) is added to its logits. PSA, https://arxiv.org/abs/2512.04025, steps 2 and 6. Spec: psa.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from secateur.attention.layout import LEVELS, Layout
from secateur.errors import SecateurError
from secateur.utils.screen import Screen


def pool(x: Tensor, level: int, real: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Means over `level` consecutive tokens that are real, and how many each stands for.

    >>> means, counts = pool(torch.tensor([[1.0], [3.0], [5.0]]), 2)
    >>> means.tolist(), counts.tolist()
    ([[2.0], [5.0]], [2, 1])

    x: [..., tokens, d]; real: bool [..., tokens], those that aren't padding. Gives [..., groups, d] and int64 [..., groups].
    """
    pad = -x.shape[-2] % level
    there = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device) if real is None else real
    there = F.pad(there.expand(x.shape[:-1]), (0, pad)).unflatten(-1, (-1, level))
    counts = there.sum(-1)
    if level == 1:
        return x, counts
    groups = F.pad(x, (0, 0, 0, pad)).unflatten(-2, (-1, level))
    summed = (groups * there[..., None]).sum(-2, dtype=torch.promote_types(x.dtype, torch.float32))
    return (summed / counts.clamp(min=1)[..., None]).to(x.dtype), counts


def check(q: Tensor, k: Tensor, v: Tensor, levels: Tensor, layout: Layout) -> None:
    """Raises `SecateurError` for tensors that don't fit each other, the layout, or the levels that there are."""
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}, levels {tuple(levels.shape)}"
    fits = q.dim() == k.dim() == v.dim() == 4 and k.shape[:3] == v.shape[:3] and q.shape[0] == k.shape[0]
    if not fits or q.shape[-1] != k.shape[-1] or q.shape[1] % k.shape[1]:
        raise SecateurError(
            f"{shapes} don't belong together",
            where="attention",
            fix="q [B, H, N, d], k and v [B, H of keys, M, d], with H a multiple of that of the keys",
        )
    if (layout.queries, layout.keys) != (q.shape[2], k.shape[2]):
        raise SecateurError(f"{layout} isn't theirs: {shapes}", where="attention")
    if tuple(levels.shape) != (*q.shape[:2], layout.rows, layout.columns):
        wanted = (*q.shape[:2], layout.rows, layout.columns)
        raise SecateurError(f"{shapes}: the levels should be {wanted}", where="attention")
    for level in levels.unique().tolist():
        if level and (level not in LEVELS or layout.block_k % level):
            raise SecateurError(
                f"a block of {layout.block_k} keys has no level {level}",
                where="attention",
                fix=f"0 and those of {LEVELS} that divide a block",
            )


@dataclass(frozen=True, repr=False)
class Resolution(Screen):
    """All keys at one level: k [B, G, n, d], v [B, G, n, d], what each stands for (counts [B, G, n]), its block and last position [n]."""

    level: int
    k: Tensor
    v: Tensor
    counts: Tensor
    block: Tensor
    last: Tensor


def resolutions(
    k: Tensor, v: Tensor, levels: Tensor, layout: Layout, real: Tensor | None
) -> list[Resolution]:
    """Keys and values at each level that any block has."""
    there = None if real is None else real[:, None]
    found = []
    for level in (one for one in LEVELS if bool((levels == one).any())):
        keys, counts = pool(k, level, there)
        at = torch.arange(keys.shape[2], device=k.device)
        last = ((at + 1) * level).clamp(max=layout.keys) - 1
        found.append(
            Resolution(level, keys, pool(v, level, there)[0], counts, at * level // layout.block_k, last)
        )
    return found


def masked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    levels: Tensor,
    layout: Layout,
    *,
    scale: float | None = None,
    real: Tensor | None = None,
) -> Tensor:
    """The reference: every level of every key, masked where a block has another. More work than dense attention.

    >>> q, k, v = torch.randn(3, 1, 2, 256, 16).unbind(0)
    >>> layout = Layout(256, 256)
    >>> levels = torch.ones(1, 2, layout.rows, layout.columns, dtype=torch.int64)
    >>> torch.allclose(masked(q, k, v, levels, layout), F.scaled_dot_product_attention(q, k, v), atol=1e-5)
    True

    q: [B, H, N, d]; k, v: [B, H of keys, M, d]; levels: int64 [B, H, rows, columns]; real: bool [B, M], keys that aren't padding.
    Gives [B, H, N, d of v] in q's dtype; logits and softmax in float32 at least. A query that may read nothing gives zeros.
    """
    check(q, k, v, levels, layout)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    exact, each = torch.promote_types(q.dtype, torch.float32), q.shape[1] // k.shape[1]
    at = torch.arange(layout.queries, device=q.device)
    logits, values = (
        [q.new_empty(*q.shape[:3], 0, dtype=exact)],
        [v.new_empty(*q.shape[:2], 0, v.shape[3], dtype=exact)],
    )
    for part in resolutions(k, v, levels, layout, real):
        keys, means, counts = (x.to(exact).repeat_interleave(each, 1) for x in (part.k, part.v, part.counts))
        read = (levels == part.level)[..., at // layout.block_q, :][..., part.block]
        if layout.causal:
            read &= part.last <= at[:, None] + layout.offset
        dots = q.to(exact) @ keys.transpose(-1, -2) * scale + counts.log()[:, :, None]
        logits.append(dots.masked_fill(~read, -torch.inf))
        values.append(means)
    weights = torch.cat(logits, -1).softmax(-1).nan_to_num()
    return (weights @ torch.cat(values, 2)).to(q.dtype)


def gathered(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    levels: Tensor,
    layout: Layout,
    *,
    scale: float | None = None,
    real: Tensor | None = None,
) -> Tensor:
    """What `masked` gives, with only those keys read that a block of queries asks for: its work is the density's.

    Arguments as those of `masked`. One call of the library's attention for each block of queries, all heads at once; heads
    that read fewer keys than others are filled up. Keys are fetched in pieces as long as the shortest pooled block.
    """
    check(q, k, v, levels, layout)
    parts = resolutions(k, v, levels, layout, real)
    if not parts:
        return q.new_zeros(*q.shape[:3], v.shape[3])
    piece = layout.block_k // parts[-1].level
    keys, values, counts, level, block, last = pieces(parts, layout, piece)
    weight = counts.to(q.dtype).log()
    owner = torch.arange(len(q) * k.shape[1], device=q.device).view(len(q), -1, 1)
    starts = owner.repeat_interleave(q.shape[1] // k.shape[1], 1) * len(block)
    at = torch.arange(layout.queries, device=q.device) + layout.offset
    out = q.new_empty(*q.shape[:3], v.shape[3])
    for row in range(layout.rows):
        rows = slice(row * layout.block_q, (row + 1) * layout.block_q)
        wanted = (levels[:, :, row, block] == level).to(torch.int8)
        if layout.causal:
            wanted += wanted * (last[:, -1] > at[rows][0])
        index, late = packed(wanted)
        found = (starts + index).flatten()
        shape = (*q.shape[:2], 1, index.shape[-1] * piece)
        bias = weight.index_select(0, found).view(*index.shape, piece)
        bias = bias.masked_fill((wanted.gather(2, index) == 0)[..., None], -torch.inf).view(shape)
        unsure = bool((bias[..., : shape[-1] - late * piece] == -torch.inf).all(-1).any())
        if late:
            bias = bias.expand(-1, -1, len(at[rows]), -1).contiguous()
            hidden = last[index[..., -late:]].flatten(2)[:, :, None] > at[rows][:, None]
            bias[..., -late * piece :].masked_fill_(hidden, -torch.inf)
        mine = F.scaled_dot_product_attention(
            q[:, :, rows],
            keys.index_select(0, found).view(*q.shape[:2], shape[-1], -1),
            values.index_select(0, found).view(*q.shape[:2], shape[-1], -1),
            attn_mask=bias,
            scale=scale,
        )
        if unsure:
            mine = mine.masked_fill((bias == -torch.inf).all(-1, keepdim=True), 0)
        out[:, :, rows] = mine
    return out


def pieces(parts: list[Resolution], layout: Layout, piece: int) -> tuple[Tensor, ...]:
    """Keys, values and counts of all levels, cut into pieces [B * G * pieces, piece * d]; each piece's level and block [pieces],
    the last position of each key in it [pieces, piece]. What lies behind the end counts as nothing."""
    columns: list[list[Tensor]] = [[] for _ in range(6)]
    for part in parts:
        size = layout.columns * layout.block_k // part.level
        behind = size - part.k.shape[2]
        block = torch.arange(size // piece, device=part.k.device) * piece * part.level // layout.block_k
        made = (
            F.pad(part.k, (0, 0, 0, behind)).unflatten(2, (-1, piece)),
            F.pad(part.v, (0, 0, 0, behind)).unflatten(2, (-1, piece)),
            F.pad(part.counts.expand(*part.k.shape[:2], -1), (0, behind)).unflatten(2, (-1, piece)),
            torch.full_like(block, part.level),
            block,
            F.pad(part.last, (0, behind), value=layout.keys - 1).view(-1, piece),
        )
        for column, x in zip(columns, made, strict=True):
            column.append(x)
    keys, values, counts = (torch.cat(column, 2).flatten(3).flatten(0, 2) for column in columns[:3])
    level, block, last = (torch.cat(column) for column in columns[3:])
    return keys, values, counts, level, block, last


def packed(wanted: Tensor) -> tuple[Tensor, int]:
    """Where `wanted` isn't 0, int64 [..., most], at the end, the largest last; and for how many places some are above 1.

    >>> packed(torch.tensor([[2, 0, 1], [0, 1, 0]]))
    (tensor([[2, 0],
            [2, 1]]), 1)
    """
    most = max(1, int((wanted > 0).sum(-1).max()))
    return wanted.argsort(dim=-1, stable=True)[..., -most:], int((wanted > 1).sum(-1).max())
