"""What an attention method is: levels of key blocks, from the queries and keys of one attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from secateur.attention.layout import Layout
from secateur.method import Method


@dataclass
class AttentionMethod(Method):
    """Says how finely each block of queries reads each block of keys; no weight changes.

    Write `levels`; `secateur.attach(model, method)` runs it at every self-attention of the model.
    """

    verb: ClassVar[str] = "attend"
    block_q: int = 128
    block_k: int = 64
    warmup: int = 0
    """The first runs of the model that stay dense, such as steps of denoising."""

    def places(self, q: Tensor, k: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor] | None:
        """The order in which queries and keys are cut into blocks, int64 [B or 1, H or 1, N] and [B or 1, H of keys or 1, M]; None: theirs."""
        return None

    def levels(self, q: Tensor, k: Tensor, layout: Layout, generator: torch.Generator) -> Tensor:
        """int64 [B, H, layout.rows, layout.columns]: 1 whole, 2, 4, 8 in means of so many, 0 not at all.

        q: [B, H, N, d], k: [B, H of keys, M, d], as the model has them (rotated).
        """
        raise NotImplementedError
