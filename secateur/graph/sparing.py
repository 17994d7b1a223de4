"""A trace asks for shapes and not for values: convolutions give zeros, as long as nothing looks at what they give.

Most of a convolutional network's time is in its convolutions, and none of its labels hang on their results. Where something
could (a branch, a size, an index, the model's own state), `Looked` ends the run, and all is computed in another one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from secateur.graph.labels import Axes
from secateur.graph.operations import described
from secateur.graph.rules import RULES, pick
from secateur.graph.tracer import Tracer

FEW = 8
"""With no more convolutions than these nothing is spared: it would be less than a second run costs."""
READERS = {
    "numpy",
    "__array__",
    "tolist",
    "data_ptr",
    "storage",
    "untyped_storage",
    "__dlpack__",
    "__reduce_ex__",
    "__set__",
}
"""What Python calls to get at a tensor's memory, or to change what it is, past the dispatcher."""
LENGTHS = {"_pack_padded_sequence", "_pad_packed_sequence"}
"""Operations whose shapes hang on values, though nothing in their schema says so."""


class Looked(Exception):
    """Something asked for values that were spared."""


class Spared:
    """Zeros for what convolutions would give, and a watch over who looks at values once there are some."""

    def __init__(
        self,
        modules: Sequence[nn.Module],
        inputs: Sequence[torch.Tensor],
        axes: Callable[[torch.Tensor], Axes | None],
    ):
        self.kept = [(m.__dict__[kind], dict(m.__dict__[kind])) for m in modules for kind in KINDS]
        self.inputs, self.axes = {place(v) for v in inputs}, axes
        self.any = self.looked = False

    def __call__(self, op: Any, args: Sequence[Any], kwargs: Mapping[str, Any] | None) -> torch.Tensor | None:
        """Zeros in place of a convolution; None where the operation is to be done."""
        if op is CONVOLUTION:
            size = None if kwargs else spared_size(*args)
            if size is None:
                return None
            self.any = True
            return args[0].new_zeros(size)
        blind, writes = care(op)
        nothing = op is EMPTY and 0 in args[0]  # which a batch norm asks for
        if writes and self.changes(writes, args) or self.any and not blind and not nothing:
            self.look()
        return None

    def changes(self, writes: str, args: Sequence[Any]) -> bool:
        """Whether this call writes into anything but what this run has made of its inputs."""
        if writes == "statistics":
            return any(a is True for a in args) and args[3] is not None
        known = self.axes(args[0]) if writes == "self" else None
        return known is None or known.params is not None or place(args[0]) in self.inputs

    def look(self) -> None:
        """Values are asked for: zeros must not be taken for them."""
        self.looked = True
        raise Looked

    def called(self, name: str) -> None:
        """Python calls something by this name."""
        if name in READERS:
            self.look()

    def put_back(self) -> None:
        """Parameters and buffers that the model set on itself are as they were."""
        for held, before in self.kept:
            if len(held) != len(before) or any(held.get(name) is not value for name, value in before.items()):
                self.looked = True
                held.clear()
                held.update(before)


@contextmanager
def sparing(t: Tracer, inputs: Sequence[torch.Tensor]) -> Iterator[Spared]:
    """Spare what can be; in the end `Looked`, also where a model caught it and went on."""
    spared = Spared([module for _, module in t.unique()], inputs, t.env.get)
    try:
        yield spared
    finally:
        spared.put_back()
    if spared.looked:
        raise Looked


KINDS = ("_parameters", "_buffers")
CONVOLUTION = torch.ops.aten.convolution.default
EMPTY = torch.ops.aten.empty.memory_format


def worthwhile(modules: Sequence[nn.Module]) -> bool:
    """Whether there is something to be spared, and no hook of the user's and no compiled module to see it."""
    if sum(isinstance(m, nn.modules.conv._ConvNd) for m in modules) <= FEW:
        return False
    if any(isinstance(m, torch.jit.ScriptModule) for m in modules):
        return False
    return not any(m._forward_hooks or m._forward_pre_hooks for m in modules) and not watched()


def watched() -> bool:
    """Whether there are hooks on every module there is."""
    shared = nn.modules.module
    return bool(shared._global_forward_hooks or shared._global_forward_pre_hooks)


def place(tensor: torch.Tensor) -> int:
    """What a tensor has in common with its views."""
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else id(tensor)


@functools.cache
def care(op: Any) -> tuple[bool, str]:
    """What to know of an operation: whether it does the same with any values, by its schema and its rule; where it writes.

    That is "" (nowhere), "self", "out", or "statistics" (of a batch norm in train mode, which its schema doesn't say).
    """
    known = described(op)
    rule = RULES.get(known.name)
    hangs = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
    blind = op.namespace == "aten" and not hangs & set(op.tags) and known.name not in LENGTHS
    blind &= known.pointwise if rule is None else rule.__module__ != pick.__name__
    if "batch_norm" in known.name:
        return blind, "statistics"
    return blind, "self" if known.in_place else "out" if op._schema.is_mutable else ""


def spared_size(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> list[int] | None:
    """The shape of a convolution's result; None where it is better computed."""
    plain = type(x) is torch.Tensor and x.is_contiguous() and weight.is_contiguous()
    rank = weight.dim() - 2
    if (
        transposed
        or not plain
        or x.dim() != weight.dim()
        or x.dtype != weight.dtype
        or x.device != weight.device
    ):
        return None
    if (
        x.shape[1] != weight.shape[1] * groups
        or weight.shape[0] % groups
        or not len(stride) == len(padding) == rank
    ):
        return None
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != x.dtype):
        return None
    size = [x.shape[0], weight.shape[0]]
    for k in range(rank):
        reach = dilation[k] * (weight.shape[k + 2] - 1) + 1
        size.append((x.shape[k + 2] + 2 * padding[k] - reach) // stride[k] + 1)
    return size if min(size) > 0 else None
