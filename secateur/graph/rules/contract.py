"""Rules of operations that contract axes: matrix products, convolutions, attention, recurrent layers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from secateur.graph.labels import ALONE, EXPERT, HEAD, INNER, MIXED, Axes, NoRule, along, axes_of
from secateur.graph.rules.moves import Call, elementwise, fix, join, rect, rect_heads, rule, vector
from secateur.graph.tracer import Tracer

# --- contractions


@rule("linear")
def linear(t: Tracer, c: Call) -> Axes:
    x, w, b = rect(t, c.axes["input"]), rect(t, c.axes["weight"]), c.axes.get("bias")
    if len(w.shape) != 2:
        raise NoRule
    t.weight(c.axes["weight"], [0], [1])
    read = vector(t, x, -1)
    t.layer({"weight": c.axes["weight"], "bias": b}, reads=read)
    join(t, read, vector(t, w, 1), t.reason("the input of a linear layer is fixed"))
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
    left, right = x, y
    x, y, rank = square(t, x), square(t, y), len(out)
    if left.params is None and right.params:
        t.layer({"weight": right}, _dims(t, right, 1), vector(t, x, -1))
    elif right.params is None and left.params:
        t.layer({"weight": left}, _dims(t, left, 0), vector(t, y, -2))
    shared = join(t, vector(t, x, -1), vector(t, y, -2), t.reason("the partner of a matrix product is fixed"))
    if shared is not None and x.params is None and y.params is None:
        t.labels.flag(shared, INNER if t.inner else MIXED | INNER)

    # What is left are batch axes: heads where two activations meet, experts where one is a weight.
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


def _dims(t: Tracer, x: Axes, out: int) -> tuple[int, int]:
    """(out, in) of a matrix, where `out` is that axis of the value, which may be a transposed view."""
    own = t.own.get(next(iter(x.params or ()), ""))
    turned = own is not None and own is not x and own.shape == x.shape[::-1] and not _alike(t, own, x)
    return (1 - out, out) if turned else (out, 1 - out)


def _alike(t: Tracer, a: Axes, b: Axes) -> bool:
    """Do two values have the same labels along their first axis?"""
    one, two = vector(t, a, 0), vector(t, b, 0)
    return one is not None and two is not None and np.array_equal(t.labels.find(one), t.labels.find(two))


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
        t.notes.grains.append((layer.reshape(-1), max(1, 16 // bytes_)))
    flat = Axes(w.shape[1:], [layer[0] for layer in w.layers], w.params)
    return matmul_axes(t, x, flat, c.out)


@rule("addmm", "baddbmm", "addmv", "addbmm")
def addmm(t: Tracer, c: Call) -> Axes:
    first, x, y = list(c.axes.values())[:3]
    if c.name == "addbmm":
        raise NoRule
    product = matmul_axes(t, x, y, c.out)
    if product.params is None and len(first.shape) == 1:
        t.layer({"shift": first})
    return elementwise(t, [first, product], c.out)


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
    # A letter is one axis of all its owners: kept ones are batch axes, summed ones are contracted.
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


def channels_of(
    t: Tracer,
    ids: Sequence[np.ndarray | None],
    groups: int,
    n_in: int,
    n_out: int,
    transposed: bool,
) -> np.ndarray | None:
    """Tie the channels of a convolution's input to its weight; the labels of its output channels.

    `ids` are those of the input and of the weight's axes 0 and 1: [out, in / groups], [in, out / groups] transposed.
    """
    inp, w0, w1 = ids
    out: np.ndarray | None
    fixed_in, fixed_out = (
        t.reason("the input of a convolution is fixed"),
        t.reason("a fixed convolution weight"),
    )
    if groups == 1:
        join(t, inp, w0 if transposed else w1, fixed_in)
        out = w1 if transposed else w0
    elif n_in == groups and not transposed:  # depthwise: an input channel leaves with its outputs
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
    elif not transposed and t.stack[-1] in t.whole_groups:  # a group leaves with its first channel
        out = w0
        join(t, w1, None, fixed_out)
        if inp is None or w0 is None:
            join(t, inp, w0, fixed_in)
        else:
            t.labels.tie(inp.reshape(groups, -1), inp[:: n_in // groups][:, None])
            t.labels.tie(w0.reshape(groups, -1), inp[:: n_in // groups][:, None])
    elif not transposed:  # all groups lose the same channel of theirs
        out = w0
        if w0 is not None:
            t.notes.grouped[t.stack[-1]] = w0 if inp is None else np.concatenate([w0, inp])
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
    return out


@rule("convolution", "_convolution", "cudnn_convolution", "mkldnn_convolution")
def convolution(t: Tracer, c: Call) -> Axes:
    x, w, b = rect(t, c.axes["input" if "input" in c.axes else "self"]), c.axes["weight"], c.axes.get("bias")
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
    dims = (1, 0) if transposed else (0, 1)
    t.layer({"weight": c.axes["weight"], "bias": b}, dims, inp, groups, transposed)
    keep = [layer for layer in x.layers if layer.shape[channel] == 1]
    n_in, n_out = x.shape[channel], c.out[channel]
    out = channels_of(t, (inp, w0, w1), groups, n_in, n_out, transposed)
    if b is not None:
        join(t, vector(t, b, 0), out, t.reason("a fixed convolution weight"))
    if out is not None:
        keep = [*keep, along(out, rank, channel)]
    result = Axes(c.out, keep, t.origin([x, w]))
    outer = x if transposed else result
    t.cost([(outer, k) for k in range(rank)] + [(w, k) for k in range(1, len(w.shape))])
    return result


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
    # q and k meet along the width of a head; its root is the scale unless the code gives one.
    inner = join(t, vector(t, q, -1), vector(t, k, -1), t.reason("the partner in attention is fixed"))
    if inner is not None and not t.inner:
        t.freeze(inner, t.reason("a single head's width sets the scale of attention"))
    elif inner is not None:
        t.labels.flag(inner, INNER)
        if c.args.get("scale") is None:
            rows = [layer for layer in rows if layer.size == len(inner) * (q.shape[-3] if rank >= 4 else 1)]
            t.notes.rescaled.append(
                (inner, rows, str(t.reason("the width of a head sets the scale of attention")))
            )
    width = vector(t, v, -1)
    layers = []
    if rank >= 4:
        hq, hk, hv = (vector(t, x, -3) for x in (q, k, v))
        n_q, n_k = q.shape[-3], k.shape[-3]
        why = t.reason("heads meet keys or values of a fixed number")
        if n_k == 1 and n_q > 1:  # multi-query: every query head can leave alone, its keys and values stay
            if hq is not None:
                t.labels.flag(hq, HEAD | ALONE)
                layers.append(along(hq, rank, -3))
            if width is not None and not t.inner:
                t.freeze(width, t.reason("all query heads share these keys and values"))
                width = None
        else:
            # [n_k] -> [n_q]: query heads that read one key-value head come one after the other.
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


@rule("cdist", "_cdist_forward", "_euclidean_dist")
def distances(t: Tracer, c: Call) -> Axes:
    """Rows of one matrix against rows of another: a unit that is zero in both adds nothing."""
    x, y = (rect(t, v) for v in list(c.axes.values())[:2])
    for v, other in ((x, y), (y, x)):
        if v.params:
            t.weight(v, [-2], [-1])
    join(t, vector(t, x, -1), vector(t, y, -1), t.reason("the partner of a distance is fixed"))
    layers = [layer for layer in x.layers if layer.shape[-1] == 1]
    rows = vector(t, y, -2)
    if rows is not None:
        layers.append(along(rows, len(c.out), -1))
    if len(x.shape) > 2 and any(v.has(k) for v in (x, y) for k in range(-len(v.shape), -2)):
        raise NoRule
    return Axes(c.out, layers, t.origin([x, y]))


@rule("lstm", "gru", "rnn_tanh", "rnn_relu")
def recurrent(t: Tracer, c: Call) -> list[Axes]:
    gates = {"lstm": 4, "gru": 3}.get(c.name, 1)
    ways = 2 if c.args["bidirectional"] else 1
    layers, biased, ws = int(c.args["num_layers"]), bool(c.args["has_biases"]), c.axes["params"]
    states = c.axes["hx"] if isinstance(c.axes["hx"], list) else [c.axes["hx"]]
    for h in states:
        for layer in h.layers:
            t.freeze(layer, t.reason("the initial state of a recurrent layer"))
    # Parameters come layer by layer, direction by direction: w_ih, w_hh, (b_ih, b_hh,) (w_hr).
    size, per = ws[0].shape[0] // gates, len(ws) // (layers * ways)
    projected = per == (5 if biased else 3)
    why = t.reason("the input of a recurrent layer is fixed")
    inp = vector(t, rect(t, next(iter(c.axes.values()))), -1)
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
            ids = ids.reshape(gates, size)  # one unit is the same row of every gate
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
