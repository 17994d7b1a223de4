"""Drawn scenes as what the modules of token methods are trained on: a picture, a question and its answer a sample."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from secateur.tasks.scenes.draw import EOS, KINDS, PAD
from secateur.tasks.scenes.models import inputs
from secateur.training.batches import Augment

SEED = 50_000_000
PART = 64


def questions(count: int, seed: int = 0) -> dict[str, Tensor]:
    """About `count` samples, a question of each kind about each picture: pictures uint8 [N, 3, 64, 64], words int64
    [N, width] (`PAD` behind the question), length and answer int64 [N].

    >>> questions(10)["pictures"].shape  # doctest: +SKIP
    torch.Size([10, 3, 64, 64])

    Other pictures than those that the models were trained and are tested on. Questions without an answer are left out.
    """
    from secateur.tasks.scenes.train import draw

    rows: list[dict[str, Tensor]] = []
    have = part = 0
    while have < count:
        batch = draw(PART, KINDS, torch.Generator().manual_seed(SEED + 100_000 * seed + part))
        for asked in batch.asked:
            words = torch.nn.functional.pad(asked.words, (0, 10 - asked.words.shape[1]), value=PAD)
            there = asked.asked
            rows.append(
                {
                    "pictures": batch.pictures[there],
                    "words": words[there],
                    "length": asked.length[there],
                    "answer": asked.answer[there],
                }
            )
            have += int(there.sum())
        part += 1
    joined = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
    return {name: values[:count] for name, values in joined.items()}


def as_arguments(model: Any) -> Augment:
    """The `augment` that makes arguments of the model's forward, with labels, of rows of `questions`."""

    def prepare(batch: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        asked = [
            [*words[:length], answer, EOS]
            for words, length, answer in zip(
                batch["words"].tolist(), batch["length"].tolist(), batch["answer"].tolist()
            )
        ]
        made = inputs(model, batch["pictures"], asked)
        labels = torch.full_like(made["input_ids"], -100)
        labels[:, -2:] = made["input_ids"][:, -2:]
        return {**made, "labels": labels}

    return prepare
