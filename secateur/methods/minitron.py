"""Minitron: one forward pass says which neurons, heads and channels are loud, or which blocks change anything.

Muralidharan et al. 2024, "Compact Language Models via Pruning and Knowledge Distillation", https://arxiv.org/abs/2407.14679;
Sreenivas et al. 2024, "LLM Pruning and Distillation in Practice: The Minitron Approach", https://arxiv.org/abs/2408.11796.
Facts from NVIDIA's Model-Optimizer (modelopt/torch/nas/plugins/megatron.py). Spec: none.

Reconstruction: the papers search for the widths, or give them; here all kinds of unit lose the same share, as in their
Mistral-NeMo model (channels of the stream and neurons each to 80 %), until the target holds. Blocks are judged on all
calibration data.

Departs: a key/value group is as loud as the heads that it serves. The released code reads its numbers in the order [heads of a
group, groups], in which they don't lie, and so adds up heads of several groups. Heads leave with their group only.
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
from secateur.pruning.context import Context
from secateur.pruning.method import UnitMethod
from secateur.pruning.plan import Plan
from secateur.scores.ablation import losses_without
from secateur.scores.influence import block_influence
from secateur.stats.collect import default_loss, each_sample
from secateur.stats.layer import LayerStats
from secateur.taxonomy import record
from secateur.utils.batches import as_batches

TOKENS = {"mean": "input_abs", "l2": "input_norm"}


def over_samples(values: list[Tensor], how: str) -> Tensor:
    """[...]: the L2 norm over samples, or the mean.

    >>> over_samples([torch.tensor([3.0, 1.0]), torch.tensor([4.0, 1.0])], "l2")
    tensor([5.0000, 1.4142])
    """
    stacked = torch.stack(values)
    return torch.linalg.vector_norm(stacked, dim=0) if how == "l2" else stacked.mean(0)


@register
@dataclass
class Minitron(UnitMethod):
    """Width by the activations that units leave behind, every layer alike; or depth by what a block changes.

    >>> secateur.prune(model, method="minitron", target="params<=80%", data=ids)  # doctest: +SKIP
    >>> secateur.prune(model, method="minitron", target="80%", data=ids, axis="depth", blocks_by="loss")  # doctest: +SKIP

    A neuron's or head's activation is what `down_proj` or `o_proj` reads of it, a channel's what each norm of a block gives, summed
    over norms: the mean of |x| over tokens, then the L2 norm over sequences. The published calibration is 1024 sequences.
    The papers then distil on the logits alone: `--recover full --distill` here. A result loads with plain `from_pretrained` where
    its config is one that transformers takes, which wants the stream's width to be a multiple of the heads: see `--round-to`.
    """

    axis: str = field(
        default="width", metadata={"help": "what leaves: width or depth", "choices": ("width", "depth")}
    )
    over_tokens: str = field(
        default="mean",
        metadata={"help": "activations over tokens: mean of |x|, or l2", "choices": ("mean", "l2")},
    )
    over_samples: str = field(
        default="l2", metadata={"help": "then over sequences: l2 or mean", "choices": ("l2", "mean")}
    )
    blocks_by: str = field(
        default="influence",
        metadata={
            "help": "depth: influence (1 - cosine of input and output), or the loss without the block",
            "choices": ("influence", "loss"),
        },
    )

    kinds: ClassVar[tuple[str, ...] | None] = ("heads", "kv_groups", "neurons", "hidden", "layers")
    needs: ClassVar[frozenset[str]] = frozenset({"input_abs"})
    share_of: ClassVar[str] = "weights"
    by_block: ClassVar[bool] = True
    info = record("minitron")

    def statistics(self) -> frozenset[str]:
        return frozenset({"block_influence"} if self.axis == "depth" else {TOKENS[self.over_tokens]})

    def passes(self) -> str:
        if self.axis == "depth" and self.blocks_by == "loss":
            raise SecateurError(
                "blocks are chosen by the loss of the whole model",
                where="minitron, blocks_by loss",
                fix="blocks_by=influence, or prune it without --stream",
            )
        return "batches" if self.axis == "depth" else "samples"

    def cuts(self, group: Group) -> bool:
        return (group.kind == "layers") == (self.axis == "depth")

    def plan(self, context: Context) -> Plan:
        scores = context.remember("scores", partial(self.scores, context))
        if not scores:
            raise SecateurError(
                "no linear layer of a block reads their units"
                if self.axis == "width"
                else "there are no blocks",
                where=f"minitron, axis {self.axis}, {context.groups[0].name}, ...",
                fix="take the other axis, or other kinds",
            )
        return context.make_plan(keep=context.allocate(scores))

    def scores(self, context: Context) -> dict[str, Tensor]:
        groups = [group for group in context.groups if self.cuts(group)]
        return (
            {g.name: self.of_blocks(g, context) for g in groups}
            if self.axis == "depth"
            else self.of_width(groups, context)
        )

    def of_width(self, groups: list[Group], context: Context) -> dict[str, Tensor]:
        """[units] of every group whose units a linear layer reads."""
        readers = {g.name: context.coupled(g, roles=("in",), kinds=("linear", "conv1d")) for g in groups}
        matrices = {s.name: matrix for pairs in readers.values() for s, matrix in pairs}
        found: dict[str, list[list[Tensor]]] = {name: [] for name, pairs in readers.items() if pairs}
        data, needs = context.require_data(), self.statistics()
        for stats in each_sample(context.model, data, needs, matrices, context.progress, context.play):
            for name, samples in found.items():
                once = {id(stats[s.name].inputs): (s.index, stats[s.name]) for s, _ in readers[name]}
                samples.append(
                    [self.loudness(own)[index.to(self.loudness(own).device)] for index, own in once.values()]
                )
        return {name: self.gathered(samples) for name, samples in found.items()}

    def loudness(self, stats: LayerStats) -> Tensor:
        return stats.input_abs if self.over_tokens == "mean" else stats.input_norm

    def gathered(self, samples: list[list[Tensor]]) -> Tensor:
        """[samples][readers] of [units, entries] -> [units]: over samples, the L2 norm of a unit's entries, the readers' sum."""
        of_readers = [over_samples(list(values), self.over_samples) for values in zip(*samples, strict=True)]
        return torch.stack([torch.linalg.vector_norm(value, dim=1) for value in of_readers]).sum(0)

    def of_blocks(self, group: Group, context: Context) -> Tensor:
        """[blocks] of a stack."""
        data = context.require_data()
        if self.blocks_by == "influence":
            return block_influence(context.model, data, group.modules, context.progress, context.play)
        batches = as_batches(data)
        every = torch.arange(group.size)
        choices: list[Mapping[str, Tensor]] = [
            {group.name: every[every != unit]} for unit in range(group.size)
        ]
        loss = context.loss or default_loss(context.model, batches[0])
        return torch.tensor(
            losses_without(context.model, context.graph, choices, batches, loss, context.progress)
        )
