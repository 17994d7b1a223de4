"""Grouped magnitude: the L2 norm of everything that leaves with a unit.

Fang et al. 2023, "DepGraph: Towards Any Structural Pruning", https://arxiv.org/abs/2301.12900 (group norm, without its
sparse training); Li et al. 2016, https://arxiv.org/abs/1608.08710 for single filters. Spec: weight-baselines, item 1.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from secateur.graph import Group
from secateur.method import register
from secateur.pruning.context import Context
from secateur.pruning.method import UnitMethod
from secateur.taxonomy import record


@register
@dataclass
class GroupMagnitude(UnitMethod):
    """Units whose coupled weights are small leave first. Any architecture, no data.

    >>> secateur.prune(resnet, images, method="group-magnitude", target="50%")  # doctest: +SKIP
    """

    norm: int = field(
        default=2, metadata={"help": "1: sum of |w|, 2: root of the sum of w²", "choices": (1, 2)}
    )

    kinds: ClassVar[tuple[str, ...] | None] = (
        "channels",
        "heads",
        "kv_groups",
        "head_dim",
        "neurons",
        "hidden",
        "experts",
    )
    share_of: ClassVar[str] = "units"
    by_block: ClassVar[bool] = True
    info = record("group-magnitude")

    def score(self, group: Group, context: Context) -> Tensor:
        parameters = dict(context.model.named_parameters(remove_duplicate=False))
        names = [s.name for s in group.slices if s.role in ("out", "in") and s.name in parameters]
        names += [name for name in parameters if name.startswith(tuple(f"{m}." for m in group.modules))]
        values = {name: parameters[name].detach().float() for name in names}
        powers = {n: v.square() if self.norm == 2 else v.abs().pow(self.norm) for n, v in values.items()}
        return group.reduce(powers, roles=("out", "in")).pow(1 / self.norm)
