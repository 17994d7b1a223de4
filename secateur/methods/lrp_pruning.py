"""LRP pruning: the filters and units through which least of the right class's logit comes are removed.

Yeom et al. 2021, "Pruning by explaining: A novel criterion for deep neural network pruning", Pattern Recognition 115,
https://arxiv.org/abs/1912.08881. Spec: lrp-pruning.

The authors state that a patent application covers this method ("patent pending") and publish their code under
CC BY-NC-SA 4.0. This is written from the equations alone; whether you may use the method is for you to find out.

Reconstruction: the sheet covers feed-forward nets and ResNets. Elsewhere attention hands relevance to its values, norms
and activations hand it on, and products of two activations halve it. A coupled unit has the relevance of all its filters
together. Of equal scores the later unit leaves first, as everywhere here; in the sheet it is the earlier one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from secateur.errors import SecateurError
from secateur.graph import Group
from secateur.graph.groups import KINDS, WHOLE
from secateur.method import register
from secateur.pruning.context import Context
from secateur.pruning.method import UnitMethod
from secateur.pruning.plan import Plan
from secateur.saliency.filters import filter_relevance, unit_relevance, unseen
from secateur.saliency.relevance import COMPOSITES
from secateur.taxonomy import record
from secateur.utils.batches import as_batches

START = ("one", "logit")
NORMALISE = ("none", "sum")


@register
@dataclass
class LrpPruning(UnitMethod):
    """Channels, units and heads by the relevance that lands on their output, over a few labelled samples.

    >>> secateur.prune(resnet, x[:1], method="lrp-pruning", target="80%", data=(x, y))  # doctest: +SKIP

    Ten samples of each class are enough. Every layer receives the same total, so layers compare without normalisation.
    Data: pairs (inputs, class ids); token ids for language models, whose classes are the next tokens. Made for
    moderate cuts: beyond some 40 % of the units at once, units that only inhibit leave together and the network falls.
    `composite="epsilon-plus"` is the published choice for ResNets; `epsilon` did better on one (docs/results.md).
    """

    composite: str = field(
        default="z+",
        metadata={"help": f"rules of relevance: {', '.join(COMPOSITES)}", "choices": tuple(COMPOSITES)},
    )
    start: str = field(
        default="one", metadata={"help": "what the right class hands on: one, or its logit", "choices": START}
    )
    absolute: bool = field(
        default=True,
        metadata={"help": "add up magnitudes of relevance (the same for z+ without residual sums)"},
    )
    normalise: str = field(
        default="none", metadata={"help": "over a layer's filters: none, or sum", "choices": NORMALISE}
    )

    kinds: ClassVar[tuple[str, ...] | None] = tuple(
        kind for kind in KINDS if kind not in (*WHOLE, "vocabulary")
    )
    needs: ClassVar[frozenset[str]] = frozenset({"relevance"})
    allocation: ClassVar[str] = "global"
    share_of: ClassVar[str] = "units"
    info = record("lrp-pruning")

    def plan(self, context: Context) -> Plan:
        scores = context.remember("scores", lambda: self.scores(context))
        missing = unseen(context.model, as_batches(context.require_data()))
        notes = {"classes": f"no sample of {missing}: what only they need leaves first"} if missing else {}
        return context.make_plan(keep=context.allocate(scores), notes=notes)

    def score(self, group: Group, context: Context) -> Tensor:
        return self.scores(context)[group.name]

    def scores(self, context: Context) -> dict[str, Tensor]:
        """[units] of every group whose layers receive relevance."""
        batches = as_batches(context.require_data())
        shown = context.progress(batches, "relevance", len(batches)) if context.progress else batches
        relevance = filter_relevance(context.model, shown, self.composite, self.start, self.absolute)
        if self.normalise == "sum":
            relevance = {key: r / r.sum().clamp_min(1e-30) for key, r in relevance.items()}
        found = {
            group.name: torch.stack(parts).sum(0)
            for group in context.groups
            if (parts := unit_relevance(group, context.graph.shapes, relevance))
        }
        if not found:
            raise SecateurError(
                f"no relevance lands on what {type(context.model).__name__} can lose",
                where=self.name,
                fix="use another criterion",
            )
        return found
