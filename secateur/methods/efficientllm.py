"""EfficientLLM: while a language model is trained on, its least salient head, neuron or stem channel leaves, again and again.

Xing et al. 2025, "EfficientLLM: Scalable Pruning-Aware Pretraining for Architecture-Agnostic Edge Language Models",
https://arxiv.org/abs/2502.06663. Spec: efficientllm.

Reconstruction: no training code is published, and the sheet was made from its figures. Saliencies are averaged over the
batches since the last removal; kinds of unit are compared by the mean over the parameters that would leave; the damping is
1 % of the Hessian's mean diagonal; all has left after a fifth of the steps, as in the shortest published run.

Differs: several units leave at once where one at a time wouldn't be done by `end`; the last removals are the smallest, so
that the target is met within one of them; a weight that is the embedding too, or doesn't train, isn't updated.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from secateur.errors import SecateurError
from secateur.method import register
from secateur.pruning.plan import Plan
from secateur.solvers.least_squares import least_squares
from secateur.stats.hessians import every_matrix, hessians, readers
from secateur.surgery import Shrinking
from secateur.taxonomy import record
from secateur.training.job import Job
from secateur.training.leaving import Leaving
from secateur.training.method import TrainMethod
from secateur.training.state import State
from secateur.utils.batches import inputs_of

SALIENCY = {
    "second": lambda x: x.square() / 2,
    "first": lambda x: x.abs(),
    "mixed": lambda x: (x - x.square() / 2).abs(),
}
"""What removing a weight costs, of weight times gradient: the diagonal Fisher's estimate, the gradient's, both."""


@register
@dataclass
class EfficientLLM(TrainMethod):
    """One training on a stream of text, in which one unit of a kind leaves every layer after each few steps, until the target.

    >>> secateur.train_prune(model, method="efficientllm", target="params<=50%", data=ids, steps=2000)  # doctest: +SKIP
    >>> secateur.train_prune(load_task("text"), method="efficientllm", target="50%", interval=2)  # doctest: +SKIP

    Heads (with their key and value), neurons and channels of the residual stream compete; all layers stay equally wide. Before a
    cut the layers that read what leaves are updated, to give what they gave on the batch. The saliency comes from the gradients
    of the training itself. Batches of few tokens want a larger `interval`. Mixtures of experts are refused.
    """

    interval: int = field(default=1, metadata={"help": "optimiser steps between removals", "min": 1})
    begin: float = field(
        default=0.01, metadata={"help": "share of the steps before any removal", "min": 0, "below": 1}
    )
    end: float = field(
        default=0.2, metadata={"help": "share of the steps after which all has left", "above": 0, "max": 1}
    )
    saliency: str = field(
        default="second", metadata={"help": "second order, first, mixed", "choices": tuple(SALIENCY)}
    )
    across: str = field(
        default="mean",
        metadata={
            "help": "kinds compare by the mean over their parameters, or the sum",
            "choices": ("mean", "sum"),
        },
    )
    update: bool = field(default=True, metadata={"help": "update the layers that read what leaves"})
    damping: float = field(
        default=0.01, metadata={"help": "of the update, as a share of the Hessian's mean diagonal", "min": 0}
    )

    starts: ClassVar[str] = "trained"
    removes: ClassVar[str] = "units"
    kinds: ClassVar[tuple[str, ...] | None] = ("heads", "kv_groups", "neurons", "hidden", "channels")
    share_of: ClassVar[str] = "weights"
    allocation: ClassVar[str] = "global"
    info = record("efficientllm")

    def prune(self, job: Job) -> Plan:
        self.check(job)
        if not job.trained:
            job.train("dense")
        leaving = Leaving(
            job,
            self.times(job.steps),
            saliency=SALIENCY[self.saliency],
            every=self.interval,
            mean=self.across == "mean",
            before=self.repair if self.update else None,
        )
        job.train("pruning", after_backward=[leaving], after_step=[leaving.cuts])
        job.note(removals=leaving.history)
        return job.plan()

    def check(self, job: Job) -> None:
        if self.end <= self.begin:
            raise SecateurError(
                f"all would have left ({self.end:g}) before anything does ({self.begin:g})",
                where=f"{self.name}, end",
                fix="give more than begin",
            )
        if job.target.kind == "latency":
            raise SecateurError(
                "seconds aren't measured between two steps",
                where=f"{self.name}, target {job.target}",
                fix="give params, macs, size or a share",
            )
        if job.options.divides not in (None, "uniform"):
            raise SecateurError(
                "each removal takes one unit of every layer",
                where=f"{self.name}, allocation {job.options.divides}",
                fix="leave it out",
            )
        if any(group.kind == "experts" for group in job.context().graph.groups):
            raise SecateurError(
                "a batch may send an expert no token, whose units would then leave first",
                where=f"{self.name}, {type(job.model).__name__}",
                fix="take a method that calibrates on more data, such as taylor",
            )

    def times(self, steps: int) -> list[int]:
        """After how many steps something leaves.

        >>> EfficientLLM(interval=2, begin=0.2, end=0.8).times(10)
        [4, 6, 8]
        """
        first = min(round(self.begin * steps), steps - 1)
        last = min(max(round(self.end * steps), first + 1), steps)
        return [*range(first + self.interval, last + 1, self.interval)] or [last]

    def repair(self, state: State, now: Shrinking, keep: Mapping[str, Tensor]) -> None:
        """Updates the layers that lose inputs: W - W_p [H⁻¹]_pp⁻¹ [H⁻¹]_p, H of what they multiply on this batch."""
        gone, known = readers(now.graph, now.relative(keep)), every_matrix(now.model)
        plain = {n: known[n] for n in gone if n in known and known[n].parts == 1}
        plain = {n: matrix for n, matrix in plain.items() if matrix.parameter.requires_grad}
        made = []
        for matrix, stats in hessians(now.model, [inputs_of(now.model, state.batch)], plain):
            stay = (~matrix.fold(gone[matrix.name])[0]).nonzero().squeeze(1)
            made.append((matrix, least_squares(matrix.weight(), stats.hessian, stay, self.damping)))
        for matrix, weight in made:
            matrix.set(weight)
