"""Random units: the control that every structured method must beat.

No paper. Spec: weight-baselines.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from secateur.graph import Group
from secateur.method import register
from secateur.pruning.context import Context
from secateur.pruning.method import UnitMethod
from secateur.taxonomy import record


@register
@dataclass
class RandomStructured(UnitMethod):
    """Heads (with their key/value group) and MLP neurons in random order, the same share from every layer.

    >>> secateur.prune(model, method="random-structured", target="80%", seed=1)  # doctest: +SKIP
    """

    kinds: ClassVar[tuple[str, ...] | None] = ("heads", "kv_groups", "neurons")
    share_of: ClassVar[str] = "weights"
    by_block: ClassVar[bool] = True
    info = record("random-structured")

    def score(self, group: Group, context: Context) -> Tensor:
        return torch.rand(group.size, generator=context.generator(group.name))
