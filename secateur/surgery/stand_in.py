"""Copies of a model that hold no weights of their own, and weights that are changed only while an operation reads them."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from secateur.graph.groups import Graph
from secateur.surgery.changes import _tensor

Edit = Callable[[Tensor], Tensor]


def sharing(model: nn.Module, other: Mapping[str, Tensor]) -> nn.Module:
    """A copy whose parameters read the memory of the model's, but for those given in `other`; buffers are its own.

    >>> twin = sharing(model, {"norm.weight": torch.ones(8)})

    Nothing may be written into its parameters; they have gradients of their own.
    """
    memo: dict[int, Any] = {}
    for name, parameter in model.named_parameters():
        if type(parameter) is nn.Parameter:
            value = other.get(name, parameter.detach())
            memo[id(parameter)] = nn.Parameter(value, requires_grad=parameter.requires_grad)
    twin = copy.deepcopy(model, memo)
    for name, buffer in twin.named_buffers():
        if name in other:
            buffer.copy_(other[name])
    return twin


def loosened(model: nn.Module) -> dict[str, Tensor]:
    """Norms, biases and tensors of one value throughout, by name, with noise added.

    Ones, zeros and scales of 1e-6, with which networks begin, hide which of their entries was cut.
    """
    changed = {}
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.numel() and (parameter.dim() < 2 or _flat(parameter)):
            value = parameter.detach()
            changed[name] = value + _noise(name, value) * (value.abs() * 0.1 + 0.02)
    for path, module in model.named_modules():
        if not isinstance(module, nn.modules.batchnorm._NormBase):
            continue
        means, variances = module.running_mean, module.running_var
        if means is not None and variances is not None:
            mean, var = f"{path}.running_mean".lstrip("."), f"{path}.running_var".lstrip(".")
            changed[mean] = means + 0.1 * _noise(mean, means)
            changed[var] = variances * (1 + 0.2 * _noise(var, variances).clamp(-2, 2))
    return changed


def _flat(tensor: Tensor) -> bool:
    first = tensor.detach().reshape(-1)[:2]
    return bool(first[0] == first[-1]) and bool(tensor.min() == tensor.max())


def _noise(name: str, like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(like.shape, generator=generator).to(like.device, like.dtype)


def zeroed(places: Mapping[int, Tensor], tensor: Tensor) -> Tensor:
    """The tensor with zeros at places along some of its axes."""
    mask = torch.ones((), device=tensor.device, dtype=tensor.dtype)
    for dim, gone in places.items():
        along = torch.ones(tensor.shape[dim], device=tensor.device, dtype=tensor.dtype)
        along[gone.to(tensor.device)] = 0
        mask = mask * along.reshape([-1 if k == dim else 1 for k in range(tensor.dim())])
    return tensor * mask


class StandIns(TorchDispatchMode):
    """Operations read edited copies of a model's tensors; a copy lives no longer than the operation.

    >>> with StandIns(model, graph, {"fc1.weight": lambda weight: weight * 2}):
    ...     model(x)

    `ops` stands for the operations that were done, in order. Gradients aren't followed.
    """

    def __init__(self, model: nn.Module, graph: Graph, edits: Mapping[str, Edit]):
        super().__init__()
        self.ops = 0
        self.edits: dict[int, tuple[Tensor, Edit]] = {}
        for name in [*edits, *(other for other, first in graph.aliases.items() if first in edits)]:
            tensor = _tensor(model, name)
            self.edits[id(tensor)] = (tensor, edits[graph.aliases.get(name, name)])

    def _read(self, value: Any) -> Any:
        if isinstance(value, Tensor) and id(value) in self.edits:
            return self.edits[id(value)][1](value.detach())
        return [self._read(v) for v in value] if isinstance(value, (list, tuple)) else value

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # a wrapper around every operation that only compiling needs

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops = hash((self.ops, id(func)))
        kwargs = kwargs or {}
        if self.edits:
            args = tuple(self._read(value) for value in args)
            kwargs = {key: self._read(value) for key, value in kwargs.items()}
        return func(*args, **kwargs)
