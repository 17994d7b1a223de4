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
from typing import Any, ClassVar

import torch
from torch import Tensor

from secateur.errors import SecateurError
from secateur.graph import Graph, Group
from secateur.method import register
from secateur.pruning.context import Context
from secateur.pruning.plan import Plan
from secateur.solvers.least_squares import least_squares
from secateur.stats.hessians import every_matrix, hessians, readers
from secateur.surgery import Shrinking
from secateur.taxonomy import record
from secateur.training.job import Job
from secateur.training.method import TrainMethod
from secateur.training.state import State
from secateur.utils.batches import inputs_of

SALIENCY = {
    "second": lambda x: x.square() / 2,
    "first": lambda x: x.abs(),
    "mixed": lambda x: (x - x.square() / 2).abs(),
}
"""What removing a weight costs, of weight times gradient: the diagonal Fisher's estimate, the gradient's, both."""


def weights_of(graph: Graph, group: Group) -> int:
    """How many entries of parameters leave with a unit of the group."""
    own = [(s, graph.shapes[s.name]) for s in group.slices if s.name in graph._parameters]
    return sum(s.index.shape[1] * (torch.Size(shape).numel() // shape[s.dim]) for s, shape in own)


class Leaving:
    """What leaves when: a hook on the gradients that adds up saliencies, and the decision after each step.

    Sums are held for the units of the dense model, and go into checkpoints.
    """

    def __init__(self, method: EfficientLLM, job: Job):
        self.method, self.cuts = method, job.cuts(self.decide)
        self.context: Context = job.context()
        self.groups = {group.name: group for group in self.context.groups}
        self.cost, self.limit = self.context.cost()
        self.at = method.times(job.steps)
        self.sums: dict[str, Tensor] = {}
        self.clear()
        self.context.allocate(
            self.sums, "uniform", keep_scores=False
        )  # refuses a target that floors don't meet
        self.done = self.cost({}) <= self.limit
        self.history: list[list[Any]] = []

    def clear(self) -> None:
        self.sums = {name: torch.zeros(g.size, dtype=torch.float64) for name, g in self.groups.items()}

    @property
    def keep(self) -> dict[str, Tensor]:
        left = self.cuts.shrinking.keep
        return {name: left.get(name, torch.arange(g.size)) for name, g in self.groups.items()}

    @torch.no_grad()
    def __call__(self, state: State) -> None:
        """Adds this batch's saliencies, in float32, while something is still to leave."""
        if self.done or state.step + 1 <= self.at[0] - self.method.interval or state.step >= self.at[-1]:
            return
        of, graph = SALIENCY[self.method.saliency], self.cuts.shrinking.graph
        values = {
            name: of(p.float() * p.grad.float())
            for name, p in state.model.named_parameters()
            if p.grad is not None
        }
        for name, units in self.keep.items():
            self.sums[name][units] += graph[name].reduce(values).double().cpu()

    def decide(self, state: State, now: Shrinking) -> dict[str, Tensor] | None:
        """The units to keep from now on: without the least salient, as many as keep to the pace, one at least."""
        if self.done or state.step + 1 not in self.at:
            return None
        part = (self.at.index(state.step + 1) + 1) / len(self.at)
        pace = self.limit + (self.cost({}) - self.limit) * (1 - part)
        keep = self.keep
        while True:
            kind, keep, values = self.without_least(keep)
            self.history.append([state.step + 1, kind, values])
            if self.cost(keep) <= pace:
                break
        self.done = self.cost(keep) <= self.limit
        if self.method.update:
            self.method.repair(state, now, keep)
        self.clear()
        return keep

    def without_least(self, keep: Mapping[str, Tensor]) -> tuple[str, dict[str, Tensor], dict[str, float]]:
        """(the kind of unit that leaves each of its layers, what is kept then, what each kind would have cost)."""
        gone: dict[str, Tensor] = {}
        for name, units in keep.items():
            stays = torch.zeros(len(self.sums[name]), dtype=torch.bool)
            stays[units] = True
            gone[name] = self.sums[name].masked_fill(~stays, -torch.inf)
        fewer: dict[str, dict[str, Tensor]] = {}
        for group in self.context.competitors(gone, keep_scores=False):
            units = group.down_to(len(keep[group.name]) - 1)
            if len(units) < len(keep[group.name]):
                fewer.setdefault(group.kind, {})[group.name] = units
        values = {kind: self.value(keep, units) for kind, units in fewer.items()}
        left = {kind: self.cost({**keep, **units}) for kind, units in fewer.items()}
        # one that goes past the target leaves only where each would; then the smallest does
        short = [kind for kind in fewer if left[kind] > self.limit]
        kind = min(short, key=values.__getitem__) if short else max(left, key=left.__getitem__)
        return kind, {**keep, **fewer[kind]}, values

    def value(self, keep: Mapping[str, Tensor], fewer: Mapping[str, Tensor]) -> float:
        """What the units cost that `fewer` leaves out of `keep`: a mean over their parameters, or the sum."""
        total, count, graph = 0.0, 0, self.cuts.shrinking.graph
        for name, units in fewer.items():
            leaving = keep[name][~torch.isin(keep[name], units)]
            total += float(self.sums[name][leaving].sum())
            count += len(leaving) * weights_of(graph, graph[name])
        return total / count if self.method.across == "mean" else total

    def state_dict(self) -> dict[str, Any]:
        return {**self.sums, "done": self.done, "history": self.history}

    def load_state_dict(self, values: Mapping[str, Any]) -> None:
        self.sums = {name: values[name] for name in self.groups}
        self.done, self.history = values["done"], values["history"]


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
        leaving = Leaving(self, job)
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
