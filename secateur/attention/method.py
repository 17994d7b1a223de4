"""What an attention method is: levels of key blocks, from the queries and keys of one attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from secateur.attention.layout import Layout
from secateur.errors import SecateurError
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

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.warmup < 0 or min(self.block_q, self.block_k) < 1:
            raise SecateurError(
                f"warmup of {self.warmup} runs, blocks of {self.block_q} queries and {self.block_k} keys that hold nothing",
                where=self.name,
                fix="0 runs or more, blocks of 1 or more",
            )

    def places(self, q: Tensor, k: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor] | None:
        """The order in which queries and keys are cut into blocks, int64 [B or 1, H or 1, N] and [B or 1, H of keys or 1, M]; None: theirs."""
        return None

    def levels(self, q: Tensor, k: Tensor, layout: Layout, generator: torch.Generator) -> Tensor:
        """int64 [B, H, layout.rows, layout.columns]: 1 whole, 2, 4, 8 in means of so many, 0 not at all.

        q: [B, H, N, d], k: [B, H of keys, M, d], as the model has them (rotated).
        """
        raise self.lacks("levels")
