"""Tyr-the-Pruner: which layer can spare how much is found by search, not by a formula.

Li et al. 2025, "Tyr-the-Pruner: Structural Pruning LLMs via Global Sparsity Distribution Optimization",
https://arxiv.org/abs/2503.09657. Spec: tyr.

Reconstruction: the algorithm is read from the released code; rounds, halving and expected weights are from the authors'
description: `LocalPruner.step` of that code sets its argument `expected_sparsity` to 0 and so puts dense weights back,
which switches error accumulation off. Here the intended form runs (`expected="off"`: the released one). Departures:
under grouped queries a unit is a KV group with its queries; every sublayer keeps a unit; sizes are scaled from 4.2M
tokens and 7B weights to what two cores search in minutes (`PAPER` holds the published ones): versions are pruned on
part of the data, what was found once more on all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from secateur.errors import SecateurError
from secateur.method import register
from secateur.pruning.context import COARSE, Context
from secateur.pruning.method import UnitMethod
from secateur.pruning.plan import Plan
from secateur.solvers.evolution import Space, Stage, draw_tokens, evolve
from secateur.solvers.obs import Removal, select
from secateur.solvers.supernet import Candidates, Sublayer, Supernet, even_base, find_sublayers, ranges
from secateur.taxonomy import record

PAPER: dict[str, Any] = {
    "rounds": 4, "generations": 50, "offspring": 128, "tokens": (2048, 16384, 131072), "survivors": (16, 4, 2),
    "topk": 8192, "supernet": 1.0, "nested": False, "final": False,
}  # fmt: skip
"""Hyperparameters as published, for calibration data of millions of tokens."""


@register
@dataclass
class Tyr(UnitMethod):
    """Evolutionary search over locally pruned and repaired versions of every sublayer, by KL to the dense model.

    >>> secateur.prune(model, method="tyr", target="50%", data=ids, **PAPER)  # doctest: +SKIP

    With prune's `uniform` nothing is searched: every layer loses the same and what is left is refitted.
    """

    rounds: int = field(default=3, metadata={"help": "searches, the step halved after each (paper: 4)"})
    step: float = field(default=0.125, metadata={"help": "first step between levels, share of a sublayer"})
    finest: int = field(default=32, metadata={"help": "smallest step in neurons, but at most 1/64 of them"})
    reach: int = field(default=4, metadata={"help": "levels to each side"})
    generations: int = field(default=10, metadata={"help": "of a search (paper: 50)"})
    offspring: int = field(default=16, metadata={"help": "of a generation (paper: 128)"})
    flips: int = field(default=4, metadata={"help": "a child is at most so many moves away"})
    tokens: tuple[float, ...] = field(
        default=(1 / 32, 1 / 4), metadata={"help": "a stage's; <= 1: share", "above": 0}
    )
    survivors: tuple[int, ...] = field(default=(2, 1), metadata={"help": "of each stage", "above": 0})
    fixed: bool = field(default=False, metadata={"help": "draw the last stage's tokens once a round"})
    topk: int = field(default=1024, metadata={"help": "logits compared per token (paper: 8192)"})
    obs_rounds: int = field(default=16, metadata={"help": "rounds in which neurons leave; heads take one"})
    damping: float = field(default=0.01, metadata={"help": "of the Hessian, times the mean of its diagonal"})
    first_order: bool = field(default=True, metadata={"help": "add the energy term to the removal cost"})
    nested: bool = field(default=True, metadata={"help": "one path through all versions (paper: no)"})
    expected: str = field(
        default="mean", metadata={"help": "what the next block sees", "choices": ("mean", "median", "off")}
    )
    supernet: float = field(default=0.25, metadata={"help": "share of data to prune versions on (paper: 1)"})
    final: bool = field(default=True, metadata={"help": "prune the result again on all data (paper: no)"})
    dtype: str = field(default="auto", metadata={"help": "of the search; auto: bfloat16 where that is fast"})
    offload: str = field(default="", metadata={"help": "a directory for the versions; empty: memory"})

    kinds: ClassVar[tuple[str, ...] | None] = ("heads", "kv_groups", "neurons")
    needs: ClassVar[frozenset[str]] = frozenset({"hessian"})
    share_of: ClassVar[str] = "weights"
    allocation: ClassVar[str] = "per-kind"
    info = record("tyr")
    quick: ClassVar[Mapping[str, Any]] = {"generations": 2, "offspring": 4}

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.tokens) != len(self.survivors) or not self.tokens:
            raise SecateurError("tokens and survivors don't match", where="tyr", fix="one of each per stage")
        if self.dtype != "auto" and not isinstance(getattr(torch, self.dtype, None), torch.dtype):
            raise SecateurError(f"there is no {self.dtype!r}", where="tyr", fix="auto, float32, bfloat16")

    def plan(self, context: Context) -> Plan:
        layers = find_sublayers(context.groups, context.matrices, context.graph.shapes)
        if not layers:
            raise SecateurError("no group is consumed by exactly one matrix", where="tyr", fix="try `taylor`")
        removed = even_base(context, layers)
        notes = {"scores": "how many units leave is searched, so that no unit has a score of its own"}
        if not any(removed):
            return context.make_plan()
        search = not context.options.uniform and self.rounds > 0 and self.generations > 0
        with Supernet(context, layers, self.solve, self.damping, self.expected, self.offload) as net:
            if search:
                removed, notes["search"] = self.search(context, net, removed)
            if self.final or not search:
                net.build("final", context.require_data(), [[count] for count in removed], removed)
            pairs = list(zip(layers, removed))
            keep = {layer.name: net.keep(layer, count) for layer, count in pairs}
            values = {n.matrix.name: n.matrix.unfold(net.weight(n, count)) for n, count in pairs if count}
        return context.make_plan(keep=keep, values=values, notes=notes)

    def solve(self, layer: Sublayer, problem: Removal, keeps: Sequence[int]) -> list[Tensor]:
        rounds = 1 if layer.group.kind in COARSE else self.obs_rounds
        return select(problem, keeps, rounds, self.first_order, self.nested)

    def search(self, context: Context, net: Supernet, removed: list[int]) -> tuple[list[int], str]:
        """Rounds of versions around the last result, and evolution over them."""
        data, layers, path = context.require_data(), net.layers, []
        part = data[: max(1, round(self.supernet * len(data)))]
        fitness = Candidates(net, data, self.topk, self.dtype)
        check = draw_tokens(fitness.lengths, max(2, sum(fitness.lengths) // 4), context.generator("check"))
        for index in range(self.rounds):
            share = self.step / 2**index
            steps = [
                n.step(share, self.finest, context.options.round_to, n.group.kind in COARSE) for n in layers
            ]
            limits = ranges(context, layers, removed, steps, self.reach)
            counts = [[r + i * s for i in range(a, b + 1)] for r, s, (a, b) in zip(removed, steps, limits)]
            net.build(f"search-{index}", part, counts, removed)
            fitness.center(removed, steps)
            space = Space(*map(tuple, zip(*((n.name, n.pool, *limit) for n, limit in zip(layers, limits)))))
            run = partial(self.evolve, context, space, fitness, index)
            state = context.remember(f"tyr-{index}-{len(layers)}", run)["state"].tolist()
            path.append(" -> ".join(f"{fitness(s, check):.4g}" for s in ((0,) * len(state), tuple(state))))
            removed = [r + level * s for r, level, s in zip(removed, state, steps)]
        return removed, f"KL to the dense model before and after each search: {', '.join(path)}"

    def evolve(self, context: Context, space: Space, fitness: Candidates, index: int) -> dict[str, Tensor]:
        tokens, track = sum(fitness.lengths), context.progress
        sizes = [max(2, round(t * tokens) if t <= 1 else int(t)) for t in self.tokens]
        found = evolve(
            space,
            fitness,
            fitness.lengths,
            [Stage(size, survivors) for size, survivors in zip(sizes, self.survivors)],
            context.generator("search", context.round, index),
            generations=self.generations,
            offspring=self.offspring,
            flips=self.flips,
            fixed=self.fixed,
            progress=partial(track, description="search") if track else iter,
        )
        return {"state": torch.tensor(found.state)}
