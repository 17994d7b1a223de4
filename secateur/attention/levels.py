"""Levels of key blocks from their importance, one row of key blocks for each block of queries.

Everything here takes scores float [..., rows, columns] (not negative), and `visible` bool [rows, columns]; levels are int64 of
the scores' shape: 1 for a block that is read whole, 2, 4 or 8 for one read in means of so many tokens, 0 for one that isn't read.
`must`, bool that spreads to the scores' shape: blocks that are read whole where they are visible.
PSA, https://arxiv.org/abs/2512.04025, steps 4 and 5. Spec: psa.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from secateur.attention.layout import LEVELS
from secateur.errors import SecateurError

Ends = Sequence[float]
"""Where the levels 1, 2, 4 and 8 end, not falling."""


def check_ends(ends: Ends) -> None:
    """Raises `SecateurError` unless there are four numbers from 0 to 1 that don't fall."""
    clean = len(ends) == len(LEVELS) and all(0 <= end <= 1 for end in ends)
    if not clean or any(b < a for a, b in itertools.pairwise(ends)):
        raise SecateurError(
            f"the levels 1, 2, 4 and 8 can't end at {', '.join(map(str, ends))}",
            where="ends",
            fix="four numbers from 0 to 1, none below the one before, such as .1,.15,.15,.35",
        )


def stretched(ends: Ends, share: float) -> tuple[float, ...]:
    """The ends times one number, at most 1 each, so that this share of the keys is read.

    >>> stretched((0.1, 0.15, 0.15, 0.35), 0.3)
    (0.2, 0.3, 0.3, 0.7)

    Raises `SecateurError` for ends that can't be stretched so far: where level 1 has none, half of the keys are the most.
    """
    check_ends(ends)
    most = read_by([float(end > 0) for end in ends])
    if most < share:
        raise SecateurError(
            f"levels that end at {', '.join(map(str, ends))} read {most:.1%} of the keys at most, not {share:.1%}",
            where="density",
            fix="ask for less, or give ends whose first number is above 0",
        )
    low, high = 0.0, 1 / min(end for end in ends if end > 0)
    for _ in range(60):
        middle = (low + high) / 2
        enough = read_by([min(1, end * middle) for end in ends]) >= share
        low, high = (low, middle) if enough else (middle, high)
    return tuple(round(min(1.0, end * high), 12) for end in ends)


def read_by(ends: Ends) -> float:
    """The share of the keys that blocks of these ends read.

    >>> round(read_by((0.1, 0.3, 0.4, 0.6)), 6)
    0.25
    """
    return sum((end - start) / level for level, start, end in zip(LEVELS, [0, *ends], ends))


def by_rank(
    scores: Tensor,
    visible: Tensor,
    ends: Ends,
    align: Sequence[int] = (1, 1, 1, 1),
    must: Tensor | None = None,
) -> Tensor:
    """`topk`: of n visible blocks those of rank below n * ends[0] get level 1, the next up to n * ends[1] level 2, and so on.

    >>> scores = torch.tensor([[.02, .30, .05, .01, .20, .09, .04, .15, .12, .02]])
    >>> by_rank(scores, torch.ones(1, 10, dtype=torch.bool), (.1, .3, .4, .6)).tolist()
    [[0, 1, 8, 0, 2, 8, 0, 2, 4, 0]]

    align: each level's number of blocks is rounded up to a multiple of this, down at the end of a row.
    """
    check_ends(ends)
    rank, _ = _ranked(scores, visible)
    count = visible.sum(-1, keepdim=True)
    levels, start = torch.zeros_like(rank), torch.zeros_like(count)
    for level, end, multiple in zip(LEVELS, ends, align, strict=True):
        wanted = (count * end + 1e-9).long().clamp(min=start) - start
        length = torch.minimum(-(-wanted // multiple), (count - start) // multiple) * multiple
        levels[(rank >= start) & (rank < start + length)] = level
        start = start + length
    return _settled(levels, rank, visible, must)


def by_threshold(
    scores: Tensor, visible: Tensor, ends: Ends, least: float = 0.06, must: Tensor | None = None
) -> Tensor:
    """`thresholdbound`: levels by the share of the row that blocks hold together, the block that crosses a bound included.

    >>> scores = torch.tensor([[.02, .30, .05, .01, .20, .09, .04, .15, .12, .02]])
    >>> by_threshold(scores, torch.ones(1, 10, dtype=torch.bool), (.7, .8, .9, .9)).tolist()
    [[0, 1, 4, 0, 1, 2, 0, 1, 1, 0]]

    least: at least this share of the blocks, and one more, have level 1.
    """
    check_ends(ends)
    rank, mass = _ranked(scores, visible)
    count = visible.sum(-1, keepdim=True)
    levels, start = torch.zeros_like(rank), torch.zeros_like(count)
    for level, end in zip(LEVELS, ends):
        within = ((mass <= end + 1e-6) & visible).sum(-1, keepdim=True) + 1
        if level == 1:
            within = within.clamp(min=(least * count).long() + 1)
        stop = torch.minimum(torch.maximum(within, start), count)
        levels[(rank >= start) & (rank < stop)] = level
        start = stop
    return _settled(levels, rank, visible, must)


def by_energy(scores: Tensor, visible: Tensor, ends: Ends, must: Tensor | None = None) -> Tensor:
    """`energybound`: as `by_threshold` without tolerance, and the block that crosses a bound goes to the next level.

    >>> scores = torch.tensor([[.02, .30, .05, .01, .20, .09, .04, .15, .12, .02]])
    >>> by_energy(scores, torch.ones(1, 10, dtype=torch.bool), (.7, .8, .9, .9)).tolist()
    [[0, 1, 0, 0, 1, 4, 0, 1, 2, 0]]
    """
    check_ends(ends)
    rank, mass = _ranked(scores, visible)
    levels = torch.zeros_like(rank)
    for level, end in reversed(list(zip(LEVELS, ends))):
        levels[mass <= end] = level
    return _settled(levels, rank, visible, must)


def _ranked(scores: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """Each block's rank in its row, largest first, ties by index; and what it and those before hold of the row."""
    if not bool(torch.isfinite(scores.where(visible, 0)).all()):
        raise SecateurError("a block's importance is no number", where="scores", fix="look at q and k")
    hidden = scores.float().masked_fill(~visible, -torch.inf)
    order = hidden.argsort(dim=-1, descending=True, stable=True)
    positions = torch.arange(scores.shape[-1], device=scores.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(-1, order, positions)
    share = scores.double().where(visible, 0)
    share = share / share.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    mass = share.gather(-1, order).cumsum(-1).to(scores.dtype)
    return rank, torch.empty_like(mass).scatter_(-1, order, mass)


def _settled(levels: Tensor, rank: Tensor, visible: Tensor, must: Tensor | None) -> Tensor:
    """Visible blocks alone, those that must be read whole; a row that would read nothing reads its first block whole."""
    levels = levels.where(visible, 0)
    if must is not None:
        levels = forced(levels, must, visible)
    nothing = (levels == 0).all(-1, keepdim=True)
    return torch.where(nothing & (rank == 0), 1, levels)


def cap_by_likeness(
    keys: Tensor, block: int, thresholds: Sequence[float], real: Tensor | None = None
) -> Tensor:
    """How coarse each block of keys may be read, int64 [..., blocks]: 8, 4, 2 where neighbours are alike, else 1.

    >>> a, b = [1.0, 0.0], [0.0, 1.0]
    >>> keys = torch.tensor([a, a, b, b, a, a, b, b])
    >>> cap_by_likeness(keys, 8, (.7, .65, .6)).tolist(), cap_by_likeness(keys, 8, (0.0, 0.0, -1.0)).tolist()
    ([2], [8])

    keys: [..., tokens, d]. thresholds: the mean cosine of the first and last token of each group of 2, 4, 8 must exceed them;
    the three tests don't wait for each other. real: bool [..., tokens]; pairs with a token that isn't one don't count.
    """
    tokens = keys.shape[-2]
    pad = -tokens % block
    unit = F.pad(F.normalize(keys.float(), dim=-1), (0, 0, 0, pad))
    there = torch.ones(keys.shape[:-1], dtype=torch.bool, device=keys.device) if real is None else real
    there = F.pad(there.expand(keys.shape[:-1]), (0, pad))
    cap = torch.ones(*keys.shape[:-2], (tokens + pad) // block, dtype=torch.int64, device=keys.device)
    for level, threshold in zip(LEVELS[1:], thresholds, strict=True):
        first, last = unit[..., ::level, :], unit[..., level - 1 :: level, :]
        both = (there[..., ::level] & there[..., level - 1 :: level]).unflatten(-1, (-1, block // level))
        cosine = (first * last).sum(-1).unflatten(-1, (-1, block // level)).where(both, 0).sum(-1)
        cap = torch.where(cosine > threshold * both.sum(-1), level, cap)
    return cap


def capped(levels: Tensor, cap: Tensor) -> Tensor:
    """No block coarser than its cap; what isn't read stays so. cap: [..., columns]."""
    return torch.minimum(levels, cap[..., None, :])


def forced(levels: Tensor, blocks: Tensor, visible: Tensor) -> Tensor:
    """`blocks`, bool of the levels' shape or one that spreads to it, are read whole where they are visible."""
    return torch.where(blocks & visible, 1, levels)


def density(levels: Tensor, visible: Tensor) -> float:
    """The mean of 1 / level over the visible pairs, a block that isn't read counted as nothing.

    >>> density(torch.tensor([[0, 1, 8, 0, 2, 8, 0, 2, 4, 0]]), torch.ones(1, 10, dtype=torch.bool))
    0.25
    """
    shares = torch.where(levels > 0, 1 / levels.clamp(min=1).double(), 0.0)
    seen = visible.expand_as(levels)
    return float((shares * seen).sum() / seen.sum())
