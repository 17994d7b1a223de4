"""The graph of a model that was cut, worked out from the one before: nothing runs again."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from secateur.errors import SecateurError
from secateur.graph.groups import Graph, Group, Slice

Places = dict[tuple[str, int], Tensor]


def left(graph: Graph, keep: Mapping[str, Tensor]) -> Places:
    """What stays of each tensor's axis that loses something: (name, axis) -> bool [size].

    >>> left(graph, {"fc1:neurons": torch.tensor([0, 2])})["fc1.bias", 0]  # doctest: +SKIP
    tensor([ True, False,  True, False])
    """
    stays: Places = {}
    for group, kept in graph._kept(keep):
        gone = torch.ones(group.size, dtype=torch.bool)
        gone[kept] = False
        for s in group.slices if gone.any() else ():
            size = graph.shapes[s.name][s.dim]
            stay = stays.setdefault((s.name, s.dim), torch.ones(size, dtype=torch.bool))
            stay[s.index[gone].reshape(-1)] = False
    return stays


def smaller(graph: Graph, keep: Mapping[str, Tensor]) -> Graph:
    """The graph of the model after this cut: fewer units in smaller tensors, numbered as they lie there.

    >>> after = smaller(graph, {"fc1:neurons": torch.tensor([0, 2])})  # doctest: +SKIP
    >>> after["fc1:neurons"].size, after.shapes["fc1.weight"]  # doctest: +SKIP
    (2, (2, 8))

    Equal to `trace(model)` of the cut model, and as good for a further cut. Values that attributes had stay those of the
    dense model, which is what a further cut counts from.

    Raises `SecateurError` for units whose leaving renames what is left (blocks, experts), and for heads that became narrower.
    """
    pairs = graph._kept(keep)
    for group, kept in pairs:
        if (group.whole or group.kind == "experts") and len(kept) < group.size:
            raise SecateurError(
                f"{group.kind} that leave give what is left other names or numbers",
                where=group.name,
                fix="trace the cut model",
            )
    alive = graph._alive(keep)
    if any(not alive[classes].all() for classes, _ in graph._rescaled):
        raise SecateurError(
            "narrower heads scale their queries anew with each cut",
            where="head_dim",
            fix="trace the cut model, or leave head_dim out",
        )
    stays, units = left(graph, keep), {group.name: kept for group, kept in pairs}
    place = {key: stay.cumsum(0) - 1 for key, stay in stays.items()}
    shapes = {name: list(shape) for name, shape in graph.shapes.items()}
    for (name, dim), stay in stays.items():
        for alias in (name, *(other for other, first in graph.aliases.items() if first == name)):
            shapes[alias][dim] = int(stay.sum())

    def cut(group: Group) -> Group:
        kept = units.get(group.name, torch.arange(group.size))
        moved = any((s.name, s.dim) in place for s in group.slices)
        if len(kept) == group.size and not moved:
            return group
        slices = []
        for s in group.slices:
            index, own = s.index[kept], place.get((s.name, s.dim))
            slices.append(Slice(s.name, s.dim, index if own is None else own[index], s.role))
        return dataclasses.replace(
            group, size=len(kept), slices=tuple(slices), _classes=group._classes[kept.numpy()]
        )

    made = dataclasses.replace(
        graph,
        groups=[cut(group) for group in graph.groups],
        shapes={name: tuple(shape) for name, shape in shapes.items()},
        _runs={},
        _left=alive,
    )
    made._attributes.update(graph._attributes)
    return made
