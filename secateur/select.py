"""Selection: which weights or units stay, given scores and how many may.

Ties are broken by position, the earlier stays, so the same scores always give the same choice.
"""

from __future__ import annotations

from dataclasses import dataclass

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
    values = scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores
    threshold = values.kthvalue(columns - k + 1, dim=1, keepdim=True).values
    above = values > threshold
    missing = k - above.sum(1, keepdim=True)
    equal = values == threshold
    surplus = equal.sum(1, keepdim=True) > missing
    if surplus.any():
        equal = equal & (equal.cumsum(1) <= missing)
    return above | equal


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
    best, where = scores.masked_fill(mask, lowest).max(1)
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
    return top_k_rows(scores.reshape(-1, m), n).reshape(rows, columns)


@dataclass(frozen=True)
class Pattern:
    """What a layer's mask must look like: how many weights stay and where they compete.

    `keep` weights stay in all, compared per `scope` (row, layer); with `n_m` every m consecutive inputs keep n.
    """

    keep: int
    scope: str = "row"
    n_m: tuple[int, int] | None = None

    def select(self, scores: Tensor) -> Tensor:
        """Bool mask like `scores` [out, in], True = kept."""
        if self.n_m:
            return n_of_m(scores, *self.n_m)
        return exact_rows(scores, self.keep) if self.scope == "row" else top_k(scores, self.keep)
