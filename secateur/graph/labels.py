"""Labels: one integer for every index of every prunable axis, merged by a vectorised union-find.

Spec: spa, "Finding the groups" (Structurally Prune Anything, arXiv 2403.18955).
"""

from __future__ import annotations

from collections.abc import Sequence

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

    def __init__(self, capacity: int = 1024) -> None:
        self.count = 0
        self.parent = np.arange(capacity)
        self.frozen = np.zeros(capacity, np.int32)
        self.flags = np.zeros(capacity, np.uint16)
        self.shared = np.ones(capacity, np.int32)
        self.reasons = [""]
        self.codes: dict[str, int] = {}

    def new(self, n: int, why: object = None) -> np.ndarray:
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
        parent = self.parent
        root = first = parent[ids]
        while True:
            up = parent[root]
            if not np.count_nonzero(up != root):
                break
            root = up
        if root is not first:
            parent[ids] = root
        return root

    def roots(self) -> np.ndarray:
        """The representative of every label."""
        root = self.parent[: self.count]
        while np.count_nonzero((up := self.parent[root]) != root):
            root = up
        self.parent[: self.count] = up
        return up

    def tie(self, a: np.ndarray, b: np.ndarray) -> None:
        """Merge elementwise after broadcasting."""
        if a is b:
            return
        if a.shape != b.shape:
            a, b = np.broadcast_arrays(a, b)
        a, b = self.find(a.ravel()), self.find(b.ravel())
        while True:
            apart = a != b
            count = np.count_nonzero(apart)
            if not count:
                return
            low, high = np.minimum(a, b), np.maximum(a, b)
            if count < len(apart):
                low, high = low[apart], high[apart]
            np.minimum.at(self.parent, high, low)
            if not np.count_nonzero(self.parent[high] != low):
                return
            a, b = self.find(low), self.find(high)

    def freeze(self, ids: np.ndarray, why: object) -> None:
        """Refuse these labels; the first reason given stays. `why` is only made a text where it is needed."""
        ids = ids.ravel()
        ids = ids[self.frozen[ids] == 0]
        if not len(ids):
            return
        text = str(why)
        if text not in self.codes:
            self.codes[text] = len(self.reasons)
            self.reasons.append(text)
        self.frozen[ids] = self.codes[text]

    def flag(self, ids: np.ndarray, bit: int) -> None:
        self.flags[ids.ravel()] |= bit

    def same(self, array: np.ndarray, axis: int) -> bool:
        """Are all labels along this axis one and the same?"""
        rank = array.ndim
        last = (*(0,) * (axis % rank), -1, *(0,) * (rank - axis % rank - 1))
        if self.root(array[(0,) * rank]) != self.root(array[last]):
            return False
        found = self.find(array)
        return not np.count_nonzero(found != found.take([0], axis))

    def root(self, label: int) -> int:
        """The representative of one label."""
        up = self.parent.item(label)
        while up != label:
            label, up = up, self.parent.item(up)
        return up


class Axes:
    """What is known of one tensor: its shape and label arrays of the same rank, of size 1 on free axes.

    `params` names the parameters a value was computed from when it depends on nothing else (an empty set: a
    constant); None for activations. `picks`: the values are positions among these labels, as those of a `topk` are.
    """

    __slots__ = ("layers", "params", "picks", "shape")

    def __init__(
        self,
        shape: tuple[int, ...],
        layers: Sequence[np.ndarray] = (),
        params: frozenset[str] | None = None,
        picks: np.ndarray | None = None,
    ):
        self.shape, self.params, self.picks = shape, params, picks
        self.layers = [layer for layer in layers if layer.size > 1] if layers else []

    def has(self, axis: int) -> bool:
        for layer in self.layers:
            if layer.shape[axis] > 1:
                return True
        return False


def axes_of(layer: np.ndarray) -> list[int]:
    """The labelled axes of one layer."""
    return [k for k, n in enumerate(layer.shape) if n > 1]


def along(ids: np.ndarray, rank: int, axis: int) -> np.ndarray:
    """A vector of labels as a layer of this rank."""
    shape = [1] * rank
    shape[axis % rank] = len(ids)
    return ids.reshape(shape)
