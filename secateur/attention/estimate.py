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

    share: of a block's positions, drawn for each batch item and head, for queries and keys apart, the same in all blocks. normalise:
    divide by the row's sum first, as the paper has it and the code hasn't. Gives float32 [B, H, rows, columns].
    """
    batch, heads = q.shape[:2]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    k = k.repeat_interleave(heads // k.shape[1], 1)
    rows = _drawn(batch, heads, layout.block_q, share, layout.rows, layout.queries, generator, q.device)
    columns = _drawn(batch, heads, layout.block_k, share, layout.columns, layout.keys, generator, q.device)
    dots = (_take(q, rows) @ _take(k, columns).transpose(-1, -2)).float() * scale
    real_q, real_k = (at < size for at, size in ((rows, layout.queries), (columns, layout.keys)))
    may = real_k[:, :, None].expand_as(dots)
    if layout.causal:
        may = may & (columns[:, :, None] <= rows[..., None] + layout.offset)
    dots = dots.masked_fill(~may, -torch.inf)
    largest = dots.amax(-1, keepdim=True)
    weights = (dots - largest.where(largest > -torch.inf, 0)).exp()
    if normalise:
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
    weights = weights.masked_fill(~real_q[..., None], 0)
    shape = (layout.rows, rows.shape[-1] // layout.rows, layout.columns, columns.shape[-1] // layout.columns)
    return weights.unflatten(-1, shape[2:]).unflatten(-3, shape[:2]).amax((-1, -3))


def _drawn(
    batch: int,
    heads: int,
    block: int,
    share: float,
    blocks: int,
    size: int,
    generator: torch.Generator | None,
    device: torch.device,
) -> Tensor:
    """Positions [B, H, blocks * drawn]; a last block that is short gives some beyond the end."""
    count = min(max(1, int(block * share)), block)
    chance = torch.rand(batch, heads, min(block, size), generator=generator).to(device)
    within = chance.argsort(-1)[..., :count].sort(-1).values
    starts = torch.arange(blocks, device=device) * block
    return (starts[:, None] + within[:, :, None]).flatten(2)


def _take(x: Tensor, at: Tensor) -> Tensor:
    return x.gather(2, at.clamp(max=x.shape[2] - 1)[..., None].expand(-1, -1, -1, x.shape[-1]))


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
    pieces_q = F.pad(q, (0, 0, 0, -layout.queries % stride)).unflatten(2, (-1, stride)).flip(3).flatten(3)
    pieces_k = F.pad(k, (0, 0, 0, -layout.keys % stride)).unflatten(2, (-1, stride)).flatten(3)
    each = q.shape[1] // k.shape[1]
    grouped = pieces_q.unflatten(1, (k.shape[1], each))
    dots = (grouped @ pieces_k[:, :, None].transpose(-1, -2)).flatten(1, 2).float() * (scale / stride)
    if layout.causal:
        rows, columns = (torch.arange(n, device=q.device) for n in dots.shape[-2:])
        dots = dots.masked_fill(columns > rows[:, None] + layout.offset // stride, -torch.inf)
    weights = dots.softmax(-1)
    down = -weights.shape[-2] % (layout.block_q // stride)
    across = -weights.shape[-1] % (layout.block_k // stride)
    weights = F.pad(weights, (0, across, 0, down))
    weights = weights.unflatten(-1, (-1, layout.block_k // stride)).sum(-1)
    return weights.unflatten(-2, (-1, layout.block_q // stride)).sum(-2)
