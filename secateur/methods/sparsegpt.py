"""SparseGPT: weights leave by the error they cause, and those that stay make up for it, column by column.

Frantar & Alistarh 2023, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot",
https://arxiv.org/abs/2301.00774. Spec: weight-baselines, items 7 and 10.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import ClassVar

import torch
from torch import Tensor

from secateur.budget import divide
from secateur.errors import SecateurError
from secateur.method import WeightMethod, register
from secateur.select import Pattern, ahead_of, top_k
from secateur.stats.layer import InputStats, LayerStats
from secateur.stats.stream import Block
from secateur.taxonomy import MethodInfo

PANEL = 16
"""Columns that are swept before their error is carried to the rest of the block in one product."""


@register
@dataclass
class SparseGPT(WeightMethod):
    """Masks by w² / U_jj² a block of columns at a time, and updates the columns behind (H⁻¹ = UᵀU, H the Hessian).

    >>> secateur.prune(model, method="sparsegpt", target="2:4", data=ids)  # doctest: +SKIP

    A block's Hessians are taken behind the pruned blocks before it. Matrices that read the same tensor share one
    Hessian and one factor, and are swept as one. The paper's data: 128 sequences of 2048 tokens.
    """

    blocksize: int = field(default=128, metadata={"help": "columns whose mask is chosen at once"})
    damping: float = field(default=0.01, metadata={"help": "added to H's diagonal, as a share of its mean"})
    exact_k: bool = field(
        default=True,
        metadata={
            "help": "meet the budget exactly; no: remove all up to the threshold, one more a block, as published"
        },
    )

    needs: ClassVar[frozenset[str]] = frozenset({"hessian"})
    scope: ClassVar[str] = "layer"

    info = MethodInfo(
        title="SparseGPT",
        spec="weight-baselines",
        objects="W",
        granularity="unstr/N:M",
        speedup="spec",
        when="PAT-PT",
        criteria="LOSS",
        order="shot",
        data="calib",
        start="pre",
        scope="loc",
        models="cnn vit bert llm ssm",
        budget_unit="weight",
        year=2023,
        arxiv="2301.00774",
        refs="IST-DASLab/sparsegpt",
        description="Second-order scores, and an update of the weights that stay.",
    )

    def score(self, weight: Tensor, stats: LayerStats) -> Tensor:
        """w² / U_jj² before any update, for allocations that rank the dense model."""
        inputs, part = _inputs(stats)
        return weight.float().square() * inputs.factor(self.damping, part)[0].diagonal().square()

    def solve(self, weight: Tensor, stats: LayerStats, pattern: Pattern) -> tuple[Tensor, Tensor]:
        return self._solve([weight], [stats], [pattern])[0]

    def solve_block(self, block: Block, patterns: Mapping[str, Pattern]) -> dict[str, tuple[Tensor, Tensor]]:
        together: dict[int, list[str]] = {}
        for name in patterns:
            together.setdefault(id(block.stats[name].inputs), []).append(name)
        solved: dict[str, tuple[Tensor, Tensor]] = {}
        for names in together.values():
            weights = [block.matrices[name].weight() for name in names]
            stats, wanted = [block.stats[name] for name in names], [patterns[name] for name in names]
            solved |= zip(names, self._solve(weights, stats, wanted))
            if stats[0].inputs is not None:
                stats[0].inputs.release()
        return {name: solved[name] for name in patterns}

    def _solve(
        self, weights: Sequence[Tensor], stats: Sequence[LayerStats], patterns: Sequence[Pattern]
    ) -> list[tuple[Tensor, Tensor]]:
        """Matrices with the same inputs, part by part, their rows stacked."""
        parts = len(list(stats[0].split(weights[0])))
        keeps = [
            divide([w.numel() // parts] * parts, [p.keep / w.numel()] * parts, p.keep)
            for w, p in zip(weights, patterns)
        ]
        solved: list[list[tuple[Tensor, Tensor]]] = [[] for _ in weights]
        pieces = [list(s.split(w)) for w, s in zip(weights, stats)]
        for part in range(parts):
            rows = [piece[part][0] for piece in pieces]
            inputs, index = _inputs(pieces[0][part][1])
            upper, dead = inputs.factor(self.damping, index)
            removed = [r.numel() - keep[part] for r, keep in zip(rows, keeps)]
            swept = sweep(rows, upper, dead, removed, patterns[0].n_m, self.blocksize, self.exact_k)
            for own, pair in zip(solved, swept):
                own.append(pair)
        if parts == 1:
            return [own[0] for own in solved]
        return [(torch.cat([new for new, _ in own]), torch.cat([mask for _, mask in own])) for own in solved]


def _inputs(stats: LayerStats) -> tuple[InputStats, int]:
    if stats.inputs is None:
        raise SecateurError(
            "hessian wasn't gathered", where=stats.name or "stats", fix="pass calibration data"
        )
    return stats.inputs, stats.part or 0


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
