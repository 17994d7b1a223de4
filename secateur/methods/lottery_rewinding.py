"""Lottery tickets with rewinding: survivors go back to their values early in training instead of the initial ones.

Frankle, Dziugaite, Roy, Carbin 2019, "Stabilizing the Lottery Ticket Hypothesis", https://arxiv.org/abs/1903.01611.
Spec: lottery-rewinding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from secateur.method import register
from secateur.pruning.plan import Plan
from secateur.taxonomy import record
from secateur.training.job import Job
from secateur.training.tickets import TicketMethod


@register
@dataclass
class LotteryRewinding(TicketMethod):
    """`lottery-ticket`, with the survivors put back to step `rewind`; schedule and data go on from that step.

    >>> secateur.train_prune(task, method="lottery-rewinding", target="20%", rewind="500it")  # doctest: +SKIP

    The default is the paper's for ResNet-20, 500 of 30,000 steps. The optimiser starts afresh at that step, as in the
    published code; `restore_moments` gives it back its state. `stability=n` measures n pairs of runs: how far the
    ticket ends from the whole network under the same data order, and from itself under another, beside a random mask
    with the same layer counts; the report's phases hold distances, angles, and, where the task has a quality, by how
    much it falls on the line between the two orders' ends (the error barrier).
    """

    rewind: str = field(
        default="1.7%",
        metadata={"help": "the step survivors go back to: 500it, 1.4ep, or a share such as 1.7%"},
    )
    restore_moments: bool = field(
        default=False, metadata={"help": "rewind the optimiser's state too; default: it starts afresh"}
    )
    stability: int = field(default=0, metadata={"help": "pairs of runs whose distance is measured"})

    info = record("lottery-rewinding", title="Lottery tickets with rewinding")
    quick: ClassVar[Mapping[str, Any]] = {"rounds": 2, "rewind": "2it"}

    def prune(self, job: Job) -> Plan:
        masks = self.ticket(
            job,
            rewind=job.step_of(self.rewind),
            restore_moments=self.restore_moments,
            pairs=self.stability,
        )
        return job.plan(masks=masks)
