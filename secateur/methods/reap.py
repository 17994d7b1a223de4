"""REAP: experts leave by the mean of router weight times output norm, over the tokens that are sent to them.

Lasby, Lazarevich, Sinnadurai, Lie, Ioannou, Thangarasa 2025, "REAP the Experts: Why Pruning Prevails for One-Shot MoE Compression",
https://arxiv.org/abs/2510.13999. Facts from the authors' code, github.com/CerebrasResearch/reap. Spec: none.

Differs: the router's weights are those that the model multiplies with, behind its own renormalisation, scaling and grouped
choice. The released code takes the softmax of the router's logits, renormalised where asked for; on models that do just that both
are the same.

Reconstruction: where a router first chooses among groups of experts, groups leave whole, by the mean over their experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from secateur.method import register
from secateur.pruning.context import Context
from secateur.pruning.method import UnitMethod
from secateur.stats.experts import ExpertStats, collect_experts, members
from secateur.taxonomy import record


def saliency(stats: ExpertStats) -> Tensor:
    """[experts]: the mean of weight times norm over an expert's tokens; 0 where none came.

    >>> two = torch.tensor([2.0, 0.0])
    >>> saliency(ExpertStats(two, two, two, torch.tensor([3.0, 0.0]), torch.zeros(2, 4), two))
    tensor([1.5000, 0.0000])
    """
    return stats.weighted / stats.tokens.clamp_min(1)


@register
@dataclass
class Reap(UnitMethod):
    """The same share of every layer's experts, those whose weighted outputs are smallest first; routers pick among the rest.

    >>> secateur.prune(model, method="reap", target="50%", data=ids)  # doctest: +SKIP

    A percentage is that of the experts. Shared experts stay, and so many that the router has as many to pick as it does.
    """

    kinds: ClassVar[tuple[str, ...] | None] = ("experts",)
    needs: ClassVar[frozenset[str]] = frozenset({"routing"})
    by_block: ClassVar[bool] = True
    info = record("reap")

    def passes(self) -> str:
        return "batches"

    def scores(self, context: Context) -> dict[str, Tensor]:
        return context.remember("scores", lambda: self.gather(context))

    def gather(self, context: Context) -> dict[str, Tensor]:
        groups = context.groups
        found = collect_experts(context.model, context.require_data(), groups, context.progress, context.play)
        return {
            group.name: saliency(found[group.name])[members(context.model, group)].mean(1) for group in groups
        }
