"""2SSP: neurons of every MLP leave by the norm of their activations, then whole attentions by what perplexity loses.

Sandri, Cunegatti, Iacca 2025, "2SSP: A Two-Stage Framework for Structured Pruning of LLMs",
https://arxiv.org/abs/2501.17771. Facts from the authors' code, github.com/FabrizioSandri/2SSP. Spec: none.

Reconstruction: sizes are counted in weights, biases and norms left out. A sequence is what is calibrated on, of any length
(published: 32 of 2048 tokens of C4, the first of which judges attentions).

Departs: neurons leave until the target holds, whatever it bounds, and as many from each layer but for the last of them; where
neurons alone can't make up for what the formula leaves to them, more attentions go than it says, where the released code stops.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from secateur.errors import SecateurError
from secateur.graph import Group
from secateur.method import register
from secateur.pruning.allocate import Step
from secateur.pruning.context import Context
from secateur.pruning.method import UnitMethod
from secateur.pruning.plan import Plan
from secateur.scores.ablation import least_missed
from secateur.stats.collect import default_loss, each_sample
from secateur.surgery import trial
from secateur.taxonomy import record
from secateur.utils.batches import as_batches


def attentions_to_remove(blocks: int, removed: float, ratio: float, alpha: float) -> int:
    """How many attentions leave when a share of the blocks' weights does: blocks * removed ** (ratio / alpha), rounded.

    >>> [attentions_to_remove(32, removed, 2.0, 1.5) for removed in (0.25, 0.375, 0.5)]
    [5, 9, 13]

    ratio: weights of an MLP to weights of an attention; the larger, the more is left to the neurons.
    """
    return round(blocks * removed ** (ratio / alpha)) if removed > 0 else 0


@register
@dataclass
class TwoSSP(UnitMethod):
    """Neurons with the smallest activations, the same number from each block; then the attentions that matter least.

    >>> secateur.prune(model, method="2ssp", target="75%", data=ids)  # doctest: +SKIP

    An activation's size is the L2 norm over a sequence of what `down_proj` reads, averaged over sequences. Attentions are
    taken one by one, each time the one without which the loss of the narrowed model is lowest: blocks times attentions
    forwards. What is left is saved with a model file of its own, since no config says that a block has no attention.
    """

    alpha: float = field(
        default=1.5,
        metadata={"help": "the larger, the more attentions leave and the fewer neurons", "above": 0},
    )
    attentions: int | None = field(
        default=None, metadata={"help": "how many attentions leave; default: by the formula", "min": 0}
    )
    judged: int = field(default=1, metadata={"help": "sequences on which attentions are judged", "min": 1})

    name: ClassVar[str] = "2ssp"
    kinds: ClassVar[tuple[str, ...] | None] = ("neurons", "attentions")
    needs: ClassVar[frozenset[str]] = frozenset({"input_norm"})
    share_of: ClassVar[str] = "weights"
    by_block: ClassVar[bool] = True
    info = record("2ssp")

    def passes(self) -> str:
        if self.attentions != 0:
            raise SecateurError(
                "attentions are chosen by the loss of the whole model",
                where="2ssp, attentions",
                fix="attentions=0 takes neurons alone, or prune it without --stream",
            )
        return "samples"

    def cuts(self, group: Group) -> bool:
        return group.kind == "neurons" or self.attentions != 0

    def divide(self, context: Context, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self.divide_both(context, scores)[0]

    def plan(self, context: Context) -> Plan:
        scores = context.remember("scores", partial(self.scores, context))
        if not scores:
            raise SecateurError(
                "no linear layer reads their units", where=f"2ssp, {context.groups[0].name}, ..."
            )
        keep, count = self.divide_both(context, scores)
        neurons = {name: keep[name] for name in scores}
        found = context.remember("attentions", lambda: self.search(context, neurons, count)) if count else {}
        parts = [group for group in context.groups if group.kind == "attentions"]
        said = f"{count} of {sum(g.size for g in parts)} attentions leave, those that perplexity misses least"
        return context.make_plan(keep={**neurons, **found}, notes={"attentions": said} if count else {})

    def scores(self, context: Context) -> dict[str, Tensor]:
        """[units] of every group of neurons."""
        readers = {
            group.name: (group, *pairs[0])
            for group in context.groups
            if group.kind == "neurons"
            if (pairs := context.coupled(group, roles=("in",), kinds=("linear", "conv1d")))
        }
        matrices = {s.name: matrix for _, s, matrix in readers.values()}
        found: dict[str, list[Tensor]] = {name: [] for name in readers}
        data = context.require_data()
        for stats in each_sample(context.model, data, self.needs, matrices, context.progress, context.play):
            for name, (_, s, _) in readers.items():
                norm = stats[s.name].input_norm
                found[name].append(norm[s.index.to(norm.device)].norm(dim=1))
        return {name: torch.stack(norms).mean(0) for name, norms in found.items() if norms}

    def divide_both(self, context: Context, scores: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], int]:
        """(kept units of every group, of attentions any; how many attentions leave)."""
        parts = [group for group in context.groups if group.kind == "attentions"]
        neurons = context.competitors(scores)
        others = context.competitors({g.name: torch.zeros(g.size) for g in parts}, keep_scores=False)
        path = context.path(neurons)
        spare = [(other.name, unit) for other in others for unit in range(other.size - other.floor)]
        if (self.attentions or 0) > len(spare):
            raise SecateurError(
                f"{self.attentions} attentions can't leave of {len(spare)}",
                where="2ssp, attentions",
                fix="give fewer",
            )
        counts = [*range(self.affordable(context, parts, spare) + 1)]
        if self.attentions is not None:
            counts = [self.attentions]
        for count in counts:
            first: list[Step] = [spare[:count]] if count else []
            try:
                keep = context.follow([*neurons, *others], [*first, *path])
            except SecateurError:
                if count == counts[-1]:
                    raise
                continue
            if count >= self.wanted(context, parts, keep):
                break
        return keep, sum(other.size - len(keep[other.name]) for other in others)

    def affordable(self, context: Context, parts: list[Group], spare: Step) -> int:
        """The most attentions that can leave before they alone take more than the target wants gone."""
        cost, limit = context.cost()
        for count in range(1, len(spare) + 1):
            gone = set(spare[:count])
            keep = {
                g.name: torch.tensor([u for u in range(g.size) if (g.name, u) not in gone], dtype=torch.int64)
                for g in parts
            }
            if cost(keep) < limit:
                return count - 1
        return len(spare)

    def wanted(self, context: Context, parts: list[Group], keep: Mapping[str, Tensor]) -> int:
        """How many attentions the formula wants gone for what `keep` removes."""
        names = list(context.every_matrix)
        inside = {m: [n for n in names if n.startswith(f"{m}.")] for g in parts for m in g.modules}
        if not inside:
            return 0
        dense = context.graph.params({}, names=names)
        attention = context.graph.params({}, names=[n for own in inside.values() for n in own])
        mlp = sum(context.unit_weights(g) * g.size for g in context.groups if g.kind == "neurons")
        removed = 1 - context.graph.params(keep, names=names) / dense
        return attentions_to_remove(len(inside), removed, mlp / attention, self.alpha)

    def search(self, context: Context, neurons: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
        """Kept attentions, by group: `count` leave one after the other, of the model without the neurons that leave."""
        parts = [group for group in context.groups if group.kind == "attentions"]
        left = {
            group.name: [unit for unit in range(group.size) if not _left_before(context, group, unit)]
            for group in parts
        }
        count -= sum(group.size - len(left[group.name]) for group in parts)
        model, batches = context.model, as_batches(context.require_data(), 1)[: self.judged]
        loss = context.loss or default_loss(model, batches[0])
        with trial(model, context.graph, neurons):
            return least_missed(model, context.graph, left, count, batches, loss, context.progress)


def _left_before(context: Context, group: Group, unit: int) -> bool:
    return group.name in context.gone and bool(context.gone[group.name][unit])
