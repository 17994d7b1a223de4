"""What a hook of the training loop sees."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from secateur.utils.screen import Screen


@dataclass(repr=False)
class State(Screen):
    """What a hook sees, and may change. `losses` holds one number a step; `lr` is the rate of this step."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    steps: int
    step: int = 0
    batch: Any = None
    loss: float = math.nan
    losses: list[float] = field(default_factory=list)
    lr: float = math.nan


Hook = Callable[[State], None]
