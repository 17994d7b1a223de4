"""Which tokens stay when the vocabulary is cut: those that must, then those that the user's text uses most."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.data.text import encode, load_text
from secateur.errors import SecateurError
from secateur.surgery.tokenizer import Pieces, read_pieces
from secateur.surgery.vocabulary import named_tokens
from secateur.utils.screen import Screen, counted

KIND = "vocabulary"


@dataclass(frozen=True, repr=False)
class Tokens(Screen):
    """Every token in the order in which they stay, and how often the text uses each.

    The first `fixed` stay always, and the first `used` are enough for the text to be read as before.
    """

    order: Tensor  # int64 [size], token ids
    counts: Tensor  # int64 [size], by token id
    fixed: int
    used: int

    def first(self, count: float) -> Tensor:
        """The tokens that stay where `count` may (infinite: all that the text uses), sorted.

        Raises `SecateurError` where those that must stay are more.
        """
        number = self.used if count == float("inf") else int(count)
        if number < self.fixed:
            raise SecateurError(
                f"{counted(number, 'token')} can't do: {self.fixed:,} must stay (special tokens, bytes, and those that the"
                " config names)",
                where=f"target vocabulary={number}",
                fix=f"ask for {self.fixed} or more",
            )
        return self.order[:number].sort().values

    def scores(self) -> Tensor:
        """[size], higher stays: the order as numbers."""
        scores = torch.empty(len(self.order), dtype=torch.float64)
        scores[self.order] = torch.arange(len(self.order), 0, -1, dtype=torch.float64)
        return scores

    def told(self, kept: Tensor) -> str:
        """What a report says of the tokens that stay."""
        stay = torch.zeros(len(self.counts), dtype=torch.bool)
        stay[kept] = True
        lost, total = int((self.counts[~stay] > 0).sum()), int(self.counts.sum())
        always = int((self.counts[self.order[: self.fixed]] == 0).sum())
        inside = int((self.counts[stay] > 0).sum())
        text = (
            f"vocabulary: {len(kept):,} of {len(self.counts):,} tokens stay: {inside:,} that are in the text, {always:,} that"
            f" must stay (special tokens, bytes, and those that the config names), and {len(kept) - inside - always:,} that the"
            " others are merged from or that there is room for"
        )
        if lost:
            share = float(self.counts[~stay].sum()) / total
            text += f"; the text loses {lost:,} of its tokens ({share:.2%} of its length), which are written in smaller pieces"
        return text


def rank_tokens(model: nn.Module, tokenizer: Any, data: Any) -> Tokens:
    """The order in which the tokens of a model stay, by how often a text uses them.

    >>> tokens = rank_tokens(model, tokenizer, "my.txt")  # doctest: +SKIP
    >>> tokens.fixed, tokens.used  # doctest: +SKIP
    (252, 16103)

    data: a text file or the name of a text; token ids, or a list of model inputs.

    Raises `SecateurError` without a text, or for ids outside the vocabulary.
    """
    size = _size(model)
    counts = _counts(data, tokenizer, size)
    pieces = (
        Pieces({}, {}, {"special": set(), "bytes": set()}) if tokenizer is None else read_pieces(tokenizer)
    )
    named = [i for ids in named_tokens(model, size).values() for i in ids]
    must = {*named, *pieces.fixed["special"], *pieces.fixed["bytes"]}
    must |= pieces.characters([i for i in must | set(counts.nonzero().reshape(-1).tolist())])
    if over := [i for i in must if i >= size]:
        raise SecateurError(
            f"the tokenizer has a token {max(over)}, and the model {size} tokens",
            where="vocabulary",
            fix="give the model's own tokenizer",
        )
    order: dict[int, None] = {}
    for i in sorted(must):
        order.update(dict.fromkeys(_with_parts(i, pieces)))
    fixed = len(order)
    number = counts.tolist()
    ranks = sorted(range(size), key=lambda i: (-number[i], i not in pieces.tokens, i))
    used = fixed
    for i in ranks:
        order.update(dict.fromkeys(_with_parts(i, pieces)))
        used = len(order) if number[i] else used
    return Tokens(torch.tensor(list(order)), counts, fixed, used)


def _with_parts(token: int, pieces: Pieces) -> Iterator[int]:
    yield from pieces.parts.get(token, ())
    yield token


def _size(model: nn.Module) -> int:
    try:
        table: Any = model.get_input_embeddings()  # type: ignore[operator]
        return int(table.weight.shape[0])
    except (AttributeError, NotImplementedError):
        raise SecateurError(
            f"{type(model).__name__} has no table of tokens", where=f"kinds={KIND}", fix="leave it out"
        ) from None


def _counts(data: Any, tokenizer: Any, size: int) -> Tensor:
    """How often each token is used."""
    if data is None or data == "self":
        raise SecateurError(
            "the tokens that stay are those of your text, and there is none",
            where=f"kinds={KIND}",
            fix="give data: a text file, or the name of a text",
        )
    if isinstance(data, str | Path):
        if tokenizer is None:
            raise SecateurError(
                "there is no tokenizer, so text cannot be read", where="data", fix="give token ids"
            )
        ids = encode(tokenizer, load_text(data))
    else:
        ids = torch.cat(
            [torch.zeros(0, dtype=torch.int64), *_ids([data] if isinstance(data, Tensor) else data)]
        )
    if not len(ids):
        raise SecateurError("it holds no token ids", where="data", fix="give a text file, or token ids")
    if int(ids.max()) >= size or int(ids.min()) < 0:
        raise SecateurError(
            f"token {int(ids.max())} of a vocabulary of {size}",
            where="data",
            fix="give the model's own tokenizer",
        )
    return torch.bincount(ids, minlength=size)


def _ids(batches: Iterable[Any]) -> Iterator[Tensor]:
    for batch in batches:
        named = isinstance(batch, dict) or hasattr(batch, "keys")
        parts = (
            [v for k, v in dict(batch).items() if str(k).endswith(("input_ids", "labels"))]
            if named
            else [batch]
        )
        for part in parts:
            flat = (
                part[0] if isinstance(part, Sequence) and len(part) and isinstance(part[0], Tensor) else part
            )
            if isinstance(flat, Tensor) and not flat.is_floating_point():
                ids = flat.reshape(-1).long().cpu()
                yield ids[ids >= 0]  # labels that don't count are -100
