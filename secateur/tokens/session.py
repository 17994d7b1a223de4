"""What a method remembers from one run to the next: how much the words of each step attended to each visual token.

A step is a run over pictures with the words that it writes. Its rows are those of the last prompt token and of every word
that is written; a decode step only keeps its query, and the rows are worked out when the call ends, from the keys that the
cache holds anyway. Shapes: B rows, L columns, N visual tokens, R query rows, H heads of width d.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from secateur.errors import SecateurError
from secateur.tokens.method import Memory
from secateur.tokens.scores import attention_rows
from secateur.tokens.sets import Table
from secateur.utils.screen import Screen, counted

RESET = "call attached.reset() between episodes"


@dataclass(eq=False, repr=False)
class Rows(Screen):
    """The queries of one layer since the last call ended, and the keys that they see."""

    slots: Tensor
    """[N] the key of each visual token; -1 where it had left."""
    queries: list[Tensor] = field(default_factory=list)
    """[B, H, d] each."""
    columns: list[Tensor] = field(default_factory=list)
    """[B] the column of each query."""
    keys: Tensor | None = None
    """[B, H_kv, L, d] of the last forward."""
    held: tuple[Tensor, Tensor] | None = None
    """Their columns [B, L], and which of them are no padding."""
    scale: float | None = None


@dataclass(eq=False, repr=False)
class Step(Screen):
    """The step that goes on."""

    row: Tensor
    """[N] the batch row of each visual token."""
    rows: int
    layers: dict[int, Rows] = field(default_factory=dict)
    total: Tensor | None = None
    """[N] the sum over rows, a mean over heads and layers."""
    count: Tensor | None = None
    """[B] how many rows there were."""


@dataclass(eq=False, repr=False)
class Session(Screen):
    """The memory of an attached method, by batch row, until `reset`.

    >>> attached.session.history[0][-1]  # doctest: +SKIP
    tensor([0.0021, 0.0107, ...])
    """

    memory: Memory
    runs: list[int] = field(default_factory=list)
    """Steps of each row since the last reset."""
    _history: list[list[Tensor]] = field(default_factory=list)
    _words: list[Tensor] = field(default_factory=list)
    _step: Step | None = None

    @property
    def history(self) -> list[list[Tensor]]:
        """For each row its steps, the oldest first: float32 [N of the row], by the tokens' numbers; 0 where one had left."""
        self.close()
        return self._history

    def reset(self, rows: Iterable[int] | None = None) -> None:
        """Forgets the steps of these rows, or of all: a new episode begins.

        Raises `SecateurError` for a row that there is not.
        """
        if rows is None:
            self._history, self.runs, self._words, self._step = [], [], [], None
            return
        self.close()
        self._step = None
        for row in rows:
            if self._history and not 0 <= row < len(self._history):
                raise SecateurError(
                    f"there is no row {row}", where="reset", fix=f"rows go from 0 to {len(self._history) - 1}"
                )
            if self._history:
                self._history[row], self.runs[row], self._words[row] = [], 0, self._words[row][:0]

    def keep(self, rows: Sequence[int]) -> None:
        """The batch goes on with these rows alone, in this order; the episodes of the others have ended.

        >>> attached.session.keep([0, 2])  # doctest: +SKIP

        Raises `SecateurError` for a row that there is not.
        """
        self.close()
        wrong = [row for row in rows if not 0 <= row < len(self._history)]
        if wrong:
            raise SecateurError(
                f"there is no row {wrong[0]}", where="keep", fix=f"there are {len(self._history)}"
            )
        self._step = None
        self._history = [self._history[row] for row in rows]
        self.runs = [self.runs[row] for row in rows]
        self._words = [self._words[row] for row in rows]

    def of(self, row: Tensor, index: Tensor) -> Tensor:
        """float32 [S, steps, n] what is remembered of tokens `index` [S, n] of rows [S], the newest last; NaN where no step was."""
        out = torch.full((len(row), self.memory.steps, index.shape[1]), torch.nan, device=index.device)
        for number, (one, tokens) in enumerate(zip(row.tolist(), index)):
            for back, values in enumerate(reversed(self._history[one]), 1):
                out[number, -back] = values[tokens.clamp(min=0)].masked_fill(tokens < 0, 0)
        return out

    # -- what the drivers tell it --

    def open(self, table: Table, ids: Tensor | None, mask: Tensor | None) -> None:
        """A run over pictures begins, with `ids` [B, L] and bool `mask`. Rows that can't be of the same episode are
        forgotten, with a warning."""
        self.close()
        row = table.row[: table.visual]
        self._step = Step(row, table.rows)
        sizes = torch.bincount(row, minlength=table.rows).tolist()
        if len(self._history) != table.rows:
            if any(self._history):
                _warn(
                    f"a batch of {len(self._history)} rows became one of {table.rows}: what was remembered is forgotten"
                )
            self._history = [[] for _ in sizes]
            self.runs = [0] * table.rows
            self._words = [torch.empty(0) for _ in sizes]
        for number, size in enumerate(sizes):
            if self._history[number] and len(self._history[number][-1]) != size:
                before = counted(len(self._history[number][-1]), "visual token")
                _warn(f"row {number} has {size} instead of {before}: what was remembered of it is forgotten")
                self.reset([number])
                self._step = Step(row, table.rows)
            self.runs[number] += 1
            if self.runs[number] == self.memory.longest + 1:
                _warn(
                    f"row {number} is in its {self.runs[number]}th step: an episode of another task may run on"
                )
        if ids is not None and mask is not None:
            text = mask.clone()
            text[row, table.column[: table.visual]] = False
            self._read([one[there] for one, there in zip(ids, text)])

    def _read(self, prompts: list[Tensor]) -> None:
        """Warns where most words of a row's prompt are others than in the step before."""
        for number, words in enumerate(prompts):
            before = self._words[number]
            self._words[number] = words
            if not self._history[number] or not len(before):
                continue
            same = int((words == before).sum()) if len(words) == len(before) else 0
            if 2 * same < len(words):
                _warn(f"row {number} has another prompt: the episode before it seems to run on")

    def note(
        self,
        layer: int,
        begins: Tensor | None,
        columns: Tensor,
        valid: Tensor,
        cache: Any,
        q: Tensor,
        k: Tensor,
        scale: float | None,
    ) -> None:
        """From a layer's attention: q [B, H, L, d] and k [B, H_kv, keys, d], whose columns are `columns` [B, keys], bool `valid`.

        begins: [T] the column of each token of the table, in the forward that brings the pictures; later None.
        """
        step = self._step
        if step is None:
            return
        owner: Any = getattr(cache, "_secateur_step", None)
        if begins is not None:
            if cache is not None:
                cache._secateur_step = step
            step.layers[layer] = Rows(_slots(step, begins, columns, valid))
        elif owner is not step:
            return
        if k.shape[2] != columns.shape[1]:
            raise SecateurError(
                f"layer {layer} holds the last {k.shape[2]} of {columns.shape[1]} keys",
                where="session",
                fix="remember layers without a window, or shorten the prompt",
            )
        rows, count = step.layers[layer], q.shape[2]
        if count == 1:
            rows.queries.append(q.detach()[:, :, 0])
            rows.columns.append(columns[:, -1])
        else:
            place = torch.arange(count, device=q.device)
            last = torch.where(valid[:, -count:], place, -1).max(1).values.clamp(min=0)
            every = torch.arange(len(q), device=q.device)
            rows.queries.append(q.detach()[every, :, last])
            rows.columns.append(columns[:, -count:][every, last])
        rows.keys, rows.held, rows.scale = k.detach(), (columns, valid), scale

    def close(self, said: Tensor | None = None, ends: Sequence[int] = (), least: int = 1) -> None:
        """The rows since the last time, if there are `least` of them, become the newest step, or are added to it.

        said: [B, R] the words that were written; rows that follow one of `ends` count for nothing.
        """
        step = self._step
        if step is None:
            return
        noted = [rows for rows in step.layers.values() if rows.queries]
        if not noted:
            return
        count = len(noted[0].queries)
        if count < least:
            return
        usable = torch.ones(step.rows, count, dtype=torch.bool, device=step.row.device)
        if said is not None and ends and count > 1:
            over = torch.isin(said[:, : count - 1], torch.tensor(list(ends), device=said.device))
            usable[:, 1 : over.shape[1] + 1] = over.int().cumsum(1) == 0
        total = torch.stack([_attended(step.row, rows, usable) for rows in noted]).mean(0)
        first = step.total is None
        step.total = total if step.total is None else step.total + total
        step.count = usable.sum(1) if step.count is None else step.count + usable.sum(1)
        newest = step.total / step.count[step.row]
        for number, history in enumerate(self._history):
            values = newest[step.row == number]
            before = history if first else history[:-1]
            if self.memory.carry and before:
                values = torch.where(values == 0, before[-1], values)
            self._history[number] = [*before, values][-self.memory.steps :]
        for rows in noted:
            rows.queries, rows.columns, rows.keys, rows.held = [], [], None, None


def _slots(step: Step, column_at: Tensor, columns: Tensor, valid: Tensor) -> Tensor:
    """[N] which key of a layer each visual token is, -1 where it had left."""
    column = column_at[: len(step.row)]
    table = torch.full((step.rows, int(max(column.max(), columns.max())) + 1), -1, device=column.device)
    row, slot = valid.nonzero(as_tuple=True)
    table[row, columns[row, slot]] = slot
    return torch.where(column >= 0, table[step.row, column.clamp(min=0)], -1)


def _attended(row: Tensor, rows: Rows, usable: Tensor) -> Tensor:
    """[N] what the usable [B, R] query rows of a layer attend to, summed over them."""
    assert rows.keys is not None and rows.held is not None
    (held, valid), asking = rows.held, torch.stack(rows.columns, 1)
    seen = valid[:, None] & (held[:, None] <= asking[..., None])
    queries = torch.stack(rows.queries, 2)
    out = attention_rows(queries, rows.keys, usable.float(), mask=seen[:, None], scale=rows.scale)
    return out[row, rows.slots.clamp(min=0)].masked_fill(rows.slots < 0, 0)


def _warn(what: str) -> None:
    warnings.warn(f"{what}; {RESET}", stacklevel=2)
