"""What else than single questions token methods are judged by on scenes: masks (`seg`), and questions behind demonstrations (`icl`).

`judge_of` gives the numbers of one model under whatever is attached to it, `prompts_of` a batch of the same prompts to time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from in_context import answered, batch_of, by_kind, drawn
from torch import Tensor

from secateur.tasks.scenes.evaluate import Judge
from secateur.tasks.scenes.models import inputs, load_scenes
from secateur.tasks.scenes.questions import PART, TEST_SEED, test_set
from secateur.tasks.scenes.segment import MaskReader, Referred, overlap, referred, seen, states, train_reader

DEMONSTRATIONS = 2
BENCHES = ("seg", "icl")


def judge_of(data: str, variant: str, limit: int) -> Judge | None:
    """None where `evaluate` itself has the questions."""
    judges: dict[str, Any] = {"seg": functools.partial(masks, variant), "icl": demonstrated}
    return functools.partial(judges[data], limit) if data in judges else None


def prompts_of(data: str, model: Any) -> tuple[dict[str, Tensor], int]:
    """(what the model is called with, pictures in it)."""
    if data == "seg":
        part = referred(2 * PART, TEST_SEED)[slice(PART)]
        return inputs(model, part.pictures, part.questions), PART
    if data == "icl":
        every = by_kind(test_set(2 * PART))["where"]
        rows = drawn(every, DEMONSTRATIONS, torch.Generator().manual_seed(0))[: PART // 2]
        return batch_of(rows), len(rows) * (1 + DEMONSTRATIONS)
    groups = [group for group in test_set(2 * PART) if len(group.questions) >= PART]
    return inputs(model, groups[0].pictures[:PART], groups[0].questions[:PART]), PART


@functools.cache
def read_out(variant: str, seed: int, limit: int) -> tuple[MaskReader, Referred, Tensor]:
    """A reader that is trained on the model as it is (half a minute), the pictures, and their features."""
    model, data = load_scenes(variant, seed), referred(limit, TEST_SEED)
    return train_reader(model, seed), data, seen(model, data)


def masks(variant: str, limit: int, model: Any, seed: int, after: Callable[[], None]) -> dict[str, float]:
    reader, data, features = read_out(variant, seed, limit)
    found = overlap(reader, states(model, data, after=after), features, data.masks)
    return {"IoU": 100 * float(found.mean())}


def demonstrated(limit: int, model: Any, seed: int, after: Callable[[], None]) -> dict[str, float]:
    return answered(model, by_kind(test_set(limit)), DEMONSTRATIONS, seed, after)
