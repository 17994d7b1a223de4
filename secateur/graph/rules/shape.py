"""Rules of operations that move, split and join axes."""

from __future__ import annotations

from math import prod

import numpy as np

from secateur.graph.labels import Axes, NoRule, along, axes_of
from secateur.graph.rules.moves import Call, canon, collapse, dims_of, elementwise, fix, rect, rule, vector
from secateur.graph.rules.pick import pick
from secateur.graph.tracer import Tracer

# --- views and moves


@rule(
    "view", "_unsafe_view", "_reshape_alias", "reshape", "_reshape_copy", "view_copy", "unflatten", "flatten"
)
def view(t: Tracer, c: Call) -> Axes:
    x = c.axes["self"]
    if not x.layers:
        return Axes(c.out, [], x.params)
    # The smallest runs of old and new axes that hold equally many entries: labels move within them.
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
        if len(axes_of(new)) > len(axes_of(layer)):  # an axis was split: [n * m] -> [n, m]
            t.notes.splits.append(new)
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
            t.by_number(layer.reshape(-1), i % x.shape[d])
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
    # Labels along d are laid end to end; those along other axes must agree in all parts.
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
    t.notes.splits.append(grid)
    return Axes(c.out, [along(grid.T.reshape(-1), len(c.out), 1)])


@rule("unfold")
def unfold(t: Tracer, c: Call) -> Axes:
    x, d = c.axes["self"], int(c.args["dimension"])
    x = fix(t, x, d % len(x.shape), t.reason("windows are taken along this axis"))
    return Axes(c.out, [layer[..., None] for layer in x.layers], x.params)


@rule("_pack_padded_sequence", "_pad_packed_sequence")
def packed(t: Tracer, c: Call) -> list[Axes]:
    """Sentences of unequal length: [batch, words, ...] becomes [all words, ...], and back."""
    x = next(iter(c.axes.values()))
    for d in range(2 if c.name.startswith("_pack") else 1):
        x = fix(t, x, d, t.reason("sentences are packed along this axis"))
    if c.name.startswith("_pack"):
        layers = [layer.reshape(layer.shape[1:]) for layer in x.layers]
    else:
        layers = [layer[None] for layer in x.layers]
    return [Axes(c.out, layers, x.params), *(Axes(o, [], frozenset()) for o in c.outs[1:])]
