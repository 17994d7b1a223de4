"""The kinds of method that prune a trained model: single weights, or whole units."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from secateur.errors import SecateurError
from secateur.method import Method

if TYPE_CHECKING:
    from secateur.graph.groups import Group
    from secateur.pruning.context import Context
    from secateur.pruning.plan import Plan
    from secateur.pruning.select import Pattern
    from secateur.stats.layer import LayerStats
    from secateur.stats.stream import Block


@dataclasses.dataclass
class WeightMethod(Method):
    """Removes single weights: a mask over every prunable matrix, unstructured or N:M.

    Write `score`; override `solve` when choosing and repairing happen together, as in SparseGPT.
    """

    verb: ClassVar[str] = "prune"
    unrepaired: ClassVar[str] = ""
    """Why no `repair` can follow; empty: any can."""

    @classmethod
    def usual(cls) -> dict[str, Any]:
        own = {"objects": "W", "granularity": "unstr/N:M", "speedup": "spec", "when": "PAT-PT"}
        return {**super().usual(), **own, "data": "calib" if cls.needs else "free"}

    scope = "row"
    """Where weights compete: in their output row, in their layer, or globally."""
    everywhere: ClassVar[bool] = False
    """Whether linear and convolution layers outside the repeated blocks count too, as with the option of that name."""
    later_stays: ClassVar[bool] = False
    """Which of equal scores stays: the earlier weight, or the later."""
    propagate: ClassVar[bool] = True
    """Whether a block's statistics are gathered after the blocks before it were pruned."""

    def shares(self, context: Context, share: float) -> Mapping[str, float]:
        """The share kept of every matrix, by name, where all together keep `share`: with `allocation = "own"`."""
        raise self.lacks("shares")

    def score(self, weight: Tensor, stats: LayerStats) -> Tensor:
        """[out, in] -> [out, in], higher = keep."""
        raise self.lacks("score")

    def scores(self, weight: Tensor, stats: LayerStats) -> Tensor:
        """`score`, part by part where rows have inputs of their own: experts, convolution groups."""
        found = []
        for rows, own in stats.split(weight):
            found.append(self.score(rows, own))
            if not isinstance(found[-1], Tensor) or found[-1].shape != rows.shape:
                shape = list(found[-1].shape) if isinstance(found[-1], Tensor) else type(found[-1]).__name__
                raise SecateurError(
                    f"its scores are {shape} for weights of {list(rows.shape)}",
                    where=f"method {self.name}, {stats.name}",
                    fix="score gives a number for each weight",
                )
        return torch.cat(found)

    def solve(self, weight: Tensor, stats: LayerStats, pattern: Pattern) -> tuple[Tensor, Tensor]:
        """(new weight, kept mask), both [out, in]; the mask satisfies `pattern` exactly."""
        mask = pattern.select(self.scores(weight, stats), stats.parts, self.later_stays)
        return weight.masked_fill(~mask, 0), mask

    def solve_block(self, block: Block, patterns: Mapping[str, Pattern]) -> dict[str, tuple[Tensor, Tensor]]:
        """`solve` for the matrices of one block, by name; override it to solve several at once."""
        return {
            name: self.solve(block.matrices[name].weight(), block.stats[name], pattern)
            for name, pattern in patterns.items()
        }


@dataclasses.dataclass
class UnitMethod(Method):
    """Removes whole units (heads, neurons, channels, layers): smaller dense tensors.

    Write `score` (or `scores`, when one pass gives those of all groups), and `repair` when what is left is corrected in
    closed form; override `plan` when the method divides the budget itself.
    """

    verb: ClassVar[str] = "prune"
    unrepaired: ClassVar[str] = ""
    """Why no `repair` can follow; empty: any can."""
    kinds: ClassVar[tuple[str, ...] | None] = None
    """The kinds of unit it cuts; None: every kind the graph has."""
    share_of: ClassVar[str] = "units"
    """What a bare percentage counts: "units" of every prunable group, or the "weights" inside a language model's blocks."""
    by_block: ClassVar[bool] = False
    """Whether a block's tensors and what passes through it are all that scores and repairs its groups, and the plan is `decide` of
    what was gathered block by block: a folder can then be cut with one block in memory (`prune_folder`)."""

    @classmethod
    def usual(cls) -> dict[str, Any]:
        own = {"objects": "N F C H", "granularity": "struct", "speedup": "univ", "when": "PAT-PT"}
        return {**super().usual(), **own, "data": "calib" if cls.needs else "free"}

    def score(self, group: Group, context: Context) -> Tensor:
        """[units], higher = keep."""
        raise self.lacks("score")

    def scores(self, context: Context) -> dict[str, Tensor]:
        """`score` by group name."""
        return {group.name: self.score(group, context) for group in context.groups}

    def ranked_with(self, group: Group, context: Context) -> str:
        """What a group's units are ranked among where `allocation` is per-kind: all groups of which this says the same."""
        return group.kind

    def divide(self, context: Context, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Kept units of every group."""
        return context.allocate(scores)

    # Folders that are cut block by block

    def passes(self) -> str:
        """What goes through a block while it alone is there: "inputs" (statistics of them, where it needs any), "batches" or
        "samples" of the data, by `context.play`. Raises `SecateurError` where its hyperparameters want the whole model."""
        return "inputs"

    def cuts(self, group: Group) -> bool:
        """Whether units of this group may leave, with the hyperparameters as they are."""
        return True

    def gather(self, context: Context) -> dict[str, Tensor]:
        """What the plan needs of the groups of one block: their scores, by name, and what else there is."""
        return self.scores(context)

    def decide(self, context: Context, found: Mapping[str, Tensor]) -> Plan:
        """The plan, from what was gathered of all blocks."""
        return context.make_plan(keep=self.divide(context, found))

    def repair(self, context: Context, keep: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Tensors (at their dense shape, by name) that replace the model's before the cut."""
        return {}

    def plan(self, context: Context) -> Plan:
        """Scores -> budget -> kept units -> repaired tensors."""
        keep = self.divide(context, self.scores(context))
        return context.make_plan(keep=keep, values=self.repair(context, keep))
