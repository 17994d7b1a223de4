"""What every shorter sequence needs: the kept columns side by side, and masks for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def pack(keep: Tensor, right: bool = False) -> tuple[Tensor, Tensor]:
    """bool [B, L] -> (index [B, L'], bool [B, L']): the kept columns of each row, padded on the left (or right).

    >>> index, valid = pack(torch.tensor([[True, False, True], [False, False, True]]))
    >>> index.tolist(), valid.tolist()
    ([[0, 2], [0, 2]], [[True, True], [False, True]])
    """
    count = keep.sum(1)
    width = int(count.max()) if len(count) else 0
    row, column = keep.nonzero(as_tuple=True)
    place = torch.arange(len(row), device=keep.device) - (count.cumsum(0) - count)[row]
    if not right:
        place = place + (width - count)[row]
    index = torch.zeros(len(keep), width, dtype=torch.int64, device=keep.device)
    valid = torch.zeros_like(index, dtype=torch.bool)
    index[row, place], valid[row, place] = column, True
    return index, valid


def gather_columns(values: Tensor, index: Tensor) -> Tensor:
    """[B, L, D] at index [B, L'] -> [B, L', D]."""
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))


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
