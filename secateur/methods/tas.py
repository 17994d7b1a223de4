"""TAS: widths and depths are searched by gradient, and the small network learns from the dense one.

Dong and Yang 2019, "Network Pruning via Transformable Architecture Search", https://arxiv.org/abs/1905.09717. Spec: tas.

Differs from the published code: layers whose channels are coupled, as along a residual stream, share one choice, so that a
residual width is that of all its blocks and no shortcut is ever inserted; depths are those of blocks that may leave, without
the first block of a stage that changes its shape; the temperature falls at each step, not each epoch; the budget is
met exactly (`select="argmax"`: the likeliest sizes, as published). The architecture is the last one, not the best on
validation.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from secateur.gates import choice_of, counts_of, log_cost
from secateur.gates.choice import temperature
from secateur.graph import Group
from secateur.method import register
from secateur.pruning.context import Context
from secateur.pruning.plan import Plan
from secateur.taxonomy import record
from secateur.training.distill import distillation
from secateur.training.job import Job
from secateur.training.losses import default_loss
from secateur.training.method import TrainMethod
from secateur.training.price import price
from secateur.training.ramp import Ramp
from secateur.training.recipe import Recipe
from secateur.training.second import Second, halves
from secateur.training.tickets import reinitialised
from secateur.utils.random import seed_of
from secateur.utils.types import Objective

SEARCH = Recipe(
    optimizer="adam", betas=(0.5, 0.999), weight_decay=1e-3, decay="all", lr_schedule="constant", warmup=0.0
)
"""How the sizes are trained."""


@register
@dataclass
class TAS(TrainMethod):
    """Two trainings: a network of all sizes, weights and sizes in turns on two halves of the data; then the found one, anew.

    >>> secateur.train_prune(load_task("digits:digits-resnet"), method="tas", target="macs<=50%", shape_lr=0.02)  # doctest: +SKIP

    No weight is inherited: the small network begins untrained and is distilled from the dense one, whatever it weighed.
    A target in MACs or parameters is that of the whole network; a bare share is that of the units. Searches
    of a few hundred steps need a larger `shape_lr` than the published one, which is for 600 epochs.
    """

    search: float = field(
        default=1.0, metadata={"help": "the search, in lengths of the training", "above": 0}
    )
    shape_lr: float = field(default=1e-3, metadata={"help": "learning rate of the sizes", "above": 0})
    cost: float = field(default=2.0, metadata={"help": "weight of the expected cost", "min": 0})
    tolerance: float = field(
        default=0.05,
        metadata={"help": "how far below the target is well, of the whole", "min": 0, "below": 1},
    )
    tau: float = field(default=5.0, metadata={"help": "first temperature of the draws", "above": 0})
    tau_end: float = field(default=0.1, metadata={"help": "last temperature", "above": 0})
    distil: float = field(
        default=0.9, metadata={"help": "weight of the dense network's answers", "min": 0, "max": 1}
    )
    soften: float = field(default=4.0, metadata={"help": "temperature of the answers", "above": 0})
    select: str = field(
        default="allocate",
        metadata={"help": "which sizes: allocate, argmax (published)", "choices": ("allocate", "argmax")},
    )

    starts: ClassVar[str] = "trained"
    removes: ClassVar[str] = "units"
    kinds: ClassVar[tuple[str, ...] | None] = ("layers", "channels")
    allocation: ClassVar[str] = "global"
    share_of: ClassVar[str] = "units"
    info = record("tas")

    def prune(self, job: Job) -> Plan:
        initial = job.snapshot()
        if not job.trained:
            job.train("dense")
        teacher = copy.deepcopy(job.model)
        context = job.context()
        job.restore(reinitialised(job, seed_of(job.seed, "tas"), initial))
        job.cut(self.sizes(job, context))
        job.train("small", loss=self.loss(job, teacher))
        return job.plan()

    def sizes(self, job: Job, context: Context) -> dict[str, Tensor]:
        """Kept units by group: the first ones, as many as the search found."""
        ramp = Ramp(1.0)
        law = lambda group: choice_of(group, lambda: temperature(ramp.weight, self.tau, self.tau_end))
        groups = [group for group in context.groups if len(counts_of(group)) > 1]
        with job.seeded("sizes"):
            gated = job.gated(context, law, groups, model=copy.deepcopy(job.model))
        share_of, wanted = price(context, gated.points)
        own = job.task.loss or default_loss

        def loss(model: nn.Module, batch: Any) -> Tensor:
            now = float(share_of({name: made.value() for name, made in gated.by_group().items()}))
            seek = log_cost(share_of(gated.keep()), now, wanted, self.tolerance)
            return own(model, batch) + self.cost * seek

        first, second = halves(job.task.train, job.generator("halves"))
        sizes = [law.logits for law in gated.choices().values()]
        recipe = SEARCH.replace(lr=self.shape_lr, batch=job.recipe.batch, precision=job.recipe.precision)
        upper = Second(
            gated, sizes, data=second, loss=loss, recipe=recipe, seed=job.seed, augment=job.task.augment
        )
        job.train(
            "search",
            steps=max(1, round(self.search * job.steps)),
            model=gated,
            parameters=[*gated.model.parameters(), *gated.widths.parameters()],
            data=first,
            after_step=[upper, ramp],
        )
        likeliest = {name: made.value() for name, made in gated.by_group().items()}
        job.note(
            share_of_the_likeliest=float(share_of(likeliest)), share_expected=share_of(gated.keep()).item()
        )
        if self.select == "argmax":
            return gated.open()
        return context.allocate(self.scores(context.groups, gated.keep()), job.options.allocation)

    def scores(self, groups: list[Group], keep: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """How likely each unit is in the network, [units]; of equals the first units stay, in all groups alike."""
        found = {}
        for group in groups:
            likely = (
                keep[group.name].detach().double().cpu() if group.name in keep else torch.ones(group.size)
            )
            found[group.name] = likely - 1e-6 * torch.arange(group.size, dtype=torch.float64) / group.size
        return found

    def loss(self, job: Job, teacher: nn.Module) -> Objective | None:
        """(1 - distil) * the task's loss + distil * soften^2 * KL(dense || small); None: the task's alone."""
        if not self.distil or job.task.loss is None:
            return distillation(teacher, weight=self.distil, temperature=self.soften) if self.distil else None
        own, told = job.task.loss, distillation(teacher, weight=1.0, temperature=self.soften)
        return lambda model, batch: (1 - self.distil) * own(model, batch) + self.distil * told(model, batch)
