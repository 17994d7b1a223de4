"""Reduction: what becomes of the tokens that leave. Everything is batched over sets, [S, n], with masks for padding.

A token that stands for others keeps its place in the sequence; only its features change.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from secateur.tokens.state import Reduction


def merge_nearest(
    features: Tensor, metric: Tensor, pool: Tensor, count: Tensor | int
) -> tuple[Tensor, Tensor]:
    """Merges the tokens of `pool` into `count` evenly strided ones of them, each into the nearest by cosine.

    >>> targets, merged = merge_nearest(features, keys, ~dominant & valid, count=4)  # doctest: +SKIP

    features [S, n, D], metric [S, n, d], pool [S, n] bool, count: how many targets, one number or [S].
    Gives the targets, [S, n] bool, and features [S, n, D] in which a target is itself plus the mean of what came to it
    (the sum isn't divided again: arXiv 2506.22283 and VisionZip). Where count is 0 nothing is merged.
    """
    count = torch.as_tensor(count, device=pool.device).expand(len(pool))[:, None]
    rank = pool.cumsum(1) - 1
    step = (pool.sum(1, keepdim=True) // count.clamp(min=1)).clamp(min=1)
    targets = pool & (rank % step == 0) & (rank // step < count)
    sources = pool & ~targets & (count > 0)
    directions = F.normalize(metric.float(), dim=-1)
    likeness = directions @ directions.mT
    nearest = likeness.masked_fill(~targets[:, None, :], -torch.inf).argmax(2)
    sums, counts = pour(features, nearest, sources)
    merged = features.float() + sums / counts.clamp(min=1)[..., None]
    return targets, torch.where(targets[..., None], merged, features.float()).to(features.dtype)


def pour(features: Tensor, into: Tensor, who: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Sums of the features of `who` at the places they go to, and the sums of their weights (1 each when None).

    features [S, n, D], into [S, n] positions 0..n-1, who [S, n] bool -> [S, n, D] and [S, n], both float32.
    """
    share = who.float() if weights is None else weights.float().masked_fill(~who, 0)
    into = into.masked_fill(~who, 0)
    sums = torch.zeros(features.shape, dtype=torch.float32, device=features.device)
    sums.scatter_add_(1, into[..., None].expand_as(sums), features.float() * share[..., None])
    return sums, torch.zeros_like(share).scatter_add_(1, into, share)


def best_of_cell(scores: Tensor, cells: Tensor, who: Tensor) -> tuple[Tensor, Tensor]:
    """The best of every cell among `who` (ties: the first), and for each token the position of its cell's best.

    scores [S, n], cells [S, n] integers >= 0, who [S, n] bool -> [S, n] bool, [S, n] int64 (meaningful for `who`).
    """
    slots = int(cells.max()) + 1 if cells.numel() else 1
    places = torch.arange(scores.shape[1], device=scores.device).expand_as(cells)
    home = cells.masked_fill(~who, 0)
    top = torch.full((len(scores), slots), -torch.inf, device=scores.device)
    top.scatter_reduce_(1, home, scores.float().masked_fill(~who, -torch.inf), "amax")
    leads = who & (scores.float() == top.gather(1, home))
    first = torch.full((len(scores), slots), scores.shape[1], device=scores.device)
    first.scatter_reduce_(1, home, places.masked_fill(~leads, scores.shape[1]), "amin")
    best = first.gather(1, home).clamp(max=scores.shape[1] - 1)
    return who & (best == places), best


def recycle_cells(features: Tensor, weights: Tensor, cells: Tensor, who: Tensor) -> tuple[Tensor, Tensor]:
    """One token a cell stands for all of `who` in it: their weighted mean, at the place of the heaviest.

    >>> kept, merged = recycle_cells(features, importance, row // 2 * width + column // 2, low)  # doctest: +SKIP

    features [S, n, D], weights [S, n], cells [S, n] integers >= 0, who [S, n] bool -> [S, n] bool, [S, n, D].
    A cell whose weights sum to 0 gives the plain mean (arXiv 2508.05211; the last rule is the sheet's).
    """
    kept, home = best_of_cell(weights, cells, who)
    sums, mass = pour(features, home, who, weights)
    plain, counts = pour(features, home, who)
    flat = mass == 0
    mean = (
        torch.where(flat[..., None], plain, sums)
        / torch.where(flat, counts, mass).clamp(min=1e-30)[..., None]
    )
    return kept, torch.where(kept[..., None], mean, features.float()).to(features.dtype)


def weighted_sum(features: Tensor, weights: Tensor, who: Tensor) -> Tensor:
    """One token for all of `who`: the sum of weight x feature. [S, n, D], [S, n], [S, n] -> [S, D]."""
    return torch.einsum("snd,sn->sd", features.float(), weights.float().masked_fill(~who, 0)).to(
        features.dtype
    )


def mean_of(states: Tensor, who: Tensor) -> Tensor:
    """The mean of `who`, float32, 0 where there is none: [S, m, D], [S, m] bool -> [S, 1, D]."""
    states = states.float().masked_fill(~who[..., None], 0)
    return states.sum(1, keepdim=True) / who.sum(1).clamp(min=1)[:, None, None]


def match_pairs(
    metric: Tensor, valid: Tensor, count: Tensor | int, rank: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Bipartite soft matching: tokens at even places each find the nearest at odd places; the `count` closest pairs merge.

    metric [S, n, d], valid [S, n], count: pairs a set, at most half of its tokens, rank [S, n]: the places, 0 and on
    within a set unless given, padding not counted -> sources [S, n] bool, the position each goes to, [S, n] int64, and
    how near it is, [S, n], -inf at odd places (arXiv 2210.09461).
    """
    directions = F.normalize(metric.float(), dim=-1)
    rank = valid.cumsum(1) - 1 if rank is None else rank
    even, odd = valid & (rank % 2 == 0), valid & (rank % 2 == 1)
    likeness = (directions @ directions.mT).masked_fill(~odd[:, None, :], -torch.inf)
    best, into = likeness.max(2)
    best = best.masked_fill(~even, -torch.inf)
    place = best.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    count = torch.as_tensor(count, device=metric.device).expand(len(metric))
    allowed = torch.minimum(count, valid.sum(1) // 2)[:, None]
    return even & (place < allowed) & best.isfinite(), into, best


def first(scores: Tensor, count: int) -> Tensor:
    """Positions of the `count` highest of [n] scores, best first, ties by position."""
    return scores.argsort(descending=True, stable=True)[:count]


def others(n: int, taken: Tensor) -> Tensor:
    """Positions 0..n-1 that aren't in `taken`, ascending."""
    return (
        torch.ones(n, dtype=torch.bool, device=taken.device).index_fill(0, taken, False).nonzero().squeeze(1)
    )


def clusters(
    x: Tensor, weights: Tensor, keys: Tensor, bonus: Tensor, count: int, size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The `count` heaviest tokens as `gathered` makes them.

    Gives the centres' positions (heaviest first), the positions of all others (ascending) and the features [count, C]
    (arXiv 2409.01179).
    """
    centres = first(weights, min(count, len(x) - 1))
    return centres, others(len(x), centres), gathered(x, weights, keys, bonus, centres, size)


def gathered(x: Tensor, weights: Tensor, keys: Tensor, bonus: Tensor, centres: Tensor, size: int) -> Tensor:
    """Each centre [k] with the weighted sum of the `size` tokens nearest to it added, other centres among them: [k, C].

    x [n, C], weights [n], keys [n, d] (compared by cosine), bonus [n]: added to how near a token is.
    """
    order = torch.cat([centres, others(len(x), centres)])
    keys = F.normalize(keys.float(), dim=-1)
    near = keys[centres] @ keys[order].T + bonus[order]
    itself = torch.eye(*near.shape, dtype=torch.bool, device=x.device)
    near = near.masked_fill(itself, -torch.inf).argsort(dim=1, descending=True, stable=True)
    members = order[near[:, : min(size, len(x) - 1)]]
    return x[centres] + torch.einsum("km,kmc->kc", weights[members], x[members])


def density_clusters(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """`count` means of x [n, D] around density peaks: positions of the centres, best first, and the means, float32.

    Density: of a token's `count` nearest, itself among them, exp(-mean squared distance), distances over sqrt(D). A centre is dense and far
    from what is denser (of equals the first is); every other token goes to the nearest centre (arXiv 2410.04417 and its code, whose 1e-6 in the mean's
    denominator is kept).
    """
    x = x.float()
    distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist") / x.shape[1] ** 0.5
    density = (-distance.topk(count, largest=False).values.square().mean(1)).exp()
    earlier = torch.ones_like(distance, dtype=torch.bool).tril(-1)
    denser = (density > density[:, None]) | (density == density[:, None]) & earlier
    apart = torch.where(denser, distance, distance.max()).amin(1)
    centres = first(apart * density, count)
    home = distance[centres].argmin(0)
    home[centres] = torch.arange(count, device=x.device)
    sums = torch.zeros(count, x.shape[1], device=x.device).index_add_(0, home, x)
    return centres, sums / (torch.bincount(home, minlength=count)[:, None] + 1e-6)


def in_order(groups: Sequence[Tensor], features: Tensor) -> Reduction:
    """What stays, group after group, ascending within each: groups of disjoint masks [S, n], features [S, n, D] by place."""
    n = features.shape[1]
    places = torch.arange(n, device=features.device).expand(features.shape[:2])
    order = torch.full_like(places, len(groups) * n)
    for number, mask in enumerate(groups):
        order = torch.where(mask, number * n + places, order)
    count = torch.stack([mask.sum(1) for mask in groups]).sum(0)
    index = order.argsort(dim=1)[:, : int(count.max())]
    real = places[:, : index.shape[1]] < count[:, None]
    return _reduction(index, real, features.gather(1, index[..., None].expand(-1, -1, features.shape[2])))


def with_token(reduction: Reduction, token: Tensor, free: Tensor, first: bool = False) -> Reduction:
    """A reduction and one more token a set, in the place of a token that leaves: after all others, or before them.

    token [S, D], free [S, n] bool: what leaves; a set in which nothing does gets no token.
    """
    assert reduction.features is not None
    index, features = reduction.index, reduction.features
    slot = torch.where(free.any(1), free.int().argmax(1), -1)[:, None]
    pair = ([slot, index], [token[:, None].to(features.dtype), features])
    index, features = (torch.cat(part if first else part[::-1], 1) for part in pair)
    real = index >= 0
    order = (~real).to(torch.uint8).argsort(dim=1, stable=True)[:, : int(real.sum(1).max())]
    features = features.gather(1, order[..., None].expand(-1, -1, features.shape[2]))
    return _reduction(index.gather(1, order), real.gather(1, order), features)


def _reduction(index: Tensor, real: Tensor, features: Tensor) -> Reduction:
    return Reduction(index.masked_fill(~real, -1), features.masked_fill(~real[..., None], 0))
