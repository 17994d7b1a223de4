"""Types that several rooms share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Objective = Callable[[torch.nn.Module, Any], Tensor]
"""A scalar of a model and a batch: the loss, or what a method differentiates in its place."""
