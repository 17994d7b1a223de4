"""Selection: which weights or units stay, given scores and how many may.

Ties are broken by position, the earlier stays, so the same scores always give the same choice.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from secateur.errors import SecateurError


def top_k(scores: Tensor, k: int) -> Tensor:
    """Mask of the k highest of all scores (any shape); of equal scores the earlier index stays.

    >>> top_k(torch.tensor([1.0, 3.0, 3.0, 2.0]), 1)
    tensor([False,  True, False, False])
    """
    flat = scores.reshape(1, -1)
    return _top_k_rows(flat, k).reshape(scores.shape)


def top_k_rows(scores: Tensor, k: int) -> Tensor:
    """Mask of the k highest of every row of [rows, columns] scores.

    Selection by the k-th value instead of a sort: equal scores at the threshold are settled by position.
    Raises `SecateurError` when a score is NaN.

    >>> top_k_rows(torch.tensor([[1.0, 2.0, 2.0, 0.0]]), 2)
    tensor([[False,  True,  True, False]])
    """
    return _top_k_rows(scores, k)


def _top_k_rows(scores: Tensor, k: int) -> Tensor:
    columns = scores.shape[1]
    if k <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    if k >= columns:
        return torch.ones_like(scores, dtype=torch.bool)
    values = scores.detach()
    values = values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
    if values.device.type == "cpu":
        # numpy's vectorised partition is several times faster than kthvalue or topk
        threshold = torch.from_numpy(np.partition(values.numpy(), columns - k, axis=1)[:, columns - k])[
            :, None
        ]
    else:
        threshold = values.topk(k, dim=1, sorted=False).values.amin(1, keepdim=True)
    mask = values >= threshold
    count = mask.sum(1)
    if (count == k).all():
        return mask
    if (count < k).any():
        raise SecateurError(
            "a score isn't a number", where="selection", fix="check the weights and the data for NaN"
        )
    equal = values == threshold
    ties = equal.sum(1)
    row, column = equal.nonzero(as_tuple=True)
    order = torch.arange(len(row), device=row.device) - (ties.cumsum(0) - ties)[row]
    late = order >= (ties - (count - k))[row]
    mask[row[late], column[late]] = False
    return mask


def exact_rows(scores: Tensor, keep: int) -> Tensor:
    """Mask that keeps `keep` of all weights, as evenly over rows as can be.

    Each row keeps ⌊keep / rows⌋; what is left over goes to the rows whose next weight scores highest.
    """
    each, extra = divmod(keep, len(scores))
    mask = top_k_rows(scores, each)
    if not extra:
        return mask
    lowest = (
        torch.finfo(scores.dtype).min if scores.dtype.is_floating_point else torch.iinfo(scores.dtype).min
    )
    left = scores.masked_fill(mask, lowest)
    where = left.argmax(1)
    best = left.gather(1, where[:, None]).squeeze(1)
    chosen = top_k(best, extra).nonzero().squeeze(1)
    mask[chosen, where[chosen]] = True
    return mask


def n_of_m(scores: Tensor, n: int, m: int) -> Tensor:
    """Mask that keeps the n highest of every m consecutive weights of a row.

    >>> n_of_m(torch.tensor([[1.0, 4.0, 3.0, 2.0]]), 2, 4)
    tensor([[False,  True,  True, False]])
    """
    rows, columns = scores.shape
    if columns % m:
        raise SecateurError(
            f"a row of {columns} weights can't be parted into groups of {m}", where=f"pattern {n}:{m}"
        )
    groups = scores.reshape(-1, m)
    if m > 8:
        return top_k_rows(groups, n).reshape(rows, columns)
    return (ahead_of(groups.T.contiguous()) < n).T.reshape(rows, columns)


def ahead_of(lanes: Tensor) -> Tensor:
    """[m, groups] scores -> how many of its group are ahead of each: higher, or equal and earlier.

    >>> ahead_of(torch.tensor([[1.0], [4.0], [4.0]])).T
    tensor([[2, 0, 1]], dtype=torch.int8)
    """
    rank = torch.zeros(lanes.shape, dtype=torch.int8, device=lanes.device)
    for second in range(1, len(lanes)):
        ahead = lanes[:second] >= lanes[second]
        rank[second] += ahead.sum(0, dtype=torch.int8)
        rank[:second] += ~ahead
    return rank


@dataclass(frozen=True)
class Pattern:
    """What a layer's mask must look like: how many weights stay and where they compete.

    `keep` weights stay in all, compared per `scope` (row, layer, or global, whose counts come from a comparison over
    layers); with `n_m` every m consecutive inputs keep n.
    """

    keep: int
    scope: str = "row"
    n_m: tuple[int, int] | None = None

    def select(self, scores: Tensor, parts: int = 1, later_stays: bool = False) -> Tensor:
        """Bool mask like `scores` [out, in], True = kept.

        parts: equal runs of rows with inputs of their own (experts). Each is a layer: norms over different tokens can't
        be compared. later_stays: which of equal scores stays.
        """
        if later_stays:
            return self.select(scores.flip(0, 1), parts).flip(0, 1)
        if self.n_m:
            return n_of_m(scores, *self.n_m)
        if self.scope == "layer":
            return exact_rows(scores.reshape(parts, -1), self.keep).reshape(scores.shape)
        return exact_rows(scores, self.keep) if self.scope == "row" else top_k(scores, self.keep)
