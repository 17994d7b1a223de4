"""From the labels of a finished trace to a graph of groups."""

from __future__ import annotations

import operator
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from math import gcd, lcm
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from secateur.graph.groups import KINDS, Graph, Group, Slice
from secateur.graph.labels import ALONE, EXPERT, HEAD, INNER, MIXED, PICKED, RESIDUAL, SOFT, STEM, Axes
from secateur.graph.sizes import Attribute, Extent, leaves

if TYPE_CHECKING:
    from secateur.graph.tracer import Tracer


# --- from labels to groups


def build_graph(t: Tracer, outputs: Sequence[Axes]) -> Graph:
    """Resolve what tracing left open, and gather the classes into groups."""
    labels = t.labels
    for out in outputs:
        for layer in out.layers:
            labels.freeze(layer, "it is an output of the model")
        if out.picks is not None:
            labels.freeze(out.picks, "its numbers are an output of the model")
    containers = _experts(t)
    _settle(t)
    queries = _queries(t)
    _link(t)
    classes = labels.roots()
    root = classes == np.arange(labels.count)
    classes = (np.cumsum(root) - 1)[classes]
    n = int(np.count_nonzero(root))
    code = np.zeros(n, np.int32)
    flags = np.zeros(n, np.uint16)
    shared = np.ones(n, np.int32)
    frozen = labels.frozen[: labels.count]
    known = frozen > 0
    order = np.flatnonzero(known)[::-1]
    code[classes[order]] = frozen[order]
    marked = np.flatnonzero(labels.flags[: labels.count])
    np.bitwise_or.at(flags, classes[marked], labels.flags[marked])
    marked = np.flatnonzero(labels.shared[: labels.count] > 1)
    np.maximum.at(shared, classes[marked], labels.shared[marked])

    keys = list(t.ids)
    sizes = [len(ids) for ids in t.ids.values()]
    ends = np.cumsum(sizes, dtype=int)
    cls = classes.astype(np.int32)[np.concatenate([*t.ids.values(), np.zeros(0, int)])]
    members = [cls[end - size : end] for end, size in zip(ends.tolist(), sizes, strict=True)]
    made = np.zeros(n, bool)
    for key, mine in zip(keys, members, strict=True):
        if t.roles.get(key) == "out":
            made[mine] = True
    own = np.repeat(np.arange(len(keys), dtype=np.int32), sizes)
    place = np.concatenate([*(np.arange(size, dtype=np.int32) for size in sizes), np.zeros(0, np.int32)])
    order = np.argsort(cls, kind="stable")
    cls, place, own = cls[order], place[order], own[order]
    bounds = np.flatnonzero(np.r_[True, cls[1:] != cls[:-1], True]) if len(cls) else np.zeros(1, int)
    buckets = _alike(bounds, own, code[cls[bounds[:-1]]])

    floors = []
    for ids, k in t.floors:
        met = np.zeros(n, bool)
        met[classes[ids]] = True
        floors.append((met, int(met.sum()), len(ids), k))
    stacked: set[str] = set()
    if np.count_nonzero(flags & EXPERT):
        stacked = {key[0] for key, mine in zip(keys, members, strict=True) if flags[mine].max() & EXPERT}
    ranks = {name: v.dim() for name, v in t.tensors("_parameters")}
    grains = []
    for ids, grain in t.grains:
        met = np.zeros(n, bool)
        met[classes[ids]] = True
        each = len(ids) // max(1, int(met.sum()))
        grains.append((met, grain // gcd(grain, each)))
    used = t.uses
    groups = []
    for why, width, starts in buckets:
        first_place = own[starts[0]]
        starts = starts[np.argsort(place[starts], kind="stable")]
        rows = place[starts[:, None] + np.arange(width)]
        owners = own[starts[0] : starts[0] + width]
        slices, at = [], 0
        for k, count in Counter(owners.tolist()).items():
            name, dim = keys[k]
            index = torch.from_numpy(np.array(rows[:, at : at + count], np.int64))
            slices.append(Slice(name, dim, index, t.roles.get(keys[k], "vector")))
            at += count
        units = cls[starts].astype(int)
        reason = labels.reasons[why] if why else None
        if reason is not None and reason.startswith("a spatial axis of a convolution"):
            continue
        if reason is None and not made[units].any():
            reason = "no layer produces it"
        if reason is None and all(s.name not in used for s in slices):
            continue
        if reason is None and len(units) == 1:
            reason = "a single unit"
        bits = int(np.bitwise_or.reduce(flags[units]))
        kind = _kind(slices, bits, int(shared[units].max()), ranks, stacked)
        least = max((-(-k * heads // size) for met, heads, size, k in floors if met[units].any()), default=1)
        if reason is None and least >= len(units):
            reason = f"the model picks {least} of {len(units)} units, which is all"
        exact = not bits & MIXED and (not bits & SOFT or bool(bits & PICKED))
        grain = lcm(*(k for met, k in grains if met[units].all()))
        group = Group(
            "", kind, len(units), tuple(slices), reason, exact, (), least, grain, units, bool(bits & ALONE)
        )
        groups.append((first_place, group))
    for container, ids in containers.items():
        _own(t, container, classes[ids], [g for _, g in groups])
    _name([g for _, g in groups])
    rank = {name: n for name, n in used.items()}
    position = {name: n for n, (name, _) in enumerate(keys)}

    def order_of(group: Group) -> tuple:
        names = [s.name for s in group.slices if s.role == "out"] or [s.name for s in group.slices]
        late = KINDS.index(group.kind) if group.kind == "hidden" else 0
        return group.reason is not None, late, min((rank.get(x, 10**9), position[x]) for x in names)

    ordered = sorted((g for _, g in groups), key=order_of)
    shapes = {name: tuple(v.shape) for kind in ("_parameters", "_buffers") for name, v in t.tensors(kind)}
    distinct = {id(v): name for name, v in reversed(list(t.tensors("_parameters")))}
    graph = Graph(
        ordered,
        shapes,
        dict(t.aliases),
        dict(t.unknown),
        frozenset(t.normalised),
        [name for name, v in t.tensors("_parameters") if distinct[id(v)] == name and name not in t.aliases],
        classes,
        np.zeros(n, bool),
    )
    for g in ordered:
        if g.reason is None:
            graph._open[g._classes] = True
    graph._choices = [
        (module, name, classes[layer])
        for module, name, layer in t.choices
        if flags[classes[layer]].max() & PICKED
    ]
    graph._rescaled = [(classes[ids], rows) for ids, rows in queries]
    _compile(t, graph)
    last = [g for g in ordered if g.reason is None]
    graph.groups = last + _layers(t, graph) + [g for g in ordered if g.reason is not None]
    return graph


def _alike(bounds: np.ndarray, own: np.ndarray, code: np.ndarray) -> list[tuple[int, int, np.ndarray]]:
    """(reason, members of a class, starts of classes) of classes with the same reason and the same owners, in order."""
    starts, sizes = bounds[:-1], np.diff(bounds)
    found = []
    for width in dict.fromkeys(sizes.tolist()):
        here = np.flatnonzero(sizes == width)
        keys = np.column_stack([code[here], own[starts[here][:, None] + np.arange(width)]])
        new = np.r_[
            True, (keys[1:] != keys[:-1]).any(1)
        ]  # runs of equal rows: few rows are left to be sorted
        rows = np.ascontiguousarray(keys[new])
        rows = rows.view(np.dtype((np.void, rows.dtype.itemsize * (width + 1)))).ravel()
        which = np.unique(rows, return_inverse=True)[1][np.cumsum(new) - 1]
        order = np.argsort(which, kind="stable")
        for part in np.split(order, np.cumsum(np.bincount(which))[:-1]):
            found.append((int(here[part[0]]), int(code[here[part[0]]]), width, starts[here[part]]))
    return [(why, width, group) for _, why, width, group in sorted(found, key=lambda item: item[0])]


def _experts(t: Tracer) -> dict[str, np.ndarray]:
    """Lists of expert modules, with the labels that a router knows them by; units told apart otherwise are frozen."""
    labels, found = t.labels, {}
    for container, ids in t.experts.items():
        children = dict(t.model.get_submodule(container).named_children())
        shapes = [[(n, p.shape) for n, p in child.named_parameters()] for child in children.values()]
        if any(shape != shapes[0] for shape in shapes) or not shapes[0]:
            labels.freeze(ids, "its experts are modules of different shapes")
            continue
        ran = [name for name in children if f"{container}.{name}" in t.calls]
        for name in children.keys() - set(ran):  # no token came here: it is as its neighbours are
            for (tensor, dim), own in list(t.ids.items()):
                start = f"{container}.{name}."
                if tensor.startswith(start):
                    twin = (f"{container}.{ran[0]}.{tensor[len(start) :]}", dim)
                    labels.tie(own, t.ids[twin])
                    t.uses.setdefault(tensor, len(t.uses))
                    if twin in t.roles:
                        t.roles[tensor, dim] = t.roles[twin]
        labels.flag(ids, EXPERT)
        found[container] = ids
    told: dict[bytes, set[int]] = defaultdict(set)
    for ids, value, _ in t.numbered:
        told[labels.find(ids).tobytes()] |= set(range(len(ids))) if value is None else {value}
    known = {labels.find(ids).tobytes() for ids in found.values()}
    for ids, _, why in t.numbered:
        key = labels.find(ids).tobytes()
        if key not in known or told[key] != set(range(len(ids))):
            labels.freeze(ids, why)
    return found


def _own(t: Tracer, container: str, units: np.ndarray, groups: Sequence[Group]) -> None:
    """Give the group of these units the modules that leave with them."""
    paths = [f"{container}.{name}" for name in t.model.get_submodule(container)._modules]
    for group in groups:
        if not np.isin(group._classes, units).any():
            continue
        if len(set(units.tolist())) == len(units) == group.size and set(units.tolist()) == set(
            group._classes.tolist()
        ):
            order = {unit: path for unit, path in zip(units.tolist(), paths, strict=True)}
            group.modules = tuple(order[unit] for unit in group._classes.tolist())
            if list(group.modules) != paths and group.reason is None:
                group.reason = "a router numbers its modules in another order"
        elif group.reason is None:
            group.reason = "a router's units are not the modules it routes to"


def _queries(t: Tracer) -> list[tuple[np.ndarray, list[tuple[str, int, np.ndarray]]]]:
    """Attention that divides by the root of its width: the rows that make its queries, to be scaled when it shrinks."""
    owner = np.full(t.labels.count, -1)
    keys = list(t.ids)
    for n, key in enumerate(keys):
        owner[t.ids[key]] = n
    found = []
    for inner, layers, why in t.rescaled:
        ids = np.concatenate([np.ravel(v) for v in layers] or [np.zeros(0, int)])
        makers = np.unique(owner[ids])
        if (
            len(makers) != 1
            or makers[0] < 0
            or t.roles.get(keys[makers[0]]) != "out"
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
            if other.rpartition(".")[0] == module and len(t.ids[other, d]) == size and t.roles.get((other, d)) != "in"
            and np.array_equal(t.labels.find(t.ids[other, d][place]), roots)
        ]  # fmt: skip
        found.append((inner, rows))
    return found


def _settle(t: Tracer) -> None:
    """Blocks of a split axis lose the same offsets; axes that cannot shrink do not."""
    labels, busy = t.labels, True
    while busy:
        busy = False
        for grid in t.splits:
            varying = [k for k, size in enumerate(grid.shape) if size > 1 and not labels.same(grid, k)]
            if len(varying) > 1:
                labels.tie(grid, grid.take([0], varying[0]))
                busy = True
        for layer, axis, why in t.rigids:
            if labels.same(layer, axis):
                continue
            found = labels.find(layer)
            if any(n > 1 and k != axis and not labels.same(layer, k) for k, n in enumerate(found.shape)):
                labels.tie(layer, layer.take([0], axis))
                busy = True
            else:
                labels.freeze(layer, why)


def _link(t: Tracer) -> None:
    """One size in the code, one set of units: axes that share an attribute, or that one takes from the other.

    `x.reshape(B, N, C)` with C from the residual stream makes whole heads and blocks of channels leave together;
    an attribute that is also needed at its old value cannot change.
    """
    labels = t.labels
    flags = np.zeros(labels.count, np.uint16)
    marked = np.flatnonzero(labels.flags[: labels.count])
    np.bitwise_or.at(flags, labels.find(marked), labels.flags[marked])
    shared: dict[Attribute, list[tuple[np.ndarray | None, Any]]] = defaultdict(list)
    for event in t.events:
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
    _settle(t)


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


def _kind(
    slices: Sequence[Slice], bits: int, shared: int, ranks: Mapping[str, int], stacked: set[str]
) -> str:
    makers = [s for s in slices if s.role == "out"]
    wide = any(s.index.shape[1] > 1 for s in makers)
    if bits & STEM:
        return "hidden"
    if bits & HEAD and wide:
        return "kv_groups" if shared > 1 else "heads"
    if bits & EXPERT and not bits & RESIDUAL:
        return "experts"
    shapes = [ranks[s.name] for s in makers if s.name in ranks]
    if shapes and all(rank > 2 for rank in shapes) and not any(s.name in stacked for s in makers):
        return "channels"
    if bits & RESIDUAL:
        return "hidden"
    if bits & INNER:
        return "head_dim"
    return "neurons"


def _common(paths: Sequence[str]) -> str:
    parts = [p.split(".") for p in paths]
    out = []
    for level in zip(*parts, strict=False):
        if len(set(level)) > 1:
            break
        out.append(level[0])
    return ".".join(out)


def _name(groups: Sequence[Group]) -> None:
    """Common module path and kind; the producing layer where that is not enough."""
    hidden = [g for g in groups if g.kind == "hidden" and g.reason is None]
    for g in groups:
        modules = [s.name.rpartition(".")[0] for s in g.slices if s.role != "vector"]
        modules = modules or [s.name.rpartition(".")[0] for s in g.slices]
        path = g.modules[0].rpartition(".")[0] if g.modules else _common(modules)
        if g.kind == "hidden" and (len(hidden) == 1 and g is hidden[0] or not path):
            path = "stem"
        g.name = f"{path or modules[0] or 'model'}:{g.kind}"
    for attempt in range(2):
        count = Counter(g.name for g in groups)
        for g in groups:
            if count[g.name] > 1 and g.reason is not None or count[g.name] > 1 and attempt == 0:
                maker = next((s for s in g.slices if s.role == "out"), g.slices[0])
                place = maker.name if attempt else maker.name.rpartition(".")[0]
                g.name = f"{place or 'model'}:{g.kind}"
    seen: Counter[str] = Counter()
    for g in sorted(groups, key=lambda g: g.reason is not None):
        seen[g.name] += 1
        if seen[g.name] > 1:
            g.name = f"{g.name}.{seen[g.name]}"


def _layers(t: Tracer, graph: Graph) -> list[Group]:
    """Blocks of a list that add to the residual stream: what goes in is tied to what comes out."""
    groups = []
    for path, module in t.unique():
        if not isinstance(module, (nn.ModuleList, nn.Sequential)) or len(module) < 2 or path in t.experts:
            continue
        found = []
        for name, child in module.named_children():
            inside = f"{path}.{name}" if path else name
            calls = t.calls.get(inside, [])
            if len(calls) != 1 or not any(True for _ in child.parameters()):
                continue
            before, after = calls[0]
            if not isinstance(before, Axes) or after is None or not before.layers or before is after:
                continue
            if before.shape == after.shape and _same_labels(t, before, after):
                found.append(inside)
        if len(found) > 1:
            groups.append(Group(f"{path or 'model'}:layers", "layers", len(found), modules=tuple(found)))
    return groups


def _same_labels(t: Tracer, a: Axes, b: Axes) -> bool:
    if len(a.layers) != len(b.layers):
        return False
    return all(
        x.shape == y.shape and np.array_equal(t.labels.find(x), t.labels.find(y))
        for x, y in zip(a.layers, b.layers, strict=True)
    )


def _compile(t: Tracer, graph: Graph) -> None:
    """Keep of the recorded sizes and costs only what depends on labels that can be cut."""
    attributes = graph._attributes
    seen = set()
    for event in t.events:
        part = event.part
        rows = graph._entries(part.axes, part.axis)
        fixed = [a for a in leaves(event.expr) if isinstance(a, Attribute)]
        moving = rows is not None or any(
            isinstance(a, Extent) and graph._entries(a.axes, a.axis) is not None for a in leaves(event.expr)
        )
        if not fixed and not moving:
            continue
        where = f"{event.where}"
        packed = (rows, part.start, part.stop, part.sign)
        value = part.sign * (part.stop - part.start)
        key = (
            event.module,
            where,
            repr(event.expr) if fixed else id(event.expr),
            id(rows),
            part.start,
            part.stop,
        )
        if key in seen:
            continue
        seen.add(key)
        for a in fixed:
            attributes.setdefault(a, 0)
        graph._events.append((event.expr, packed, where, event.module))
        if isinstance(event.expr, Attribute):
            attributes[event.expr] = value
    modules = dict(t.paths)
    for a in attributes:
        owner: Any = modules[a.module]
        for name in a.name.split("."):
            owner = getattr(owner, name)
        attributes[a] = int(owner if a.place is None else owner[a.place])
    for module, dims in t.costs:
        const, parts = 1, []
        for dim in dims:
            if isinstance(dim, int):
                const *= dim
                continue
            axes, axis = dim
            rows = graph._entries(axes, axis)
            size = axes.shape[axis]
            if rows is None:
                const *= size
            else:
                parts.append((rows, 0, size, 1))
        graph._costs.append((module, const, parts))
