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

from secateur.context import Context
from secateur.errors import SecateurError
from secateur.graph import Group, Slice
from secateur.method import UnitMethod, register
from secateur.plan import Plan
from secateur.stats.collect import collect
from secateur.stats.windows import draw_windows
from secateur.taxonomy import MethodInfo

ELEMENTS = ("param_first", "param_second", "param_mix", "vectorize", "square", "gate")
AGGREGATIONS = ("sum", "mean", "max", "prod", "first")


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


def unit_scores(scores: Tensor, dim: int, index: Tensor) -> Tensor:
    """[units]: the scores of what one slice gives each unit, summed. index [units, k] along `dim`.

    >>> unit_scores(torch.ones(4, 3), 0, torch.tensor([[0, 1], [2, 3]]))
    tensor([6., 6.])
    """
    lines = scores if scores.dim() == 1 else scores.sum([d for d in range(scores.dim()) if d != dim])
    return lines[index.to(lines.device)].sum(1)


def aggregate(members: Tensor, how: str) -> Tensor:
    """[members, units] -> [units]: importance of a group from that of the tensors in it.

    >>> aggregate(torch.tensor([[1.0, 2.0], [3.0, 5.0]]), "prod")
    tensor([ 3., 10.])
    """
    if how == "max":
        return members.amax(0)
    return members[0] if how == "first" else getattr(members, how)(0)


@register
@dataclass
class Taylor(UnitMethod):
    """How much the loss would change, to first or second order, without a head or a neuron.

    >>> secateur.prune(model, method="taylor", target="80%", data=ids)  # doctest: +SKIP

    Ranks locally: every layer loses the same share. Published sparing: `spare_first=4, spare_last=2` of 32 blocks.
    """

    element: str = field(
        default="param_first", metadata={"help": f"importance of a weight: {', '.join(ELEMENTS)}"}
    )
    aggregation: str = field(
        default="sum", metadata={"help": f"over coupled tensors: {', '.join(AGGREGATIONS)}"}
    )
    windows: int = field(default=10, metadata={"help": "calibration windows"})
    length: int = field(default=64, metadata={"help": "tokens of a window"})
    spare_first: int = field(default=0, metadata={"help": "leading blocks left whole (paper: 4 of 32)"})
    spare_last: int = field(default=0, metadata={"help": "final blocks left whole (paper: 2 of 32)"})

    kinds: ClassVar[tuple[str, ...] | None] = ("heads", "kv_groups", "neurons")
    needs: ClassVar[frozenset[str]] = frozenset({"gradient"})
    share_of: ClassVar[str] = "weights"
    info = MethodInfo(
        title="LLM-Pruner",
        spec="weight-baselines",
        objects="H N",
        granularity="struct",
        speedup="univ",
        when="PAT-PT",
        criteria="LOSS",
        order="shot",
        data="calib",
        start="pre",
        recovery="none/LoRA",
        scope="loc",
        models="llm",
        budget_unit="params",
        year=2023,
        arxiv="2305.11627",
        refs=("horseee/LLM-Pruner",),
        description="Taylor importance of coupled heads and neurons, ranked within each layer.",
    )

    def __post_init__(self) -> None:
        for value, known in ((self.element, ELEMENTS), (self.aggregation, AGGREGATIONS)):
            if value not in known:
                raise SecateurError(
                    f"there is no {value!r}", where="taylor", fix=f"one of {', '.join(known)}"
                )

    def plan(self, context: Context) -> Plan:
        scores = context.remember("scores", lambda: self.scores(context))
        blocks = sorted({b for name in scores if (b := context.block_of(name)) is not None})
        spared = {*blocks[: self.spare_first], *blocks[len(blocks) - self.spare_last :]}
        keep = context.allocate(
            {name: s for name, s in scores.items() if context.block_of(name) not in spared}
        )
        return context.make_plan(keep=keep)

    def score(self, group: Group, context: Context) -> Tensor:
        return self.scores(context)[group.name]

    def scores(self, context: Context) -> dict[str, Tensor]:
        """[units] of every group, from one pass over the windows."""
        needs = {"gradient", "fisher"} if self.element in ("param_second", "param_mix") else {"gradient"}
        data = draw_windows(context.require_data(), self.windows, self.length, context.generator("windows"))
        stats = collect(
            context.model, data, needs, context.matrices, loss=context.loss, progress=context.progress
        )

        def member(s: Slice) -> Tensor:
            matrix, found = context.matrices[s.name], stats[s.name]
            fisher = matrix.unfold(found.fisher) if "fisher" in needs else None
            scores = element_scores(
                self.element, matrix.parameter.detach(), matrix.unfold(found.gradient), fisher, s.dim
            )
            return unit_scores(scores, s.dim, s.index)

        return {
            name: aggregate(torch.stack([member(s) for s in slices]), self.aggregation)
            for name, slices in matrices_of_groups(context).items()
        }


def matrices_of_groups(context: Context) -> dict[str, list[Slice]]:
    """The slices of weight matrices by group; biases and norms have no say, groups without matrices are left out.

    Raises `SecateurError` when no group has any.
    """
    found = {
        group.name: [s for s in group.slices if s.role in ("out", "in") and s.name in context.matrices]
        for group in context.groups
    }
    if not any(found.values()):
        raise SecateurError("no weight matrix leaves with its units", where=context.groups[0].name)
    return {name: slices for name, slices in found.items() if slices}
