"""The questions about drawn scenes that methods are judged by, and how many of them a model answers."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from secateur.tasks.scenes.draw import KINDS
from secateur.tasks.scenes.models import inputs
from secateur.utils.screen import Screen

TEST_SEED = 40_000_000
PART = 64


@dataclass(repr=False)
class Group(Screen):
    """Questions of one kind and one length: pictures uint8 [n, 3, 64, 64], word numbers, one answer each."""

    kind: str
    pictures: Tensor
    questions: list[list[int]]
    answers: Tensor
    images: list[int]


@functools.lru_cache(maxsize=4)
def test_set(images: int = 256) -> tuple[Group, ...]:
    """The questions that methods are judged by: one of each kind about each of the first `images` test pictures.

    >>> sum(len(group.questions) for group in test_set(8))  # doctest: +SKIP
    38

    Scenes are drawn 64 at a time from a seed of their own, so a smaller set is the beginning of a larger one. Pictures
    without anything to ask about (no shape that occurs once, say) have no question of that kind.
    """
    from secateur.tasks.scenes.train import draw

    rows: dict[tuple[str, int], list[tuple[Tensor, list[int], int, int]]] = {}
    for part in range(math.ceil(images / PART)):
        batch = draw(PART, KINDS, torch.Generator().manual_seed(TEST_SEED + part))
        for kind, asked in zip(KINDS, batch.asked):
            for row in range(min(PART, images - part * PART)):
                if asked.asked[row]:
                    length = int(asked.length[row])
                    one = (batch.pictures[row], asked.words[row, :length].tolist(), int(asked.answer[row]))
                    rows.setdefault((kind, length), []).append((*one, part * PART + row))
    return tuple(
        Group(
            kind,
            torch.stack([row[0] for row in found]),
            [row[1] for row in found],
            torch.tensor([row[2] for row in found]),
            [row[3] for row in found],
        )
        for (kind, _), found in rows.items()
    )


@torch.no_grad()
def accuracy(
    model: nn.Module, groups: Sequence[Group], batch: int = 64, after: Callable[[], None] = lambda: None
) -> dict[str, float]:
    """Accuracy in percent by kind: the most likely of all words after the question is the answer.

    >>> accuracy(load_scenes("llava"), test_set(128))  # doctest: +SKIP

    after: called when a batch is done.
    """
    right: dict[str, int] = {}
    asked: dict[str, int] = {}
    for group in groups:
        for start in range(0, len(group.questions), batch):
            rows = slice(start, start + batch)
            given = inputs(model, group.pictures[rows], group.questions[rows])
            logits = model(**given, logits_to_keep=1, use_cache=False).logits[:, -1]
            hits = int((logits.argmax(-1).cpu() == group.answers[rows]).sum())
            right[group.kind] = right.get(group.kind, 0) + hits
            asked[group.kind] = asked.get(group.kind, 0) + len(group.questions[rows])
            after()
    return {kind: 100 * right[kind] / asked[kind] for kind in sorted(asked, key=_order)}


def _order(kind: str) -> int:
    return KINDS.index(kind) if kind in KINDS else len(KINDS)
