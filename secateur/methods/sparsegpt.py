"""SparseGPT: weights leave by the error they cause, and those that stay make up for it, column by column.

Frantar & Alistarh 2023, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot",
https://arxiv.org/abs/2301.00774. Spec: weight-baselines, items 7 and 10.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from secateur.errors import SecateurError
from secateur.method import register
from secateur.pruning.allocate import divide
from secateur.pruning.method import WeightMethod
from secateur.pruning.select import Pattern
from secateur.solvers.sweep import sweep
from secateur.stats.layer import InputStats, LayerStats
from secateur.stats.stream import Block
from secateur.taxonomy import record


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
    scope = "layer"

    info = record("sparsegpt")

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
