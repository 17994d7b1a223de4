"""How many tokens stay, and where: counts from targets, quotas, adaptive budgets, schedules, places on a grid.

Pure functions on batches of sets, padded at the end: scores `[S, n]` with `valid [S, n]` (False = padding).
Ties go to the lowest index everywhere. Specs: holov (quotas), recoverable-compression (outlier factor),
flowcut (entropy), visiondrop and vflowopt (schedules), feather (strided grid), hiprune (neighbours).
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

    `scores` [S, n], any real type; `keep` [S] or one number, never more than a row has; `valid` [S, n] bool, the
    candidates (padding is False). A candidate with -inf still goes before padding.
    Raises `SecateurError` where a candidate's score is NaN.
    """
    valid = torch.ones_like(scores, dtype=torch.bool) if valid is None else valid
    return _places(scores, valid) < _column(keep, scores)


def _places(scores: Tensor, valid: Tensor) -> Tensor:
    """[S, n]: the place of every candidate in its row's order, best 0; n for what isn't a candidate."""
    values = scores.detach() if scores.dtype == torch.float64 else scores.detach().float()
    values = values.masked_fill(~valid, -torch.inf)
    if values.isnan().any():
        raise SecateurError(
            "a token's score isn't a number", where="tokens", fix="check the image and the model for NaN"
        )
    order = values.sort(dim=1, descending=True, stable=True).indices
    order = order.gather(1, (~valid).to(torch.uint8).gather(1, order).sort(dim=1, stable=True).indices)
    places = torch.empty_like(order).scatter_(1, order, _positions(order))
    return places.masked_fill(~valid, scores.shape[1])


def _positions(like: Tensor) -> Tensor:
    return torch.arange(like.shape[1], device=like.device).expand_as(like)


def _column(value: Count, like: Tensor) -> Tensor:
    """[S, 1] on the device of `like`."""
    return torch.as_tensor(value, device=like.device).reshape(-1, 1)
