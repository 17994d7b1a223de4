"""Attention statistics from queries and keys, without the L x L matrix.

Pure functions on `q [B, H, L, d]` and `k [B, H_kv, L, d]`, any float type, computed in float32; grouped-query keys aren't
repeated. A row is a query, a column a key: `attention_rows(...)[b, j]` is how much the chosen rows attend to token j.
"""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.errors import choose
from secateur.tokens.state import Missing, TokenSets

ROWS = 128
"""Query rows handled at once by `received_attention`."""


def attention_rows(
    q: Tensor,
    k: Tensor,
    weights: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    over: Tensor | None = None,
    scale: float | None = None,
    heads: bool = False,
) -> Tensor:
    """What given query rows attend to: softmax(q k^T * scale + mask), weighted over the rows, mean over the heads.

    >>> cls_row = attention_rows(q[:, :, :1], k)[:, 1:]  # doctest: +SKIP

    `q` [B, H, R, d] the rows alone, `k` [B, H_kv, L, d] -> float32 [B, L] (`heads`: [B, H, L]).
    `weights` [B, R]: sum of weight x row; None: the mean. `mask` broadcastable to [B, H, R, L]: bool (True = may be
    seen) or additive. `over` [B, L] bool: the softmax is over these keys alone, others get 0. `scale`: None is
    d ** -0.5. A row that may see nothing gives zeros.
    """
    if weights is None:
        batch, rows = q.shape[0], q.shape[2]
        weights = torch.full((batch, rows), 1 / max(rows, 1), device=q.device)
    attention = _weighted(q, k.float(), weights.float(), mask, over, scale)
    return attention if heads else attention.mean(1)


def received_attention(
    q: Tensor,
    k: Tensor,
    weights: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    over: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    heads: bool = False,
    rows: int = ROWS,
) -> Tensor:
    """How much every token is attended to by all query rows: `attention_rows` for many rows, `rows` of them at a time.

    >>> received = received_attention(q, k, causal=True)  # doctest: +SKIP

    `q` [B, H, R, d], `k` [B, H_kv, L, d] -> float32 [B, L] (`heads`: [B, H, L]); peak memory B x H x `rows` x L numbers.
    `weights` [B, R], mean over the rows when None: give weights to leave out padding rows. `causal`: row i sees keys up to i + L - R;
    `mask` may then be None or hide more.
    """
    batch, count, total = q.shape[:3]
    length = k.shape[2]
    partial = weights is not None
    if weights is None:
        weights = torch.full((batch, total), 1 / max(total, 1), device=q.device)
    weights, keys = weights.float(), k.float()
    received = torch.zeros(batch, count, length, device=q.device)
    for start in range(0, total, rows):
        stop = min(start + rows, total)
        if partial and not weights[:, start:stop].any():
            continue
        seen = length - total + stop if causal else length
        part = mask[:, :, start:stop, :seen] if mask is not None and mask.shape[2] > 1 else mask
        part = part[..., :seen] if part is not None and part.shape[3] > 1 else part
        received[:, :, :seen] += _weighted(
            q[:, :, start:stop],
            keys[:, :, :seen],
            weights[:, start:stop],
            part,
            None if over is None else over[:, :seen],
            scale,
            length - total + start if causal else None,
        )
    return received if heads else received.mean(1)


def given_attention(
    q: Tensor,
    k: Tensor,
    to: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    rows: int = ROWS,
) -> Tensor:
    """How much of its attention each query row gives to the keys in `to` [B, L] bool: mean over heads, [B, R] float32."""
    parts, keys = [], k.float()
    total = q.shape[2]
    for start in range(0, total, rows):
        part = mask[:, :, start : start + rows] if mask is not None and mask.shape[2] > 1 else mask
        logits, shape = _logits(q[:, :, start : start + rows], keys, part, None, scale)
        share = (logits.softmax(-1) @ to.float()[:, None, :, None]).reshape(shape[:3])
        parts.append(share.nan_to_num().mean(1))
    return torch.cat(parts, 1) if parts else torch.zeros(len(q), 0, device=q.device)


def mean_logits(
    q: Tensor, k: Tensor, among: Tensor, over: str = "keys", scale: float | None = None, causal: bool = True
) -> Tensor:
    """Means over the rows or columns of q k^T * scale, and over the heads, without the n x n matrix: float32 [S, n].

    >>> q, k = torch.tensor([[1.0, 2.0], [3.0, 4.0]])[None, None], torch.eye(2)[None, None]
    >>> mean_logits(q, k, torch.ones(1, 2, dtype=torch.bool), scale=1.0)
    tensor([[1.0000, 3.5000]])

    `q` [S, H, n, d], `k` [S, H_kv, n, d]; `among` [S, n] bool: what counts; `over`: "keys" (a token's row) or "queries" (its
    column); `causal`: a token sees itself and those before it. 0 where nothing counts. Spec: atp-llava.
    """
    choose(over, ("keys", "queries"), what="over", where="logits")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    folded = (
        q.float().unflatten(1, (k.shape[1], -1)).sum(2) * scale / q.shape[1]
    )  # heads that share a key add up
    own, others = (x.float().transpose(1, 2).flatten(2) for x in (folded, k))
    if over == "queries":
        own, others = others, own
    counted = among[..., None].float()

    def sums(values: Tensor) -> Tensor:
        if not causal:
            return values.sum(1, keepdim=True)
        return values.cumsum(1) if over == "keys" else values.flip(1).cumsum(1).flip(1)

    return (own * sums(others * counted)).sum(2) / sums(counted)[..., 0].clamp(min=1)


def _logits(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    over: Tensor | None,
    scale: float | None,
    first: int | None = None,
) -> tuple[Tensor, tuple[int, int, int, int]]:
    """[B, H_kv, G * R, L], the query heads that share a key head folded into rows, and the shape (B, H, R, L).

    `first`: the number of the last key that the first row may see (causal).
    """
    batch, count, rows, width = q.shape
    groups, length = k.shape[1], k.shape[2]
    shape = (batch, count, rows, length)
    folded = q.float().mul(width**-0.5 if scale is None else scale).reshape(batch, groups, -1, width)
    logits = folded @ k.mT
    view = logits.view(shape)
    if mask is not None and mask.dtype != torch.bool:
        view += mask
    hidden = None if mask is None or mask.dtype != torch.bool else ~mask
    if over is not None:
        outside = ~over[:, None, None, :]
        hidden = outside if hidden is None else hidden | outside
    if hidden is not None:
        view.masked_fill_(hidden, -torch.inf)
    if first is not None:
        last = first + torch.arange(rows, device=q.device)[:, None]
        ahead = slice(first + 1, length)  # the keys before it are seen by every row
        view[..., ahead].masked_fill_(torch.arange(first + 1, length, device=q.device) > last, -torch.inf)
    return logits, shape


def _weighted(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    mask: Tensor | None,
    over: Tensor | None,
    scale: float | None,
    first: int | None = None,
) -> Tensor:
    """[B, H, L]: sum over rows of weight x softmax. The denominator goes into the weights, so no second pass is made."""
    logits, shape = _logits(q, k, mask, over, scale, first)
    top = logits.amax(-1, keepdim=True)
    powers = logits.sub_(top.masked_fill(top == -torch.inf, 0)).exp_()
    total = powers.sum(-1).view(shape[:3])
    share = (weights[:, None] / total).masked_fill(total == 0, 0)
    return (share[:, :, None] @ powers.view(shape)).squeeze(2)


def entropy(weights: Tensor, valid: Tensor | None = None) -> Tensor:
    """-sum p ln p of each row of weights [..., n] >= 0, normalised to sum 1, in nats: [...], float64.

    >>> entropy(torch.tensor([1.0, 1.0])).exp()
    tensor(2., dtype=torch.float64)
    """
    weights = weights.double() if valid is None else weights.double().masked_fill(~valid, 0)
    return torch.special.entr(weights / weights.sum(-1, keepdim=True).clamp(min=1e-300)).sum(-1)


def cls_or_received(sets: TokenSets, site: str) -> Tensor:
    """How much CLS attends to each token; in a tower without CLS, how much all of its tokens do: [S, n].

    The second is a stand-in that no paper has: mean over heads and over all queries of the same block.
    """
    try:
        return sets.attention(site, rows="cls")
    except Missing:
        return sets.attention(site, rows="all")


def likeness(
    one: Tensor, others: Tensor, valid: Tensor, scaled: bool = False, itself: bool = False
) -> Tensor:
    """Softmax of the dot products of one vector a head, [S, H, d], with the tokens', [S, H, n, d]: mean over heads, [S, n].

    scaled: by 1 / sqrt(d). itself: the vector's product with itself counts in the softmax.
    """
    tokens = torch.cat([one[:, :, None], others], 2).float()
    dots = torch.einsum("shd,shnd->shn", one.float(), tokens)
    dots = dots * others.shape[-1] ** -0.5 if scaled else dots
    first = torch.full_like(valid[:, :1], itself)
    return dots.masked_fill(~torch.cat([first, valid], 1)[:, None], -torch.inf).softmax(2).mean(1)[:, 1:]


def over_crop(values: Tensor, crop: Tensor, valid: Tensor) -> Tensor:
    """The sum over a token's crop, at every token: values, crop, valid [S, n] -> [S, n]."""
    home = crop.clamp(min=0)
    sums = torch.zeros(len(values), int(home.max()) + 1, device=values.device)
    return sums.scatter_add_(1, home, values.float().masked_fill(~valid, 0)).gather(1, home).clamp(min=1e-30)


def patch_entropy(pixels: Tensor) -> Tensor:
    """Bits of the histogram of grey values 0..255 of each patch: [S, n, p] -> [S, n].

    >>> patch_entropy(torch.tensor([[[0.0, 255.0]]]))
    tensor([[1.]])
    """
    levels = pixels.round().clamp(0, 255).long()
    share = torch.zeros(*levels.shape[:2], 256, device=pixels.device)
    share.scatter_add_(2, levels, torch.ones(levels.shape, device=pixels.device))
    share /= levels.shape[2]
    return -(share * (share + 1e-10).log2()).sum(2)


def normalised(scores: Tensor, valid: Tensor) -> Tensor:
    """Scores [S, n] over their sum within the set."""
    scores = scores.masked_fill(~valid, 0)
    return scores / (scores.sum(1, keepdim=True) + 1e-8)
