"""PyTorch's own attention, `F.multi_head_attention_forward`: one call that leads from the stream to the stream.

Its heads fill the width of the queries, and it refuses any other number of them. So a head leaves with its block of the
stream's channels, in all layers on that stream; with `inner` an entry of every head, with one channel of every block.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import cache
from math import prod
from typing import Any

import numpy as np
from torch import Tensor
from torch.nn.functional import multi_head_attention_forward

from secateur.graph.labels import HEAD, INNER, MIXED, STEM, Axes, along
from secateur.graph.notes import Part
from secateur.graph.rules.moves import join, rect, vector
from secateur.graph.sizes import Size
from secateur.graph.tracer import Tracer

INPUTS = ("query", "key", "value")


@cache
def _signature() -> inspect.Signature:
    return inspect.signature(multi_head_attention_forward)


def tensors_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors that a call was given, by name."""
    return {k: v for k, v in _arguments(args, kwargs).items() if isinstance(v, Tensor)}


def _arguments(args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    bound = _signature().bind(*args, **kwargs)
    bound.apply_defaults()
    return dict(bound.arguments)


def multihead(t: Tracer, args: Sequence[Any], kwargs: Mapping[str, Any], result: tuple[Tensor, Any]) -> None:
    """Label what one call of `F.multi_head_attention_forward` returned."""
    given = _arguments(args, kwargs)
    axes = {k: t.axes(v) for k, v in tensors_of(args, kwargs).items()}
    width, count = int(given["query"].shape[-1]), int(given["num_heads"])
    why = t.reason("its heads fill the width of its queries, which is fixed")
    columns = [_columns(t, axes, name) for name in INPUTS]
    rows = _rows(t, axes, width, why)
    queries = rows[0].copy()
    stream = columns[0]
    for each in rows:
        join(t, each, stream, why)
    units = rows[0].reshape(count, -1)  # [heads, width of a head]
    t.labels.tie(units, units[:1] if t.inner else units[:, :1])
    t.labels.flag(units, INNER if t.inner else HEAD if stream is None else STEM | HEAD)
    if t.inner:
        reason = str(t.reason("the width of a head sets the scale of attention"))
        t.notes.rescaled.append((units[0], [queries], reason))
    _meets(t, axes, units)

    packed = axes.get("in_proj_weight")
    for name, ids in [("in", columns[0])] if packed is not None else zip("qkv", columns, strict=True):
        t.layer({"weight": axes[f"{name}_proj_weight"], "bias": axes.get(f"{name}_proj_bias")}, reads=ids)
    t.layer({"weight": axes["out_proj_weight"], "bias": axes.get("out_proj_bias")}, reads=units.ravel())
    t.weight(axes["out_proj_weight"], [0], [1])
    join(t, units.ravel(), vector(t, axes["out_proj_weight"], 1), why)
    out, bias = vector(t, axes["out_proj_weight"], 0), axes.get("out_proj_bias")
    if bias is not None:
        join(t, vector(t, bias, 0), out, t.reason("the output of a linear layer is fixed"))
    output, weights = result
    shape = tuple(output.shape)
    t.env[output] = Axes(shape, [] if out is None else [along(out, len(shape), -1)])
    if weights is not None and given["average_attn_weights"]:
        t.labels.flag(units, MIXED)
    elif weights is not None:
        heads = [] if t.inner else [along(units[:, 0], weights.dim(), -3)]
        t.env[weights] = Axes(tuple(weights.shape), heads)

    wide = Axes((width,), [units.ravel()])
    if isinstance(given["embed_dim_to_check"], Size):
        t.event(given["embed_dim_to_check"].expr, Part(wide, 0, 0, width))
    if isinstance(given["num_heads"], Size):
        heads = [] if t.inner else [units[:, 0]]
        t.event(given["num_heads"].expr, Part(Axes((count,), heads), 0, 0, count))
    # Multiply-adds: three projections in, scores, weighted values, one projection out.
    for name, ids in zip(INPUTS, columns, strict=True):
        tokens, size = prod(given[name].shape[:-1]), given[name].shape[-1]
        t.cost([int(tokens), (wide, 0), (Axes((size,), [] if ids is None else [ids]), 0)])
    tokens, seen = prod(shape[:-1]), int(given["key"].shape[0])
    seen += int(given["bias_k"] is not None) + int(given["add_zero_attn"])
    t.cost([2 * int(tokens) * seen, (wide, 0)])
    t.cost([int(tokens), (wide, 0), (t.env.get(output), len(shape) - 1)])


def _columns(t: Tracer, axes: Mapping[str, Axes], name: str) -> np.ndarray | None:
    """The labels of an input's channels, tied to the columns of the matrix that reads it."""
    x = axes[name]
    for layer in x.layers:
        if layer.shape[-1] == 1:
            t.freeze(layer, t.reason("the token axis of attention"))
    packed = axes.get("in_proj_weight")
    weight = axes[f"{name[0]}_proj_weight"] if packed is None else packed
    t.weight(weight, [0], [1])
    why = t.reason("the input of attention is fixed")
    return join(t, vector(t, rect(t, x), -1), vector(t, weight, 1), why)


def _rows(t: Tracer, axes: Mapping[str, Axes], width: int, why: object) -> list[np.ndarray]:
    """The labels of what makes queries, keys and values, in this order: [width] each, of weights and of biases."""
    packed = axes.get("in_proj_weight")
    names = [f"{name[0]}_proj_weight" for name in INPUTS] if packed is None else ["in_proj_weight"]
    found = [vector(t, axes[name], 0) for name in names]
    if (bias := axes.get("in_proj_bias")) is not None:
        found.append(vector(t, bias, 0))
    found += [vector(t, axes[name], -1) for name in ("bias_k", "bias_v") if name in axes]
    known = [ids for ids in found if ids is not None]
    if len(known) < len(found):  # constants among them
        for ids in known:
            t.freeze(ids, why)
    rows = [part for ids in known for part in ids.reshape(-1, width)]
    return rows or [t.labels.new(width, str(why))]


def _meets(t: Tracer, axes: Mapping[str, Axes], units: np.ndarray) -> None:
    """Masks of each head, and keys and values that were made elsewhere, are of a fixed number of heads."""
    mask = axes.get("attn_mask")
    for name in ("attn_mask", "key_padding_mask", "static_k", "static_v"):
        for layer in axes[name].layers if name in axes else ():
            t.freeze(layer, t.reason("a mask of attention, or keys that were given to it"))
    if mask is not None and len(mask.shape) == 3 or "static_k" in axes or "static_v" in axes:
        t.freeze(units, t.reason("heads meet a mask, keys or values of a fixed number"))
