"""How much a block of queries looks at a block of keys, from a part of the products. PSA, https://arxiv.org/abs/2512.04025, step 3."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from secateur.attention.layout import Layout
from secateur.errors import SecateurError


def sampled(
    q: Tensor,
    k: Tensor,
    layout: Layout,
    *,
    share: float = 0.25,
    normalise: bool = False,
    scale: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The largest of exp(logit - largest of the row) over some queries and keys of each pair of blocks.

    >>> q, k = torch.randn(2, 1, 2, 256, 16).unbind(0)
    >>> sampled(q, k, Layout(256, 256)).shape
    torch.Size([1, 2, 2, 4])

    share: of a block's positions, drawn for each head, for queries and keys apart, the same in all blocks and, unlike the released
    code, in all items of a batch. Behind the end the last token stands in. normalise: divide by the row's sum first, as the paper has it
    and the code hasn't. Gives float32 [B, H, rows, columns].
    """
    heads = q.shape[1]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    k = k.repeat_interleave(heads // k.shape[1], 1)
    rows = _drawn(heads, layout.block_q, share, layout.rows, layout.queries, generator, q.device)
    columns = _drawn(heads, layout.block_k, share, layout.columns, layout.keys, generator, q.device)
    dots = (_take(q, rows) @ _take(k, columns).transpose(-1, -2)).float() * scale
    if layout.causal:
        dots = dots.masked_fill(columns[:, :, None] > rows[..., None] + layout.offset, -torch.inf)
    largest = dots.amax(-1, keepdim=True)
    weights = (dots - largest.where(largest > -torch.inf, 0)).exp()
    if normalise:
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
    shape = (layout.rows, rows.shape[-1] // layout.rows, layout.columns, columns.shape[-1] // layout.columns)
    return weights.unflatten(-1, shape[2:]).unflatten(-3, shape[:2]).amax((-1, -3))


def _drawn(
    heads: int,
    block: int,
    share: float,
    blocks: int,
    size: int,
    generator: torch.Generator | None,
    device: torch.device,
) -> Tensor:
    """Positions [1, H, blocks * drawn]; in a last block that is short, the last one stands in."""
    count = min(max(1, int(block * share)), block)
    chance = torch.rand(1, heads, min(block, size), generator=generator).to(device)
    within = chance.argsort(-1)[..., :count].sort(-1).values
    starts = torch.arange(blocks, device=device) * block
    return (starts[:, None] + within[:, :, None]).flatten(2).clamp(max=size - 1)


def _take(x: Tensor, at: Tensor) -> Tensor:
    return x.gather(2, at[..., None].expand(len(x), -1, -1, x.shape[-1]))


def antidiagonal(
    q: Tensor, k: Tensor, layout: Layout, *, stride: int = 16, scale: float | None = None
) -> Tensor:
    """Sums along antidiagonals of `stride` x `stride` pieces, softmax over a row's pieces, summed over the pair of blocks (XAttention).

    >>> q, k = torch.randn(2, 1, 2, 256, 16).unbind(0)
    >>> antidiagonal(q, k, Layout(256, 256, 128, 128, causal=True)).shape
    torch.Size([1, 2, 2, 2])

    A piece is one product: query stride - 1 - i meets key i. It takes 1 / stride of the products of dense attention. Causal pieces
    are those up to the diagonal. Blocks must be multiples of stride. Gives float32 [B, H, rows, columns], each row's sum the pieces of
    queries in it.
    """
    if layout.block_q % stride or layout.block_k % stride or layout.offset % stride:
        raise SecateurError(
            f"pieces of {stride} don't divide blocks of {layout.block_q} and {layout.block_k} behind {layout.offset} keys",
            where="stride",
            fix="a divisor of all three",
        )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    down, across = layout.block_q // stride, layout.block_k // stride
    pieces_q = F.pad(q, (0, 0, 0, -layout.queries % stride)).unflatten(2, (-1, stride)).flatten(3)
    pieces_k = F.pad(k, (0, 0, 0, -layout.keys % stride)).unflatten(2, (-1, stride)).flip(3).flatten(3)
    pieces_k = pieces_k.transpose(-1, -2)
    each, offset = q.shape[1] // k.shape[1], layout.offset // stride
    out = q.new_zeros(*q.shape[:2], layout.rows, layout.columns, dtype=torch.float32)
    strip = down * max(1, 256 // down)  # rows at a time: nothing is multiplied far above the diagonal
    for start in range(0, pieces_q.shape[2], strip):
        rows = pieces_q[:, :, start : start + strip].unflatten(1, (-1, each)).flatten(2, 3)
        seen = min(pieces_k.shape[3], start + strip + offset) if layout.causal else pieces_k.shape[3]
        dots = (rows @ pieces_k[..., :seen]).float() * (scale / stride)
        dots = dots.unflatten(2, (each, -1)).flatten(1, 2)
        if layout.causal:
            dots.masked_fill_(
                torch.ones_like(dots[0, 0], dtype=torch.bool).triu(start + offset + 1), -torch.inf
            )
        weights = F.pad(dots.softmax(-1), (0, -seen % across, 0, -dots.shape[2] % down))
        summed = weights.unflatten(-1, (-1, across)).sum(-1).unflatten(-2, (-1, down)).sum(-2)
        out[:, :, start // down : start // down + summed.shape[2], : summed.shape[3]] = summed
    return out
