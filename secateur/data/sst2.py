"""SST-2: phrases of film reviews, praise or not (Socher et al. 2013; the files of GLUE, Wang et al. 2018)."""

from __future__ import annotations

import lzma
from typing import Any

import torch
from torch import Tensor

from secateur.errors import SecateurError
from secateur.utils.files import require_data

SPLITS = {
    "train": ("train_full", slice(None, -1000)),
    "val": ("train_full", slice(-1000, None)),
    "test": ("dev", slice(None)),
}
LONGEST = 128
"""Tokens; no phrase of the set has as many."""


def load_sst2(split: str = "test", limit: int | None = None) -> tuple[list[str], Tensor]:
    """(phrases, labels): text, and int64 [N], 1 for praise and 0 for blame.

    >>> load_sst2("test", 1)  # doctest: +SKIP
    (["it 's a charming and often affecting journey ."], tensor([1]))

    train 66,349 phrases, val 1,000 of the same kind, test the 872 sentences that GLUE publishes with labels.

    Raises `SecateurError` for another split, and missing or damaged data.
    """
    if split not in SPLITS:
        raise SecateurError(f"there is no split {split!r}", where="sst2", fix=", ".join(SPLITS))
    name, part = SPLITS[split]
    path = require_data(f"sst2/{name}.tsv.xz")
    try:
        with lzma.open(path, "rt", encoding="utf-8", newline="\n") as file:
            lines = file.read().splitlines()[1:]
        rows = [line.rsplit("\t", 1) for line in lines][part][:limit]
        texts, labels = [text.strip() for text, _ in rows], [("0", "1").index(label) for _, label in rows]
    except (lzma.LZMAError, EOFError, ValueError) as error:
        raise SecateurError(
            f"it isn't a table of sentences and labels ({error})", where=str(path), fix="fetch it again"
        ) from error
    return texts, torch.tensor(labels, dtype=torch.int64)


def as_batches(tokenizer: Any, texts: list[str], labels: Tensor, size: int = 32) -> list[dict[str, Tensor]]:
    """Batches of `size` phrases of like length: `input_ids` and `attention_mask` int64 [size, tokens], `labels` int64 [size].

    >>> as_batches(tokenizer, *load_sst2("test"))[0]["input_ids"].shape  # doctest: +SKIP
    torch.Size([32, 7])

    Rows are padded on the right to the longest of their batch. Raises `SecateurError` without a tokenizer.
    """
    if tokenizer is None:
        raise SecateurError(
            "phrases need the model's tokenizer", where="sst2", fix="pass tokenizer=, or use the model `sst2`"
        )
    ids = tokenizer(texts, truncation=True, max_length=LONGEST, padding=False)["input_ids"]
    order = sorted(range(len(ids)), key=lambda row: len(ids[row]))
    batches = []
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        padded = tokenizer.pad(
            {"input_ids": [ids[row] for row in rows]}, padding_side="right", return_tensors="pt"
        )
        batches.append(
            {
                "input_ids": padded["input_ids"],
                "attention_mask": padded["attention_mask"],
                "labels": labels[rows],
            }
        )
    return batches


def calibration(tokenizer: Any, samples: int, seed: int = 0) -> list[dict[str, Tensor]]:
    """`samples` of the phrases to train on, drawn by the seed, in batches of 16 with their labels.

    >>> calibration(tokenizer, samples=64)  # doctest: +SKIP
    """
    texts, labels = load_sst2("train")
    rows = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed))[:samples]
    return as_batches(tokenizer, [texts[row] for row in rows.tolist()], labels[rows], 16)
