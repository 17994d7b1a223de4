"""PAGCP: each layer loses its smallest channels until the task that suffers most has used up the layer's allowance.

Ye et al. 2023, "Performance-aware Approximation of Global Channel Pruning for Multitask CNNs", TPAMI,
https://arxiv.org/abs/2303.11923. Spec: pagcp.

Written from the sheet; the official code is GPL, made for one detector, and was neither read nor run beside. Differs from
it: groups come from the traced graph, not from a table; what a layer may lose is tried by masks; a layer that survives
the whole grid leaves by its last step; a round that takes nothing isn't trained after, and one layer at least may lose; the
guard sees training pictures and not those that judge; the last round stops where the target is met, its cheapest layers
first; the network is cut once, after the last round, and masked between rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from secateur.errors import SecateurError
from secateur.method import register
from secateur.pruning.context import Context
from secateur.pruning.plan import Plan
from secateur.scores.lift import smallest_first
from secateur.solvers.guarded import Losses, cheapest, decay, greedy, in_order, savings
from secateur.surgery import trial, unit_masks
from secateur.taxonomy import record
from secateur.training.job import Job
from secateur.training.method import TrainMethod

Counts = Mapping[str, int]


@register
@dataclass
class Pagcp(TrainMethod):
    """A greedy pass over the layers that guards the worst of several losses, then training; in rounds until the target.

    >>> secateur.train_prune(load_task("digits-tasks"), method="pagcp", target="macs<=60%")  # doctest: +SKIP

    Needs a task with several losses (`Task.losses`), or `single`, for its only one. The allowances of one round multiply to
    `budget`. Where `rounds` rounds end above the target it is refused: raise `allowance`, `budget` or `rounds`.
    """

    allowance: float = field(
        default=0.06, metadata={"help": "how much the first layer may raise a loss, as a share", "min": 0}
    )
    budget: float = field(default=6.0, metadata={"help": "what all allowances multiply to", "min": 1})
    constant: bool = field(default=False, metadata={"help": "the same allowance for every layer"})
    top: float = field(
        default=0.8, metadata={"help": "share of the layers that really lose", "above": 0, "max": 1}
    )
    guard: str = field(
        default="max",
        metadata={"help": "what is guarded: max, the worst loss; sum", "choices": ("max", "sum")},
    )
    single: bool = field(default=False, metadata={"help": "guard the task's only loss"})
    samples: int = field(default=256, metadata={"help": "training samples the guard sees", "min": 1})
    rounds: int = field(default=20, metadata={"help": "passes at most, each followed by training", "min": 1})
    slope: float = field(
        default=1.0,
        metadata={
            "help": "how much allowance and budget grow from round to round, as a share of the first's",
            "min": 0,
        },
    )

    starts: ClassVar[str] = "trained"
    removes: ClassVar[str] = "units"
    kinds: ClassVar[tuple[str, ...] | None] = ("channels", "neurons")
    share_of: ClassVar[str] = "weights"
    allocation: ClassVar[str] = "global"
    quick: ClassVar[Mapping[str, Any]] = {"single": True, "allowance": 100.0, "budget": 1e300, "top": 1.0}
    info = record("pagcp")

    def prune(self, job: Job) -> Plan:
        if not job.trained:
            job.train("dense")
        context = job.context()
        losses = job.losses(self.samples, single=self.single)
        cost, limit = context.cost()
        gone = {group.name: 0 for group in context.groups}
        for number in range(1, self.rounds + 1):
            measured = partial(job.journal(f"round-{number}"), losses)
            found = self.round(context, measured, gone, 1 + self.slope * (number - 1))
            down = gone | {name: gone[name] + count for name, count in found["removed"]}
            keep = self.kept(context, down)
            job.note(phase=f"round {number}", macs=context.graph.macs(keep) / context.graph.macs(), **found)
            if cost(keep) <= limit:
                job.cut(self.just_enough(context, gone, dict(found["removed"])))
                job.train("tune")
                return job.plan()
            if found["removed"] and number < self.rounds:
                gone, masks = down, unit_masks(job.model, context.graph, keep)
                job.train(f"masked {number}", after_step=[job.masked(masks)])
        raise SecateurError(
            f"its losses allow {cost(keep):,.0f} after {self.rounds} rounds, over the target's {limit:,.0f}",
            where=f"{self.name}, target {job.target}",
            fix="raise allowance, budget, slope or rounds, or ask for less",
        )

    def round(
        self, context: Context, losses: Callable[[], Losses], gone: Counts, raised: float
    ) -> dict[str, Any]:
        """What layers may lose beside what is gone, cheapest first, without those that the top share leaves out; how many
        times each loss grows by it, and the task that stopped each layer."""
        graph, model = context.graph, context.model
        before = self.kept(context, gone)
        groups = {g.name: g for g in context.groups if len(before[g.name]) > 1}
        left = {name: len(before[name]) for name in groups}
        orders: dict[str, Tensor] = {}

        def evaluate(removed: Counts) -> Losses:
            keep: dict[str, Tensor] = {}
            for name, count in removed.items():
                if name not in orders:  # behind what the layers before it lost
                    with trial(model, graph, keep):
                        orders[name] = smallest_first(model, groups[name])
                keep[name] = orders[name][gone[name] + count :].sort().values
            with trial(model, graph, keep):
                return losses()

        def macs(removed: Counts) -> int:
            return graph.macs(
                {g.name: torch.arange(g.size - gone[g.name] - removed.get(g.name, 0)) for g in context.groups}
            )

        whole = macs({})
        saved = {name: whole - macs({name: 3 * size // 10}) for name, size in left.items()}
        allowance, budget = self.allowance * raised, self.budget * raised
        factor = 1.0 if self.constant else decay(allowance, len(left), budget)
        sizes = {name: left[name] for name in in_order(saved, factor)}
        found = greedy(sizes, evaluate, allowance, factor, self.guard)
        removed = {step.name: step.removed for step in cheapest(found, savings(found, macs), self.top)}
        start, end = losses(), evaluate(removed)
        return {
            "removed": [*removed.items()],
            "growth": {task: end[task] / start[task] for task in start},
            "stopped_by": {step.name: step.worst for step in found if step.worst},
        }

    def kept(self, context: Context, gone: Counts) -> dict[str, Tensor]:
        """Kept units once so many of each group's smallest are gone."""
        return {
            group.name: smallest_first(context.model, group)[gone[group.name] :].sort().values
            for group in context.groups
        }

    def just_enough(self, context: Context, gone: Counts, removed: Counts) -> dict[str, Tensor]:
        """The first state that meets the target while this round's layers leave one after the other, cheapest first."""
        orders = {group.name: smallest_first(context.model, group) for group in context.groups}
        scores = {name: order.argsort().double() for name, order in orders.items()}
        path = [[(name, int(unit)) for name, order in orders.items() for unit in order[: gone[name]]]]
        groups = context.competitors(scores, keep_scores=False)
        grains = {group.name: group.grains() for group in groups}
        for name, count in removed.items():
            units = set(orders[name][gone[name] : gone[name] + count].tolist())
            path += [[(name, unit) for unit in grain] for grain in grains[name] if units.issuperset(grain)]
        return context.follow(groups, path)
