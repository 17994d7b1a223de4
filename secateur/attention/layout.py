"""Blocks of queries and of keys: which pairs there are, and which may be read."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.errors import SecateurError

LEVELS = (1, 2, 4, 8)
"""Tokens that one pooled key stands for; level 0 is a block that isn't read."""


@dataclass(frozen=True)
class Layout:
    """Queries and keys of one attention, cut into blocks.

    >>> Layout(queries=6, keys=6, block_q=4, block_k=4, causal=True).visible().tolist()
    [[True, False], [True, True]]

    queries, keys: how many there are. block_q, block_k: tokens of a block; the last may be short. causal: a query sees the
    keys up to its own position; the first query stands at position keys - queries.

    Raises `SecateurError` for blocks that hold nothing, and for more queries than keys where causal.
    """

    queries: int
    keys: int
    block_q: int = 128
    block_k: int = 64
    causal: bool = False

    def __post_init__(self) -> None:
        if self.queries < 1 or self.keys < 1:
            raise SecateurError(
                f"{self.queries} queries and {self.keys} keys are none to attend", where="layout"
            )
        if self.block_q < 1 or self.block_k < 1:
            raise SecateurError(
                f"blocks of {self.block_q} queries and {self.block_k} keys hold nothing", where="layout"
            )
        if self.causal and self.queries > self.keys:
            raise SecateurError(
                f"{self.queries} queries stand behind {self.keys} keys",
                where="layout",
                fix="causal=False, or as many keys as queries at least",
            )

    @property
    def rows(self) -> int:
        """Blocks of queries."""
        return -(-self.queries // self.block_q)

    @property
    def columns(self) -> int:
        """Blocks of keys."""
        return -(-self.keys // self.block_k)

    @property
    def offset(self) -> int:
        """Position of the first query among the keys."""
        return self.keys - self.queries if self.causal else 0

    def ends(self, device: torch.device | str = "cpu") -> Tensor:
        """The position behind the last query of each block of queries [rows]."""
        blocks = torch.arange(1, self.rows + 1, device=device) * self.block_q
        return blocks.clamp(max=self.queries) + self.offset

    def visible(self, device: torch.device | str = "cpu") -> Tensor:
        """Which pairs of blocks any query may read, bool [rows, columns]."""
        starts = torch.arange(self.columns, device=device) * self.block_k
        if not self.causal:
            return torch.ones(self.rows, self.columns, dtype=torch.bool, device=device)
        return starts < self.ends(device)[:, None]

    def crossed(self, device: torch.device | str = "cpu") -> Tensor:
        """Pairs where some queries may read keys that others may not, bool [rows, columns]: they have level 1."""
        if not self.causal:
            return torch.zeros(self.rows, self.columns, dtype=torch.bool, device=device)
        last = (torch.arange(1, self.columns + 1, device=device) * self.block_k).clamp(max=self.keys)
        first = torch.arange(self.rows, device=device) * self.block_q + self.offset
        return self.visible(device) & (last > first[:, None] + 1)
