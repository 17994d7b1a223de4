"""Rules of elementwise operations, and of those that keep or reduce axes."""

from __future__ import annotations

import numpy as np

from secateur.graph.labels import MIXED, RESIDUAL, Axes, NoRule, axes_of
from secateur.graph.rules.moves import (
    RULES,
    Call,
    chosen,
    collapse,
    dims_of,
    drop_axes,
    elementwise,
    fix,
    innermost,
    rule,
)
from secateur.graph.tracer import Tracer

PASS = {
    "hardswish", "hardsigmoid", "hardtanh", "relu6", "mish", "celu", "selu", "log_sigmoid_forward",
    "clone", "detach", "alias", "lift_fresh", "lift", "lift_fresh_copy", "_to_copy", "to", "contiguous",
    "dropout", "native_dropout", "feature_dropout", "alpha_dropout", "max_pool2d_with_indices",
    "max_pool1d_with_indices", "max_pool3d_with_indices", "max_pool1d", "max_pool2d", "max_pool3d",
    "avg_pool1d", "avg_pool2d", "avg_pool3d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d",
    "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_max_pool2d", "adaptive_max_pool1d",
    "mkldnn_adaptive_avg_pool2d", "reflection_pad1d", "reflection_pad2d", "replication_pad1d",
    "replication_pad2d", "zeros_like", "ones_like", "empty_like", "full_like", "rand_like",
    "randn_like", "triu", "tril", "fill", "zero", "bernoulli", "uniform", "normal", "random",
    "exponential", "grid_sampler_2d", "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d",
    "upsample_linear1d", "upsample_bilinear2d", "upsample_bicubic2d", "upsample_trilinear3d",
    "_upsample_nearest_exact1d", "_upsample_nearest_exact2d", "_upsample_bilinear2d_aa",
    "_upsample_bicubic2d_aa",
}  # fmt: skip


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


@rule("roi_align", "roi_pool")
def regions(t: Tracer, c: Call) -> list[Axes]:
    """Regions of a picture, resampled: [pictures, channels, height, width] becomes [regions, channels, ...]."""
    x = c.axes["input"]
    for k in (0, 2, 3):
        x = fix(t, x, k, t.reason("a spatial axis"))
    return [Axes(o, x.layers, x.params) for o in c.outs]


@rule("as_strided")
def as_strided(t: Tracer, c: Call) -> Axes:
    x = c.axes["self"]
    if x.shape != c.out or c.args.get("storage_offset"):
        raise NoRule
    return x


SCALES = {"mul": "scale", "add": "shift"}
"""What a vector of parameters does to channels."""


def differ(a: np.ndarray, b: np.ndarray) -> bool:
    """Are these other sets of labels?"""
    if a.min() != b.min() or a.max() != b.max():
        return True
    return not np.array_equal(a, b) and not np.array_equal(np.unique(a), np.unique(b))


def pointwise(t: Tracer, c: Call) -> Axes:
    xs = c.tensors()
    values = [x for x in xs if x.layers and x.params is None]
    if c.name in SCALES and len(xs) == 2 and (xs[0].params is None) != (xs[1].params is None):
        vector = xs[0] if xs[1].params is None else xs[1]
        if vector.layers and sum(n > 1 for n in vector.shape) == 1:
            t.layer({SCALES[c.name]: vector})
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
