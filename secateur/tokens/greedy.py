"""One greedy engine: picks tokens one after the other by a criterion, for all sets at once.

Criteria on distances or likenesses `[S, n, n]` between candidates, or on gains `[S, m, n]` of candidates over what is to
be covered. Padding-aware, a number of picks per set, ties to the lowest index, and the first k picks are those of any
larger k. Specs: divprune (max-min), todre (max-sum, k-centre), mmtok (coverage);
determinants for cdpruner, which has none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.errors import SecateurError
from secateur.utils.screen import Screen

FRESH = 16
"""Candidates whose gain is computed again at once by the lazy form of coverage."""


@dataclass(frozen=True, repr=False)
class Picks(Screen):
    """`order` [S, k] int64: positions in the order they were picked, -1 after a set's last.

    `values` [S, k] float32: what each pick was worth when picked, 0 where there is none.
    """

    order: Tensor
    values: Tensor

    def mask(self, n: int) -> Tensor:
        """bool [S, n]."""
        chosen = torch.zeros(len(self.order), n + 1, dtype=torch.bool, device=self.order.device)
        chosen.scatter_(1, self.order.masked_fill(self.order < 0, n), True)
        return chosen[:, :n]


def directions(features: Tensor, valid: Tensor | None = None, eps: float = 1e-8) -> Tensor:
    """Rows of length 1 in float32, [S, n, D]; padding is 0, and so is a row of zeros.

    Raises `SecateurError` where a token's feature isn't finite.
    """
    features = features.detach().float()
    if valid is not None and not valid.all():
        features = features.masked_fill(~valid[..., None], 0)
    norm = torch.linalg.vector_norm(features, dim=-1, keepdim=True)
    if not norm.isfinite().all():
        raise SecateurError(
            "a token's features aren't finite", where="tokens", fix="check the image and the model for NaN"
        )
    return features / norm.clamp(min=eps)


def cosine_distance(features: Tensor, valid: Tensor | None = None) -> Tensor:
    """1 - cosine of every two tokens of a set, [S, n, D] -> [S, n, n] float32."""
    rows = directions(features, valid)
    return 1 - rows @ rows.mT


def max_min(
    distance: Tensor, keep: Tensor | int, valid: Tensor | None = None, first: Tensor | None = None
) -> Picks:
    """Farthest first: the next pick is the one whose nearest pick is farthest (max-min diversity, k-centre).

    >>> max_min(cosine_distance(features), keep=64).mask(576)  # doctest: +SKIP

    `distance` [S, n, n] symmetric, `keep` [S], `valid` [S, n] the candidates. `first` [S]: the first picks, a pivot;
    None: the token whose nearest neighbour is farthest, as DivPrune does. A pick's value is its distance to the nearest
    earlier pick (of the first, without a pivot, to its nearest neighbour; a pivot's is 0).
    """
    return _by_distance(distance, keep, valid, first, torch.minimum)


def max_sum(
    distance: Tensor, keep: Tensor | int, valid: Tensor | None = None, first: Tensor | None = None
) -> Picks:
    """Max-sum diversity: the next pick has the largest sum of distances to all earlier picks. Arguments as in `max_min`."""
    return _by_distance(distance, keep, valid, first, torch.add)


def k_center(
    distance: Tensor, keep: Tensor | int, valid: Tensor | None = None, first: Tensor | None = None
) -> Picks:
    """Farthest first from a pivot, the lowest candidate when none is given: 2-approximates the k-centre radius."""
    if first is None:
        first = (
            torch.zeros(len(distance), dtype=torch.int64, device=distance.device)
            if valid is None
            else valid.to(torch.uint8).argmax(1)
        )
    return max_min(distance, keep, valid, first)


def _by_distance(
    distance: Tensor,
    keep: Tensor | int,
    valid: Tensor | None,
    first: Tensor | None,
    update: Callable[..., Tensor],
) -> Picks:
    sets, n = distance.shape[:2]
    keep, steps = _steps(keep, valid, sets, n, distance.device)
    _refuse_nan(distance)
    table, rows = distance.float().clone(), torch.arange(sets, device=distance.device)
    diagonal = table.diagonal(dim1=1, dim2=2)
    if first is None:
        diagonal.fill_(torch.inf)
        near = table if valid is None else table.masked_fill(~valid[:, :, None], torch.inf)
        score = near.amin(1)
        score = torch.where(score.isposinf(), 0.0, score)  # alone in its set
    else:
        score = torch.zeros(sets, n, device=distance.device)
    diagonal.fill_(-torch.inf)  # taken: the minimum and the sum with it never win again
    if valid is not None:
        score = score.masked_fill(~valid, -torch.inf)
    picks: list[tuple[Tensor, Tensor]] = []
    for step in range(steps):
        if step == 0 and first is not None:
            pick, value = first, torch.zeros(sets, device=distance.device)
        else:
            value, pick = score.max(1)
        picks.append((pick, value))
        row = table[rows, pick]
        if step == 0:
            score = row if valid is None else row.masked_fill_(~valid, -torch.inf)
        else:
            update(score, row, out=score)
    return _finish(picks, keep)


def max_determinant(kernel: Tensor, keep: Tensor | int, valid: Tensor | None = None) -> Picks:
    """The next pick raises the determinant of the picks' kernel most: MAP inference of a determinantal point process.

    >>> max_determinant(torch.tensor([[[1.0, 0.9, 0.0], [0.9, 1.0, 0.0], [0.0, 0.0, 0.5]]]), 2).order
    tensor([[0, 2]])

    `kernel` [S, n, n] positive semidefinite. A pick's value is the factor by which it multiplies the determinant: what is
    left of its diagonal (Chen et al. 2018, arXiv 1709.05135). Where nothing is left, picks follow by place.
    """
    sets, n = kernel.shape[:2]
    keep, steps = _steps(keep, valid, sets, n, kernel.device)
    _refuse_nan(kernel)
    kernel, rows = kernel.float(), torch.arange(sets, device=kernel.device)
    left = kernel.diagonal(dim1=1, dim2=2).clone()
    if valid is not None:
        left = left.masked_fill(~valid, -torch.inf)
    factors = torch.zeros(sets, steps, n, device=kernel.device)
    picks: list[tuple[Tensor, Tensor]] = []
    for step in range(steps):
        value, pick = left.max(1)
        picks.append((pick, value))
        before = factors[:, :step]
        row = kernel[rows, pick] - torch.einsum("st,stn->sn", before[rows, :, pick], before)
        row = row / value.clamp(min=0).sqrt()[:, None]
        factors[:, step] = row.masked_fill((value <= 0)[:, None], 0)
        left = (left - factors[:, step] ** 2).clamp(min=0).masked_fill(left == -torch.inf, -torch.inf)
        left[rows, pick] = -torch.inf
    return _finish(picks, keep)


def coverage(
    gains: Tensor,
    keep: Tensor | int,
    valid: Tensor | None = None,
    *,
    covered: Tensor | float = 0.0,
    own: Tensor | None = None,
    lazy: bool | None = None,
) -> Picks:
    """Maximum coverage: the next pick raises sum_i max(covered_i, best gains_ij), and the sum of `own`, the most.

    >>> coverage(torch.tensor([[[0.9, 0.7, 0.1], [0.0, 0.1, 0.6]]]), keep=2).order
    tensor([[0, 2]])

    `gains` [S, m, n]: how well candidate j covers row i (MMTok, arXiv 2508.18264); a row of padding is all 0. `covered`:
    what every row starts from, one number or [S, m]. `own` [S, n]: what a pick is worth beside that. `lazy`: compute again only gains that can still win, since they
    never rise (Minoux 1978); picks are the same. None: on the CPU.
    """
    sets, _, n = gains.shape
    keep, steps = _steps(keep, valid, sets, n, gains.device)
    _refuse_nan(gains)
    table = gains.float().mT.contiguous()
    best = torch.as_tensor(covered, dtype=torch.float32, device=gains.device).expand(table.shape[::2]).clone()
    rows = torch.arange(sets, device=gains.device)
    worth = torch.stack([_worth(one, base) for one, base in zip(table, best)]) if sets else table.sum(2)
    own = torch.zeros_like(worth) if own is None else own.float()
    _refuse_nan(own)
    worth = worth + own
    if valid is not None:
        worth = worth.masked_fill(~valid, -torch.inf)
    picks: list[tuple[Tensor, Tensor]] = []
    lazy = gains.device.type == "cpu" if lazy is None else lazy
    for step in range(steps):
        if lazy and step:
            value, pick = _lazily(table, best, worth, own, rows)
        else:
            value, pick = worth.max(1)
        picks.append((pick, value))
        torch.maximum(best, table[rows, pick], out=best)
        worth[rows, pick] = -torch.inf
        if not lazy:
            worth = torch.where(worth == -torch.inf, worth, _worth(table, best) + own)
    return _finish(picks, keep)


def facility_location(
    likeness: Tensor, keep: Tensor | int, valid: Tensor | None = None, *, lazy: bool | None = None
) -> Picks:
    """Coverage of the candidates by themselves: maximises sum_i max_{j picked} likeness_ij. `likeness` [S, n, n], any sign.

    A value is what the pick adds to that sum, counted from the least likeness of each row.
    """
    if valid is not None:
        likeness = likeness.masked_fill(~(valid[:, :, None] & valid[:, None, :]), torch.inf)
    least = likeness.amin(2)
    if valid is not None:
        least = least.masked_fill(~valid, 0)
        likeness = likeness.masked_fill(likeness.isposinf(), -torch.inf)
    return coverage(likeness, keep, valid, covered=least, lazy=lazy)


def _worth(table: Tensor, best: Tensor) -> Tensor:
    """[.., r, m] candidates' rows, [.., m] covered -> [.., r] how much each adds."""
    return (table - best[..., None, :]).clamp_(min=0).sum(-1)


def _lazily(table: Tensor, best: Tensor, worth: Tensor, own: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The best candidates, after enough of the stale gains in `worth` (upper bounds) were renewed in place."""
    fresh = torch.zeros_like(worth, dtype=torch.bool)
    few = min(FRESH, worth.shape[1])
    while True:
        value, pick = worth.max(1)
        open_sets = (~fresh[rows, pick] & (value > -torch.inf)).nonzero().squeeze(1)
        if not len(open_sets):
            return value, pick
        tried = worth[open_sets].masked_fill(fresh[open_sets], -torch.inf).topk(few, dim=1).indices
        tried[:, -1] = pick[open_sets]  # the one that must be renewed, wherever topk put it among equals
        place = open_sets[:, None], tried
        renewed = _worth(table[place], best[open_sets]) + own[place]
        worth[place] = torch.where(worth[place] == -torch.inf, worth[place], renewed)
        fresh[place] = True


def _steps(
    keep: Tensor | int, valid: Tensor | None, sets: int, n: int, device: torch.device
) -> tuple[Tensor, int]:
    keep = torch.as_tensor(keep, device=device).expand(sets)
    keep = keep.clamp(max=n) if valid is None else torch.minimum(keep, valid.sum(1))
    return keep, int(keep.max()) if sets else 0


def _finish(picks: list[tuple[Tensor, Tensor]], keep: Tensor) -> Picks:
    if not picks:
        return Picks(keep.new_zeros(len(keep), 0), torch.zeros(len(keep), 0, device=keep.device))
    order, values = (torch.stack(part, 1) for part in zip(*picks))
    late = torch.arange(order.shape[1], device=order.device) >= keep[:, None]
    return Picks(order.masked_fill(late, -1), values.masked_fill(late, 0.0))


def _refuse_nan(table: Tensor) -> None:
    if table.numel() and table.amax().isnan():  # the maximum passes a NaN on
        raise SecateurError(
            "a token's score isn't a number", where="tokens", fix="check the image and the model for NaN"
        )
