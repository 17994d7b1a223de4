"""Rules of normalisations."""

from __future__ import annotations

from collections.abc import Sequence

from secateur.graph.labels import MIXED, Axes, axes_of
from secateur.graph.rules.moves import Call, elementwise, rect, rect_heads, rule, vector
from secateur.graph.tracer import Tracer


def mixed(t: Tracer, x: Axes, dims: Sequence[int]) -> None:
    """Statistics are taken over these axes: their units are not independent."""
    for layer in x.layers:
        if any(layer.shape[k] > 1 for k in dims):
            t.labels.flag(layer, MIXED)


def noted(t: Tracer, c: Call) -> None:
    """What a norm scales and shifts by."""
    names = {"weight": "scale", "bias": "shift", "running_mean": "mean", "running_var": "var"}
    t.layer({part: c.axes.get(name) for name, part in names.items()})


def channel_params(t: Tracer, c: Call, names: Sequence[str], rank: int, channels: int) -> list[Axes]:
    """Per-channel vectors seen as [1, C, 1, ...]: they belong to axis 1, not to the last."""
    shape = tuple(channels if k == 1 else 1 for k in range(rank))
    found = [c.axes[n] for n in names if c.axes.get(n) is not None]
    return [Axes(shape, [layer.reshape(shape) for layer in p.layers], p.params) for p in found]


@rule("native_batch_norm", "_native_batch_norm_legit_no_training", "_native_batch_norm_legit", "batch_norm",
      "cudnn_batch_norm", "miopen_batch_norm", "_batch_norm_with_update", "_batch_norm_no_update",
      "native_instance_norm")  # fmt: skip
def batch_norm(t: Tracer, c: Call) -> Axes:
    noted(t, c)
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
    noted(t, c)
    x = rect_heads(t, c.axes["input"])
    mixed(t, x, range(len(x.shape) - len(c.args["normalized_shape"]), len(x.shape)))
    params = [p for name, p in c.axes.items() if name in ("weight", "bias") and p is not None]
    return elementwise(t, [x, *params], c.out)


@rule("native_group_norm", "group_norm")
def group_norm(t: Tracer, c: Call) -> Axes:
    noted(t, c)
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
    t.notes.normalised |= v.params or frozenset()
    return elementwise(t, [v, g], c.out)
