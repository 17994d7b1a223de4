"""Lottery tickets: iterative magnitude pruning that resets the survivors to their initial values.

Frankle, Carbin 2019, "The Lottery Ticket Hypothesis: Finding Sparse, Trainable Neural Networks",
https://arxiv.org/abs/1803.03635. Spec: lottery-ticket.

Differs from both published codes, which remove one weight more than asked: exactly as many leave as the target says, and
the last round ends on it.
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
class LotteryTicket(TicketMethod):
    """Train, remove the smallest surviving weights, put the rest back to initialisation, again; train what is left.

    >>> secateur.train_prune(task, method="lottery-ticket", target="20%", epochs=20)  # doctest: +SKIP

    A round removes the same share p = 1 - target^(1/rounds) of what is left, at most `rate`. `scope="layer"` prunes each
    layer by itself, the last one at `output_rate` times p, as the paper does for small networks; "global" compares all.
    `controls` are trained beside the ticket and reported: `reinit` (its mask, new initial weights), `shuffle` (as many
    weights in each layer, at random places), `shuffle-global`, `keep` (its mask, trained values kept).
    """

    reset: bool = field(
        default=True,
        metadata={"help": "reset between rounds (strategy 1); off: only before the last training"},
    )

    info = record("lottery-ticket", title="Lottery tickets (IMP)")
    quick: ClassVar[Mapping[str, Any]] = {"rounds": 2}

    def prune(self, job: Job) -> Plan:
        return job.plan(masks=self.ticket(job, reset=self.reset))
