"""The column sweep of SparseGPT: choose, remove, and let the columns behind make up for what left."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from secateur.pruning.select import ahead_of, top_k

PANEL = 16
"""Columns that are swept before their error is carried to the rest of the block in one product."""


def sweep(
    weights: Sequence[Tensor],
    upper: Tensor,
    dead: Tensor,
    removed: Sequence[int],
    n_m: tuple[int, int] | None = None,
    blocksize: int = 128,
    exact: bool = True,
) -> list[tuple[Tensor, Tensor]]:
    """(updated weight, kept mask) of each of the matrices [out, in], which have the same inputs.

    >>> [(new, mask)] = sweep([weight], R, dead, removed=[weight.numel() // 2])

    upper: R of H = R Rᵀ; U = R⁻¹. dead: inputs that are always zero, whose weights become 0.
    removed: how many weights leave each matrix; each has its own threshold in every block of columns.

    Their rows are swept together. The change D = new - old of finished columns acts on column j as -(D R)_j / R_jj, so
    that U is only needed within a block, where it is the inverse of R's own block; the full inverse is never formed.
    """
    if not any(removed):
        return [(weight, torch.ones_like(weight, dtype=torch.bool)) for weight in weights]
    columns, unit = len(upper), n_m[1] if n_m else 1
    step = max(unit, blocksize // unit * unit)
    ends = list(accumulate(len(weight) for weight in weights))
    lanes = [slice(end - len(weight), end) for end, weight in zip(ends, weights)]
    # columns are rows here: a column of the matrices is then contiguous
    old = torch.empty(columns, ends[-1], device=upper.device)
    for lane, weight in zip(lanes, weights):
        old[:, lane] = weight.T
    old[dead] = 0
    change = torch.zeros_like(old)
    gone = torch.zeros(old.shape, dtype=torch.bool, device=old.device)
    for start in range(0, columns, step):
        stop = min(start + step, columns)
        own = slice(start, stop)
        unit_matrix = torch.eye(stop - start, device=old.device)
        inverse = torch.linalg.solve_triangular(upper[own, own], unit_matrix, upper=True)
        block, diagonal = old[own].clone(), inverse.diagonal()[:, None]
        if start:
            block.addmm_((upper[:start, own] @ inverse).T, change[:start], alpha=-1)
        if n_m is None:
            for lane, weight, total in zip(lanes, weights, removed):
                score = (block[:, lane] / diagonal).square_()
                due = total * stop // columns - total * start // columns
                gone[own, lane] = _lowest(score, due, total / weight.numel(), exact)
        _columns(block, gone[own], inverse, n_m)
        torch.sub(block.masked_fill_(gone[own], 0), old[own], out=change[own])
    new = old.add_(change).masked_fill_(gone, 0)
    return [
        (
            new[:, lane].T.to(weight.dtype, memory_format=torch.contiguous_format),
            ~gone[:, lane].T.contiguous(),
        )
        for lane, weight in zip(lanes, weights)
    ]


def _lowest(score: Tensor, count: int, share: float, exact: bool) -> Tensor:
    """The mask of the `count` lowest; not exact: of all up to the value at ⌊share * n⌋."""
    if exact or not count:
        return ~top_k(score, score.numel() - count)
    index = min(int(score.numel() * share), score.numel() - 1)
    return score <= score.flatten().kthvalue(index + 1).values


def _columns(block: Tensor, gone: Tensor, inverse: Tensor, n_m: tuple[int, int] | None) -> None:
    """One block of columns [columns, rows], in place: every column that leaves is made up for by those behind it.

    With `n_m`, every group's mask is chosen, into `gone`, when its first column comes up.
    """
    diagonal = inverse.diagonal()[:, None]
    group = n_m[1] if n_m else PANEL
    width = max(group, PANEL // group * group)
    errors = torch.empty_like(block)
    scaled = torch.empty_like(block) if n_m else gone / diagonal
    for first in range(0, len(block), width):
        last = min(first + width, len(block))
        panel = slice(first, last)
        if first:
            block[panel].addmm_(inverse[:first, panel].T, errors[:first], alpha=-1)
        for j in range(first, last):
            if n_m and (j - first) % group == 0:
                own = slice(j, j + group)
                gone[own] = ahead_of((block[own] / diagonal[own]).abs_()) >= n_m[0]
                torch.div(gone[own], diagonal[own], out=scaled[own])
            torch.mul(block[j], scaled[j], out=errors[j])
            if j + 1 < last:
                block[j + 1 : last].addr_(inverse[j, j + 1 : last], errors[j], alpha=-1)
