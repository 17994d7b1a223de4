"""Losses of plain training: next token, cross-entropy of a pair, or the model's own."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.utils.running import call, logits_of
from secateur.utils.types import Objective


def default_loss(model: nn.Module, batch: Any) -> Tensor:
    """Next-token loss for token ids, cross-entropy for (x, labels), the model's own loss for a dict."""
    if isinstance(batch, Tensor):
        return next_token_loss(logits_of(model(batch)), batch)
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return F.cross_entropy(logits_of(model(batch[0])).float(), batch[1])
    output = call(model, batch)
    own = output.get("loss") if hasattr(output, "get") else getattr(output, "loss", None)
    if own is not None:
        return own
    if hasattr(batch, "keys") and "input_ids" in batch:
        return next_token_loss(logits_of(output), batch["input_ids"], batch.get("attention_mask"))
    raise SecateurError(
        f"{type(model).__name__} gives no loss for such a batch",
        where="loss",
        fix="pass loss=(model, batch) -> scalar",
    )


def checked_loss(data: Any) -> Objective:
    """`default_loss`, which at its first batch refuses class labels of `data` that the model has no output for.

    Pairs (x, integer labels [N]) are checked, before a device fails on them; anything else passes.
    """
    labels = data[1] if isinstance(data, tuple) and len(data) == 2 else None
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.ndim != 1:
        return default_loss
    real = labels[labels != -100]
    low, high = (int(real.min()), int(real.max())) if real.numel() else (0, 0)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        logits = logits_of(model(batch[0])).float()
        if logits.ndim > 1 and not 0 <= low <= high < logits.shape[1]:
            raise SecateurError(
                f"labels reach from {low} to {high}, the model has {logits.shape[1]} classes",
                where="data",
                fix=f"use labels 0..{logits.shape[1] - 1}",
            )
        return F.cross_entropy(logits, batch[1])

    return loss


def next_token_loss(logits: Tensor, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean cross-entropy of logits [b, t, vocabulary] at t for ids [b, t] at t + 1; 0 in mask [b, t]: padding."""
    targets = ids[:, 1:]
    if mask is not None:
        targets = targets.masked_fill((mask[:, 1:] == 0) | (mask[:, :-1] == 0), -100)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets.flatten())
