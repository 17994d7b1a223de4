"""Consensus sub-network: gates that look at each input are polarised until all inputs agree on one network.

Learning a Consensus Sub-Network with Polarization Regularization and One Pass Training,
https://arxiv.org/abs/2302.10798. Spec: consensus-subnetwork.

No official code is known: the abstract's facts are the binary gate, the straight-through gradient, the polarisation over the
data, a wanted size and one pass; every formula, the gate's network and all coefficients are reconstructions. The size term
is one-sided: with the sheet's distance on both sides one block stays half open wherever the target falls between two
counts, and polarisation and size hold each other up (measured). Blocks are
computed for all samples of a batch, also those that skip them, so BatchNorm sees them all; its statistics are taken anew
after the cut.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.gates import Reading, answers_over
from secateur.gates.laws import GRADIENTS
from secateur.graph import Group
from secateur.method import register
from secateur.pruning.allocate import at_least
from secateur.pruning.plan import Plan
from secateur.taxonomy import record
from secateur.training.job import Job
from secateur.training.method import TrainMethod
from secateur.training.price import price
from secateur.training.ramp import Ramp
from secateur.utils.running import evaluating, run


def polarisation(answers: Tensor) -> Tensor:
    """mean over units of gbar (1 - gbar), where gbar is the share of the samples that a unit runs for.

    >>> polarisation(torch.tensor([[1.0, 0, 1], [1, 0, 0], [1, 1, 1], [1, 0, 0]]))
    tensor(0.1458)

    answers: [batch, units], 0 or 1. 0 where every gate is constant over the batch. Sheet, step 5.
    """
    mean = answers.mean(0)
    return (mean * (1 - mean)).mean()


def disagreement(share: Tensor) -> float:
    """The largest share of inputs that a gate's majority doesn't speak for; share: [units] of inputs that run each."""
    return torch.minimum(share, 1 - share).max().item()


@register
@dataclass
class ConsensusSubnetwork(TrainMethod):
    """One training with gates; what almost no input uses is cut, the rest runs without gates.

    >>> secateur.train_prune(load_task("cifar10"), method="consensus-subnetwork", target="macs<=60%", epochs=4)  # doctest: +SKIP

    A target in MACs or parameters is that of the whole network; a bare share is that of the gated units. Of the
    units that most inputs skip none stays; where that isn't enough for the target, the least used of the others leave.
    `select="threshold"` takes the majority's network as it is, as published, so that a target may be missed. Needs
    batches of two or more: one sample always agrees with itself. Fine-tuning is not part of the method (`tune`), but needed where
    most inputs skip all units of a group: one stays, and the report says so.
    """

    gate: str = field(
        default="auto",
        metadata={
            "help": "what is gated: layers (residual blocks), channels; auto: layers where there are any",
            "choices": ("auto", "layers", "channels"),
        },
    )
    lambda_p: float = field(default=2.0, metadata={"help": "weight of the polarisation", "min": 0})
    lambda_s: float = field(default=4.0, metadata={"help": "weight of what is over the target", "min": 0})
    ramp: float = field(
        default=0.2,
        metadata={"help": "share of the steps over which the polarisation comes in", "min": 0, "max": 1},
    )
    width: int = field(default=16, metadata={"help": "hidden width of a gate's network", "min": 1})
    gate_lr: float = field(default=1.0, metadata={"help": "rate of the gates, of the network's", "above": 0})
    gradient: str = field(
        default="sigmoid",
        metadata={"help": "backward of the hard step: sigmoid, identity", "choices": GRADIENTS},
    )
    select: str = field(
        default="allocate",
        metadata={
            "help": "what leaves: allocate, threshold (published)",
            "choices": ("allocate", "threshold"),
        },
    )
    reestimate: int = field(
        default=20, metadata={"help": "batches to take BatchNorm statistics anew on after the cut", "min": 0}
    )
    tune: float = field(default=0.0, metadata={"help": "fine-tuning, in lengths of the training", "min": 0})

    starts: ClassVar[str] = "trained"
    removes: ClassVar[str] = "units"
    kinds: ClassVar[tuple[str, ...] | None] = ("layers", "channels")
    allocation: ClassVar[str] = "global"
    share_of: ClassVar[str] = "units"
    info = record("consensus-subnetwork")

    def prune(self, job: Job) -> Plan:
        if job.recipe.batch < 2 and self.lambda_p:
            raise SecateurError(
                "one sample always agrees with itself, so nothing is polarised",
                where=f"{self.name}, batch",
                fix="a batch of 2 or more, or lambda_p=0",
            )
        context = job.context()
        layers = [group for group in context.groups if group.kind == "layers"]
        kind = self.gate if self.gate != "auto" else "layers" if layers else "channels"
        groups = [group for group in context.groups if group.kind == kind]
        with job.seeded("gates"):
            gated = job.gated(context, self.law, groups, inputs=context.example)
        share_of, wanted = price(context, gated.points)
        ramp, laws = Ramp(self.ramp), gated.readers()

        def polar(model: nn.Module, batch: Any) -> Tensor:
            answers = torch.cat([law.answers() for law in laws.values()], 1)
            return self.lambda_p * ramp.weight * polarisation(answers)

        def size(model: nn.Module, batch: Any) -> Tensor:
            return self.lambda_s * (share_of(gated.keep()) - wanted).clamp_min(0)

        job.train(
            "gates",
            model=gated,
            parameters=[
                {"params": [*job.model.parameters()], "lr": job.recipe.lr},
                {"params": [*gated.laws.parameters()], "lr": job.recipe.lr * self.gate_lr, "weight_decay": 0},
            ],
            loss_terms=[polar, size],
            after_step=[ramp],
        )
        with evaluating(gated):
            found = answers_over(laws, (run(gated, batch) for batch in job.batches(max(1, round(job.epoch)))))
        shares = {name: share for name, (share, _) in found.items()}
        majority = {name: (share >= 0.5).float() for name, share in shares.items()}
        job.note(
            quality_of_the_gated=None if job.task.quality is None else float(job.task.quality(gated.eval())),
            disagreement=max(disagreement(share) for share in shares.values()),
            share_of_the_consensus=float(share_of(majority)),
        )
        kept = self.choose(job, groups, shares, {name: sure for name, (_, sure) in found.items()})
        told = {}
        for name, units in kept.items():
            if added := [int(u) for u in units if shares[name][u] < 0.5]:
                told[f"kept against the consensus: {name}"] = (
                    f"most inputs skip all of its units, and one has to stay ({added[0]}): the cut network isn't the gated one; fine-tune it"
                )
        job.cut(kept)
        job.reestimate(self.reestimate)
        job.note(quality_after_the_cut=job.quality())
        if steps := round(self.tune * job.steps):
            job.train("tune", steps=steps)
        return job.plan(notes=told)

    def law(self, group: Group) -> Reading:
        return Reading(group.size, blocks=group.kind == "layers", hidden=self.width, gradient=self.gradient)

    def choose(
        self, job: Job, groups: Sequence[Group], shares: Mapping[str, Tensor], sure: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Kept units by group: as many at least as it needs, the most used, of equals the first."""
        least = {group.name: group.least for group in groups}
        stay = {name: at_least(share >= 0.5, share, least[name]) for name, share in shares.items()}
        if self.select == "allocate":
            fits = job.context().allocate(sure, job.options.allocation)
            for name, units in fits.items():
                both = stay[name] & torch.zeros_like(stay[name]).index_fill(0, units, True)
                stay[name] = at_least(both, sure[name].masked_fill(~stay[name], -1), least[name])
        return {name: mask.nonzero().flatten() for name, mask in stay.items()}
