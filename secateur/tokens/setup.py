"""Where the stages of an attached method stand, and what a call has kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from secateur.tokens.method import Stage


@dataclass(frozen=True)
class Placed:
    """A stage and where it stands in this model."""

    stage: Stage
    kind: str
    number: int
    label: str


class Kept(dict[str, list[Tensor]]):
    """What stayed, by stage ("input", "layer:2", or its number) and row."""

    def __missing__(self, key: Any) -> list[Tensor]:
        if isinstance(key, int) and -len(self) <= key < len(self):
            return list(self.values())[key]
        raise KeyError(key)
