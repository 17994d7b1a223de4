"""Labels: one integer for every index of every prunable axis, merged by a vectorised union-find.

Spec: spa, "Finding the groups" (Structurally Prune Anything, arXiv 2403.18955).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

HEAD, EXPERT, RESIDUAL, MIXED, INNER, ALONE, STEM, SOFT, PICKED = (1 << n for n in range(9))


class NoRule(Exception):
    """No rule says what an operation does to these labels: what it touches is frozen."""


class Labels:
    """Union-find over int64 arrays. All methods take and return numpy arrays of labels.

    >>> labels = Labels()
    >>> a, b = labels.new(3), labels.new(3)
    >>> labels.tie(a, b)
    >>> (labels.find(a) == labels.find(b)).all()
    True
    """

    def __init__(self) -> None:
        self.count = 0
        self.parent = np.arange(1024)
        self.frozen = np.zeros(1024, np.int32)
        self.flags = np.zeros(1024, np.uint16)
        self.shared = np.ones(1024, np.int32)
        self.reasons = [""]

    def new(self, n: int, why: str | None = None) -> np.ndarray:
        """n fresh labels; with `why` they are frozen from birth."""
        while self.count + n > len(self.parent):
            size = len(self.parent)
            self.parent = np.concatenate([self.parent, np.arange(size, 2 * size)])
            self.frozen = np.concatenate([self.frozen, np.zeros(size, np.int32)])
            self.flags = np.concatenate([self.flags, np.zeros(size, np.uint16)])
            self.shared = np.concatenate([self.shared, np.ones(size, np.int32)])
        ids = np.arange(self.count, self.count + n)
        self.count += n
        if why is not None:
            self.freeze(ids, why)
        return ids

    def find(self, ids: np.ndarray) -> np.ndarray:
        """The representative of each label."""
        root = first = self.parent[ids]
        while True:
            up = self.parent[root]
            if (up == root).all():
                break
            root = up
        if root is not first:
            self.parent[ids] = root
        return root

    def tie(self, a: np.ndarray, b: np.ndarray) -> None:
        """Merge elementwise after broadcasting."""
        if a.shape != b.shape:
            a, b = np.broadcast_arrays(a, b)
        a, b = np.ravel(a), np.ravel(b)
        while True:
            a, b = self.find(a), self.find(b)
            apart = a != b
            if not apart.any():
                return
            a, b = a[apart], b[apart]
            np.minimum.at(self.parent, np.maximum(a, b), np.minimum(a, b))

    def freeze(self, ids: np.ndarray, why: str) -> None:
        """Refuse these labels; the first reason given stays."""
        if why not in self.reasons[-64:]:
            self.reasons.append(why)
        code = len(self.reasons) - 1 - self.reasons[::-1].index(why)
        ids = np.ravel(ids)
        self.frozen[ids[self.frozen[ids] == 0]] = code

    def flag(self, ids: np.ndarray, bit: int) -> None:
        self.flags[np.ravel(ids)] |= bit

    def same(self, array: np.ndarray, axis: int) -> bool:
        """Are all labels along this axis one and the same?"""
        found = self.find(array)
        return bool((found == found.take([0], axis)).all())


@dataclass(eq=False)
class Axes:
    """What is known of one tensor: its shape and label arrays of the same rank, of size 1 on free axes.

    `params` names the parameters a value was computed from when it depends on nothing else (an empty set: a
    constant); None for activations. `picks`: the values are positions among these labels, as those of a `topk` are.
    """

    shape: tuple[int, ...]
    layers: list[np.ndarray] = field(default_factory=list)
    params: frozenset[str] | None = None
    picks: np.ndarray | None = None

    def __post_init__(self) -> None:
        self.layers = [layer for layer in self.layers if layer.size > 1]

    def has(self, axis: int) -> bool:
        return any(layer.shape[axis] > 1 for layer in self.layers)


def axes_of(layer: np.ndarray) -> list[int]:
    """The labelled axes of one layer."""
    return [k for k, n in enumerate(layer.shape) if n > 1]


def along(ids: np.ndarray, rank: int, axis: int) -> np.ndarray:
    """A vector of labels as a layer of this rank."""
    shape = [1] * rank
    shape[axis % rank] = len(ids)
    return np.reshape(ids, shape)
