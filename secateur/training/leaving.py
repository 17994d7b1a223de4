"""Units that leave one after the other while a model trains, by saliencies of the training's own gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from secateur.pruning.context import Context
from secateur.surgery import Shrinking
from secateur.training.job import Job
from secateur.training.state import State


class Leaving:
    """One unit of a kind leaves each of its layers at these steps, until the target: a hook for `after_backward` that adds up
    saliencies, whose `cuts` are the hook for `after_step`.

    >>> leaving = Leaving(job, [100, 101, 102], saliency=lambda x: x.square() / 2)  # doctest: +SKIP
    >>> job.train("pruning", after_backward=[leaving], after_step=[leaving.cuts])  # doctest: +SKIP

    at: after how many steps something leaves; several units at once where one at a time would miss the target at the last.
    saliency: what removing a weight costs, of weight times gradient; summed over a unit and the `every` steps before the first
    removal, then those since the last. mean: kinds of unit compete by the mean over the parameters that leave, else by the sum. before:
    called with the state, the model and the units to keep before each cut. Sums are held for the units of the dense model, and go
    into checkpoints. `history`: [step, kind that left, what each kind would have cost].

    Raises `SecateurError` for a target below the floors.
    """

    def __init__(
        self,
        job: Job,
        at: Sequence[int],
        *,
        saliency: Callable[[Tensor], Tensor],
        every: int = 1,
        mean: bool = True,
        before: Callable[[State, Shrinking, Mapping[str, Tensor]], None] | None = None,
    ):
        self.saliency, self.every, self.mean, self.before = saliency, every, mean, before
        self.cuts, self.at = job.cuts(self.decide), list(at)
        self.context: Context = job.context()
        self.groups = {group.name: group for group in self.context.groups}
        self.cost, self.limit = self.context.cost()
        self.sums: dict[str, Tensor] = {}
        self.clear()
        # refuses a target that floors don't meet
        self.context.allocate(self.sums, "uniform", keep_scores=False)
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
        if self.done or state.step + 1 <= self.at[0] - self.every or state.step >= self.at[-1]:
            return
        graph = self.cuts.shrinking.graph
        values = {
            name: self.saliency(p.float() * p.grad.float())
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
        if self.before is not None:
            self.before(state, now, keep)
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
            count += len(leaving) * graph.unit_params(graph[name])
        return total / count if self.mean else total

    def state_dict(self) -> dict[str, Any]:
        return {**self.sums, "done": self.done, "history": self.history}

    def load_state_dict(self, values: Mapping[str, Any]) -> None:
        self.sums = {name: values[name] for name in self.groups}
        self.done, self.history = values["done"], values["history"]
