"""What tracing left open, settled before classes of labels are read: experts, queries, splits, shared sizes."""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn

from secateur.graph.labels import EXPERT, HEAD, RESIDUAL, STEM, Axes
from secateur.graph.sizes import Attribute, Extent
from secateur.graph.tracer import Tracer


def settle_experts(t: Tracer) -> dict[str, np.ndarray]:
    """Lists of expert modules, with the labels that a router knows them by; units told apart otherwise are frozen."""
    labels, lists = t.labels, {}
    for container, ids in t.notes.experts.items():
        children = dict(t.model.get_submodule(container).named_children())
        if unlike := _unlike(container, children):
            labels.freeze(ids, unlike)
            labels.flag(ids, EXPERT)
            continue
        ran = [name for name in children if f"{container}.{name}" in t.notes.calls]
        for name in children.keys() - set(ran):  # no token came here: it is as its neighbours are
            for (tensor, dim), own in list(t.ids.items()):
                start = f"{container}.{name}."
                if tensor.startswith(start):
                    twin = (f"{container}.{ran[0]}.{tensor[len(start) :]}", dim)
                    labels.tie(own, t.ids[twin])
                    t.notes.uses.setdefault(tensor, len(t.notes.uses))
                    if twin in t.notes.roles:
                        t.notes.roles[tensor, dim] = t.notes.roles[twin]
        labels.flag(ids, EXPERT)
        lists[container] = ids
    # Units that code treats by number are sound only where every one of them is, as a loop over experts does.
    by_number: dict[bytes, set[int]] = defaultdict(set)
    for ids, value, _ in t.notes.numbered:
        by_number[labels.find(ids).tobytes()] |= set(range(len(ids))) if value is None else {value}
    known = {labels.find(ids).tobytes() for ids in lists.values()}
    for ids, _, why in t.notes.numbered:
        key = labels.find(ids).tobytes()
        if key not in known or by_number[key] != set(range(len(ids))):
            labels.freeze(ids, why)
    return lists


def _unlike(container: str, experts: Mapping[str, nn.Module]) -> str | None:
    """What tells the first two experts apart whose parameters differ, and why that matters; None where all are alike."""
    (first, shapes), *others = [
        (n, {k: [*p.shape] for k, p in e.named_parameters()}) for n, e in experts.items()
    ]
    if not shapes:
        return f"its experts hold no parameters ({container}.{first})"
    for name, own in others:
        for key in [*shapes, *own]:
            if own.get(key) != shapes.get(key):
                a, b = (str(each.get(key) or "none") for each in (shapes, own))
                return (
                    f"its experts aren't alike: {key} of {container}.{first} is {a}, of {container}.{name} {b}, "
                    "and experts that differ in size can't be counted as units of one kind"
                )
    return None


def query_rows(t: Tracer) -> list[tuple[np.ndarray, list[tuple[str, int, np.ndarray]]]]:
    """Attention that divides by the root of its width: the rows that make its queries, to be scaled when it shrinks."""
    if not t.notes.rescaled:
        return []
    owner = np.full(t.labels.count, -1)
    keys = list(t.ids)
    for n, key in enumerate(keys):
        owner[t.ids[key]] = n
    found = []
    for inner, layers, why in t.notes.rescaled:
        ids = np.concatenate([np.ravel(v) for v in layers] or [np.zeros(0, int)])
        makers = np.unique(owner[ids])
        if (
            len(makers) != 1
            or makers[0] < 0
            or t.notes.roles.get(keys[makers[0]]) != "out"
            or len(np.unique(ids)) < len(ids)
        ):
            t.freeze(inner, why)
            continue
        name, dim = keys[makers[0]]
        place = ids - t.ids[name, dim][0]
        roots, size, module = t.labels.find(ids), len(t.ids[name, dim]), name.rpartition(".")[0]
        rows = [
            (other, d, place)
            for other, d in keys
            if other.rpartition(".")[0] == module and len(t.ids[other, d]) == size and t.notes.roles.get((other, d)) != "in"
            and np.array_equal(t.labels.find(t.ids[other, d][place]), roots)
        ]  # fmt: skip
        found.append((inner, rows))
    return found


def settle_splits(t: Tracer) -> None:
    """Blocks of a split axis lose the same offsets; axes that cannot shrink do not."""
    labels, busy = t.labels, True
    while busy:
        busy = False
        for grid in t.notes.splits:
            varying = [k for k, size in enumerate(grid.shape) if size > 1 and not labels.same(grid, k)]
            if len(varying) > 1:  # [n, m] that vary along both: whole blocks leave, as the outer axis
                labels.tie(grid, grid.take([0], varying[0]))
                busy = True
        for layer, axis, why in t.notes.rigids:
            if labels.same(layer, axis):
                continue
            found = labels.find(layer)
            if any(n > 1 and k != axis and not labels.same(layer, k) for k, n in enumerate(found.shape)):
                labels.tie(layer, layer.take([0], axis))
                busy = True
            else:
                labels.freeze(layer, why)


def link_sizes(t: Tracer) -> None:
    """One size in the code, one set of units: axes that share an attribute, or that one takes from the other.

    `x.reshape(B, N, C)` with C from the residual stream makes whole heads and blocks of channels leave together;
    an attribute that is also needed at its old value cannot change.
    """
    labels = t.labels
    flags = np.zeros(labels.count, np.uint16)
    marked = np.flatnonzero(labels.flags[: labels.count])
    np.bitwise_or.at(flags, labels.find(marked), labels.flags[marked])
    shared: dict[Attribute, list[tuple[np.ndarray | None, Any]]] = defaultdict(list)
    # A size that is another axis's own, or a quotient of it, couples both axes; an attribute couples all its uses.
    for event in t.notes.events:
        part, expr = event.part, event.expr
        if part.sign < 0:
            continue
        if isinstance(expr, Attribute):
            ids = _varying(t, part.axes, [part.axis])
            if ids is not False:
                shared[expr].append((ids if ids is None else ids[part.start : part.stop], event))
            continue
        if isinstance(expr, Extent):
            dims = [part.axis]
        elif isinstance(expr, tuple) and isinstance(expr[1], Extent) and expr[0] is operator.floordiv:
            shape, k, size = part.axes.shape, part.axis, expr[1].axes.shape[expr[1].axis]
            pairs = [[k - 1, k], [k, k + 1]]
            dims = next(
                (p for p in pairs if 0 <= p[0] and p[1] < len(shape) and shape[p[0]] * shape[p[1]] == size),
                [],
            )
            expr = expr[1]
        else:
            continue
        source = _varying(t, expr.axes, [expr.axis])
        target = _varying(t, part.axes, dims) if dims else None
        if source is False or target is False or (source is None and target is None):
            continue
        if source is None or target is None or len(source) != len(target):
            why = f"its size is written as that of another, fixed axis ({event.where})"
            for ids in (source, target):
                if ids is not None:
                    labels.freeze(ids, why)
            continue
        _together(t, flags, source, target)
    for attribute, uses in shared.items():
        known = [ids for ids, _ in uses if ids is not None]
        fixed = [event for ids, event in uses if ids is None]
        for ids in known:
            if fixed:
                where = f"{attribute.module}.{attribute.name}"
                labels.freeze(ids, f"{where} must keep its value elsewhere ({fixed[0].where})")
            elif len(ids) == len(known[0]):
                _together(t, flags, known[0], ids)
    settle_splits(t)


def _together(t: Tracer, flags: np.ndarray, a: np.ndarray, b: np.ndarray) -> None:
    """Tie; heads that meet the residual stream become part of it."""
    bits = [int(np.bitwise_or.reduce(flags[t.labels.find(ids)])) for ids in (a, b)]
    if any(x & RESIDUAL and not x & HEAD for x in bits):
        t.labels.flag(a, STEM)
    t.labels.tie(a, b)


def _varying(t: Tracer, axes: Axes, dims: Sequence[int]) -> Any:
    """The labels along these neighbouring axes, flattened; None when nothing varies there, False when unclear."""
    for layer in axes.layers:
        if all(layer.shape[k] == 1 or t.labels.same(layer, k) for k in dims):
            continue
        free = [k for k in range(layer.ndim) if k not in dims]
        if any(layer.shape[k] > 1 and not t.labels.same(layer, k) for k in free):
            return False
        for k in free:
            layer = layer.take([0], k)
        wide = [axes.shape[k] if k in dims else 1 for k in range(layer.ndim)]
        return np.broadcast_to(layer, wide).reshape(-1)
    return None
