"""FLAP: units whose input fluctuates little leave, and their mean goes into a bias.

An et al. 2024, "Fluctuation-based Adaptive Structured Pruning for Large Language Models",
https://arxiv.org/abs/2312.11983. Spec: weight-baselines, item 12.

Reconstruction: key/value groups (the published code has none) are units whose channels' metrics are averaged, like the
channels of a head; a unit costs the weights that leave with it, instead of a constant for heads of 128; the budget is
met exactly (`rounding="paper"` is the published threshold, which takes the unit at the cut along, and ties); no layer
loses its last unit. Tokens count alike, whatever the length of their sequence.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from secateur.budget import Competitor, build_path, follow
from secateur.context import Context
from secateur.errors import SecateurError
from secateur.graph import Group, Slice
from secateur.method import UnitMethod, register
from secateur.plan import Plan
from secateur.select import top_k
from secateur.taxonomy import MethodInfo


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


def cut_at(scores: Sequence[Tensor], costs: Sequence[float], share: float) -> list[Tensor]:
    """The published threshold: bool masks of what stays.

    Units in falling order; the cut lies where their cumulative cost is nearest to `share` of the whole, the first of
    equals; the unit at the cut leaves too, and whatever ties with it.
    """
    values = torch.cat([s.double() for s in scores])
    cost = torch.cat([torch.full((len(s),), float(c), dtype=torch.float64) for s, c in zip(scores, costs)])
    ordered, order = values.sort(descending=True, stable=True)
    distance = (cost[order].cumsum(0) - share * cost.sum()).abs()
    return [s.double() > ordered[distance.argmin()] for s in scores]


@register
@dataclass
class Flap(UnitMethod):
    """Weighted variance of what o_proj and down_proj read, standardised by layer and ranked over the whole network.

    >>> secateur.prune(model, method="flap", target="80%", data=ids)  # doctest: +SKIP

    The published calibration is 1024 WikiText samples. `allocation="uniform"` cuts every layer alike.
    """

    compensate: bool = field(default=True, metadata={"help": "add the removed units' mean output as a bias"})
    rounding: str = field(
        default="exact", metadata={"help": "exact: meets the budget; paper: the published threshold"}
    )

    kinds: ClassVar[tuple[str, ...] | None] = ("heads", "kv_groups", "neurons")
    needs: ClassVar[frozenset[str]] = frozenset({"input_mean", "input_var"})
    allocation: ClassVar[str] = "global"
    share_of: ClassVar[str] = "weights"
    info = MethodInfo(
        title="FLAP",
        spec="weight-baselines",
        objects="H N",
        granularity="struct",
        speedup="univ",
        when="PAT-PT",
        criteria="ACT",
        order="shot",
        data="calib",
        start="pre",
        recovery="none",
        scope="glob",
        models="llm",
        budget_unit="params",
        year=2024,
        arxiv="2312.11983",
        refs=("CASIA-IVA-Lab/FLAP",),
        description="Fluctuation of the inputs, ranked globally, with a bias for what left.",
    )

    def __post_init__(self) -> None:
        if self.rounding not in ("exact", "paper"):
            raise SecateurError(f"there is no rounding {self.rounding!r}", where="flap", fix="exact or paper")

    def plan(self, context: Context) -> Plan:
        scores = context.remember(
            "scores",
            lambda: {g.name: self.score(g, context) for g in context.groups if readers(g, context)},
        )
        if not scores:
            raise SecateurError(
                "no linear layer reads their units", where=f"flap, {context.groups[0].name}, ..."
            )
        keep = self.divide(context, scores)
        return context.make_plan(keep=keep, values=self.repair(context, keep))

    def score(self, group: Group, context: Context) -> Tensor:
        found = [
            unit_metric(wifv(weight, context.stats()[s.name].input_var), s.index, group.kind != "neurons")
            for s, weight in readers(group, context)
        ]
        return torch.stack(found).mean(0)

    def divide(self, context: Context, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
        groups = context.competitors(scores)
        if self.rounding == "paper":
            of = {group.name: unit_weights(group, context.graph.shapes) for group in context.groups}
            masks = cut_at([g.scores for g in groups], [of[g.name] for g in groups], context.share)
            return {g.name: _at_least(mask, g) for g, mask in zip(groups, masks)}
        path = build_path(groups, context.allocation or self.allocation)
        cost, limit = context.cost()
        each = {"params": 1, "size": next(context.model.parameters()).element_size()}.get(
            context.target.kind, 0
        )

        def with_biases(keep: Mapping[str, Tensor]) -> float:
            return cost(keep) + (each * self._new_parameters(context, keep) if each else 0)

        return follow(groups, path, with_biases, limit, refill=context.target.kind != "latency")

    def _new_parameters(self, context: Context, keep: Mapping[str, Tensor]) -> int:
        cut = [
            group
            for group in context.groups
            if self.compensate and len(keep.get(group.name, range(group.size))) < group.size
        ]
        return sum(
            w.shape[0] for g in cut for s, w in readers(g, context) if _bias(context, s.name)[1] is None
        )

    def repair(self, context: Context, keep: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        biases: dict[str, Tensor] = {}
        for group in context.groups if self.compensate else []:
            if len(keep.get(group.name, range(group.size))) == group.size:
                continue
            left = torch.ones(group.size, dtype=torch.bool)
            left[keep[group.name]] = False
            for s, weight in readers(group, context):
                gone = torch.zeros(weight.shape[1], dtype=torch.bool)
                gone[s.index[left].flatten()] = True
                name, bias = _bias(context, s.name)
                added = compensation(weight, context.stats()[s.name].input_mean, gone.to(weight.device))
                biases[name] = (added if bias is None else added + bias.detach().float()).to(weight.dtype)
        return biases


def readers(group: Group, context: Context) -> list[tuple[Slice, Tensor]]:
    """(slice, weight [out, in]) of the linear layers that read the group's units."""
    matrices = [
        (s, context.matrices[s.name]) for s in group.slices if s.role == "in" and s.name in context.matrices
    ]
    return [(s, matrix.weight()) for s, matrix in matrices if matrix.kind in ("linear", "conv1d")]


def unit_weights(group: Group, shapes: Mapping[str, Sequence[int]]) -> int:
    """How many weights leave with one unit (biases and norms not counted)."""
    counted = [s for s in group.slices if s.role in ("out", "in")]
    return sum(s.index.shape[1] * math.prod(shapes[s.name]) // shapes[s.name][s.dim] for s in counted)


def _bias(context: Context, weight: str) -> tuple[str, Tensor | None]:
    path, _, attribute = weight.rpartition(".")
    name = f"{path}.{attribute.replace('weight', 'bias')}".lstrip(".")
    return name, getattr(context.model.get_submodule(path), name.rpartition(".")[2], None)


def _at_least(mask: Tensor, group: Competitor) -> Tensor:
    floor = max(1, group.floor)
    return (mask if int(mask.sum()) >= floor else top_k(group.scores, floor)).nonzero().squeeze(1)
