"""The cut of a vocabulary: tokens stay by how often a text uses them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from secateur.graph import Group
from secateur.pruning.context import Context
from secateur.pruning.method import UnitMethod
from secateur.pruning.plan import Plan
from secateur.pruning.tokens import KIND


@dataclass
class TokenFrequency(UnitMethod):
    """Tokens by how often the user's text uses them; what `--kinds vocabulary` alone asks for.

    >>> secateur.prune(model, target="vocabulary=16000", data="my.txt", tokenizer=tokenizer, method="token-frequency")  # doctest: +SKIP

    Special tokens, the tokens of bytes and those that the model's config names stay always. A token stays only with the
    parts that it is merged from, so that text of kept tokens is split as before.
    """

    name: ClassVar[str] = "token-frequency"
    kinds: ClassVar[tuple[str, ...] | None] = (KIND,)

    def score(self, group: Group, context: Context) -> Tensor:
        assert context.tokens is not None
        return context.tokens.scores()

    def plan(self, context: Context) -> Plan:
        assert context.tokens is not None
        if context.target.kind != KIND:
            return super().plan(context)
        (group,) = context.groups
        return context.make_plan(keep={group.name: context.tokens.first(context.target.value)})
