"""One run of an attached model over inputs that hold pictures, as data, and which run is going on now."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from secateur.tokens.session import Session
from secateur.tokens.sets import Table
from secateur.tokens.setup import Kept, Placed, Setup


@dataclass(eq=False)
class Call:
    """One run over inputs with pictures: the table of their tokens and where each lies now.

    Letters in shapes, here and in the drivers: B rows, L columns, T tokens of the table, D width.
    """

    setup: Setup
    table: Table
    inputs: Mapping[str, Any]
    """The keyword arguments as the caller gave them."""
    ids: Tensor | None
    """[B, L] as given; None for a vision transformer on its own."""
    mask: Tensor | None
    """[B, L] bool."""
    column_at: Tensor = field(init=False)
    """[T] the column each token has in the language model now; -1 where it has left. Replaced, never written to."""
    columns: Tensor | None = None
    """[B, L'] the column of `ids` of each column the language model sees, -1 padding; None: all of them."""
    expand: int = 1
    """Rows of the language model for each row given: beams, several answers."""
    lengths: dict[int, Tensor] = field(default_factory=dict)
    """Tokens of each row before decoder layer K, where that changes."""
    tower: dict[int, int] = field(default_factory=dict)
    """Tokens in all before block K of the tower, where that changes."""
    answers: Tensor | None = None
    """[B, L] bool: columns of `ids` that are trained on, and which no prompt would hold; None: no training."""
    session: Session | None = None
    """What is remembered of earlier runs."""
    noted: dict[str, Tensor] = field(default_factory=dict)
    """What a method keeps for its later stages."""
    tiles: tuple[int, int] | None = None
    """Crops of the pyramids in all, and those that went through the tower; None: all did."""
    glimpses: list[tuple[int, Tensor]] = field(default_factory=list)
    """Layers of each look at the prompt, and the tokens [B] that they saw."""
    tower_full: int = 0
    """Tokens in all before block 0."""

    def __post_init__(self) -> None:
        self.column_at = self.table.column

    def visual_columns(self, row: Tensor, columns: Tensor, column_at: Tensor) -> Tensor:
        """bool [S, n]: which columns of the rows hold visual tokens."""
        there = column_at >= 0
        width = int(max(columns.max(), column_at.max())) + 1 if len(column_at) else int(columns.max()) + 1
        visual = torch.zeros(self.table.rows, width, dtype=torch.bool, device=columns.device)
        visual[self.table.row[there], column_at[there]] = True
        return visual[row[:, None], columns[row]]


@dataclass(eq=False)
class Current:
    """What goes on in an attached model: the call that runs, None between calls, and what the last one kept."""

    call: Call | None = None
    table: Table | None = None
    kept: Kept = field(default_factory=Kept)
    noted: dict[str, Tensor] = field(default_factory=dict)
    """What the stages of the last run noted."""
    session: Session | None = None
    columns: Tensor | None = None
    """[B, L'] the column of input_ids of each column the language model saw, -1 padding."""

    @contextmanager
    def running(self, call: Call | None) -> Iterator[None]:
        """Inside, `call` is the one that runs."""
        before, self.call = self.call, call
        try:
            yield
        finally:
            self.call = before

    def clear(self) -> None:
        """Before new pictures."""
        self.kept, self.columns = Kept(), None

    def note(self, placed: Placed, table: Table) -> None:
        """After a stage: which tokens are left."""
        self.table = table
        self.kept[placed.label] = table.numbers()
