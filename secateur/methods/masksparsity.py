"""MaskSparsity: sparsity regularisation of only those channels that are going to be removed.

Jiang et al. 2022, "Pruning-aware Sparse Regularization for Network Pruning", https://arxiv.org/abs/2201.06776.
Spec: masksparsity.

Differs from the published code: the mask is as large as the target asks, and its channels are those that leave
(`prune="threshold"` and "ot" let |gamma| decide after the sparse training, as published, so that a target may be missed);
`uniform` takes the channels of smallest |gamma|, where the released masks take the first ones (`position`). Groups of
coupled channels come from the traced network. The biases of removed channels are dropped, not folded. One round.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from secateur.graph import Group
from secateur.method import register
from secateur.pruning.context import Context
from secateur.pruning.plan import Plan
from secateur.taxonomy import record
from secateur.training.job import Job
from secateur.training.method import TrainMethod
from secateur.training.scales import (
    PENALTIES,
    Sparsify,
    above,
    as_masks,
    batchnorm_scales,
    coupled_scales,
    gammas,
    of_layers,
    ot_threshold,
    separation,
    vote,
)


@register
@dataclass
class MaskSparsity(TrainMethod):
    """Choose the channels first; train with L1 on the BatchNorm scales of these alone; cut them; fine-tune.

    >>> secateur.train_prune(load_task("cifar10"), method="masksparsity", target="macs<=50%", epochs=30)  # doctest: +SKIP

    The mask is made by `uniform` (the smallest scales of each group), `position` (the first channels of each), `global`
    (a training with all scales regularised, then the smallest of all groups) or `threshold` (such a training, then
    |gamma| <= threshold; the target is not looked at). The trainings for mask and sparsity have the full length, from the
    trained network each; fine-tuning `tune` times that, at `tune_lr`. A unit's score is the mean |gamma| of the
    BatchNorms that it is coupled with. Removed biases shift what follows until fine-tuning, or `reestimate`, sets BatchNorm
    statistics anew. Short trainings want a larger `lam`: an SGD step moves a scale by lr * lam.
    """

    lam: float = field(default=5e-4, metadata={"help": "weight of the penalty", "min": 0})
    penalty: str = field(default="l1", metadata={"help": ", ".join(PENALTIES), "choices": PENALTIES})
    mask: str = field(
        default="uniform",
        metadata={
            "help": "where the mask comes from: uniform, position, global, threshold",
            "choices": ("uniform", "position", "global", "threshold"),
        },
    )
    select: str = field(
        default="mask",
        metadata={
            "help": "what leaves after the sparse training: the mask, or what lies below: threshold, ot",
            "choices": ("mask", "threshold", "ot"),
        },
    )
    threshold: float = field(
        default=0.01, metadata={"help": "|gamma| up to which a channel leaves", "min": 0}
    )
    tune: float = field(default=0.4, metadata={"help": "length of fine-tuning, of the training's", "min": 0})
    tune_lr: float = field(default=5e-4, metadata={"help": "learning rate of fine-tuning", "above": 0})
    reestimate: int = field(
        default=0,
        metadata={
            "help": "batches to take BatchNorm statistics anew on, between the cut and fine-tuning",
            "min": 0,
        },
    )

    starts: ClassVar[str] = "trained"
    removes: ClassVar[str] = "units"
    kinds: ClassVar[tuple[str, ...] | None] = ("channels", "neurons", "hidden")
    share_of: ClassVar[str] = "units"
    info = record("masksparsity")

    def prune(self, job: Job) -> Plan:
        if not job.trained:
            job.train("baseline")
        scales, baseline = batchnorm_scales(job.model), job.snapshot()
        context = job.context()
        members = coupled_scales(context, scales)
        none = {name: torch.zeros_like(gamma, dtype=torch.bool) for name, gamma in scales.items()}
        if self.mask in ("global", "threshold"):
            job.train("mask", after_backward=[Sparsify(scales, none, self.lam, self.penalty)])
        units = self.choose(context, members, scales)
        job.restore(baseline)
        layers = of_layers(members, units, scales)
        job.train("sparse", after_backward=[Sparsify(scales, layers, self.lam, self.penalty)])
        if self.select != "mask":
            units = {name: self.fallen(group, scales) for name, group in members.items()}
        job.note(quality=job.quality(), **separation(scales, layers))
        job.cut({name: keep.nonzero().flatten().cpu() for name, keep in units.items()})
        job.reestimate(self.reestimate)
        job.note(quality_after_the_cut=job.quality())
        if steps := round(self.tune * job.steps):
            job.train("tune", steps=steps, lr=self.tune_lr)
        return job.plan()

    def choose(
        self, context: Context, members: Mapping[str, Group], scales: Mapping[str, nn.Parameter]
    ) -> dict[str, Tensor]:
        """The mask that the sparse training gets, bool [units] by group: True stays."""
        if self.mask == "threshold":
            return {name: self.fallen(group, scales, "threshold") for name, group in members.items()}
        if self.mask == "position":
            scores = {name: torch.arange(group.size).float() for name, group in members.items()}
        else:
            scores = {name: gammas(group, scales).mean(0) for name, group in members.items()}
        kept = context.allocate(
            scores, context.allocation or ("global" if self.mask == "global" else "uniform")
        )
        return as_masks(members, kept)

    def fallen(self, group: Group, scales: Mapping[str, nn.Parameter], how: str | None = None) -> Tensor:
        """Which units of a group stay by the scales as they are, bool [units]."""
        found = gammas(group, scales)
        own = [above(g, ot_threshold(g) if (how or self.select) == "ot" else self.threshold) for g in found]
        return vote(torch.stack(own), found)
