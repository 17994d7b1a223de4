"""REAM: experts that would leave by REAP are merged into those that stay.

Jha, Hashemzadeh, Saheb Pasand, Parviz, Lee, Knyazev 2026, "REAM: Merging Improves Pruning of Experts in LLMs",
https://arxiv.org/abs/2604.04356. Facts from the authors' code, github.com/SamsungSAILMontreal/ream, and its defaults. Spec: none.

Experts with the largest saliency of `reap` stay. From the largest on, each takes the most similar of the others, up to `group_size`
with itself. Similar are experts whose outputs, times the softmax of the router's logits and summed over all tokens, point the
same way, and that the router rates alike. The neurons of those that join are put in the order of the one that stays, by a
matching of what they give and of their weights, and all are averaged by their saliencies. The router keeps the rows of those that
stay. Layers are merged in order, each on what the ones before it give by then.

Departs: the saliency is that of `reap`; the released code multiplies outputs with the router's weight a second time. Neurons are matched
on the same tokens for every expert, where it draws other tokens for each. With both put right, its `Merger.fit` gives these very weights (to 1e-5) in 15 of 15 runs on random
Qwen3-MoE models of two layers of 8 experts, of which 4 or 6 stay, in groups of up to 16 or 3.

Reconstruction: where a router first chooses among groups of experts, groups leave whole, and each of their experts joins one that stays.
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
from secateur.methods.reap import Reap, saliency
from secateur.pruning.context import Context
from secateur.pruning.plan import Plan
from secateur.pruning.undo import Undo
from secateur.solvers.merging import average, distances, join, shortened, unused
from secateur.stats.experts import members
from secateur.stats.likeness import activations, collect_likeness, experts_of
from secateur.stats.stream import Flow, stream
from secateur.surgery import mask_units
from secateur.surgery.changes import set_values
from secateur.surgery.mask import zeros
from secateur.taxonomy import record
from secateur.utils.batches import as_batches
from secateur.utils.inputs import map_tensors
from secateur.utils.running import device_of, evaluating, run


@register
@dataclass
class Ream(Reap):
    """The same share of every layer's experts stays, and takes in those that are like it; the others are gone.

    >>> secateur.prune(model, method="ream", target="50%", data=ids)  # doctest: +SKIP

    The result is a model of the same class with fewer experts. A percentage is that of the experts. Every expert runs on every token once,
    so it takes about as many times longer than `reap` as there are experts for each that a token is sent to.
    """

    group_size: int = field(
        default=16,
        metadata={"help": "how many experts become one at most, that which stays included", "min": 1},
    )
    samples: int = field(default=32768, metadata={"help": "tokens on which neurons are matched", "min": 1})
    rank: int = field(default=64, metadata={"help": "directions in which weights are compared", "min": 1})

    unrepaired: ClassVar[str] = "what it merges would be lost"
    by_block: ClassVar[bool] = False
    info = record("ream")

    def plan(self, context: Context) -> Plan:
        if context.options.schedule != "once":
            raise SecateurError(
                "it merges once", where=f"ream, schedule {context.options.schedule}", fix="leave it out"
            )
        counts = {name: len(units) for name, units in context.allocate(self.scores(context)).items()}
        left = [group for group in context.groups if counts.get(group.name, group.size) < group.size]
        keep: dict[str, Tensor] = {}
        values: dict[str, Tensor] = {}
        scratch = Undo(context.model)
        try:
            self._in_order(context, left, counts, keep, values, scratch)
        finally:
            scratch.restore()
        sizes = [group.size - len(keep[group.name]) for group in left]
        return context.make_plan(
            keep=keep,
            values=values,
            notes={"merged": f"{sum(sizes)} units of experts, in {len(left)} layers"} if left else {},
        )

    def _in_order(
        self,
        context: Context,
        left: list[Group],
        counts: Mapping[str, int],
        keep: dict[str, Tensor],
        values: dict[str, Tensor],
        scratch: Undo,
    ) -> None:
        """Merges layer by layer in the model itself, so that each sees what those before it became."""
        model, device = context.model, device_of(context.model)
        batches = [
            map_tensors(b, lambda tensor: tensor.to(device)) for b in as_batches(context.require_data())
        ]

        def merge(group: Group, play: partial[None]) -> None:
            compute = partial(self._merged, context, group, counts[group.name], batches, play)
            found = context.remember(f"merged-{group.name.replace(':', '-')}", compute)
            own = {name: value for name, value in found.items() if name != "keep"}
            keep[group.name] = found["keep"]
            values.update(own)
            units = {group.name: found["keep"]}
            for name in [*own, *zeros(context.graph, units)]:
                scratch.remember(name)
            set_values(model, own)
            mask_units(model, context.graph, units)

        inside = {g.name: context.block_of(g.name) for g in left}
        for group in (g for g in left if inside[g.name] is None):
            merge(group, partial(lambda number: run(model, batches[number])))
        if all(number is None for number in inside.values()):
            return
        matrices = context.every_matrix
        for block in stream(model, batches, (), matrices, flowing=True, progress=context.progress):
            for group in (g for g in left if inside[g.name] == block.index):
                flow, start = block.flow, int(block.path.rpartition(".")[2])
                assert flow is not None
                merge(group, partial(_through, flow, start))

    def _merged(
        self, context: Context, group: Group, count: int, batches: list, play: partial[None]
    ) -> dict[str, Tensor]:
        """ "keep", the units that stay, and the tensors that merging changes, by name."""
        generator = context.generator(group.name)
        found = collect_likeness(context.model, group, batches, play, self.samples, generator)
        scores, units = unused(saliency(found.routed)), members(context.model, group)
        kept = scores[units].mean(1).topk(count).indices.sort().values
        centres: list[int] = sorted(units[kept].flatten().tolist(), key=lambda e: -float(scores[e]))
        joined = join(distances(found.outputs, found.ratings), centres, self.group_size)
        experts = experts_of(context.model, context.graph, group)
        features = shortened(experts, self.rank)
        merged = {"keep": kept}
        for centre, others in joined.items():
            if not others:
                continue
            given = [
                activations(context.model, group, experts[n], found) + features[n] for n in (centre, *others)
            ]
            mean = average([experts[n] for n in (centre, *others)], given, scores[[centre, *others]])
            for name, tensor in mean.items():
                if group.modules:
                    merged[name] = tensor
                    continue
                whole = merged.get(name)
                whole = (
                    dict(context.model.named_parameters())[name].detach().clone() if whole is None else whole
                )
                whole[centre] = tensor
                merged[name] = whole
        return merged


def _through(flow: Flow, index: int, number: int) -> None:
    """One batch through one block, on what the blocks before it give by now."""
    args, kwargs = flow.call(number, index)
    with torch.no_grad(), evaluating(flow.modules[index]):
        flow.modules[index](*args, **kwargs)
