"""LLM-Pruner: Taylor importance of coupled structures.

Ma, Fang, Wang 2023, "LLM-Pruner: On the Structural Pruning of Large Language Models", https://arxiv.org/abs/2305.11627;
the squared forms are Molchanov et al. 2019, https://arxiv.org/abs/1906.10771. Spec: weight-baselines, items 2 and 11.

Reconstruction: `param_mix` (the published code breaks on attention) is |w·g - ½w·F·w| everywhere. The paper spares the
first 4 and last 2 of 32 blocks; here none are spared unless asked, because a network of equal blocks loads with
plain `from_pretrained`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from secateur.graph import Slice
from secateur.method import register
from secateur.pruning.context import Context, Matrix
from secateur.pruning.method import UnitMethod
from secateur.pruning.plan import Plan
from secateur.scores.lift import AGGREGATIONS, aggregate, slice_scores
from secateur.taxonomy import record

ELEMENTS = ("param_first", "param_second", "param_mix", "vectorize", "square", "gate")


def element_scores(element: str, weight: Tensor, gradient: Tensor, fisher: Tensor | None, dim: int) -> Tensor:
    """Importance of every weight, or (`vectorize`, `gate`) of every index along `dim`; float32.

    fisher: mean square of single samples' gradients, for `param_second` and `param_mix`.

    >>> element_scores("gate", torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, -1.0]]), None, 0)
    tensor([1.])
    """
    weight = weight.float()
    first = weight * gradient
    if element in ("vectorize", "gate"):
        total = first.sum([d for d in range(first.dim()) if d != dim])
        return total.abs() if element == "vectorize" else total.square()
    if element == "param_first":
        return first.abs()
    if element == "square":
        return first.square()
    assert fisher is not None
    second = weight * fisher * weight
    return second.abs() if element == "param_second" else (first - second / 2).abs()


@register
@dataclass
class Taylor(UnitMethod):
    """How much the loss would change, to first or second order, without a head or a neuron.

    >>> secateur.prune(model, method="taylor", target="80%", data=ids)  # doctest: +SKIP

    Ranks locally: every layer loses the same share. Published sparing: `spare_first=4, spare_last=2` of 32 blocks.
    """

    element: str = field(
        default="param_first",
        metadata={"help": f"importance of a weight: {', '.join(ELEMENTS)}", "choices": ELEMENTS},
    )
    aggregation: str = field(
        default="sum",
        metadata={"help": f"over coupled tensors: {', '.join(AGGREGATIONS)}", "choices": AGGREGATIONS},
    )
    windows: int = field(default=10, metadata={"help": "calibration windows"})
    length: int = field(default=64, metadata={"help": "tokens of a window"})
    spare_first: int = field(default=0, metadata={"help": "leading blocks left whole (paper: 4 of 32)"})
    spare_last: int = field(default=0, metadata={"help": "final blocks left whole (paper: 2 of 32)"})

    kinds: ClassVar[tuple[str, ...] | None] = ("heads", "kv_groups", "neurons")
    needs: ClassVar[frozenset[str]] = frozenset({"gradient"})
    share_of: ClassVar[str] = "weights"
    info = record("taylor")

    def plan(self, context: Context) -> Plan:
        context.skip_blocks = (self.spare_first, self.spare_last)
        scores = context.remember("scores", lambda: self.scores(context))
        return context.make_plan(keep=context.allocate(scores))

    def scores(self, context: Context) -> dict[str, Tensor]:
        """[units] of every group, from one pass over the windows."""
        needs = {"gradient", "fisher"} if self.element in ("param_second", "param_mix") else {"gradient"}
        stats = context.stats(needs, data=context.draw(self.windows, self.length, "windows"))

        def member(s: Slice, matrix: Matrix) -> Tensor:
            found = stats[s.name]
            gradient = matrix.unfold(found.gradient)
            fisher = matrix.unfold(found.fisher) if "fisher" in needs else None
            scores = element_scores(self.element, matrix.parameter.detach(), gradient, fisher, s.dim)
            return slice_scores(scores, s.dim, s.index)

        return {
            name: aggregate(torch.stack([member(*pair) for pair in pairs]), self.aggregation)
            for name, pairs in context.all_coupled().items()
        }
