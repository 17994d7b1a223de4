"""Which tokens stay: the highest scores of a row or a group, and a budget divided over groups.

Pure functions on batches of sets, padded at the end: scores `[S, n]` with `valid [S, n]` (False = padding). Ties go to the
lowest index everywhere. Spec: holov (quotas).
"""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.errors import SecateurError

Count = Tensor | int


def top_per_row(scores: Tensor, keep: Count, valid: Tensor | None = None) -> Tensor:
    """Mask of the `keep` highest scores of every row; of equal scores the lowest index stays.

    >>> top_per_row(torch.tensor([[1.0, 3.0, 3.0, 2.0]]), torch.tensor([1]))
    tensor([[False,  True, False, False]])

    `scores` [S, n], any real type; `keep` [S] or one number; `valid` [S, n] bool, the candidates (padding is False),
    all of which stay where they are fewer. A candidate with -inf still goes before padding.
    Raises `SecateurError` where a candidate's score is NaN.
    """
    valid = torch.ones_like(scores, dtype=torch.bool) if valid is None else valid
    return (_places(scores, valid) < _column(keep, scores)) & valid


def top_per_group(scores: Tensor, groups: Tensor, quota: Tensor, valid: Tensor | None = None) -> Tensor:
    """Mask of the `quota[s, g]` highest scores of every group g of every row s.

    >>> top_per_group(torch.tensor([[1.0, 2.0, 5.0, 4.0]]), torch.tensor([[0, 0, 1, 1]]), torch.tensor([[2, 1]]))
    tensor([[ True,  True,  True, False]])

    `scores` [S, n], `groups` [S, n] in 0..C-1 (ignored where not valid), `quota` [S, C].
    """
    valid = torch.ones_like(scores, dtype=torch.bool) if valid is None else valid
    # sorted by group, then by place; a token's place within its group is its own less that of the group's first
    places = _places(scores, valid)
    groups = groups.masked_fill(~valid, quota.shape[1])
    order = places.argsort(dim=1, stable=True)
    order = order.gather(1, groups.gather(1, order).argsort(dim=1, stable=True))
    size = torch.zeros(len(quota), quota.shape[1] + 1, dtype=torch.int64, device=scores.device)
    size.scatter_add_(1, groups, torch.ones_like(groups))
    start = size.cumsum(1) - size
    place = torch.empty_like(order).scatter_(1, order, _positions(order)) - start.gather(1, groups)
    room = torch.cat([quota, torch.zeros_like(quota[:, :1])], 1)
    return (place < room.gather(1, groups)) & valid


def _places(scores: Tensor, valid: Tensor) -> Tensor:
    """[S, n]: the place of every candidate in its row's order, best 0; what isn't a candidate comes last."""
    values = scores.detach() if scores.dtype == torch.float64 else scores.detach().float()
    values = values.masked_fill(~valid, -torch.inf)
    if values.isnan().any():
        raise SecateurError(
            "a token's score isn't a number", where="tokens", fix="check the image and the model for NaN"
        )
    # stable sorts: by score, then candidates before the rest
    order = values.sort(dim=1, descending=True, stable=True).indices
    order = order.gather(1, (~valid).to(torch.uint8).gather(1, order).sort(dim=1, stable=True).indices)
    return torch.empty_like(order).scatter_(1, order, _positions(order))


def _positions(like: Tensor) -> Tensor:
    return torch.arange(like.shape[1], device=like.device).expand_as(like)


def _column(value: Count, like: Tensor) -> Tensor:
    """[S, 1] on the device of `like`."""
    return torch.as_tensor(value, device=like.device).reshape(-1, 1)


def complement(mask: Tensor, valid: Tensor) -> Tensor:
    """What isn't in `mask`, without the padding."""
    return ~mask & valid


def quotas(weights: Tensor, budget: Count, caps: Tensor) -> Tensor:
    """Divides a budget of each row over its groups by weight, never above a group's cap.

    >>> quotas(torch.tensor([[0.4, 0.6]]), 4, torch.tensor([[4, 4]]))     # floors 1 and 2, the rest to the largest
    tensor([[1, 3]])

    `weights` [S, C] >= 0, summing to about 1; `budget` one number or [S]; `caps` [S, C] int64, 0 where there is no such
    group. First floor(weight * budget), what is left over one each by weight; then what a cap cut off goes to groups
    with room, in proportion to weight * room, what that leaves one each by weight, until all is spent or all is full
    (HoloV's rule, arXiv 2510.02912; its rounding is ours). Returns [S, C] int64, rows summing to the budget where
    the caps allow. Raises `SecateurError` where a weight is NaN.
    """
    weights, budget = weights.double().clamp(min=0), _column(budget, caps).long()
    budget = torch.minimum(budget.expand(len(caps), 1), caps.sum(1, keepdim=True))
    shares = (weights * budget).floor().long()  # [S, C]
    exists = caps > 0
    shares = (shares + (_places(weights, exists) < budget - shares.sum(1, keepdim=True))) * exists
    shares = torch.minimum(shares, caps)
    # every round spends something: floors may all be 0, the rest by weight is not
    while (surplus := budget - shares.sum(1, keepdim=True)).any():
        room = caps - shares
        gain = weights * room
        gain = torch.where(gain.sum(1, keepdim=True) > 0, gain, room.double())
        more = (surplus * gain / gain.sum(1, keepdim=True).clamp(min=1e-300)).floor().long()
        more = more + ((_places(weights, room > 0) < surplus - more.sum(1, keepdim=True)) & (room > 0))
        shares = torch.minimum(shares + more, caps)
    return shares


def even_runs(valid: Tensor, parts: Tensor | int) -> tuple[Tensor, Tensor]:
    """Parts each set into runs of equal length, the first ones longer by one: the run of each token [S, n], sizes [S, C].

    >>> even_runs(torch.ones(1, 5, dtype=torch.bool), 2)
    (tensor([[0, 0, 0, 1, 1]]), tensor([[3, 2]]))

    `valid` [S, n], padding at the end; `parts`: how many runs, one number or [S], at most one a token.
    """
    count = valid.sum(1)
    parts = torch.minimum(torch.as_tensor(parts, device=valid.device).clamp(min=1), count.clamp(min=1))
    run = torch.arange(int(parts.max()), device=valid.device)
    sizes = (count // parts)[:, None] + (run < (count % parts)[:, None])
    sizes = sizes * (run < parts[:, None])
    place = torch.arange(valid.shape[1], device=valid.device).expand_as(valid).contiguous()
    return torch.searchsorted(sizes.cumsum(1), place, right=True).clamp(max=len(run) - 1), sizes


def strided(count: Tensor, keep: Tensor, n: int) -> Tensor:
    """bool [S, n]: places 0, step, 2 step, ... with a step of floor(count / keep), `keep` of them; both [S].

    >>> strided(torch.tensor([7]), torch.tensor([3]), 7).nonzero()[:, 1].tolist()
    [0, 2, 4]
    """
    place = torch.arange(n, device=count.device)
    step = (count // keep.clamp(min=1)).clamp(min=1)[:, None]
    return (place % step == 0) & (place // step < keep[:, None]) & (place < count[:, None])
