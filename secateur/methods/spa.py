"""SPA: any criterion of single weights, lifted to the channels that must leave together.

Wang, Rachwan, Günnemann, Charpentier 2024, "Structurally Prune Anything: Any Architecture, Any Framework, Any Time",
https://arxiv.org/abs/2403.18955. Spec: spa, algorithm B.

Reconstruction: aggregation and normalisation are sum and mean, as the paper's choice wasn't available. Weights count,
biases and normalisations don't. `fpgm` counts the filters that make a unit, `bn-scale` the normalisation behind it.
Signed scores (GraSP) are normalised by their mean size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from secateur.graph import Group
from secateur.graph.groups import HOW, KINDS, WHOLE
from secateur.method import register
from secateur.pruning.context import Context
from secateur.pruning.method import UnitMethod
from secateur.pruning.plan import Plan
from secateur.scores.criteria import CRITERIA, NORMALISE, OF_INPUTS, OF_LOSS, normalise
from secateur.scores.lift import of_elements
from secateur.solvers.batchnorm import batchnorm_after
from secateur.taxonomy import record
from secateur.utils.batches import as_batches

BATCHNORM = ("keep", "new", "shift")


@register
@dataclass
class Spa(UnitMethod):
    """Coupled channels by any criterion, in any network: before training, or after it with and without fine-tuning.

    >>> secateur.prune(net, images, method="spa", criterion="snip", data=[(x, y)], target="macs<=50%")  # doctest: +SKIP

    Batches are pairs (inputs, labels) for criteria that need a loss, unless `loss=` says otherwise; token ids for
    language models. An untrained network is scored with the batch's statistics where BatchNorm has none.
    """

    criterion: str = field(
        default="magnitude",
        metadata={"help": f"of single weights: {', '.join(CRITERIA)}", "choices": tuple(CRITERIA)},
    )
    aggregate: str = field(
        default="sum", metadata={"help": f"over a unit's weights: {', '.join(HOW)}", "choices": tuple(HOW)}
    )
    normalise: str = field(
        default="mean",
        metadata={"help": f"over a group's units: {', '.join(NORMALISE)}", "choices": tuple(NORMALISE)},
    )
    damping: float = field(
        default=0.01,
        metadata={"help": "for obd and obs: share of the Hessian's mean diagonal added to it", "min": 0},
    )
    batchnorm: str = field(
        default="keep",
        metadata={
            "help": "BatchNorm statistics after the cut: keep, new (of the data), shift (by the change on the data)",
            "choices": BATCHNORM,
        },
    )

    kinds: ClassVar[tuple[str, ...] | None] = tuple(
        kind for kind in KINDS if kind not in (*WHOLE, "vocabulary")
    )
    allocation: ClassVar[str] = "global"
    share_of: ClassVar[str] = "units"
    info = record("spa")

    def statistics(self) -> frozenset[str]:
        needs = {"gradient"} if self.criterion in OF_LOSS else set()
        if self.criterion in OF_INPUTS or self.batchnorm != "keep":
            needs.add("hessian")
        return frozenset(needs)

    def batches(self, context: Context) -> list[Any]:
        """What is calibrated on; labels, where there are, beside the inputs."""
        return as_batches(context.require_data())

    def plan(self, context: Context) -> Plan:
        scores = context.remember("scores", lambda: self.scores(context))
        keep = context.allocate(scores)
        notes: dict[str, str] = {}
        values = self.changes(context, keep, notes) if _cuts(context, keep) else {}
        return context.make_plan(keep=keep, values=values, notes=notes)

    def score(self, group: Group, context: Context) -> Tensor:
        return self.scores(context)[group.name]

    def scores(self, context: Context) -> dict[str, Tensor]:
        """[units] of every group that the criterion says something about, normalised."""
        elements = of_elements(context, self.criterion, lambda: self.batches(context), self.damping)
        return {
            group.name: normalise(group.reduce(values, self.aggregate, roles), self.normalise)
            for group, values, roles in elements
        }

    def changes(
        self, context: Context, keep: Mapping[str, Tensor], notes: dict[str, str]
    ) -> dict[str, Tensor]:
        """Tensors that replace the model's; adds to the plan's notes."""
        values = dict(self.repair(context, keep))
        if self.batchnorm != "keep":
            batches = self.batches(context)
            values |= batchnorm_after(context.model, context.graph, keep, values, batches, self.batchnorm)
        return values


def _cuts(context: Context, keep: Mapping[str, Tensor]) -> bool:
    return any(len(units) < context.graph[name].size for name, units in keep.items())
