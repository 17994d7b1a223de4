"""MoNE: experts that are little used and vary little become novices, which give the mean of what the expert gave.

Zhang, Han, Lou, Zhao, Zhang, You 2025, "MoNE: Replacing Redundant Experts with Lightweight Novices for Structured Pruning of MoE",
https://arxiv.org/abs/2507.00390. Facts from the authors' code, github.com/zxgx/mode-pd. Spec: none.

An expert's score is the root of the variance of its output, over the tokens sent to it and summed over channels, times the sum of
the router's weights. The router is left as it is and goes on sending tokens to novices.

Departs: mean and variance are those over all tokens. The released code follows them from batch to batch, without the variance of the first
batch and with squares that each batch takes from the mean so far. On random models of two layers of 8 experts in lists it keeps the same
4 in 20 of 20 layers, on 4 or 32 batches, and its vectors are these to 1e-6; on a single batch its variances are zero and no expert stays.

Differs: the router's weights are those that the model multiplies with, behind its own renormalisation and scaling.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from secateur.errors import SecateurError
from secateur.graph.novices import KIND, holder_of
from secateur.method import register
from secateur.pruning.allocate import build_path
from secateur.pruning.context import Context
from secateur.pruning.method import UnitMethod
from secateur.pruning.plan import Plan
from secateur.stats.experts import ExpertStats, collect_experts
from secateur.taxonomy import record


def redundancy(stats: ExpertStats) -> Tensor:
    """[experts]: the spread of an expert's outputs times the sum of its weights; 0 where fewer than two tokens came.

    >>> two = torch.tensor([2.0, 1.0])  # tokens; outputs 1 and 3, then 5, of weight 0.5
    >>> redundancy(ExpertStats(two, two / 2, two, two, torch.tensor([[4.0], [5.0]]), torch.tensor([10.0, 25.0])))
    tensor([1.4142, 0.0000])
    """
    rest = stats.squares - stats.outputs.square().sum(1) / stats.tokens.clamp_min(1)
    variance = rest.clamp_min(0) / (stats.tokens - 1).clamp_min(1)
    return torch.where(stats.tokens > 1, variance.sqrt(), 0) * stats.weights


@register
@dataclass
class Mone(UnitMethod):
    """The same share of every layer's experts stays; each of the others becomes a vector, its mean output.

    >>> secateur.prune(model, method="mone", target="50%", data=ids)  # doctest: +SKIP

    A percentage is that of the experts; a novice has as many parameters as the model is wide. Fewer may stay than the router picks, but one.
    No class of transformers holds an expert that is a vector, so the result is saved with a modeling file of its own, and loads with
    `from_pretrained(folder, trust_remote_code=True)`.
    """

    kinds: ClassVar[tuple[str, ...] | None] = (KIND,)
    needs: ClassVar[frozenset[str]] = frozenset({"routing"})
    by_block: ClassVar[bool] = True
    unrepaired: ClassVar[str] = "its vectors are what makes up for the experts"
    info = record("mone")

    def plan(self, context: Context) -> Plan:
        if context.options.schedule != "once":
            raise SecateurError(
                "its vectors are means of the dense experts",
                where=f"mone, schedule {context.options.schedule}",
                fix="leave it out",
            )
        return self.decide(context, context.remember("routing", partial(self.gather, context)))

    def passes(self) -> str:
        return "batches"

    def decide(self, context: Context, found: Mapping[str, Tensor]) -> Plan:
        scores = {group.name: found[f"{group.name}/scores"] for group in context.groups}
        means = {group.name: found[f"{group.name}/means"] for group in context.groups}
        keep = self._divide(context, scores, means)
        values: dict[str, Tensor] = {}
        for group in context.groups:
            mean = means[group.name].to(torch.float32)
            gone = sorted({*range(group.size)} - {*keep.get(group.name, torch.arange(group.size)).tolist()})
            if group.modules:
                values |= {f"{group.modules[unit]}.constant": mean[unit].clone() for unit in gone}
            elif gone:
                whole = torch.zeros_like(mean)
                whole[gone] = mean[gone]
                values[f"{holder_of(context.model, group)}.constants"] = whole
        return context.make_plan(keep=keep, values=values)

    def gather(self, context: Context) -> dict[str, Tensor]:
        """Scores and mean outputs, by group name."""
        groups = context.groups
        if others := sorted({group.kind for group in groups} - {KIND}):
            raise SecateurError(
                f"it replaces experts, and cuts no {', '.join(others)}",
                where="mone, kinds",
                fix="leave kinds out",
            )
        stats = collect_experts(context.model, context.require_data(), groups, context.progress, context.play)
        found = {}
        for group in groups:
            own = stats[group.name]
            found[f"{group.name}/scores"] = redundancy(own)
            found[f"{group.name}/means"] = own.outputs / own.tokens.clamp_min(1)[:, None]
        return found

    def _divide(
        self, context: Context, scores: Mapping[str, Tensor], means: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Kept units of every group; a target in parameters or bytes counts the vectors too."""
        if context.target.kind == "macs" and (stacked := [g.name for g in context.groups if not g.modules]):
            raise SecateurError(
                "what vectors save of multiply-adds depends on how many tokens are sent to them",
                where=f"mone, target {context.target}, {stacked[0]}",
                fix="give a share of the experts, params or size",
            )
        if context.target.kind not in ("params", "size"):
            return context.allocate(scores)
        groups = context.competitors(scores)
        path = build_path(groups, context.allocation or self.allocation)
        sizes = {name: mean.shape for name, mean in means.items()}

        def new(keep: Mapping[str, Tensor]) -> int:
            return sum((sizes[name][0] - len(units)) * sizes[name][1] for name, units in keep.items())

        return context.follow(groups, path, new=new)
