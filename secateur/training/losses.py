"""Losses: of plain training (next token, cross-entropy of a pair, or the model's own), of masks of classes, of restored pictures."""

from __future__ import annotations

from typing import Any

import torch
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


def mask_losses(masks: Tensor, presence: Tensor, labels: Tensor, nobody: int = -100) -> Tensor:
    """Presence (weight 1, absent classes .1), focal (20; alpha .25, gamma 2) and dice (1) losses of mask logits [B, C, H, W].

    >>> sure = torch.tensor([[[[20.0, -20.0]], [[-20.0, 20.0]]]])
    >>> there = torch.tensor([[[20.0, -20.0], [20.0, -20.0]]])
    >>> round(mask_losses(sure, there, torch.tensor([[[0, 1]]])).item(), 4)
    0.0

    presence: logits [B, C, 2], there and not. Focal and dice are means over the classes that a picture has.
    """
    known = labels != nobody
    wanted = (
        F.one_hot(labels.clamp(min=0), masks.shape[1]).permute(0, 3, 1, 2) * known[:, None]
    )  # [B, C, H, W]
    there = wanted.flatten(2).any(2)  # [B, C]
    weight = presence.new_tensor([1.0, 0.1])
    said = F.cross_entropy(presence.flatten(0, 1), (~there).long().flatten(), weight)
    logits, y = masks[there], wanted[there].to(masks)  # [pairs, H, W]
    counts = known[:, None].expand_as(masks)[there].to(masks)
    p = logits.sigmoid()
    each = F.binary_cross_entropy_with_logits(logits, y, reduction="none")
    right = p * y + (1 - p) * (1 - y)
    focal = (0.25 * y + 0.75 * (1 - y)) * (1 - right) ** 2 * each * counts
    p = p * counts
    dice = 1 - (2 * (p * y).flatten(1).sum(1) + 1) / (p.flatten(1).sum(1) + y.flatten(1).sum(1) + 1)
    return said + 20 * focal.sum() / counts.sum() + dice.mean()


def reconstruction(made: Tensor, sharp: Tensor) -> Tensor:
    """L1 + (1 - SSIM) + 0.1 times L1 of the spectra, of pictures [B, 3, H, W] in 0..1."""
    spectra = torch.view_as_real(torch.fft.rfft2(made.float()) - torch.fft.rfft2(sharp.float()))
    return F.l1_loss(made, sharp) + 1 - similarity(made, sharp) + 0.1 * spectra.abs().mean()


def similarity(a: Tensor, b: Tensor, size: int = 11) -> Tensor:
    """Mean SSIM of pictures [B, C, H, W] in 0..1, with a Gaussian window of sigma 1.5. Wang et al. 2004."""
    line = torch.exp(-((torch.arange(size, device=a.device, dtype=torch.float32) - size // 2) ** 2) / 4.5)
    kernel = (line[:, None] * line / line.sum() ** 2).expand(a.shape[1], 1, size, size)
    mean = lambda x: F.conv2d(x, kernel, groups=x.shape[1])
    a, b = a.float(), b.float()
    x, y = mean(a), mean(b)
    spread = mean(a * a) - x * x + mean(b * b) - y * y
    both = mean(a * b) - x * y
    return ((2 * x * y + 1e-4) * (2 * both + 9e-4) / ((x * x + y * y + 1e-4) * (spread + 9e-4))).mean()
