"""How each ATen operation moves labels. An operation without a rule freezes what it touches.

A rule takes the tracer and a call and returns the labelled result, or a list of them. Spec: spa, table of rules.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from secateur.graph.labels import (
    INNER,
    PICKED,
    Axes,
    along,
    axes_of,
)
from secateur.graph.tracer import Tracer


@dataclass
class Call:
    """One operation: its name without overload, arguments by schema name, shapes of the outputs."""

    name: str
    args: dict[str, Any]
    axes: dict[str, Any]  # the tensor arguments as Axes (lists of them where the argument is a list)
    outs: list[tuple[int, ...]]

    @property
    def out(self) -> tuple[int, ...]:
        return self.outs[0]

    def tensors(self) -> list[Axes]:
        flat: list[Axes] = []
        for value in self.axes.values():
            flat += [v for v in value if v is not None] if isinstance(value, list) else [value]
        return flat


Rule = Callable[["Tracer", Call], "Axes | list[Axes]"]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    def add(function: Rule) -> Rule:
        for name in names:
            RULES[name] = function
        return function

    return add


# --- steps the rules share


def canon(t: Tracer, layer: np.ndarray) -> np.ndarray:
    """Axes along which all labels have become one are free again."""
    for k in axes_of(layer):
        if t.labels.same(layer, k):
            layer = layer.take([0], k)
    return layer


def collapse(t: Tracer, layer: np.ndarray, axis: int) -> np.ndarray:
    """Tie along an axis, which becomes free."""
    first = layer.take([0], axis)
    t.labels.tie(layer, first)
    return first


def fix(t: Tracer, x: Axes, axis: int, why: object) -> Axes:
    """The axis cannot shrink: tie along it where another axis is labelled too, else freeze."""
    if x.picks is None and not x.has(axis):
        return x
    layers = []
    for layer in x.layers:
        if layer.shape[axis] == 1:
            layers.append(layer)
        elif t.inner and len(axes_of(canon(t, layer))) > 1 and axis == axes_of(layer)[-1]:
            layer = innermost(t, layer)
            t.labels.flag(layer, INNER)
            t.freeze(layer, why)
        elif len(axes_of(layer)) > 1:
            layers.append(canon(t, collapse(t, layer, axis)))
        else:
            t.freeze(layer, why)
    return Axes(x.shape, layers, x.params)


def innermost(t: Tracer, layer: np.ndarray) -> np.ndarray:
    """Only the innermost labelled axis stays: the same entry of every head."""
    layer = canon(t, layer)
    for k in axes_of(layer)[:-1]:
        layer = collapse(t, layer, k)
    return layer


def rect_heads(t: Tracer, x: Axes) -> Axes:
    """`rect` where heads are: what stays of them is the tracer's choice."""
    return Axes(x.shape, [innermost(t, layer) for layer in x.layers], x.params) if t.inner else rect(t, x)


def rect(t: Tracer, x: Axes) -> Axes:
    """Only the outermost labelled axis of every layer stays (whole heads, not parts of them)."""
    layers: list[np.ndarray] = []
    for layer in x.layers:
        layer = canon(t, layer)
        for k in axes_of(layer)[1:]:
            layer = collapse(t, layer, k)
        layers.append(layer)
    return Axes(x.shape, layers, x.params)


def vector(t: Tracer, x: Axes | None, axis: int) -> np.ndarray | None:
    """The labels along one axis of a rectangular value, or None."""
    if x is None or not x.shape:
        return None
    axis %= len(x.shape)
    found = [layer for layer in x.layers if layer.shape[axis] > 1]
    for layer in found[1:]:
        t.labels.tie(found[0], layer)
    return found[0].reshape(-1) if found else None


def join(t: Tracer, a: np.ndarray | None, b: np.ndarray | None, why: object) -> np.ndarray | None:
    """Tie two label vectors; a missing partner freezes the other."""
    if a is not None and b is not None:
        t.labels.tie(a, b)
        return a
    if a is not None or b is not None:
        t.freeze(a if b is None else b, why)  # type: ignore[arg-type]
    return None


def elementwise(t: Tracer, operands: Sequence[Axes], shape: tuple[int, ...]) -> Axes:
    """Right-align, tie where both are labelled, fix where the partner is full-size and unlabelled."""
    rank = len(shape)
    usual = one_axis(t, operands, rank)
    if usual is not None:
        return Axes(shape, usual, t.origin(operands))
    xs = []
    for x in operands:
        pad = (1,) * (rank - len(x.shape))
        xs.append(Axes(pad + x.shape, [layer.reshape(pad + layer.shape) for layer in x.layers], x.params))
    # Where an operand with several labelled axes meets one that has some of them only, heads leave whole.
    busy = True
    while busy:
        busy = False
        for i, x in enumerate(xs):
            for n, layer in enumerate(x.layers):
                mine = set(axes_of(layer))
                others = [set(axes_of(o)) for j, y in enumerate(xs) if j != i for o in y.layers]
                if len(mine) > 1 and any(o & mine and not o >= mine for o in others):
                    layer = canon(t, layer)
                    if t.inner and any(max(mine) in o for o in others):
                        layer = innermost(t, layer)
                    for k in axes_of(layer)[1:]:
                        layer = collapse(t, layer, k)
                    x.layers[n], busy = layer, True
    # A full-size partner without labels can't shrink, so nothing that it meets can.
    for k in range(rank):
        if any(x.has(k) for x in xs) and any(x.shape[k] > 1 and not x.has(k) for x in xs):
            why = t.reason("meets a tensor of full size that has no channels to cut")
            xs = [fix(t, x, k, why) for x in xs]
    # What is left lies along the same axes or along none in common: tie, or put side by side.
    layers: list[np.ndarray] = []
    for x in xs:
        for layer in x.layers:
            for n, other in enumerate(layers):
                if set(axes_of(layer)) & set(axes_of(other)):
                    t.labels.tie(layer, other)
                    layers[n] = other if len(axes_of(other)) >= len(axes_of(layer)) else layer
                    break
            else:
                layers.append(layer)
    return Axes(shape, [canon(t, layer) for layer in layers], t.origin(operands))


def one_axis(t: Tracer, operands: Sequence[Axes], rank: int) -> list[np.ndarray] | None:
    """`elementwise` in the usual case: all labels lie along one axis, which no operand without labels fills."""
    place, found = 0, []
    for x in operands:
        for layer in x.layers:
            size, shape = layer.size, layer.shape
            if size not in shape:
                return None
            k = shape.index(size) - len(shape)
            if place not in (0, k):
                return None
            place = k
            found.append(layer.ravel())
    if not found:
        return []
    for x in operands:
        if not x.layers and len(x.shape) >= -place and x.shape[place] > 1:
            return None
    if len(found) == 2:
        t.labels.tie(found[0], found[1])
    elif len(found) > 2:
        t.labels.tie(np.concatenate(found[1:]), np.concatenate(found[:1] * (len(found) - 1)))
    return [canon(t, along(found[0], rank, place))]


def drop_axes(x: Axes, dims: Sequence[int], shape: tuple[int, ...]) -> list[np.ndarray]:
    """The layers without these (free) axes, unless the rank was kept."""
    if len(shape) == len(x.shape):
        return list(x.layers)
    return [layer.reshape([n for k, n in enumerate(layer.shape) if k not in dims]) for layer in x.layers]


def dims_of(value: Any, rank: int) -> list[int]:
    if value is None or (isinstance(value, (list, tuple)) and not value):
        return list(range(rank))
    return [int(d) % rank for d in (value if isinstance(value, (list, tuple)) else [value])] if rank else []


def chosen(t: Tracer, x: Axes, d: int, count: int, name: str) -> tuple[Axes, np.ndarray | None]:
    """The best of an axis are taken: what is left of the labels, and those that the winners are numbered among."""
    layers, picks = [], None
    for layer in x.layers:
        layer = canon(t, layer)
        if layer.shape[d] == 1:
            layers.append(layer)
            continue
        if axes_of(layer)[0] != d:  # blocks leave whole
            layer = collapse(t, layer, d)
            layers.append(layer)
        else:
            for k in axes_of(layer)[1:]:
                layer = collapse(t, layer, k)
            picks = layer.reshape(-1)
            t.notes.floors.append((picks, count))
        t.labels.flag(layer, PICKED)
        t.choice(name, layer)
    return Axes(x.shape, layers, x.params), picks
