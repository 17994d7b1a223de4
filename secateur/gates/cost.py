"""What a gated network is expected to cost: parameters and multiply-adds as functions of the probabilities to stay."""

from __future__ import annotations

from collections.abc import Container, Mapping
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from secateur.errors import SecateurError
from secateur.graph import Graph


class ExpectedCost:
    """Expected parameters and multiply-adds of a traced model, differentiable in the probabilities.

    >>> cost = ExpectedCost(graph)  # doctest: +SKIP
    >>> (cost.macs({"fc1:neurons": law.keep()}) / graph.macs()).backward()  # doctest: +SKIP

    Units are taken as independent, so each size is the sum of its probabilities, and a matrix costs the product of
    its two; where every probability is 0 or 1 it is exactly `graph.params` and `graph.macs`. Groups without
    probabilities are whole. Probabilities: [units] by group name, of any float dtype; sums are float64.
    """

    def __init__(self, graph: Graph):
        if graph._left is not None:
            raise SecateurError(
                "the graph is that of a model that was cut after the trace",
                where="ExpectedCost",
                fix="trace the cut model",
            )
        self.graph = graph
        self.whole_params, self.whole_macs = graph.params(), graph.macs()
        self._owner, self._unit = _owners(graph)
        self._inside = {g.name: g for g in graph.groups if g.reason is None and g.modules}
        self._parts: dict[tuple[int, int, int], Any] = {}
        self._costs = [
            (module, const, [self._part(part) for part in parts]) for module, const, parts in graph._costs
        ]
        self._sizes = _sizes(graph)

    def params(self, keep: Mapping[str, Tensor], names: Container[str] | None = None) -> Tensor:
        """Expected parameters of the whole model, or of those that are named, a scalar."""
        keep = _double(keep)
        gone = {name: len(p) - p.sum() for name, p in keep.items()}
        totals: dict[tuple[tuple[str, int], ...], Any] = {}
        for name, (shape, leaves) in self._sizes.items():
            if names is not None and name not in names:
                continue
            dims: list[Any] = list(shape)
            for dim, group, width in leaves:
                if group in gone:
                    dims[dim] = dims[dim] - width * gone[group]
            owners = self._owners_of(name, keep, lambda g: True)
            totals[owners] = totals.get(owners, 0) + prod(dims)
        return _sum(totals, keep)

    def macs(self, keep: Mapping[str, Tensor]) -> Tensor:
        """Expected multiply-adds of one forward on the traced inputs, a scalar."""
        keep = _double(keep)
        counted: dict[int, Any] = {}
        totals: dict[tuple[tuple[str, int], ...], Any] = {}
        for module, const, parts in self._costs:
            sizes = [self._size(part, keep, counted) for part in parts]
            owners = self._owners_of(module + ".", keep, lambda g: g.kind == "layers")
            totals[owners] = totals.get(owners, 0) + const * prod(sizes)
        return _sum(totals, keep)

    def _owners_of(self, name: str, keep: Mapping[str, Tensor], counts: Any) -> tuple[tuple[str, int], ...]:
        """(group, unit) of each block with a probability that a parameter or module lies in."""
        return tuple(
            (group.name, unit)
            for group in self._inside.values()
            if group.name in keep and counts(group)
            for unit, path in enumerate(group.modules)
            if name.startswith(path + ".")
        )

    def _part(self, part: Any) -> Any:
        """A size as (constant, [(group, weight of each unit)], rows of several units that are one entry)."""
        rows, start, stop, sign = part
        if rows is None:
            return sign * (stop - start), {}, ()
        key = (id(rows), start, stop)
        if key not in self._parts:
            constant = 0
            weights: dict[str, Any] = {}
            several: list[Any] = []
            for entry in rows[start:stop]:
                classes = np.unique(entry)
                names = self._owner[classes]
                if (names < 0).any():
                    constant += 1  # something that always stays
                elif len(classes) == 1:
                    group = self.graph.groups[names[0]]
                    counts = weights.setdefault(group.name, np.zeros(group.size))
                    counts[self._unit[classes[0]]] += 1
                else:
                    several.append(
                        [(self.graph.groups[n].name, int(u)) for n, u in zip(names, self._unit[classes])]
                    )
            self._parts[key] = constant, {n: torch.from_numpy(w) for n, w in weights.items()}, several
        constant, weights, several = self._parts[key]
        return sign * constant, {n: sign * w for n, w in weights.items()}, [(sign, e) for e in several]

    def _size(self, part: Any, keep: Mapping[str, Tensor], counted: dict[int, Any]) -> Any:
        if id(part) not in counted:
            constant, weights, several = part
            total: Any = constant
            for name, weight in weights.items():
                total = total + (
                    (keep[name] * weight.to(keep[name])).sum() if name in keep else weight.sum().item()
                )
            for sign, entry in several:
                gone: Any = 1
                for name, unit in entry:
                    gone = gone * ((1 - keep[name][unit]) if name in keep else 0)
                total = total + sign * (1 - gone)
            counted[id(part)] = total
        return counted[id(part)]


def _double(keep: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: p.double() for name, p in keep.items()}


def _sum(totals: Mapping[tuple[tuple[str, int], ...], Any], keep: Mapping[str, Tensor]) -> Tensor:
    total: Any = torch.zeros((), dtype=torch.float64)
    for owners, value in totals.items():
        for name, unit in owners:
            value = value * keep[name][unit]
        total = total + value
    return total


def _owners(graph: Graph) -> tuple[np.ndarray, np.ndarray]:
    """[classes] the number of the group that a class is a unit of (-1: none that can be cut), and which unit."""
    owner = np.full(len(graph._open), -1)
    unit = np.zeros(len(graph._open), int)
    for number, group in enumerate(graph.groups):
        if group.reason is None and group.kind != "layers":
            owner[group._classes] = number
            unit[group._classes] = np.arange(group.size)
    return owner, unit


def _sizes(graph: Graph) -> dict[str, tuple[tuple[int, ...], list[tuple[int, str, int]]]]:
    """The shape of each parameter, and (dim, group, entries of a unit) of what may leave it."""
    found: dict[str, tuple[tuple[int, ...], list[tuple[int, str, int]]]] = {
        name: (graph.shapes[name], []) for name in graph._parameters
    }
    for group in graph.groups:
        if group.reason is None:
            for s in group.slices:
                if s.name in found:
                    found[s.name][1].append((s.dim, group.name, s.index.shape[1]))
    return found
