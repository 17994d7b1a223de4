"""From the labels of a finished trace to a graph of groups."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import gcd, lcm
from typing import Any

import numpy as np
import torch
from torch import nn

from secateur.graph.groups import KINDS, Graph, Group, Slice
from secateur.graph.labels import ALONE, EXPERT, HEAD, INNER, MIXED, PICKED, RESIDUAL, SOFT, STEM, Axes
from secateur.graph.resolve import link_sizes, query_rows, settle_experts, settle_splits
from secateur.graph.sizes import Attribute, Extent, leaves
from secateur.graph.tracer import Tracer
from secateur.graph.vocabulary import join_tokens


def build_graph(t: Tracer, outputs: Sequence[Axes], vocabulary: bool = False) -> Graph:
    """Resolve what tracing left open, and gather the classes of united labels into groups."""
    freeze_outputs(t, outputs)
    containers = settle_experts(t)
    settle_splits(t)
    queries = query_rows(t)
    link_sizes(t)
    classes = classes_of(t)
    members = members_of(t, classes)
    groups = make_groups(t, classes, members, buckets(classes, members))
    for container, ids in containers.items():
        _own(t, container, classes.of[ids], groups)
    _name(groups)
    if vocabulary:
        groups = join_tokens(t.model, groups)
    return finish(t, in_order(t, groups), classes, queries)


def freeze_outputs(t: Tracer, outputs: Sequence[Axes]) -> None:
    """What the model returns keeps its shape, and its numbers of units their meaning."""
    for out in outputs:
        for layer in out.layers:
            t.freeze(layer, "it is an output of the model")
        if out.picks is not None:
            t.freeze(out.picks, "its numbers are an output of the model")


@dataclass
class Classes:
    """The classes of united labels, numbered from 0, and what holds for each."""

    of: np.ndarray  # [labels] -> class
    reason: np.ndarray  # [classes] code of the first reason to freeze it, 0 for none
    flags: np.ndarray  # [classes] bits of its labels
    shared: np.ndarray  # [classes] query heads over one key-value head

    def __len__(self) -> int:
        return len(self.reason)

    def met(self, ids: np.ndarray) -> np.ndarray:
        """[classes] whether a class holds one of these labels."""
        met = np.zeros(len(self), bool)
        met[self.of[ids]] = True
        return met


def classes_of(t: Tracer) -> Classes:
    """Number the classes, and bring to each what is noted at its labels."""
    labels, count = t.labels, t.labels.count
    of = labels.roots()
    is_root = of == np.arange(count)
    of = (np.cumsum(is_root) - 1)[of]  # in the order of their first labels
    n = int(np.count_nonzero(is_root))
    reason, flags, shared = np.zeros(n, np.int32), np.zeros(n, np.uint16), np.ones(n, np.int32)
    frozen = np.flatnonzero(labels.frozen[:count])[
        ::-1
    ]  # backwards: the first label's reason is written last
    reason[of[frozen]] = labels.frozen[frozen]
    marked = np.flatnonzero(labels.flags[:count])
    np.bitwise_or.at(flags, of[marked], labels.flags[marked])
    marked = np.flatnonzero(labels.shared[:count] > 1)
    np.maximum.at(shared, of[marked], labels.shared[marked])
    return Classes(of, reason, flags, shared)


@dataclass
class Members:
    """Every entry of every axis of every parameter, sorted by class: [entries] arrays and the runs in them."""

    keys: list[tuple[str, int]]  # (parameter, dim)
    axes: list[np.ndarray]  # the classes along each of them
    cls: np.ndarray  # [entries] class
    place: np.ndarray  # [entries] index along its axis
    owner: np.ndarray  # [entries] number of its key
    bounds: np.ndarray  # where the entries of one class end and those of the next begin


def members_of(t: Tracer, classes: Classes) -> Members:
    """The entries that each class holds, in the order of the parameters."""
    keys, sizes = list(t.ids), [len(ids) for ids in t.ids.values()]
    ends = list(accumulate(sizes, initial=0))
    none = np.zeros(0, np.int32)
    cls = classes.of.astype(np.int32)[np.concatenate([*t.ids.values(), none])]
    axes = [cls[start:end] for start, end in pairwise(ends)]
    owner = np.repeat(np.arange(len(keys), dtype=np.int32), sizes)
    place = np.concatenate([*(np.arange(size, dtype=np.int32) for size in sizes), none])
    order = np.argsort(cls, kind="stable")
    cls, place, owner = cls[order], place[order], owner[order]
    bounds = np.flatnonzero(np.r_[True, cls[1:] != cls[:-1], True]) if len(cls) else np.zeros(1, int)
    return Members(keys, axes, cls, place, owner, bounds)


def buckets(classes: Classes, members: Members) -> list[tuple[int, int, np.ndarray]]:
    """(reason, entries in a class, starts of classes) of classes with one reason and the same owners, in order.

    Classes of one bucket have the same footprint, so that they are the units of one group.
    """
    starts, sizes = members.bounds[:-1], np.diff(members.bounds)
    reasons = classes.reason[members.cls[starts]]
    result = []
    for width in dict.fromkeys(sizes.tolist()):
        here = np.flatnonzero(sizes == width)
        keys = np.column_stack([reasons[here], members.owner[starts[here][:, None] + np.arange(width)]])
        # Runs of equal rows are taken as one: few rows are left to be sorted, as bytes.
        new = np.r_[True, (keys[1:] != keys[:-1]).any(1)]
        rows = np.ascontiguousarray(keys[new])
        rows = rows.view(np.dtype((np.void, rows.dtype.itemsize * (width + 1)))).ravel()
        which = np.unique(rows, return_inverse=True)[1][np.cumsum(new) - 1]
        order = np.argsort(which, kind="stable")
        for start, end in pairwise(accumulate(np.bincount(which).tolist(), initial=0)):
            part = order[start:end]
            result.append((int(here[part[0]]), int(reasons[here[part[0]]]), width, starts[here[part]]))
    return [(why, width, group) for _, why, width, group in sorted(result, key=lambda item: item[0])]


def make_groups(
    t: Tracer, classes: Classes, members: Members, buckets: Sequence[tuple[int, int, np.ndarray]]
) -> list[Group]:
    """A group of each bucket, but for those of spatial axes and of tensors that the run didn't read."""
    made = np.zeros(len(classes), bool)  # [classes] whether a layer produces it
    for key, mine in zip(members.keys, members.axes, strict=True):
        if t.notes.roles.get(key) == "out":
            made[mine] = True
    stacked: set[str] = set()
    if np.count_nonzero(classes.flags & EXPERT):
        pairs = zip(members.keys, members.axes, strict=True)
        stacked = {key[0] for key, mine in pairs if classes.flags[mine].max() & EXPERT}
    ranks = {name: v.dim() for name, v in t.parameters}
    floors = [(classes.met(ids), len(ids), k) for ids, k in t.notes.floors]
    grains = [(classes.met(ids), len(ids), k) for ids, k in t.notes.grains]

    groups = []
    for code, width, starts in buckets:
        reason = t.labels.reasons[code] if code else None
        if reason is not None and reason.startswith("a spatial axis of a convolution"):
            continue
        units, slices = _slices(t, members, starts, width)
        if reason is None and not made[units].any():
            reason = "no layer produces it"
        if reason is None and all(s.name not in t.notes.uses for s in slices):
            continue
        if reason is None and len(units) == 1:
            reason = "a single unit"
        # A pick of k among n labels is one among fewer units where several labels are one.
        least = max((-(-k * int(met.sum()) // n) for met, n, k in floors if met[units].any()), default=1)
        if reason is None and least >= len(units):
            reason = f"the model picks {least} of {len(units)} units, which is all"
        each = [(k, n // max(1, int(met.sum()))) for met, n, k in grains if met[units].all()]
        bits = int(np.bitwise_or.reduce(classes.flags[units]))
        exact = not bits & MIXED and (not bits & SOFT or bool(bits & PICKED))
        kind = _kind(slices, bits, int(classes.shared[units].max()), ranks, stacked)
        multiple = lcm(*(k // gcd(k, rows) for k, rows in each))
        groups.append(
            Group("", kind, len(units), slices, reason, exact, (), least, multiple, units, bool(bits & ALONE))
        )
    return groups


def _slices(
    t: Tracer, members: Members, starts: np.ndarray, width: int
) -> tuple[np.ndarray, tuple[Slice, ...]]:
    """The units of a bucket, in the order of their first entries, and the slices that they own."""
    owners = members.owner[starts[0] : starts[0] + width]
    starts = starts[np.argsort(members.place[starts], kind="stable")]
    rows = members.place[starts[:, None] + np.arange(width)]  # [units, entries of a unit]
    slices, first = [], 0
    for k, count in Counter(owners.tolist()).items():
        name, dim = members.keys[k]
        index = torch.from_numpy(np.array(rows[:, first : first + count], np.int64))
        slices.append(Slice(name, dim, index, t.notes.roles.get(members.keys[k], "vector")))
        first += count
    return members.cls[starts].astype(int), tuple(slices)


def in_order(t: Tracer, groups: Sequence[Group]) -> list[Group]:
    """Groups that can be cut first, streams after the rest, each in the order in which the run first used them."""
    rank, position = t.notes.uses, {name: n for n, (name, _) in enumerate(t.ids)}

    def key(group: Group) -> tuple:
        names = [s.name for s in group.slices if s.role == "out"] or [s.name for s in group.slices]
        late = KINDS.index(group.kind) if group.kind == "hidden" else 0
        return group.reason is not None, late, min((rank.get(x, 10**9), position[x]) for x in names)

    return sorted(groups, key=key)


def finish(t: Tracer, groups: list[Group], classes: Classes, queries: list[Any]) -> Graph:
    """The graph of these groups, with sizes, costs and choices in terms of classes, and groups of blocks."""
    notes = t.notes
    parameters = list(t.tensors("_parameters"))
    distinct = {id(v): name for name, v in reversed(parameters)}
    graph = Graph(
        groups,
        {name: tuple(v.shape) for name, v in [*parameters, *t.tensors("_buffers")]},
        dict(t.aliases),
        dict(notes.unknown),
        frozenset(notes.normalised),
        rule_errors=list(notes.rule_errors),
        unreached=tuple(t.unreached()),
        _parameters=[n for n, v in parameters if distinct[id(v)] == n and n not in t.aliases],
        _class=classes.of,
        _open=np.zeros(len(classes), bool),
    )
    can_leave = [g for g in groups if g.reason is None]
    for g in can_leave:
        graph._open[g._classes] = True
    graph._choices = [
        (module, name, classes.of[layer])
        for module, name, layer in notes.choices
        if classes.flags[classes.of[layer]].max() & PICKED
    ]
    graph._rescaled = [(classes.of[ids], rows) for ids, rows in queries]
    _compile_sizes(t, graph)
    _compile_costs(t, graph)
    graph.groups = can_leave + _layers(t, graph) + [g for g in groups if g.reason is not None]
    return graph


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
        if (
            not isinstance(module, (nn.ModuleList, nn.Sequential))
            or len(module) < 2
            or path in t.notes.experts
        ):
            continue
        found = []
        for name, child in module.named_children():
            inside = f"{path}.{name}" if path else name
            calls = t.notes.calls.get(inside, [])
            if len(calls) != 1:
                continue
            before, after = calls[0]
            if not isinstance(before, Axes) or after is None or not before.layers or before is after:
                continue
            if before.shape != after.shape or not _same_labels(t, before, after):
                continue
            if any(True for _ in child.parameters()):
                found.append(inside)
        if len(found) > 1:
            others = sum(1 for child in module.children() if any(True for _ in child.parameters())) > len(
                found
            )
            groups.append(
                Group(
                    f"{path or 'model'}:layers",
                    "layers",
                    len(found),
                    modules=tuple(found),
                    least=0 if others else 1,
                )
            )
    return groups


def _same_labels(t: Tracer, a: Axes, b: Axes) -> bool:
    if len(a.layers) != len(b.layers):
        return False
    return all(
        x.shape == y.shape and np.array_equal(t.labels.find(x), t.labels.find(y))
        for x, y in zip(a.layers, b.layers, strict=True)
    )


def _compile_sizes(t: Tracer, graph: Graph) -> None:
    """Keep of the recorded sizes only what depends on labels that can be cut, and what each attribute is now."""
    attributes = graph._attributes
    seen = set()
    for event in t.notes.events:
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


def _compile_costs(t: Tracer, graph: Graph) -> None:
    """Each cost as a constant times the sizes of axes that can be cut."""
    for module, dims in t.notes.costs:
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
