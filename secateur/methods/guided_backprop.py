"""Guided backpropagation: only positive gradients come back through activation functions.

Springenberg et al. 2015, https://arxiv.org/abs/1412.6806.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from secateur.method import register
from secateur.methods.gradient import Gradient
from secateur.saliency.method import Drawn
from secateur.saliency.record import record as look
from secateur.saliency.relevance import plain
from secateur.taxonomy import record


class GuidedMode(TorchFunctionMode):
    """Only positive gradients come back through activation functions (guided backpropagation).

    Springenberg et al. 2015, https://arxiv.org/abs/1412.6806. Smooth activations are treated like ReLU.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        if plain(func) in ACTIVATIONS and isinstance(found, Tensor) and found.requires_grad:
            return _PositiveGradient.apply(found)
        return found


ACTIVATIONS = {
    *(
        F.relu,
        torch.relu,
        Tensor.relu,
        F.relu6,
        F.hardtanh,
        F.leaky_relu,
        F.elu,
        F.gelu,
        F.silu,
        F.hardswish,
        F.mish,
    ),
    *(torch.relu_, Tensor.relu_, F.selu, F.celu),
}


class _PositiveGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g.clamp(min=0)


@register
@dataclass
class GuidedBackprop(Gradient):
    """The gradient that passes only where it is positive behind every activation function.

    >>> secateur.saliency(model, image, method="guided-backprop", target=281).values  # doctest: +SKIP
    """

    info = record("guided-backprop")
    words = False

    def draw(self, model: nn.Module, image: Tensor, target: Any) -> Drawn:
        return self.of(look(model, image, target, pixels=True, mode=GuidedMode()))
