"""What every shorter sequence needs: the kept columns side by side, and masks for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def gather_mask(mask: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
    """[B or 1, H, L or 1, L] at queries [B, n] and keys [B, m] -> [B, H, n or 1, m]."""
    mask = mask.expand(len(queries), *mask.shape[1:])
    if mask.shape[2] > 1:
        mask = mask.gather(2, queries[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))
    return mask.gather(3, keys[:, None, None].expand(-1, mask.shape[1], mask.shape[2], -1))


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask (True = may be seen) as what eager attention adds to its logits."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


def window_of(config: Any) -> tuple[str, int] | None:
    """The name and size of what keeps a language model's layers from seeing every column; None: all see everything.

    >>> window_of(transformers.MistralConfig(sliding_window=4096))  # doctest: +SKIP
    ('sliding window', 4096)
    """
    kinds = getattr(config, "layer_types", None)
    # without a list of kinds the number holds for every layer
    if kinds is not None and set(kinds) <= {"full_attention"}:
        return None
    for field, name in (("sliding_window", "sliding window"), ("attention_chunk_size", "attention chunk")):
        if getattr(config, field, None):
            return name, int(getattr(config, field))
    return None
