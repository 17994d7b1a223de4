"""What stands in the place of a part that left a block."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class Absent(nn.Module):
    """Zeros of the shape of its input: a tensor where `returns` is 0, else a tuple of so many, the rest None."""

    def __init__(self, returns: int = 0):
        super().__init__()
        self.returns = returns

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        zeros = torch.zeros_like(args[0] if args else kwargs["hidden_states"])
        return (zeros, *[None] * (self.returns - 1)) if self.returns else zeros
