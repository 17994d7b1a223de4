"""FLAP: units whose input fluctuates little leave, and their mean goes into a bias.

An et al. 2024, "Fluctuation-based Adaptive Structured Pruning for Large Language Models",
https://arxiv.org/abs/2312.11983. Spec: weight-baselines, item 12.

Reconstruction: key/value groups (the published code has none) are units whose channels' metrics are averaged, like the
channels of a head; a unit costs the weights that leave with it, instead of a constant for heads of 128; the budget is
met exactly (`rounding="paper"` is the published threshold, which takes the unit at the cut along, and ties); no layer
loses its last unit. Tokens count alike, whatever the length of their sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from secateur.errors import SecateurError
from secateur.graph import Group, Slice
from secateur.method import register
from secateur.pruning.allocate import at_least, cut_at
from secateur.pruning.context import Context, Matrix
from secateur.pruning.method import UnitMethod
from secateur.pruning.plan import Plan
from secateur.taxonomy import record


def wifv(weight: Tensor, variance: Tensor) -> Tensor:
    """Weighted input feature variance Var(x_j)·Σ_i W_ij²: [out, in], [in] -> [in]."""
    return variance * weight.float().square().sum(0)


def standardise(metric: Tensor) -> Tensor:
    """(x - mean) / std over the channels of a layer, unbiased."""
    return (metric - metric.mean()) / metric.std().clamp_min(torch.finfo(metric.dtype).tiny)


def unit_metric(metric: Tensor, index: Tensor, attention: bool) -> Tensor:
    """Channels [in] -> units [units], index [units, k]: standardised (attention: after squaring), then averaged."""
    return standardise(metric.square() if attention else metric)[index.to(metric.device)].mean(1)


def compensation(weight: Tensor, mean: Tensor, gone: Tensor) -> Tensor:
    """What the layer loses on average: W·(mean ∘ gone), [out, in], [in], bool [in] -> [out]."""
    return weight.float() @ (mean.float() * gone)


@register
@dataclass
class Flap(UnitMethod):
    """Weighted variance of what o_proj and down_proj read, standardised by layer and ranked over the whole network.

    >>> secateur.prune(model, method="flap", target="80%", data=ids)  # doctest: +SKIP

    The published calibration is 1024 WikiText samples. `allocation="uniform"` cuts every layer alike.
    """

    compensate: bool = field(default=True, metadata={"help": "add the removed units' mean output as a bias"})
    rounding: str = field(
        default="exact",
        metadata={
            "help": "exact: meets the budget; paper: the published threshold",
            "choices": ("exact", "paper"),
        },
    )

    kinds: ClassVar[tuple[str, ...] | None] = ("heads", "kv_groups", "neurons")
    needs: ClassVar[frozenset[str]] = frozenset({"input_mean", "input_var"})
    allocation: ClassVar[str] = "global"
    share_of: ClassVar[str] = "weights"
    by_block: ClassVar[bool] = True
    info = record("flap")

    def plan(self, context: Context) -> Plan:
        scores = context.remember("scores", partial(self.scores, context))
        if not scores:
            raise SecateurError(
                "no linear layer reads their units", where=f"flap, {context.groups[0].name}, ..."
            )
        keep = self.divide(context, scores)
        return context.make_plan(keep=keep, values=self.repair(context, keep))

    def scores(self, context: Context) -> dict[str, Tensor]:
        return {g.name: self.score(g, context) for g in context.groups if readers(g, context)}

    def score(self, group: Group, context: Context) -> Tensor:
        found = []
        for s, matrix in readers(group, context):
            metric = wifv(matrix.weight(), context.stats()[s.name].input_var)
            found.append(unit_metric(metric, s.index, attention=group.kind != "neurons"))
        return torch.stack(found).mean(0)

    def divide(self, context: Context, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Kept units of every group."""
        groups = context.competitors(scores)
        if self.rounding == "exact":
            path = context.path(groups)
            return context.follow(groups, path, new=partial(self.new_biases, context))
        costs = {group.name: context.unit_weights(group) for group in context.groups}
        masks = cut_at([g.scores for g in groups], [costs[g.name] for g in groups], context.share)
        return {
            g.name: at_least(mask, g.scores, g.floor).nonzero().squeeze(1) for g, mask in zip(groups, masks)
        }

    def cut_readers(
        self, context: Context, keep: Mapping[str, Tensor]
    ) -> Iterator[tuple[Group, Slice, Matrix]]:
        """The layers whose bias makes up for what left."""
        for group in context.groups if self.compensate else []:
            if len(keep.get(group.name, range(group.size))) < group.size:
                yield from ((group, s, matrix) for s, matrix in readers(group, context))

    def new_biases(self, context: Context, keep: Mapping[str, Tensor]) -> int:
        return sum(m.shape[0] for _, _, m in self.cut_readers(context, keep) if m.bias[1] is None)

    def repair(self, context: Context, keep: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        biases: dict[str, Tensor] = {}
        for group, s, matrix in self.cut_readers(context, keep):
            left = torch.ones(group.size, dtype=torch.bool)
            left[keep[group.name]] = False
            gone = torch.zeros(matrix.shape[1], dtype=torch.bool)
            gone[s.index[left].flatten()] = True
            weight, (name, bias) = matrix.weight(), matrix.bias
            added = compensation(weight, context.stats()[s.name].input_mean, gone.to(weight.device))
            biases[name] = (added if bias is None else added + bias.detach().float()).to(weight.dtype)
        return biases


def readers(group: Group, context: Context) -> list[tuple[Slice, Matrix]]:
    """The linear layers that read the group's units."""
    return context.coupled(group, roles=("in",), kinds=("linear", "conv1d"))
