"""How many tokens stay, and where: counts from targets, quotas, adaptive budgets, schedules, places on a grid.

Pure functions on batches of sets, padded at the end: scores `[S, n]` with `valid [S, n]` (False = padding).
Ties go to the lowest index everywhere. Specs: holov (quotas), recoverable-compression (outlier factor),
flowcut (entropy), visiondrop and vflowopt (schedules), feather (strided grid), hiprune (neighbours).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from secateur.errors import SecateurError
from secateur.tokens.scores import entropy

Count = Tensor | int


def counts(total: Tensor, target: float, image: Tensor | None = None) -> Tensor:
    """How many tokens of each set stay: a float is a share of the set, an int a count per image.

    >>> counts(torch.tensor([576, 45]), 0.1)                            # 57.6 and 4.5: half to even
    tensor([58,  4])
    >>> counts(torch.tensor([576, 576, 576]), 64, torch.tensor([0, 0, 1]))   # two crops of one image, and an image
    tensor([32, 32, 64])

    `total` [S] int64; `image` [S]: sets with the same number share one image's count, in proportion to their size.
    At least one token of every set that has any stays, so a count below the number of crops is exceeded.
    Raises `SecateurError` for a share outside 0..1 and a count below 1.
    """
    if target <= 0 or (isinstance(target, float) and target > 1):
        raise SecateurError(
            f"{target} is no number of tokens to keep", where="target", fix="a share such as 25%, or a count"
        )
    if isinstance(target, float):
        found = (total.double() * target).round().long()
    else:
        image = torch.arange(len(total), device=total.device) if image is None else image
        _, image = image.unique(return_inverse=True)
        members = (
            image[None]
            == torch.arange(int(image.max()) + 1 if len(image) else 0, device=total.device)[:, None]
        )
        sizes = total * members
        shares = sizes / sizes.sum(1, keepdim=True).clamp(min=1)
        found = quotas(shares, torch.full((len(sizes),), target, device=total.device), sizes).sum(0)
    return torch.minimum(found.clamp(min=1), total)


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
    (HoloV's rule, arXiv 2510.02912; its rounding is the sheet's). Gives [S, C] int64, rows summing to the budget where
    the caps allow. Raises `SecateurError` where a weight is NaN.
    """
    weights, budget = weights.double().clamp(min=0), _column(budget, caps).long()
    budget = torch.minimum(budget.expand(len(caps), 1), caps.sum(1, keepdim=True))
    found = (weights * budget).floor().long()
    exists = caps > 0
    found = (found + (_places(weights, exists) < budget - found.sum(1, keepdim=True))) * exists
    found = torch.minimum(found, caps)
    while (surplus := budget - found.sum(1, keepdim=True)).any():
        room = caps - found
        gain = weights * room
        gain = torch.where(gain.sum(1, keepdim=True) > 0, gain, room.double())
        more = (surplus * gain / gain.sum(1, keepdim=True).clamp(min=1e-300)).floor().long()
        more = more + ((_places(weights, room > 0) < surplus - more.sum(1, keepdim=True)) & (room > 0))
        found = torch.minimum(found + more, caps)
    return found


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


def outlier_factor(values: Tensor, neighbours: int, valid: Tensor | None = None) -> Tensor:
    """Local outlier factor of the numbers of every row: about 1 among others, larger apart from them.

    >>> outlier_factor(torch.tensor([[1.0, 1.1, 1.25, 9.0]]), 2).argmax()
    tensor(3)

    `values` [S, n] -> [S, n] float64. Exactly `neighbours` nearest others count, all there are if fewer; equally near
    ones by index (Breunig et al. 2000 as in scikit-learn; an outlier by its "auto" rule has a factor above 1.5).
    A number without others has factor 1.
    """
    values = values.double()
    valid = torch.ones_like(values, dtype=torch.bool) if valid is None else valid
    apart = (values[:, :, None] - values[:, None, :]).abs().masked_fill(~valid[:, None, :], torch.inf)
    apart.diagonal(dim1=1, dim2=2).fill_(torch.inf)
    distance, near = (part[..., :neighbours] for part in apart.sort(dim=2, stable=True))
    used = distance.isfinite()
    count = used.sum(2).clamp(min=1)
    reach_of = distance.masked_fill(~used, 0).amax(2)
    rows = torch.arange(len(values), device=values.device)[:, None, None]
    reach = torch.maximum(reach_of[rows, near], distance).masked_fill(~used, 0)
    density = 1 / (reach.sum(2) / count + 1e-10)
    factor = (density[rows, near] * used).sum(2) / count / density
    return torch.where(used.any(2) & valid, factor, 1.0)


def outliers(values: Tensor, neighbours: int, valid: Tensor | None = None, threshold: float = 1.5) -> Tensor:
    """[S, n] bool: which numbers have an outlier factor above the threshold. See `outlier_factor`."""
    return outlier_factor(values, neighbours, valid) > threshold


def entropy_ratio(weights: Tensor, valid: Tensor | None = None) -> Tensor:
    """Entropy of each row of weights, normalised to sum 1, as a share of the highest there can be: [S, n] -> [S].

    >>> entropy_ratio(torch.ones(1, 8))
    tensor([1.], dtype=torch.float64)
    """
    sizes = torch.full((len(weights),), weights.shape[1]) if valid is None else valid.sum(1)
    found = entropy(weights, valid)
    return found / sizes.to(found).clamp(min=2).log()


def entropy_share(weights: Tensor, valid: Tensor | None = None) -> Tensor:
    """The share of what may leave that FlowCut lets leave, [S]: 1 - ratio^2, nothing where weights are spread evenly.

    >>> entropy_share(torch.tensor([[1.0, 0.0, 0.0]]))
    tensor([1.], dtype=torch.float64)

    `weights` [S, n] >= 0, see `entropy_ratio` (arXiv 2505.19536).
    """
    return 1 - entropy_ratio(weights, valid) ** 2


def geometric(stages: int = 4, first: float = 1.5) -> list[float]:
    """Shares of the target that equal stages keep: falling by one ratio from `first`, with mean 1.

    >>> [round(32 * share) for share in geometric()]
    [48, 35, 26, 19]

    Raises `SecateurError` where no ratio above 0 does it: `first` must be below the number of stages.
    """
    if not 0 < first < stages:
        raise SecateurError(f"{stages} stages can't start at {first} of their mean", where="geometric")
    low, high = 0.0, float(stages)
    for _ in range(100):
        ratio = (low + high) / 2
        low, high = (ratio, high) if first * sum(ratio**i for i in range(stages)) < stages else (low, ratio)
    return [first * ratio**i for i in range(stages)]


def mean_over_layers(kept: Sequence[float], layers: Sequence[int]) -> float:
    """Mean number (or share) of tokens a layer sees, when stage i keeps `kept[i]` for `layers[i]` layers.

    >>> mean_over_layers([48, 35, 26, 19], [8, 8, 8, 8])
    32.0
    """
    return sum(k * n for k, n in zip(kept, layers, strict=True)) / sum(layers)


def last_ratio(mean: float, ratios: Sequence[float], layers: Sequence[int]) -> float:
    """The keep ratio of the last stage that makes the mean over layers `mean`, in 0..1: each ratio is of what was left.

    >>> round(last_ratio(0.25, [0.2651026, 0.9833433], [9, 9, 10]), 2)
    0.87

    `ratios` of all stages but the last, `layers` of all (VFlowOpt, arXiv 2508.05211).
    """
    left, spent = 1.0, 0.0
    for ratio, count in zip(ratios, layers, strict=False):
        left *= ratio
        spent += left * count
    return min(1.0, max(0.0, (mean * sum(layers) - spent) / (layers[-1] * left)))


def strided_grid(grid_row: Tensor, grid_col: Tensor, stride: int) -> Tensor:
    """[S, n] bool: tokens whose row and column are both multiples of `stride`, from the top left; -1 is no place."""
    placed = (grid_row >= 0) & (grid_col >= 0)
    return (grid_row % stride == 0) & (grid_col % stride == 0) & placed


def even_grid(height: int, width: int, keep: int) -> Tensor:
    """Places (row * width + column, ascending) of exactly `keep` tokens spread evenly over a grid: int64 [keep].

    >>> even_grid(4, 4, 4)
    tensor([ 5,  7, 13, 15])

    Rows are taken evenly in a number that makes the spacing as square as it can be; the tokens are divided evenly over
    them, and stand evenly within each.
    """
    keep = min(keep, height * width)
    rows = min(height, max(1, round((keep * height / width) ** 0.5), -(-keep // width)))
    rows = min(rows, max(keep, 1))
    spread = lambda count, size: ((torch.arange(count) + 0.5) * size / max(count, 1)).floor().long()
    edges = [keep * i // rows for i in range(rows + 1)]
    chosen = [row * width + spread(b - a, width) for row, a, b in zip(spread(rows, height), edges, edges[1:])]
    return torch.cat(chosen) if chosen else torch.zeros(0, dtype=torch.int64)


def rectangle(grid_row: Tensor, grid_col: Tensor, valid: Tensor) -> list[tuple[int, int]]:
    """Height and width of the rectangle that each set's tokens fill in raster order; (1, count) where they fill none."""
    found = []
    for row, column, count in zip(grid_row, grid_col, valid.sum(1).tolist()):
        row, column, place = row[:count], column[:count], torch.arange(count, device=row.device)
        height, width = len(row.unique()), max(len(column.unique()), 1)
        full = height * width == count and bool(
            (row - row[:1] == place // width).all() and (column - column[:1] == place % width).all()
        )
        found.append((height, width) if count and full else (1, count))
    return found


def neighbours(mask: Tensor, places: Tensor, width: Tensor, height: Tensor, edges: str = "clip") -> Tensor:
    """`mask` and the tokens left, right, above and below of it on their grid, [S, n] bool.

    `places` [S, n] int64: row * width + column of every token, -1 for none; `width`, `height` [S]. `edges`: "clip" stops at the
    grid's border; "wrap" counts on flat places, so the right edge's neighbour is the next row's first, and clamps what
    falls outside to the first and last place (as HiPrune's code does). A place whose token is gone is passed over.
    """
    if edges not in ("clip", "wrap"):
        raise SecateurError(f"there is no rule {edges!r} for edges", where="neighbours", fix="clip or wrap")
    width, last = width[:, None], (width * height)[:, None] - 1
    taken = torch.zeros(len(mask), int(last.max()) + 2, dtype=torch.bool, device=mask.device)
    column = places % width.clamp(min=1)
    there = mask & (places >= 0)
    steps = (
        (0, True),
        (-1, column > 0),
        (1, column < width - 1),
        (-width, places >= width),
        (width, places + width <= last),
    )
    for step, inside in steps:
        at = (places + step).clamp(min=0).minimum(last) if edges == "wrap" else places + step
        who = there if edges == "wrap" else there & inside
        taken.scatter_(1, at.masked_fill(~who, taken.shape[1] - 1), True)
    taken[:, -1] = False
    return mask | taken.gather(1, places.masked_fill(places < 0, taken.shape[1] - 1))
