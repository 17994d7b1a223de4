"""Rules of operations that choose by value or index, and of the numbers they choose by."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from secateur.graph.labels import EXPERT, SOFT, Axes, NoRule, along, axes_of
from secateur.graph.rules.moves import (
    Call,
    canon,
    chosen,
    collapse,
    dims_of,
    drop_axes,
    elementwise,
    fix,
    rect,
    rule,
    vector,
)
from secateur.graph.tracer import Tracer


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
    t.notes.extras |= set(more.tolist())
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
    # source: the axes that are indexed; rank: how many axes take their place.
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
    # Indexed axes that are neighbours are replaced in place, others move to the front, as in numpy.
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
                t.notes.floors.append(
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
                t.by_number(x.picks, other)
            elif not (
                isinstance(other, int)
                and (other == len(x.picks) or other in places or other < 1 and c.name in ("lt", "ge"))
            ):
                t.freeze(x.picks, t.reason("units are told apart by number"))
        elif c.name not in ("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like"):
            t.freeze(x.picks, t.reason(f"calculates with the numbers of units: {c.name}"))
