"""MetaPruning: a network that changes networks, so that plain group-norm pruning hurts them less.

Liu, Wang, Zhang 2025, "Meta Pruning via Graph Metanetworks", https://arxiv.org/abs/2506.12041. Spec: metapruning.

Differs from the published code: nodes and edges come from the traced network, not from positions of modules, with one form for
all networks: five numbers a channel, a shortcut's convolution with channels of its own, and residuals as edges between channels
that meet, without zero edges between all others. A kernel below 3 x 3 lies in the middle of one. The units leave in one step
to the exact budget, by norms that count those of the normalisations too, as the penalty does. The epoch is taken by the loss after a cut of a held-out data model, not by eye. The loss is a mean, so
`reg` is that of the published setting over 100 batches.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from secateur.graph.network import network
from secateur.method import register
from secateur.pruning.context import Context
from secateur.pruning.plan import Plan
from secateur.surgery import mask_units
from secateur.taxonomy import record
from secateur.training.job import Job, at_dense_shape
from secateur.training.metanetwork import MetaNetwork, load_metanetwork, tensors_of
from secateur.training.metatraining import KINDS, Making, cut_by, importance, make_metanetwork
from secateur.utils.running import device_of


@register
@dataclass
class Metapruning(Making):
    """A first small cut, a metanetwork's change of all weights, training, the cut by group norms, training.

    >>> secateur.train_prune(load_task("digits"), method="metapruning", metanetwork="meta", target="macs<=43%")  # doctest: +SKIP

    `secateur train metanetwork TASK --out DIR` makes a metanetwork, for networks of one architecture with other weights; without
    `metanetwork` one is made in the run, which takes several trainings. A target above the first cut's has none.
    """

    metanetwork: str = field(default="", metadata={"help": "the folder of a metanetwork; default: make one"})
    last: float = field(
        default=0.7, metadata={"help": "training after the last cut, of one training", "min": 0}
    )

    name: ClassVar[str] = "metapruning"
    starts: ClassVar[str] = "trained"
    removes: ClassVar[str] = "units"
    kinds: ClassVar[tuple[str, ...] | None] = KINDS
    allocation: ClassVar[str] = "global"
    share_of: ClassVar[str] = "units"
    quick: ClassVar[Mapping[str, Any]] = {
        "models": 1,
        "meta_epochs": 1,
        "hidden": 4,
        "layers": 1,
        "first": 1.0,
    }
    info = record("metapruning")

    def prune(self, job: Job) -> Plan:
        meta = load_metanetwork(self.metanetwork) if self.metanetwork else None
        if meta is not None:
            meta.to(device_of(job.model)).check(network(job.model, job.context().example), self.metanetwork)
        if not job.trained:
            job.train("dense")
        context = job.context()
        small, keep = self.first_cut(job, context)
        self.fine(job, "ready", self.ready, small)
        self.change(job, small, meta)
        self.fine(job, "changed", self.tune, small)
        self.put_back(job, context, small, keep)
        job.note(quality_before_the_cut=job.quality())
        job.cut(self.smallest(job, context))
        job.note(quality_after_the_cut=job.quality())
        self.fine(job, "tune", self.last, job.model)
        return job.plan()

    def change(self, job: Job, model: nn.Module, meta: MetaNetwork | None) -> None:
        """The metanetwork's answer, in the model."""
        meta = meta or make_metanetwork(job, self)
        meta.transform(model, network(model, job.inputs))

    def first_cut(self, job: Job, context: Context) -> tuple[nn.Module, dict[str, Tensor]]:
        """(a copy with fewer multiply-adds by `first`, its kept units); a whole one where the target keeps more."""
        small = cut_by(job.model, job.inputs, self.first, kinds=job.options.kinds)
        if small is None:
            return copy.deepcopy(job.model), {}
        last = self.smallest(job, context)
        if any(len(last[name]) > len(units) for name, units in small.plan.keep.items() if name in last):
            return copy.deepcopy(job.model), {}
        return small.model, small.plan.keep

    def smallest(self, job: Job, context: Context) -> dict[str, Tensor]:
        """The units that stay by the norms of the weights as they are."""
        tensors = tensors_of(job.model)
        scores = {group.name: importance(group, tensors).sqrt() for group in context.groups}
        return context.allocate(scores, job.options.allocation)

    def put_back(self, job: Job, context: Context, small: nn.Module, keep: Mapping[str, Tensor]) -> None:
        """The job's model becomes the small one at the dense shape: units that are gone are zero, and so leave first."""
        mask_units(job.model, context.graph, keep)
        values = {name: tensor.detach() for name, tensor in tensors_of(small).items()}
        job.restore(at_dense_shape(values, job.snapshot(), context.graph, keep))
