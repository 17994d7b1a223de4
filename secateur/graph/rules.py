"""How each ATen operation moves labels. An operation without a rule freezes what it touches.

A rule takes the tracer and a call and returns the labelled result, or a list of them. Spec: spa, table of rules.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from secateur.graph.labels import (
    ALONE,
    EXPERT,
    HEAD,
    INNER,
    MIXED,
    PICKED,
    RESIDUAL,
    SOFT,
    Axes,
    NoRule,
    along,
    axes_of,
)

if TYPE_CHECKING:
    from secateur.graph.trace import Tracer


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
    for k in range(rank):
        if any(x.has(k) for x in xs) and any(x.shape[k] > 1 and not x.has(k) for x in xs):
            why = t.reason("meets a tensor of full size that has no channels to cut")
            xs = [fix(t, x, k, why) for x in xs]
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
        t.labels.tie(np.concatenate(found[1:]).reshape(len(found) - 1, -1), found[0])
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


# --- elementwise

PASS = [
    "hardswish",
    "hardsigmoid",
    "hardtanh",
    "relu6",
    "mish",
    "celu",
    "selu",
    "log_sigmoid_forward",
    "clone",
    "detach",
    "alias",
    "lift_fresh",
    "lift",
    "lift_fresh_copy",
    "_to_copy",
    "to",
    "contiguous",
    "dropout",
    "native_dropout",
    "feature_dropout",
    "alpha_dropout",
    "max_pool2d_with_indices",
    "max_pool1d_with_indices",
    "max_pool3d_with_indices",
    "max_pool1d",
    "max_pool2d",
    "max_pool3d",
    "avg_pool1d",
    "avg_pool2d",
    "avg_pool3d",
    "_adaptive_avg_pool2d",
    "_adaptive_avg_pool3d",
    "adaptive_avg_pool1d",
    "adaptive_avg_pool2d",
    "adaptive_max_pool2d",
    "adaptive_max_pool1d",
    "mkldnn_adaptive_avg_pool2d",
    "reflection_pad1d",
    "reflection_pad2d",
    "replication_pad1d",
    "replication_pad2d",
    "zeros_like",
    "ones_like",
    "empty_like",
    "full_like",
    "rand_like",
    "randn_like",
    "triu",
    "tril",
    "fill",
    "zero",
    "bernoulli",
    "uniform",
    "normal",
    "random",
    "exponential",
    "grid_sampler_2d",
]


PASS += [f"upsample_{mode}" for mode in ("nearest1d", "nearest2d", "nearest3d", "linear1d", "bilinear2d", "bicubic2d",
         "trilinear3d")]  # fmt: skip
PASS += [
    "_upsample_nearest_exact1d",
    "_upsample_nearest_exact2d",
    "_upsample_bilinear2d_aa",
    "_upsample_bicubic2d_aa",
]


@rule(*PASS)
def same(t: Tracer, c: Call) -> Axes:
    x = next(iter(c.axes.values()))
    if any(word in c.name for word in ("pool", "_pad", "upsample", "grid")):
        spatial = int(c.name.rpartition("d")[0][-1:]) if c.name.rpartition("d")[0][-1:].isdigit() else 2
        for k in range(len(x.shape) - spatial, len(x.shape)):
            x = fix(t, x, k, t.reason("a spatial axis"))
    if any(x.has(k) and x.shape[k] != c.out[k] for k in range(len(c.out))):
        raise NoRule
    return Axes(c.out, x.layers, x.params)


@rule("as_strided")
def as_strided(t: Tracer, c: Call) -> Axes:
    x = c.axes["self"]
    if x.shape != c.out or c.args.get("storage_offset"):
        raise NoRule
    return x


def differ(a: np.ndarray, b: np.ndarray) -> bool:
    """Are these other sets of labels?"""
    if a.min() != b.min() or a.max() != b.max():
        return True
    return not np.array_equal(a, b) and not np.array_equal(np.unique(a), np.unique(b))


def pointwise(t: Tracer, c: Call) -> Axes:
    xs = c.tensors()
    values = [x for x in xs if x.layers and x.params is None]
    before = [t.labels.find(x.layers[0].ravel()) for x in values[:2]] if c.name == "add" else []
    out = elementwise(t, xs, c.out)
    if len(before) > 1 and differ(*before):
        for layer in out.layers:
            t.labels.flag(layer, RESIDUAL)
    return out


for _name in ("where", "masked_fill", "lerp", "addcmul", "addcdiv", "_prelu_kernel", "bitwise"):
    RULES[_name] = pointwise


@rule("copy")
def copy(t: Tracer, c: Call) -> Axes:
    target, source = c.axes["self"], c.axes["src"]
    if target.layers:
        return elementwise(t, [target, source], c.out)
    pad = (1,) * (len(c.out) - len(source.shape))
    return Axes(c.out, [layer.reshape(pad + layer.shape) for layer in source.layers], source.params)


@rule("_softmax", "_log_softmax", "softmax", "log_softmax", "_safe_softmax")
def softmax(t: Tracer, c: Call) -> Axes:
    x = c.axes["self"]
    for layer in x.layers:
        if layer.shape[c.args["dim"]] > 1:
            t.labels.flag(layer, SOFT)
            t.choice(c.name, layer)
    return Axes(c.out, x.layers, x.params)


@rule("cumsum", "flip", "logcumsumexp")
def scan(t: Tracer, c: Call) -> Axes:
    x = c.axes["self"]
    if c.name == "flip":
        dims = dims_of(c.args["dims"], len(c.out))
        return Axes(c.out, [np.flip(layer, tuple(dims)) for layer in x.layers], x.params)
    return x


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
            t.floors.append((picks, count))
        t.labels.flag(layer, PICKED)
        t.choice(name, layer)
    return Axes(x.shape, layers, x.params), picks


def pick(t: Tracer, x: Axes, d: int, picks: np.ndarray) -> Axes:
    """Entries of an axis are taken by numbers that a router gave: they are units of the same kind."""
    layers, met = [], False
    for layer in x.layers:
        layer = canon(t, layer)
        if layer.shape[d] == 1:
            layers.append(layer)
            continue
        for k in axes_of(layer):
            layer = collapse(t, layer, k) if k != d else layer
        ids = layer.reshape(-1)
        if len(ids) <= len(picks) and len(ids) + len(t.beyond(picks)) >= len(picks):
            t.labels.tie(ids, picks[: len(ids)])
            met = True
        else:
            t.freeze(ids, t.reason("entries of this axis are picked by index"))
    if x.params:
        t.labels.flag(picks, EXPERT)
        if len(x.shape) > 2:
            t.weight(x, [d], [])
    if not met:
        t.freeze(picks, t.reason("its numbers pick entries of a fixed axis"))
    return Axes(x.shape, layers, x.params)


@rule("topk")
def topk(t: Tracer, c: Call) -> list[Axes]:
    x, d = c.axes["self"], int(c.args["dim"]) % max(1, len(c.out))
    if not c.args.get("largest", True):
        x = fix(t, x, d, t.reason("topk takes the smallest along this axis"))
    free, picks = chosen(t, x, d, int(c.args["k"]), "topk")
    return [Axes(c.outs[0], free.layers), Axes(c.outs[1], free.layers, picks=picks)]


@rule("one_hot")
def one_hot(t: Tracer, c: Call) -> Axes:
    x, n, picks = c.axes["self"], c.args["num_classes"], c.axes["self"].picks
    layers = [layer[..., None] for layer in x.layers]
    if picks is None:
        return Axes(c.out, layers)
    if n < len(picks):
        t.freeze(picks, t.reason("its units are counted by number"))
        return Axes(c.out, layers)
    more = t.labels.new(n - len(picks), t.reason("a place that belongs to no unit"))
    t.extras |= set(more.tolist())
    layers.append(along(np.concatenate([picks, more]), len(c.out), -1))
    out = Axes(c.out, layers)
    t.sized(n, out, len(c.out) - 1)
    return out


@rule("histc", "bincount")
def count(t: Tracer, c: Call) -> Axes:
    picks = c.axes["self"].picks
    if picks is None:
        return Axes(c.out, [], frozenset())
    if c.out != (len(picks),):
        t.freeze(picks, t.reason("its units are counted by number"))
        return Axes(c.out)
    out = Axes(c.out, [picks])
    t.sized(c.args.get("bins", c.args.get("minlength")), out, 0)
    return out


@rule("nonzero")
def nonzero(t: Tracer, c: Call) -> Axes:
    x = c.axes["self"]
    if len(x.shape) == 1:
        return Axes(c.out, [], None, vector(t, x, 0))
    for layer in x.layers:
        t.freeze(layer, t.reason("entries of this axis are found by index"))
    return Axes(c.out, [], frozenset())


@rule("cumprod", "sort", "argsort", "kthvalue", "median", "cummax", "cummin", "argmax", "argmin")
def ordering(t: Tracer, c: Call) -> list[Axes]:
    x = c.axes["self"]
    rank = len(x.shape)
    if c.name == "argmax" and c.args.get("dim") is not None:
        d = int(c.args["dim"]) % rank
        x, picks = chosen(t, x, d, 1, "argmax")
        return [Axes(c.out, drop_axes(x, [d], c.out), picks=picks)]
    for d in dims_of(c.args.get("dim"), rank):
        x = fix(t, x, d, t.reason(f"{c.name} runs over this axis"))
    if c.name in ("sort", "argsort", "cumprod", "cummax", "cummin") or len(c.out) == rank:
        return [Axes(o, x.layers) for o in c.outs]
    return [Axes(o, drop_axes(x, dims_of(c.args.get("dim"), rank), o)) for o in c.outs]


@rule("mean", "sum", "amax", "amin", "var", "std", "norm", "linalg_vector_norm", "logsumexp", "prod", "max",
      "min", "any", "all", "var_mean", "std_mean")  # fmt: skip
def reduce(t: Tracer, c: Call) -> Axes | list[Axes]:
    x = c.axes.get("self") or next(iter(c.axes.values()))
    if "other" in c.axes:
        return pointwise(t, c)
    rank = len(x.shape)
    if c.name == "max" and len(c.outs) == 2:
        d = int(c.args["dim"]) % rank
        free, picks = chosen(t, x, d, 1, "max")
        best, places = (Axes(o, drop_axes(free, [d], o)) for o in c.outs)
        places.picks = picks
        return [best, places]
    dims = dims_of(c.args.get("dim"), rank)
    layers = []
    for layer in x.layers:
        if any(layer.shape[k] > 1 for k in dims):
            if t.inner and axes_of(layer)[-1] in dims:
                layer = innermost(t, layer)
            if all(k in dims for k in axes_of(layer)):
                t.labels.flag(layer, MIXED)
                continue
            for k in dims:
                layer = collapse(t, layer, k)
        layers.append(layer)
    return [Axes(o, drop_axes(Axes(x.shape, layers), dims, o), x.params) for o in c.outs]


# --- contractions


@rule("linear")
def linear(t: Tracer, c: Call) -> Axes:
    x, w, b = rect(t, c.axes["input"]), rect(t, c.axes["weight"]), c.axes.get("bias")
    if len(w.shape) != 2:
        raise NoRule
    t.weight(c.axes["weight"], [0], [1])
    join(t, vector(t, x, -1), vector(t, w, 1), t.reason("the input of a linear layer is fixed"))
    out = vector(t, w, 0)
    if b is not None:
        join(t, vector(t, b, 0), out, t.reason("the output of a linear layer is fixed"))
    layers = [layer for layer in x.layers if layer.shape[-1] == 1]
    if out is not None:
        layers.append(along(out, len(c.out), -1))
    result = Axes(c.out, layers, t.origin([x, w]))
    t.cost([(result, k) for k in range(len(c.out))] + [(w, 1)])
    return result


def matmul_axes(t: Tracer, x: Axes, y: Axes, out: tuple[int, ...]) -> Axes:
    if len(x.shape) == 1:
        x = Axes((1, *x.shape), [v[None] for v in x.layers], x.params)
        return squeeze_out(
            matmul_axes(t, x, y, (*out[:-1], 1, *out[-1:]) if len(y.shape) > 1 else (1,)), -2, out
        )
    if len(y.shape) == 1:
        y = Axes((*y.shape, 1), [v[..., None] for v in y.layers], y.params)
        return squeeze_out(matmul_axes(t, x, y, (*out, 1)), -1, out)
    t.weight(x, [-2], [-1])
    t.weight(y, [-1], [-2])
    square = rect if x.params or y.params else rect_heads
    x, y, rank = square(t, x), square(t, y), len(out)
    shared = join(t, vector(t, x, -1), vector(t, y, -2), t.reason("the partner of a matrix product is fixed"))
    if shared is not None and x.params is None and y.params is None:
        t.labels.flag(shared, INNER if t.inner else MIXED | INNER)

    def batch(v: Axes) -> Axes:
        layers = [layer for layer in v.layers if layer.shape[-1] == 1 and layer.shape[-2] == 1]
        return Axes((*v.shape[:-2], 1, 1), layers, v.params)

    bx, by = batch(x), batch(y)
    ratios = [heads(t, bx), heads(t, by)]
    joined = elementwise(t, [bx, by], (*out[:-2], 1, 1))
    for layer in joined.layers:
        if x.params or y.params:
            t.labels.flag(layer, EXPERT)
            t.weight(x if x.params else y, axes_of(layer), [])
        else:
            t.labels.flag(layer, HEAD)
            flat = np.ravel(layer)
            share = max(1, ratios[0] // max(1, ratios[1]))
            t.labels.shared[flat] = np.maximum(t.labels.shared[flat], share)
    layers = list(joined.layers)
    for side, axis in ((x, -2), (y, -1)):
        ids = vector(t, side, axis)
        if ids is not None:
            layers.append(along(ids, rank, axis))
    result = Axes(out, layers, t.origin([x, y]))
    t.cost([(result, k) for k in range(rank)] + [(x if x.has(-1) else y, -1 if x.has(-1) else -2)])
    return result


def heads(t: Tracer, x: Axes) -> int:
    """How many different units the batch axes hold."""
    return max([len(np.unique(t.labels.find(layer))) for layer in x.layers], default=0)


def squeeze_out(x: Axes, axis: int, out: tuple[int, ...]) -> Axes:
    return Axes(out, [layer.squeeze(axis) for layer in x.layers], x.params)


@rule("matmul", "mm", "bmm", "mv", "dot")
def matmul(t: Tracer, c: Call) -> Axes:
    x, y = list(c.axes.values())[:2]
    return matmul_axes(t, x, y, c.out)


@rule("_grouped_mm", "grouped_mm", "grouped_mm_fallback")
def grouped_mm(t: Tracer, c: Call) -> Axes:
    x, w = list(c.axes.values())[:2]
    if len(x.shape) != 2 or len(w.shape) != 3:
        raise NoRule
    t.weight(w, [0, 2], [1])
    offs = c.axes.get("offs")
    ids = join(
        t,
        vector(t, w, 0),
        None if offs is None else vector(t, offs, 0),
        t.reason("experts are picked by number"),
    )
    if ids is not None:
        t.labels.flag(ids, EXPERT)
        w = Axes(w.shape, [layer for layer in w.layers if layer.shape[0] == 1], w.params)
    bytes_ = c.args["self" if "self" in c.args else "input"].element_size()
    for layer in w.layers:  # the kernel reads rows of a multiple of 16 bytes
        t.grains.append((layer.reshape(-1), max(1, 16 // bytes_)))
    flat = Axes(w.shape[1:], [layer[0] for layer in w.layers], w.params)
    return matmul_axes(t, x, flat, c.out)


@rule("addmm", "baddbmm", "addmv", "addbmm")
def addmm(t: Tracer, c: Call) -> Axes:
    first, x, y = list(c.axes.values())[:3]
    if c.name == "addbmm":
        raise NoRule
    return elementwise(t, [first, matmul_axes(t, x, y, c.out)], c.out)


@rule("einsum")
def einsum(t: Tracer, c: Call) -> Axes:
    equation = c.args["equation"].replace(" ", "")
    if "." in equation or "->" not in equation:
        raise NoRule
    left, right = equation.split("->")
    for x, term in zip(c.axes["tensors"], left.split(","), strict=True):
        summed = [k for k, letter in enumerate(term) if letter not in right]
        t.weight(x, [k for k in range(len(term)) if k not in summed], summed)
    xs = [rect(t, x) for x in c.axes["tensors"]]
    found: dict[str, np.ndarray] = {}
    dims: dict[str, tuple[Axes, int]] = {}
    activations = all(x.params is None for x in xs)
    for letter in sorted(set(left) - {","}):
        owners = [
            (x, term.index(letter)) for x, term in zip(xs, left.split(","), strict=True) if letter in term
        ]
        owners = [(x, k) for x, k in owners if x.shape[k] > 1]
        ids = [vector(t, x, k) for x, k in owners]
        if owners:
            dims[letter] = next((o for o in owners if o[0].has(o[1])), owners[0])
        if any(v is None for v in ids):
            for v in ids:
                if v is not None:
                    t.freeze(v, t.reason("the partner of an einsum is fixed"))
        elif ids:
            counts = [len(np.unique(t.labels.find(v))) for v in ids if v is not None]
            for v in ids[1:]:
                t.labels.tie(ids[0], v)  # type: ignore[arg-type]
            assert ids[0] is not None
            found[letter] = ids[0]
            if len(ids) > 1 and letter in right:
                t.labels.flag(ids[0], HEAD if activations else EXPERT)
                share = max(1, counts[0] // max(1, counts[-1]))
                t.labels.shared[ids[0]] = np.maximum(t.labels.shared[ids[0]], share)
            elif len(ids) > 1 and activations:
                t.labels.flag(ids[0], MIXED | INNER)
    layers = [along(found[k], len(right), n) for n, k in enumerate(right) if k in found]
    result = Axes(c.out, layers, t.origin(xs))
    t.cost(list(dims.values()))
    return result


@rule("convolution", "_convolution", "cudnn_convolution", "mkldnn_convolution")
def convolution(t: Tracer, c: Call) -> Axes:
    x, w, b = rect(t, c.axes["input"]), c.axes["weight"], c.axes.get("bias")
    groups, transposed = int(c.args.get("groups", 1)), bool(c.args.get("transposed", False))
    rank, channel = len(x.shape), len(x.shape) - (len(w.shape) - 2) - 1
    why = t.reason("a spatial axis of a convolution")
    t.weight(w, [1 if transposed else 0], [0 if transposed else 1])
    for k in range(2, len(w.shape)):
        w = fix(t, w, k, why)
    w = rect(t, w)
    for k in range(channel + 1, rank):
        x = fix(t, x, k, why)
    inp, w0, w1 = vector(t, x, channel), vector(t, w, 0), vector(t, w, 1)
    keep = [layer for layer in x.layers if layer.shape[channel] == 1]
    n_in, n_out = x.shape[channel], c.out[channel]
    fixed_in, fixed_out = (
        t.reason("the input of a convolution is fixed"),
        t.reason("a fixed convolution weight"),
    )
    out: np.ndarray | None
    if groups == 1:
        join(t, inp, w0 if transposed else w1, fixed_in)
        out = w1 if transposed else w0
    elif n_in == groups and not transposed:
        out = w0
        if inp is None or w0 is None:
            join(t, inp, w0, fixed_in)
            out = None if inp is None and w0 is not None else out
        else:
            t.labels.tie(w0, np.repeat(inp, n_out // n_in))
        join(t, w1, None, fixed_out)
    elif n_in == groups:
        join(t, inp, w0, fixed_in)
        out = None if w0 is None else np.repeat(w0, n_out // groups)
        join(t, w1, None, fixed_out)
    elif not transposed and t.stack[-1] in t.whole_groups:
        out = w0
        join(t, w1, None, fixed_out)
        if inp is None or w0 is None:
            join(t, inp, w0, fixed_in)
        else:
            t.labels.tie(inp.reshape(groups, -1), inp[:: n_in // groups][:, None])
            t.labels.tie(w0.reshape(groups, -1), inp[:: n_in // groups][:, None])
    elif not transposed:
        out = w0
        if w0 is not None:
            t.grouped[t.stack[-1]] = w0 if inp is None else np.concatenate([w0, inp])
            t.labels.tie(w0.reshape(groups, -1), w0[: n_out // groups][None])
        if inp is None or w1 is None:
            join(t, inp, w1, fixed_in)
        else:
            t.labels.tie(inp.reshape(groups, -1), w1[None])
    else:
        join(t, inp, w0, fixed_in)
        if w0 is not None:
            t.labels.tie(w0.reshape(groups, -1), w0[: n_in // groups][None])
        out = None if w1 is None else np.tile(w1, groups)
    if b is not None:
        join(t, vector(t, b, 0), out, fixed_out)
    if out is not None:
        keep = [*keep, along(out, rank, channel)]
    result = Axes(c.out, keep, t.origin([x, w]))
    outer = x if transposed else result
    t.cost([(outer, k) for k in range(rank)] + [(w, k) for k in range(1, len(w.shape))])
    return result


def mixed(t: Tracer, x: Axes, dims: Sequence[int]) -> None:
    """Statistics are taken over these axes: their units are not independent."""
    for layer in x.layers:
        if any(layer.shape[k] > 1 for k in dims):
            t.labels.flag(layer, MIXED)


def channel_params(t: Tracer, c: Call, names: Sequence[str], rank: int, channels: int) -> list[Axes]:
    """Per-channel vectors seen as [1, C, 1, ...]: they belong to axis 1, not to the last."""
    shape = tuple(channels if k == 1 else 1 for k in range(rank))
    found = [c.axes[n] for n in names if c.axes.get(n) is not None]
    return [Axes(shape, [layer.reshape(shape) for layer in p.layers], p.params) for p in found]


@rule("native_batch_norm", "_native_batch_norm_legit_no_training", "_native_batch_norm_legit", "batch_norm",
      "cudnn_batch_norm", "miopen_batch_norm", "_batch_norm_with_update", "_batch_norm_no_update",
      "native_instance_norm")  # fmt: skip
def batch_norm(t: Tracer, c: Call) -> Axes:
    x = c.axes["input"]
    names = ("weight", "bias", "running_mean", "running_var")
    params = channel_params(t, c, names, len(x.shape), x.shape[1])
    if any(len(axes_of(layer)) > 1 for layer in x.layers) and any(p.layers for p in params):
        x = rect(t, x)
    if c.args.get("training") or c.args.get("use_input_stats"):
        mixed(t, x, [k for k in range(len(x.shape)) if k != 1])
    out = elementwise(t, [x, *params], x.shape)
    return Axes(c.out, out.layers, t.origin([x, *params]))


@rule("native_layer_norm", "_fused_rms_norm", "rms_norm", "layer_norm")
def layer_norm(t: Tracer, c: Call) -> Axes:
    x = rect_heads(t, c.axes["input"])
    mixed(t, x, range(len(x.shape) - len(c.args["normalized_shape"]), len(x.shape)))
    params = [p for name, p in c.axes.items() if name in ("weight", "bias") and p is not None]
    return elementwise(t, [x, *params], c.out)


@rule("native_group_norm", "group_norm")
def group_norm(t: Tracer, c: Call) -> Axes:
    x = rect(t, c.axes["input"])
    groups, channels = int(c.args.get("group", c.args.get("num_groups", 1))), x.shape[1]
    mixed(t, x, range(2, len(x.shape)))
    ids = vector(t, x, 1)
    if ids is not None and groups < channels:
        t.labels.flag(ids, MIXED)
        if groups > 1:
            t.labels.tie(ids.reshape(groups, -1), ids[: channels // groups][None])
    return elementwise(t, [x, *channel_params(t, c, ("weight", "bias"), len(x.shape), channels)], c.out)


@rule("_weight_norm", "_weight_norm_interface")
def weight_norm(t: Tracer, c: Call) -> Axes:
    v, g = list(c.axes.values())[:2]
    t.normalised |= v.params or frozenset()
    return elementwise(t, [v, g], c.out)


@rule("scaled_dot_product_attention", "_scaled_dot_product_flash_attention_for_cpu",
      "_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention",
      "_scaled_dot_product_cudnn_attention", "_scaled_dot_product_attention_math")  # fmt: skip
def attention(t: Tracer, c: Call) -> Axes:
    rows = c.axes["query"].layers
    q, k, v = (rect_heads(t, x) for x in list(c.axes.values())[:3])
    rank = len(c.out)
    for x in (q, k, v):
        for layer in x.layers:
            if layer.shape[-2] > 1:
                t.freeze(layer, t.reason("the token axis of attention"))
    inner = join(t, vector(t, q, -1), vector(t, k, -1), t.reason("the partner in attention is fixed"))
    if inner is not None and not t.inner:
        t.freeze(inner, t.reason("a single head's width sets the scale of attention"))
    elif inner is not None:
        t.labels.flag(inner, INNER)
        if c.args.get("scale") is None:
            rows = [layer for layer in rows if layer.size == len(inner) * (q.shape[-3] if rank >= 4 else 1)]
            t.rescaled.append((inner, rows, str(t.reason("the width of a head sets the scale of attention"))))
    width = vector(t, v, -1)
    layers = []
    if rank >= 4:
        hq, hk, hv = (vector(t, x, -3) for x in (q, k, v))
        n_q, n_k = q.shape[-3], k.shape[-3]
        why = t.reason("heads meet keys or values of a fixed number")
        if n_k == 1 and n_q > 1:
            if hq is not None:
                t.labels.flag(hq, HEAD | ALONE)
                layers.append(along(hq, rank, -3))
            if width is not None and not t.inner:
                t.freeze(width, t.reason("all query heads share these keys and values"))
                width = None
        else:
            hk = join(t, hk, hv, why)
            distinct = heads(t, k)
            n_heads = heads(t, q)
            hq = join(t, hq, None if hk is None else np.repeat(hk, n_q // n_k), why)
            if hq is not None:
                t.labels.flag(hq, HEAD)
                share = max(1, n_heads // max(1, distinct))
                t.labels.shared[hq] = np.maximum(t.labels.shared[hq], share)
                layers.append(along(hq, rank, -3))
        mask = c.axes.get("attn_mask") or c.axes.get("attn_bias")
        if mask is not None and len(mask.shape) >= 3 and mask.shape[-3] > 1:
            hq = join(t, hq, vector(t, rect(t, mask), -3), t.reason("heads meet a mask of a fixed number"))
        for x in (q, k, v):
            for layer in x.layers:
                for axis in range(rank - 3):
                    if layer.shape[axis] > 1:
                        t.freeze(layer, t.reason("a batch axis of attention"))
    if width is not None:
        t.labels.flag(width, INNER)
        layers.append(along(width, rank, -1))
    result = Axes(c.out, layers)
    for last in ((k, rank - 1), (result, rank - 1)):
        t.cost([(result, d) for d in range(rank - 1)] + [k.shape[-2], last])
    return result


@rule("embedding")
def embedding(t: Tracer, c: Call) -> Axes:
    t.weight(c.axes["weight"], [1], [])
    w = fix(t, c.axes["weight"], 0, t.reason("rows are looked up by index (vocabulary)"))
    ids = vector(t, w, 1)
    return Axes(c.out, [] if ids is None else [along(ids, len(c.out), -1)], None)


@rule("lstm", "gru", "rnn_tanh", "rnn_relu")
def recurrent(t: Tracer, c: Call) -> list[Axes]:
    gates = {"lstm": 4, "gru": 3}.get(c.name, 1)
    ways = 2 if c.args["bidirectional"] else 1
    layers, biased, ws = int(c.args["num_layers"]), bool(c.args["has_biases"]), c.axes["params"]
    states = c.axes["hx"] if isinstance(c.axes["hx"], list) else [c.axes["hx"]]
    for h in states:
        for layer in h.layers:
            t.freeze(layer, t.reason("the initial state of a recurrent layer"))
    size, per = ws[0].shape[0] // gates, len(ws) // (layers * ways)
    projected = per == (5 if biased else 3)
    why = t.reason("the input of a recurrent layer is fixed")
    inp = vector(t, rect(t, c.axes["input"]), -1)
    first: tuple[np.ndarray, np.ndarray] | None = None
    outs: list[np.ndarray] = []
    for n in range(layers):
        outs = []
        for way in range(ways):
            start = (n * ways + way) * per
            part = ws[start : start + per]
            for w in part:
                t.weight(w, [0], [1])
            w_ih, w_hh = part[0], part[1]
            join(t, inp, vector(t, w_ih, 1), why)
            ids = vector(t, w_ih, 0)
            assert ids is not None
            ids = ids.reshape(gates, size)
            t.labels.tie(ids, ids[:1])
            unit = hidden = ids[0]
            for p in [w_hh, *part[2 : 4 if biased else 2]]:
                gate_ids = vector(t, p, 0)
                assert gate_ids is not None
                t.labels.tie(gate_ids.reshape(gates, size), unit[None])
            if projected:
                join(t, vector(t, part[-1], 1), unit, why)
                projection = vector(t, part[-1], 0)
                assert projection is not None
                hidden = projection
            join(t, vector(t, w_hh, 1), hidden, why)
            outs.append(hidden)
            t.cost([*c.out[:-1], (w_ih, 0), (w_ih, 1)])
            t.cost([*c.out[:-1], (w_hh, 0), (w_hh, 1)])
            if first is None:
                first = (unit, hidden)
            t.labels.tie(first[0], unit)
            t.labels.tie(first[1], hidden)
        inp = np.concatenate(outs)
    result = [Axes(c.out, [along(np.concatenate(outs), len(c.out), -1)])]
    result += [Axes(o, [along(outs[0], len(o), -1)]) for o in c.outs[1:]]
    return result


# --- views and moves


@rule(
    "view", "_unsafe_view", "_reshape_alias", "reshape", "_reshape_copy", "view_copy", "unflatten", "flatten"
)
def view(t: Tracer, c: Call) -> Axes:
    x = c.axes["self"]
    if not x.layers:
        return Axes(c.out, [], x.params)
    a, b, blocks, i, j = x.shape, c.out, [], 0, 0
    while i < len(a) or j < len(b):
        i0, j0, p, q = i, j, 1, 1
        if i < len(a):
            p, i = a[i], i + 1
        if j < len(b):
            q, j = b[j], j + 1
        while p != q:
            if p < q:
                p, i = p * a[i], i + 1
            else:
                q, j = q * b[j], j + 1
        blocks.append((i0, i, j0, j))
    moved = []
    for layer in x.layers:
        full, shape = list(layer.shape), []
        for i0, i1, j0, j1 in blocks:
            if any(layer.shape[k] > 1 for k in range(i0, i1)):
                full[i0:i1] = a[i0:i1]
                shape += list(b[j0:j1])
            else:
                shape += [1] * (j1 - j0)
        new = np.broadcast_to(layer, full).reshape(shape)
        if len(axes_of(new)) > len(axes_of(layer)):
            t.splits.append(new)
        moved.append((axes_of(layer)[0], canon(t, new)))
    layers: list[np.ndarray] = []
    for _, new in sorted(moved, key=lambda item: item[0]):
        if any(set(axes_of(new)) & set(axes_of(other)) for other in layers):
            t.freeze(new, t.reason("two labelled axes are merged into one"))
        else:
            layers.append(new)
    return Axes(b, layers, x.params)


@rule("permute", "transpose", "t", "swapaxes", "movedim", "numpy_T", "adjoint", "mT")
def permute(t: Tracer, c: Call) -> Axes:
    x, rank = c.axes["self"], len(c.out)
    order = list(range(rank))
    if "dims" in c.args:
        order = [int(d) % rank for d in c.args["dims"]]
    elif "dim0" in c.args:
        i, j = int(c.args["dim0"]) % max(rank, 1), int(c.args["dim1"]) % max(rank, 1)
        if rank:
            order[i], order[j] = order[j], order[i]
    else:
        order.reverse()
    return Axes(c.out, [layer.transpose(order) for layer in x.layers], x.params)


@rule("unsqueeze")
def unsqueeze(t: Tracer, c: Call) -> Axes:
    x, d = c.axes["self"], int(c.args["dim"]) % len(c.out)
    return Axes(c.out, [np.expand_dims(layer, d) for layer in x.layers], x.params)


@rule("squeeze")
def squeeze(t: Tracer, c: Call) -> Axes:
    x, rank = c.axes["self"], len(c.axes["self"].shape)
    dims = dims_of(c.args.get("dim"), rank)
    gone = tuple(k for k in dims if x.shape[k] == 1)
    return Axes(c.out, [layer.squeeze(gone) for layer in x.layers], x.params)


@rule("expand", "expand_as", "broadcast_to")
def expand(t: Tracer, c: Call) -> Axes:
    x = c.axes["self"]
    pad = (1,) * (len(c.out) - len(x.shape))
    return Axes(c.out, [layer.reshape(pad + layer.shape) for layer in x.layers], x.params)


@rule("repeat", "tile")
def repeat(t: Tracer, c: Call) -> Axes:
    x, times = c.axes["self"], [int(r) for r in c.args["repeats"]]
    pad = (1,) * (len(c.out) - len(x.shape))
    layers = []
    for layer in x.layers:
        layer = layer.reshape(pad + layer.shape)
        layers.append(np.tile(layer, [r if n > 1 else 1 for r, n in zip(times, layer.shape, strict=True)]))
    return Axes(c.out, layers, x.params)


@rule("repeat_interleave")
def repeat_interleave(t: Tracer, c: Call) -> Axes:
    x, times, d = c.axes["self"], c.args.get("repeats"), c.args.get("dim")
    if d is None or not isinstance(times, int):
        raise NoRule
    d %= len(c.out)
    layers = [np.repeat(layer, times, d) if layer.shape[d] > 1 else layer for layer in x.layers]
    return Axes(c.out, layers, x.params)


@rule("select")
def select(t: Tracer, c: Call) -> Axes:
    x, d, i = c.axes["self"], int(c.args["dim"]), int(c.args["index"])
    d %= len(x.shape)
    picks = t.picked_by(i)
    if picks is not None:
        x = pick(t, x, d, picks)
    mask = not c.args["self"].is_floating_point()
    for layer in x.layers:
        if mask and len(axes_of(layer)) == 1 and layer.shape[d] > 1:
            t.told(layer.reshape(-1), i % x.shape[d])
        elif layer.shape[d] > 1:
            t.rigid(layer, d, t.reason("one entry of this axis is selected by number"))
    layers = [layer.take(i if layer.shape[d] > 1 else 0, d) for layer in x.layers]
    return Axes(c.out, layers, x.params)


@rule("unbind")
def unbind(t: Tracer, c: Call) -> list[Axes]:
    x = c.axes["self"]
    d = int(c.args["dim"]) % len(x.shape)
    for layer in x.layers:
        if layer.shape[d] > 1:
            t.rigid(layer, d, t.reason("this axis is unbound into separate tensors"))
    return [
        Axes(o, [layer.take(i if layer.shape[d] > 1 else 0, d) for layer in x.layers], x.params)
        for i, o in enumerate(c.outs)
    ]


def cut(t: Tracer, x: Axes, d: int, start: int, stop: int, step: int, shape: tuple[int, ...]) -> Axes:
    index = np.arange(start, stop, step)
    layers = [layer.take(index, d) if layer.shape[d] > 1 else layer for layer in x.layers]
    return Axes(shape, layers, x.params)


def slice_bounds(c: Call, size: int) -> tuple[int, int, int]:
    start, stop, step = (c.args.get(k) for k in ("start", "end", "step"))
    return slice(start, stop, step or 1).indices(size)


@rule("slice")
def slice_(t: Tracer, c: Call) -> Axes:
    x = c.axes["self"]
    d = int(c.args["dim"]) % len(x.shape)
    start, stop, step = slice_bounds(c, x.shape[d])
    result = cut(t, x, d, start, stop, step, c.out)
    if x.has(d) and (start, stop, step) != (0, x.shape[d], 1):
        t.part(x, d, [(start, stop)], step)
    return result


@rule("narrow")
def narrow(t: Tracer, c: Call) -> Axes:
    x, d = c.axes["self"], int(c.args["dim"])
    d %= len(x.shape)
    start = int(c.args["start"])
    if x.has(d):
        t.part(x, d, [(start, start + c.out[d])], 1)
    return cut(t, x, d, start, start + c.out[d], 1, c.out)


@rule("split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes", "chunk", "tensor_split",
      "split_copy", "split_with_sizes_copy")  # fmt: skip
def split(t: Tracer, c: Call) -> list[Axes]:
    x = c.axes["self"]
    d, parts, at = int(c.args["dim"]) % len(x.shape), [], 0
    for o in c.outs:
        parts.append((at, at + o[d]))
        at += o[d]
    if x.has(d) and len(parts) > 1:
        t.part(x, d, parts, 1)
    return [cut(t, x, d, a, b, 1, o) for (a, b), o in zip(parts, c.outs, strict=True)]


@rule("cat", "concat", "_cat")
def cat(t: Tracer, c: Call) -> Axes:
    shape = c.out
    d = int(c.args.get("dim", 0)) % len(shape)
    xs = [x for x in c.axes["tensors"] if len(x.shape) == len(shape)]
    without = tuple(1 if k == d else n for k, n in enumerate(shape))
    origin = t.origin(xs)
    if not any(x.has(d) for x in xs):
        flat = [Axes(without, x.layers, x.params) for x in xs]
        return Axes(shape, elementwise(t, flat, without).layers, origin)
    parts: list[np.ndarray] = []
    rest = []
    cut_axes = {k for x in xs for layer in x.layers if layer.shape[d] > 1 for k in axes_of(layer)}
    for x in xs:
        layers = [canon(t, layer) for layer in x.layers]
        mine = [layer for layer in layers if layer.shape[d] > 1]
        if not mine:  # entries that belong to the units of another axis, as whole heads do
            mine = [layer for layer in layers if set(axes_of(layer)) <= cut_axes][:1]
        others = [v for v in layers if v.shape[d] == 1 and not any(v is m for m in mine)]
        rest.append(Axes(without, others, x.params))
        for layer in mine[1:]:
            t.labels.tie(mine[0], layer)
        if not mine:
            why = t.reason("joined with channels that cannot be cut")
            mine = [along(t.labels.new(x.shape[d], why), len(shape), d)]
        parts.append(mine[0])
    labelled = {k for p in parts for k in axes_of(p)} | {d}
    full = [
        np.broadcast_to(p, [x.shape[k] if k in labelled else 1 for k in range(len(shape))])
        for p, x in zip(parts, xs, strict=True)
    ]
    layers = [np.concatenate(full, d)]
    if any(x.layers for x in rest):
        layers += elementwise(t, rest, without).layers
    return Axes(shape, layers, origin)


@rule("stack")
def stack(t: Tracer, c: Call) -> Axes:
    xs = c.axes["tensors"]
    d = int(c.args.get("dim", 0)) % len(c.out)
    joined = elementwise(t, xs, xs[0].shape)
    return Axes(c.out, [np.expand_dims(layer, d) for layer in joined.layers], joined.params)


@rule("glu")
def glu(t: Tracer, c: Call) -> Axes:
    x = c.axes["self"]
    d = int(c.args.get("dim", -1)) % len(c.out)
    layers = []
    for layer in x.layers:
        if layer.shape[d] > 1:
            a, b = np.split(layer, 2, d)
            t.labels.tie(a, b)
            layer = a
        layers.append(layer)
    return Axes(c.out, layers)


@rule("roll")
def roll(t: Tracer, c: Call) -> Axes:
    x = c.axes["self"]
    for d in dims_of(c.args.get("dims"), len(c.out)):
        x = fix(t, x, d, t.reason("roll moves its wrap-around point when channels leave"))
    return x


@rule("constant_pad_nd", "pad")
def pad(t: Tracer, c: Call) -> Axes:
    x, sizes, rank = c.axes["self"], [int(p) for p in c.args["pad"]], len(c.out)
    layers = []
    for layer in x.layers:
        for i in range(len(sizes) // 2):
            k, before, after = rank - 1 - i, sizes[2 * i], sizes[2 * i + 1]
            if layer.shape[k] == 1 or not (before or after):
                continue
            if min(before, after) < 0:
                raise NoRule
            if len(axes_of(layer)) > 1:
                layer = collapse(t, layer, k)
                continue
            why = t.reason("padded with channels that cannot be cut")
            blocks = []
            for n in (before, after):
                shape = tuple(n if a == k else m for a, m in enumerate(layer.shape))
                blocks.append(t.labels.new(prod(shape), why).reshape(shape))
            layer = np.concatenate([blocks[0], layer, blocks[1]], k)
        layers.append(layer)
    return Axes(c.out, layers, x.params)


@rule("pixel_shuffle", "col2im")
def pixel_shuffle(t: Tracer, c: Call) -> Axes:
    x, rank = rect(t, c.axes["self"]), len(c.out)
    block = int(c.args["upscale_factor"]) ** 2 if c.name == "pixel_shuffle" else prod(c.args["kernel_size"])
    axis = -3 if c.name == "pixel_shuffle" else -2
    ids = vector(t, x, axis)
    if ids is None:
        return Axes(c.out, [])
    sub = ids.reshape(-1, block)
    t.labels.tie(sub, sub[:, :1])
    return Axes(c.out, [along(sub[:, 0], rank, -3)])


@rule("pixel_unshuffle", "im2col")
def pixel_unshuffle(t: Tracer, c: Call) -> Axes:
    x, rank = rect(t, c.axes["self"]), len(c.out)
    unshuffle = c.name == "pixel_unshuffle"
    block = int(c.args["downscale_factor"]) ** 2 if unshuffle else prod(c.args["kernel_size"])
    ids = vector(t, x, -3)
    layers = [] if ids is None else [along(np.repeat(ids, block), rank, -3 if unshuffle else -2)]
    return Axes(c.out, layers)


@rule("channel_shuffle", "native_channel_shuffle")
def channel_shuffle(t: Tracer, c: Call) -> Axes:
    ids = vector(t, rect(t, c.axes["self"]), 1)
    if ids is None:
        return Axes(c.out, [])
    grid = ids.reshape(int(c.args["groups"]), -1)
    t.splits.append(grid)
    return Axes(c.out, [along(grid.T.reshape(-1), len(c.out), 1)])


@rule("unfold")
def unfold(t: Tracer, c: Call) -> Axes:
    x, d = c.axes["self"], int(c.args["dimension"])
    x = fix(t, x, d % len(x.shape), t.reason("windows are taken along this axis"))
    return Axes(c.out, [layer[..., None] for layer in x.layers], x.params)


# --- indexing


@rule("index", "_unsafe_index", "index_select", "gather")
def index(t: Tracer, c: Call) -> Axes:
    x = c.axes["self"]
    why = t.reason("entries of this axis are picked by index")
    if c.name == "index_select":
        d, got = int(c.args["dim"]) % len(x.shape), c.axes["index"]
        free = fix(t, x, d, why) if got.picks is None else pick(t, x, d, got.picks)
        return Axes(c.out, free.layers, x.params, x.picks)
    if c.name == "gather":
        d = int(c.args["dim"]) % len(x.shape)
        got = c.axes["index"]
        x = fix(t, x, d, why) if got.picks is None else pick(t, x, d, got.picks)
        sizes = tuple(1 if k == d else n for k, n in enumerate(c.out))
        free = Axes(tuple(1 if k == d else n for k, n in enumerate(x.shape)), x.layers, x.params)
        joined = elementwise(t, [free, Axes(sizes, got.layers, got.params)], sizes)
        return Axes(c.out, joined.layers, picks=x.picks)
    indices = c.axes["indices"]
    source, at, rank = [], 0, 0
    for ind, raw in zip(indices, c.args["indices"], strict=True):
        if ind is None:
            at += 1
            continue
        wide = len(ind.shape) if raw.dtype in (torch.bool, torch.uint8) else 1
        source += list(range(at, at + wide))
        if ind.picks is not None:
            x = Axes(x.shape, pick(t, x, at, ind.picks).layers, x.params, x.picks)
        rank = max(rank, 1 if raw.dtype in (torch.bool, torch.uint8) else len(ind.shape))
        at += wide
        for layer in ind.layers:
            t.freeze(layer, why)
    for d in source:
        x = Axes(x.shape, fix(t, x, d, why).layers, x.params, x.picks)
    rest = [k for k in range(len(x.shape)) if k not in source]
    together = source == list(range(source[0], source[0] + len(source))) if source else True
    front = [k for k in rest if k < source[0]] if together and source else []
    layers = []
    for layer in x.layers:
        kept = [layer.shape[k] for k in rest]
        layers.append(layer.reshape([*kept[: len(front)], *[1] * rank, *kept[len(front) :]]))
    return Axes(c.out, layers, x.params, x.picks)


@rule("index_put", "_index_put_impl", "_unsafe_index_put")
def index_put(t: Tracer, c: Call) -> Axes:
    x, values = c.axes["self"], c.axes["values"]
    why = t.reason("entries of this axis are written by index")
    indices = c.axes["indices"]
    if any(i is None for i in indices) or any(
        r.dtype in (torch.bool, torch.uint8) for r in c.args["indices"]
    ):
        raise NoRule
    n = len(indices)
    for d in range(n):
        x = fix(t, x, d, why)
    tail = x.shape[n:]
    rest = Axes((1,) * n + tail, x.layers, x.params)
    rank = len(values.shape) - len(tail)
    if rank < 0:
        return elementwise(t, [rest, values], x.shape)
    for d in range(rank):
        values = fix(t, values, d, why)
    flat = Axes((1,) * n + tail, [v.reshape((1,) * n + v.shape[rank:]) for v in values.layers], values.params)
    joined = elementwise(t, [rest, flat], (1,) * n + tail)
    return Axes(c.out, joined.layers)


@rule("index_add", "index_copy", "scatter", "scatter_add", "scatter_reduce", "slice_scatter", "select_scatter",
      "index_fill")  # fmt: skip
def scatter(t: Tracer, c: Call) -> Axes:
    x, d = c.axes["self"], int(c.args.get("dim", 0)) % len(c.out)
    xs = [v for k, v in c.axes.items() if k != "index"] if c.name.startswith("index") else c.tensors()
    shape = tuple(1 if k == d else n for k, n in enumerate(c.out))
    why = t.reason("entries of this axis are written by index")
    got = c.axes.get("index")
    if c.name.startswith("scatter") and got is not None and got.picks is not None:
        ids = vector(t, rect(t, x), d)
        pick(t, x, d, got.picks)
        free = [
            Axes(shape, [layer for layer in v.layers if layer.shape[d] == 1])
            for v in xs
            if len(v.shape) == len(x.shape)
        ]
        layers = elementwise(t, free, shape).layers
        return Axes(c.out, layers if ids is None else [*layers, along(ids, len(c.out), d)])
    free = []
    for v in xs:
        if len(v.shape) == len(x.shape):
            v = fix(t, v, d, why)
            free.append(Axes(tuple(1 if k == d else n for k, n in enumerate(v.shape)), v.layers, v.params))
    return Axes(c.out, elementwise(t, free, shape).layers)


# --- what carries no channels


@rule("arange", "zeros", "ones", "full", "empty", "scalar_tensor", "new_zeros", "new_ones", "new_empty",
      "new_full", "rand", "randn", "eye", "linspace", "randint", "empty_strided", "new_empty_strided",
      "randperm", "_local_scalar_dense", "item", "equal", "is_nonzero",
      "searchsorted", "bucketize", "unique", "_unique2", "tril_indices", "triu_indices",
      "hann_window", "is_same_size", "_assert_async", "_assert_tensor_metadata", "_assert_scalar")  # fmt: skip
def nothing(t: Tracer, c: Call) -> list[Axes]:
    return [Axes(o, [], frozenset()) for o in c.outs]


# --- numbers of units

MOVES = {"view", "_unsafe_view", "_reshape_alias", "reshape", "unflatten", "flatten", "permute", "transpose", "t",
         "unsqueeze", "squeeze", "expand", "expand_as", "select", "unbind", "slice", "narrow", "split", "chunk",
         "split_with_sizes", "clone", "detach", "alias", "_to_copy", "to", "contiguous", "repeat", "repeat_interleave",
         "lift_fresh"}  # fmt: skip
NUMBERS = {"one_hot", "histc", "bincount", "index", "_unsafe_index", "index_select", "gather", "scatter", "scatter_add",
           "scatter_reduce"}  # fmt: skip


def numbers(t: Tracer, c: Call, made: Sequence[Axes]) -> None:
    """Where numbers of units go: moved as they are, used by a rule, or compared; anything else freezes the units."""
    for x in c.tensors():
        if x.picks is None or c.name in NUMBERS:
            continue
        if c.name in MOVES:
            for out in made:
                out.picks = x.picks
        elif c.name == "sort":
            made[0].picks = x.picks
        elif c.name in ("cat", "stack") and all(
            other.picks is not None and len(other.picks) == len(x.picks) for other in c.tensors()
        ):
            t.labels.tie(x.picks, c.axes["tensors"][0].picks)
            made[0].picks = x.picks
            if c.name == "cat" and len(c.out) > 1 and c.args.get("dim", 0) in (-1, len(c.out) - 1):
                t.floors.append(
                    (x.picks, min(c.out[-1], len(x.picks)))
                )  # one after the other, all for a token
        elif c.name in ("eq", "ne", "lt", "le", "gt", "ge"):
            other = c.args.get("other")
            places = t.beyond(x.picks)
            if (
                c.name == "eq"
                and isinstance(other, int)
                and 0 <= other < len(x.picks)
                and other not in places
            ):
                t.told(x.picks, other)
            elif not (
                isinstance(other, int)
                and (other == len(x.picks) or other in places or other < 1 and c.name in ("lt", "ge"))
            ):
                t.freeze(x.picks, t.reason("units are told apart by number"))
        elif c.name not in ("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like"):
            t.freeze(x.picks, t.reason(f"calculates with the numbers of units: {c.name}"))
