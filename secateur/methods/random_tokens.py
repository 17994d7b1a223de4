"""Random tokens: the control that every token method must beat.

No paper. Spec: none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from secateur.method import register
from secateur.taxonomy import record
from secateur.tokens.method import TokenMethod
from secateur.tokens.select import top_per_row
from secateur.tokens.state import TokenSets


@register
@dataclass
class RandomTokens(TokenMethod):
    """A random choice of each image's tokens, before the language model.

    >>> with secateur.attach(vlm, "random-tokens", target="25%", seed=1) as attached:  # doctest: +SKIP
    ...     vlm.generate(**inputs)

    Images are drawn for one after the other, from a sequence that starts anew with every run: the first image of every
    batch gets the same draw under the same seed.
    """

    newlines: ClassVar[str] = "drop"

    info = record("random-tokens")

    def select(self, sets: TokenSets) -> Tensor:
        scores = torch.zeros(sets.valid.shape)
        for row, count in zip(scores, sets.count.tolist()):
            row[:count] = torch.rand(count, generator=sets.generator)
        return top_per_row(scores.to(sets.device), sets.keep, sets.valid)
