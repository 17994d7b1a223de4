"""ECoFLaP: how much the loss hangs on each block sets its share, a local method does the rest.

Sung et al. 2023, "ECoFLaP: Efficient Coarse-to-Fine Layer-Wise Pruning for Vision-Language Models",
https://arxiv.org/abs/2310.02998. Spec: ecoflap.

Differs from the published code: what rounding keeps too many is taken away, where there it is added once more; weights are
put back to the bit after a step; every block that is found counts, where there those with ".block" in their names do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from secateur.errors import SecateurError
from secateur.method import make_method, register
from secateur.pruning.allocate import coarse_to_fine
from secateur.pruning.context import Context
from secateur.pruning.method import WeightMethod
from secateur.pruning.select import Pattern
from secateur.stats.layer import LayerStats
from secateur.stats.sensitivity import first_order, zeroth_order
from secateur.stats.stream import Block
from secateur.taxonomy import record

LOCAL = ("wanda", "sparsegpt", "magnitude", "ria")
ORDERS = ("zeroth", "first", "first-squared")
GROUPS = ("block", "layer", "none")


@register
@dataclass
class ECoFLaP(WeightMethod):
    """A block's share grows with the change of the loss when its matrices are moved at random; two forwards a matrix.

    >>> secateur.prune(model, method="ecoflap", target="40%", data=ids)  # doctest: +SKIP

    `allocation="coarse-to-fine"` gives other weight methods the same shares. `groups="none"` is the local method alone.
    """

    local: str = field(default="wanda", metadata={"help": "the method inside a block", "choices": LOCAL})
    order: str = field(
        default="zeroth",
        metadata={"help": "zeroth (forwards alone), first: |w| |g|, first-squared", "choices": ORDERS},
    )
    groups: str = field(default="block", metadata={"help": "what gets a share of its own", "choices": GROUPS})
    mean: bool = field(default=False, metadata={"help": "score by the mean over weights, not the sum"})
    spread: float = field(
        default=0.1, metadata={"help": "how much more than the mean a block may lose", "min": 0, "max": 1}
    )
    epsilon: float = field(default=1e-3, metadata={"help": "size of a step", "above": 0})
    noises: int = field(default=1, metadata={"help": "random steps for each batch", "min": 1})
    batch: int = field(default=8, metadata={"help": "samples in a batch of the sensitivity", "min": 1})
    windows: int = field(default=32, metadata={"help": "samples of the sensitivity", "min": 1})
    length: int = field(default=0, metadata={"help": "tokens of these samples; 0: all", "min": 0})

    allocation: ClassVar[str] = "coarse-to-fine"
    info = record("ecoflap")

    def __post_init__(self) -> None:
        super().__post_init__()
        local = make_method(self.local)
        assert isinstance(local, WeightMethod)
        self._local: WeightMethod = local
        self.scope = local.scope

    def statistics(self) -> frozenset[str]:
        return self._local.statistics()

    def score(self, weight: Tensor, stats: LayerStats) -> Tensor:
        return self._local.score(weight, stats)

    def solve_block(self, block: Block, patterns: Mapping[str, Pattern]) -> dict[str, tuple[Tensor, Tensor]]:
        return self._local.solve_block(block, patterns)

    def shares(self, context: Context, share: float) -> Mapping[str, float]:
        """By matrix, of its group."""
        if self.groups == "none":
            return dict.fromkeys(context.matrices, share)
        found = context.remember("sensitivity", lambda: self.sensitivity(context))
        of_matrix = dict(zip(context.matrices, found["scores"].tolist()))
        members: dict[object, list[str]] = {}
        for name, matrix in context.matrices.items():
            members.setdefault(
                name if self.groups == "layer" else (matrix.block_path, matrix.block), []
            ).append(name)
        if len(members) < 2:
            raise SecateurError(
                "it has one block, so there is nothing to divide over",
                where=f"{self.name}, {type(context.model).__name__}",
                fix="groups=layer: each matrix gets a share of its own",
            )
        sizes = [sum(context.matrices[name].numel for name in names) for names in members.values()]
        scores = [sum(of_matrix[name] for name in names) for names in members.values()]
        if self.mean:
            scores = [score / size for score, size in zip(scores, sizes)]
        kept = coarse_to_fine(
            sizes, scores, int(share * sum(sizes) + 1e-6), min(1.0, 1 - share + self.spread)
        )
        return {
            name: count / size for names, count, size in zip(members.values(), kept, sizes) for name in names
        }

    def sensitivity(self, context: Context) -> dict[str, Tensor]:
        """The score of each matrix, in the order of `context.matrices`."""
        data = context.require_data()
        if isinstance(data, Tensor):
            data = data[: self.windows, : self.length or None]
        else:
            data = list(data)[: max(1, self.windows // self.batch)]
        if self.order == "zeroth":
            found = zeroth_order(
                context.model,
                data,
                context.matrices,
                loss=context.loss,
                epsilon=self.epsilon,
                noises=self.noises,
                batch_size=self.batch,
                seed=context.seed,
                progress=context.progress,
            )
        else:
            found = first_order(
                context.model,
                data,
                context.matrices,
                loss=context.loss,
                batch_size=self.batch,
                square=self.order == "first-squared",
            )
        if found.swallowed > 0.01:
            context.notes["sensitivity"] = (
                f"steps of {self.epsilon:g} left {found.swallowed:.0%} of the weights as they were (rounding of their dtype)"
            )
        return {"scores": torch.tensor(list(found.scores.values()), dtype=torch.float64)}
