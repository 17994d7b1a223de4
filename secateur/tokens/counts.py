"""How many tokens stay: counts from targets, adaptive budgets, schedules over stages.

Pure functions on batches of sets `[S]` or `[S, n]`, padded at the end. Specs: recoverable-compression (outlier factor), flowcut
(entropy), adatoken-3d (mass), visiondrop and vflowopt (schedules).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from secateur.errors import SecateurError
from secateur.pruning.target import parse_target
from secateur.tokens.scores import entropy
from secateur.tokens.select import quotas


def amount_of(target: Any, where: str = "target") -> float | int:
    """A share of the tokens as a float, or a number of them as an int.

    >>> amount_of("25%"), amount_of("tokens=64")
    (0.25, 64)

    Raises `SecateurError` for anything else, and for no tokens at all.
    """
    parsed = parse_target(target)
    if parsed.kind == "share":
        return float(parsed.value)
    if parsed.kind == "tokens":
        if parsed.value < 1:
            raise SecateurError(
                "0 tokens would stay", where=where, fix="keep at least one, such as tokens=64"
            )
        return int(parsed.value)
    raise SecateurError(
        f"{parsed} doesn't say how many tokens stay", where=where, fix="a share such as 25%, or tokens=64"
    )


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
        kept = (total.double() * target).round().long()
    else:
        image = torch.arange(len(total), device=total.device) if image is None else image
        _, image = image.unique(return_inverse=True)
        images = torch.arange(int(image.max()) + 1 if len(image) else 0, device=total.device)
        sizes = total * (image[None] == images[:, None])  # [images, S]
        shares = sizes / sizes.sum(1, keepdim=True).clamp(min=1)
        kept = quotas(shares, torch.full((len(sizes),), target, device=total.device), sizes).sum(0)
    return torch.minimum(kept.clamp(min=1), total)


def floors(amount: Tensor) -> Tensor:
    """Whole tokens, int64; a product such as 640 x 0.2 may fall just short of a whole number.

    >>> floors(torch.tensor([127.9999999999, 3.7]))
    tensor([128,   3])
    """
    return (amount.double() + 1e-9).floor().long()


def ceils(amount: Tensor) -> Tensor:
    """Whole tokens, rounded up, int64; a product may lie just above a whole number."""
    return (amount.double() - 1e-9).ceil().long()


def by_mass(weights: Tensor, share: float, valid: Tensor | None = None) -> Tensor:
    """How many of each row's largest weights it takes to hold a share of their sum: [S, n] >= 0 -> [S] int64.

    >>> by_mass(torch.tensor([[0.30, 0.02, 0.01, 0.10, 0.01, 0.05, 0.01, 0.10]]), 0.9)
    tensor([4])

    A share that is reached but for rounding (1e-6) is reached; all of a row for a share of 1, none where its sum is 0.
    Spec: adatoken-3d. Raises `SecateurError` where a weight is NaN.
    """
    weights = weights.double() if valid is None else weights.double().masked_fill(~valid, 0)
    if weights.isnan().any():
        raise SecateurError("a token's weight isn't a number", where="tokens", fix="check the model for NaN")
    size = (
        torch.full_like(weights[:, 0], weights.shape[1], dtype=torch.int64) if valid is None else valid.sum(1)
    )
    total = weights.sum(1)
    held = weights.sort(dim=1, descending=True).values.cumsum(1) / total.clamp(min=1e-300)[:, None]
    count = (held < share - 1e-6).sum(1) + 1 if share < 1 else size
    return torch.where(total > 0, torch.minimum(count, size), 0)


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
    # reachability: a neighbour's own reach, or the distance where that is larger
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
    value = entropy(weights, valid)
    return value / sizes.to(value).clamp(min=2).log()


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
