"""Calibration data: whatever the caller gives, as batches a model can be run on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.data import camvid, digits, pictures, sst2
from secateur.data.pictures import as_pairs
from secateur.data.text import load_calibration
from secateur.errors import SecateurError, choose

FIX = "give token ids [samples, length], a list of model inputs, a text file, or the name of a text or of pictures"


def calibration_batches(
    data: Any, tokenizer: Any, model: nn.Module, samples: int = 32, seqlen: int = 512, seed: int = 0
) -> Any:
    """Token ids [samples, seqlen], or a list of model inputs.

    >>> calibration_batches(torch.zeros(4, 16, dtype=torch.int64), None, model).shape  # doctest: +SKIP
    torch.Size([4, 16])

    data: such ids or inputs (an iterable of them is read to its end, at most `samples`; a pair of them and their labels
    is parted into batches of 16, as are pictures); a text file or the name of a text (needs a tokenizer), or of pictures
    or phrases (`cifar10`, `imagenet-sample`, `digits`, `camvid`, `sst2`: `samples` of those to train on, with labels); None:
    what the model brings (`calibration_inputs(samples, seed)`, such as what it meets while it draws), else English that every
    machine has, or, without a tokenizer, text that the model itself writes; "self": such text.

    Raises `SecateurError` for empty data, NaN inputs, ids outside the vocabulary, and text that is too short.
    """
    own = getattr(model, "calibration_inputs", None)
    reads_text = tokenizer is not None or getattr(getattr(model, "config", None), "vocab_size", None)
    if data is None and own is not None:
        data = own(samples, seed)
    elif data is None and tokenizer is None and reads_text:
        data = "self"
    if isinstance(data, str | Path) and not reads_text:
        error = f"{type(model).__name__} reads no text, and no pictures are called {str(data)!r}"
        choose(str(data), (*pictures.SETS, "digits", "camvid"), where="data", error=error)
    if isinstance(data, str) and data in pictures.SETS:
        data = pictures.load_pictures(data, samples, split="train")
    elif data == "digits":
        data = digits.load_digits("train", samples)
    elif data == "camvid":
        data = as_pairs(camvid.load_camvid("train", samples), 2)
    elif data == "sst2":
        data = sst2.calibration(tokenizer, samples, seed)
    if data is None or isinstance(data, str | Path):
        if data is None and tokenizer is None:
            raise SecateurError(f"{type(model).__name__} needs calibration data", where="data", fix=FIX)
        return load_calibration(model, tokenizer, data, samples, seqlen, seed)
    if isinstance(data, Tensor):
        if data.dtype in (torch.int32, torch.int64) and data.dim() == 2:
            return _check_ids(data.long(), model)
        batches: list[Any] = list(data.split(16)) if data.is_floating_point() and data.dim() > 2 else [data]
    elif isinstance(data, tuple) and len({len(t) for t in data if isinstance(t, Tensor) and t.dim()}) == 1:
        batches = list(zip(*(part.split(16) for part in data)))
    else:
        try:
            batches = [batch for batch, _ in zip(data, range(samples))]
        except TypeError:
            raise SecateurError(f"it is a {type(data).__name__}", where="data", fix=FIX) from None
    if not batches or any(isinstance(b, Tensor) and not b.numel() for b in batches):
        raise SecateurError("it is empty", where="data", fix=FIX)
    for index, batch in enumerate(batches):
        parts = (
            batch.values()
            if isinstance(batch, dict)
            else batch
            if isinstance(batch, tuple | list)
            else [batch]
        )
        for part in parts:
            if isinstance(part, Tensor) and part.is_floating_point() and not torch.isfinite(part).all():
                raise SecateurError(
                    f"batch {index} holds NaN or infinite values", where="data", fix="clean the data"
                )
    return batches


def _check_ids(ids: Tensor, model: nn.Module) -> Tensor:
    if not ids.numel():
        raise SecateurError("it is empty", where="data", fix=FIX)
    if ids.shape[1] < 2:
        raise SecateurError(
            f"rows of {ids.shape[1]} token are too short", where="data", fix="give rows of at least 2 tokens"
        )
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
    if vocabulary and (ids.min() < 0 or ids.max() >= vocabulary):
        raise SecateurError(
            f"token ids run from {ids.min()} to {ids.max()}, the vocabulary has {vocabulary}",
            where="data",
            fix="tokenise with the model's own tokenizer",
        )
    return ids
