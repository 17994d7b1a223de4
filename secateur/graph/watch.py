"""Sizes while a model runs: its integer attributes are watched, and what they are passed to is noted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from secateur.graph.labels import Axes, along
from secateur.graph.notes import Part
from secateur.graph.sizes import Attribute, Extent, Size, expression, leaves
from secateur.graph.tracer import Tracer
from secateur.utils.running import BARE

INTERNAL = {"call_super_init", "dump_patches", "padding_idx", "_version"}
RESHAPES = {"view", "reshape", "expand", "repeat", "_unsafe_view", "unflatten", "broadcast_to"}
FACTORIES = {
    "zeros", "ones", "empty", "full", "rand", "randn", "new_zeros", "new_ones", "new_empty", "new_full",
}  # fmt: skip
GROUPED = {
    "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "group_norm", "layer_norm", "rms_norm",
}  # fmt: skip


@contextmanager
def watched_sizes(modules: Sequence[tuple[str, nn.Module]]) -> Iterator[None]:
    """Replace integer attributes by Sizes while the model runs."""
    undo: list[tuple[dict, str, Any]] = []
    seen: set[int] = set()

    def watch(owner: dict, module: str, prefix: str) -> None:
        for key in [key for key in owner if key not in BARE]:
            value, kind = owner[key], type(owner[key])
            if kind is int:
                if value < 2 or key in INTERNAL:
                    continue
                new: Any = Size(value, Attribute(module, prefix + key))
            elif kind is tuple or kind is list:
                if not value or key in INTERNAL or not all(type(v) is int for v in value):
                    continue
                new = kind(
                    Size(v, Attribute(module, prefix + key, n)) if v > 1 else v for n, v in enumerate(value)
                )
            elif key == "config" and hasattr(value, "__dict__") and not isinstance(value, nn.Module):
                if id(value) not in seen:  # modules share their config: it belongs to the first
                    seen.add(id(value))
                    watch(value.__dict__, module, prefix + key + ".")
                continue
            else:
                continue
            undo.append((owner, key, value))
            owner[key] = new

    for path, module in modules:
        if not isinstance(module, torch.jit.ScriptModule):
            watch(module.__dict__, path, "")
    try:
        yield
    finally:
        for owner, key, value in reversed(undo):
            owner[key] = value


@contextmanager
def watched_comparisons(t: Tracer) -> Iterator[None]:
    """Where code finds an attribute equal to the size of an axis, it goes on being so: it may be an assertion."""

    def compared(a: Any, b: Any) -> None:
        extent, other = (a, b) if isinstance(a, Extent) else (b, a)
        if t.off or not isinstance(extent, Extent) or isinstance(other, Extent):
            return
        if any(isinstance(leaf, Attribute) for leaf in leaves(other)):
            t.event(other, Part(extent.axes, extent.axis, 0, extent.axes.shape[extent.axis]))

    Size.compared = staticmethod(compared)
    try:
        yield
    finally:
        Size.compared = None


def sized_shape(t: Tracer, tensor: torch.Tensor, shape: torch.Size) -> torch.Size:
    """The shape with its labelled entries as Sizes."""
    axes = t.env.get(tensor)
    if axes is None or not axes.layers:
        return shape
    return torch.Size(Size(n, Extent(axes, k)) if axes.has(k) else n for k, n in enumerate(shape))


def note_sizes(t: Tracer, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> None:
    """Note the sizes that a Python call was given."""
    if name in RESHAPES:
        if isinstance(result, torch.Tensor):
            reshaped(t, name, args if not kwargs else (*args, *kwargs.values()), result)
    elif name in FACTORIES:
        if isinstance(result, torch.Tensor):
            created(t, name, args, result)
    elif name in ("layer_norm", "rms_norm"):
        normalised(t, args, kwargs)
    elif name in GROUPED:
        grouped(t, name, args, kwargs)


def reshaped(t: Tracer, name: str, args: Sequence[Any], out: torch.Tensor) -> None:
    """Each size given to a view is that of an axis of the result."""
    axes, rank = t.axes(out), out.dim()
    ints = list(args[1:]) if not isinstance(args[0], int) else list(args)
    if name == "unflatten":
        first = int(ints[0]) % args[0].dim() if isinstance(ints[0], int) else 0
        ints = [None] * first + list(ints[1])
        ints += [None] * (rank - len(ints))
    elif len(ints) == 1 and isinstance(ints[0], (tuple, list)):
        ints = list(ints[0])
    if len(ints) != rank:
        return
    if name == "repeat":  # how many times; of an axis of size 1 that is its new size
        pad = rank - args[0].dim()
        ints = [v if k < pad or args[0].shape[k - pad] == 1 else 1 for k, v in enumerate(ints)]
    if name in ("expand", "repeat"):
        expanded(t, args[0], out, ints)
        axes = t.axes(out)
    for k, value in enumerate(ints):
        t.sized(value, axes, k)


def expanded(t: Tracer, source: torch.Tensor, out: torch.Tensor, ints: Sequence[Any]) -> None:
    """An axis expanded to a size that an attribute holds can shrink: it gets labels of its own. One expanded to the
    size of another axis shrinks with that."""
    axes, pad = t.axes(out), out.dim() - source.dim()
    layers = list(axes.layers)
    for k, value in enumerate(ints):
        if not (k < pad or source.shape[k - pad] == 1) or value <= 1 or axes.has(k):
            continue
        ids = labels_of(expression(value))
        if ids is None and any(isinstance(a, Attribute) for a in leaves(expression(value))):
            ids = t.labels.new(int(value))
        if ids is not None:
            layers.append(along(ids, out.dim(), k))
    t.env[out] = Axes(axes.shape, layers, axes.params)


def labels_of(expr: Any) -> np.ndarray | None:
    """The labels along the axis whose size this is, where no other axis has labels."""
    for layer in expr.axes.layers if isinstance(expr, Extent) else ():
        if layer.shape[expr.axis] > 1 and sum(n > 1 for n in layer.shape) == 1:
            return layer.reshape(-1)
    return None


def created(t: Tracer, name: str, args: Sequence[Any], result: torch.Tensor) -> None:
    """A tensor made with the size of a labelled axis shrinks with it."""
    shape = args[1:] if name.startswith("new_") else args
    if shape and isinstance(shape[0], (tuple, list)):
        shape = shape[0]
    rank, layers = result.dim(), []
    for k, value in enumerate(shape[:rank]):
        expr = expression(value)
        ids = labels_of(expr) if int(value) > 1 else None
        if ids is not None:
            layers.append(along(ids, rank, k))
        elif isinstance(expr, Attribute) and int(value) > 1:
            layers.append(along(t.labels.new(int(value)), rank, k))
        t.sized(value, Axes(tuple(result.shape), layers), k)
    if layers:
        t.env[result] = Axes(tuple(result.shape), layers, frozenset())


def normalised(t: Tracer, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Normalised shapes follow the last axes of the tensor."""
    x, shape = t.axes(args[0]), args[1] if len(args) > 1 else kwargs["normalized_shape"]
    for k, value in enumerate(shape):
        t.sized(value, x, len(x.shape) - len(shape) + k)


def grouped(t: Tracer, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Groups that equal the channels shrink with them; others are fixed unless whole groups are to leave."""
    x = t.axes(args[0])
    if name == "group_norm":
        groups, channel = (args[1] if len(args) > 1 else kwargs["num_groups"]), 1
    else:
        place = 7 if name.startswith("conv_t") else 6
        groups = args[place] if len(args) > place else kwargs.get("groups", 1)
        if name.startswith("conv_t") and "groups" not in kwargs and len(args) > 6:
            groups = args[6]
        w = t.axes(args[1] if len(args) > 1 else kwargs["weight"])
        channel = len(x.shape) - (len(w.shape) - 2) - 1
    if not isinstance(groups, Size) or int(groups) <= 1:
        return
    channels, n = x.shape[channel], int(groups)
    if n == channels:
        part = Part(x, channel, 0, channels)
    elif t.stack[-1] in t.whole_groups and x.has(channel):
        heads = [v.take(range(0, channels, channels // n), channel) for v in x.layers]
        part = Part(Axes((*x.shape[:channel], n, *x.shape[channel + 1 :]), heads), channel, 0, n)
    else:
        part = Part(Axes((n,)), 0, 0, n)
    t.event(groups.expr, part)
