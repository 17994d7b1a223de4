"""Groups of coupled slices, what they cost, and which sizes follow from keeping only some of their units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from secateur.errors import SecateurError, choose
from secateur.graph.labels import Axes
from secateur.graph.notes import RuleError, Run
from secateur.graph.sizes import Attribute, Extent, evaluate, leaves
from secateur.utils.screen import Screen, counted, fit

KINDS = (
    "channels", "heads", "kv_groups", "head_dim", "neurons", "experts", "hidden", "layers", "attentions", "novices",
    "vocabulary",
)  # fmt: skip
WHOLE = ("layers", "attentions", "novices")
"""Kinds whose units leave whole, and nothing beside them: blocks, the attention of blocks, experts that leave a vector behind."""
HOW = ("sum", "mean", "max", "prod")


@dataclass(frozen=True, eq=False, repr=False)
class Slice(Screen):
    """What leaves one tensor when a unit leaves: `index[u]` along `dim` of the tensor called `name`.

    >>> graph = trace(nn.Sequential(nn.Conv2d(1, 3, 2), nn.Flatten(), nn.Linear(12, 2)), torch.zeros(1, 1, 3, 3))
    >>> for s in graph["0:channels"].slices:
    ...     print(s.name, s.dim, s.role, s.index.tolist())
    0.weight 0 out [[0], [1], [2]]
    0.bias 0 vector [[0], [1], [2]]
    2.weight 1 in [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]

    index: int64 [units, k], the k places of each unit. role: "out" where the tensor makes the units (rows of a weight), "in"
    where it reads them (columns), "vector" for a bias, a norm or a buffer.
    """

    name: str
    dim: int
    index: Tensor
    role: str


@dataclass(eq=False, repr=False)
class Group:
    """Coupled slices that vanish together; every unit has the same footprint.

    At least `least` of them must stay (0 only for modules that leave others behind in their place), and a multiple of `multiple`
    where a kernel asks for aligned rows. `returns`: what a call of an attention gives, 0 for a tensor, n for a tuple of n.

    >>> group = graph["model.layers.0.self_attn:kv_groups"]
    >>> group.size, group.kind, [(s.name, s.dim, tuple(s.index.shape)) for s in group.slices]
    """

    name: str
    kind: str
    size: int
    slices: tuple[Slice, ...] = ()
    reason: str | None = None
    exact: bool = True
    modules: tuple[str, ...] = ()
    least: int = 1
    multiple: int = 1
    _classes: np.ndarray = field(default_factory=lambda: np.zeros(0, int), repr=False)
    _alone: bool = False  # query heads over one shared key-value head
    returns: int = 0

    @property
    def whole(self) -> bool:
        """Whether its units leave whole, and nothing beside them."""
        return self.kind in WHOLE

    def __repr__(self) -> str:
        whole = f", whole: {self.reason}" if self.reason else ""
        return fit(
            [
                f"Group({self.name!r}, {counted(self.size, 'unit')}, {counted(len(self.slices), 'slice')}{whole})"
            ]
        )

    def reduce(
        self, values: Mapping[str, Tensor], how: str = "sum", roles: Sequence[str] | None = None
    ) -> Tensor:
        """One number for every unit: values of the same shapes as the tensors, gathered over the coupled slices.

        >>> scores = graph["fc1:neurons"].reduce({n: p.abs() for n, p in model.named_parameters()})  # [units]

        `how` is sum, mean (of all entries of a unit), max or prod; `roles` keeps only slices with these roles.
        Tensors missing from `values` are passed over. A group of layers sums over the tensors of each block.
        Raises SecateurError for an unknown `how`, a wrong shape, or when no slice has a value.
        """
        choose(how, HOW, what="reduction", where="Group.reduce")
        parts: list[Tensor] = []
        device = next((value.device for value in values.values()), None)  # blocks may lie on several
        if self.modules:
            blocks = [
                [
                    v.reshape(-1)
                    for n, v in values.items()
                    if n.startswith(path + ".") and (roles is None or not self.slices or v.dim() > 1)
                ]
                for path in self.modules
            ]
            for path, flat in zip(self.modules, blocks, strict=True):
                if not flat and not self.slices:
                    raise SecateurError("no value for this block", where=path, fix="score its parameters")
            if not self.slices:
                return torch.cat([_fold(torch.cat(flat)[None], how).to(device) for flat in blocks])
            if all(blocks):
                parts.append(torch.stack([torch.cat(flat).to(device) for flat in blocks]))
        for s in self.slices:
            if s.name not in values or (roles is not None and s.role not in roles):
                continue
            value = values[s.name]
            if value.dim() <= s.dim or value.shape[s.dim] <= int(s.index.max()):
                raise SecateurError(
                    f"values of shape {tuple(value.shape)}", where=s.name, fix="give the shape of the tensor"
                )
            index = s.index.to(value.device)
            if how == "sum":
                others = [k for k in range(value.dim()) if k != s.dim]
                sums = value.sum(others) if others else value
                parts.append(sums[index.reshape(-1)].reshape(self.size, -1))
            else:
                rows_ = value.movedim(s.dim, 0).reshape(value.shape[s.dim], -1)
                parts.append(rows_[index.reshape(-1)].reshape(self.size, -1))
        if not parts:
            raise SecateurError(
                "no value for any slice of this group", where=self.name, fix="check the names"
            )
        return _fold(torch.cat([part.to(device) for part in parts], 1), how)


def _fold(rows: Tensor, how: str) -> Tensor:
    if how == "max":
        return rows.amax(1)
    return torch.prod(rows, 1) if how == "prod" else (rows.sum(1) if how == "sum" else rows.mean(1))


@dataclass(repr=False)
class Graph:
    """A traced model: groups in a stable order, and the shapes of all parameters and buffers."""

    groups: list[Group]
    shapes: dict[str, tuple[int, ...]]
    aliases: dict[str, str] = field(default_factory=dict)
    unknown: dict[str, str] = field(default_factory=dict)
    normalised: frozenset[str] = frozenset()
    rule_errors: list[RuleError] = field(default_factory=list)
    unreached: tuple[str, ...] = ()
    """Parameters that no run read: what they would tie to is unknown."""
    _parameters: list[str] = field(default_factory=list, repr=False)
    _class: np.ndarray = field(default_factory=lambda: np.zeros(0, int), repr=False)
    _open: np.ndarray = field(default_factory=lambda: np.zeros(0, bool), repr=False)
    _events: list[Any] = field(default_factory=list, repr=False)
    _costs: list[Any] = field(default_factory=list, repr=False)
    _runs: dict[str, Run] = field(default_factory=dict, repr=False)
    _found: dict[tuple[int, int], Any] = field(default_factory=dict, repr=False)
    _choices: list[tuple[str, str, np.ndarray]] = field(default_factory=list, repr=False)
    _rescaled: list[tuple[np.ndarray, list[tuple[str, int, np.ndarray]]]] = field(
        default_factory=list, repr=False
    )
    _left: np.ndarray | None = field(default=None, repr=False)
    """The classes that are still there, where the model was cut after the trace."""

    def __repr__(self) -> str:
        free = self.prunable()
        lines = [
            f"Graph of {counted(len(self.groups), 'group')}, of which {len(free)} can be cut; .explain() says more"
        ]
        if self.unreached:
            lines.append(f"  not reached by the trace: {', '.join(self.unreached)}")
        for kind in dict.fromkeys(g.kind for g in free):
            sizes = [g.size for g in free if g.kind == kind]
            lines.append(f"  {kind}: {sum(sizes):,} in {counted(len(sizes), 'group')}")
        return fit([*lines, *(f"  {group!r}" for group in self.groups)])

    def __getitem__(self, name: str) -> Group:
        for group in self.groups:
            if group.name == name:
                return group
        near = [g.name for g in self.groups if name.split(":")[0] in g.name][:5]
        raise SecateurError(f"no group {name!r}", where="Graph", fix=f"see graph.explain(); near: {near}")

    def prunable(self, kinds: Sequence[str] | str | None = None) -> list[Group]:
        """The groups that can be cut, of these kinds."""
        kinds = [kinds] if isinstance(kinds, str) else kinds
        return [g for g in self.groups if g.reason is None and (kinds is None or g.kind in kinds)]

    def unit_params(self, group: Group) -> int:
        """How many entries of parameters leave with one unit of a group, biases and norms included.

        >>> trace(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), x).unit_params(group)  # 3 and a bias, 2  # doctest: +SKIP
        6
        """
        own = [(s, self.shapes[s.name]) for s in group.slices if s.name in self._parameters]
        return sum(s.index.shape[1] * (prod(shape) // shape[s.dim]) for s, shape in own)

    def params(self, keep: Mapping[str, Tensor] | None = None, names: Sequence[str] | None = None) -> int:
        """Predicted number of parameters of the whole model (tied ones count once), or of the tensors in `names`."""
        shapes = {n: list(self.shapes[n]) for n in (self._parameters if names is None else names)}
        for group, kept in self._kept(keep):
            if group.modules:
                gone = [m for u, m in enumerate(group.modules) if u not in set(kept.tolist())]
                shapes = {n: s for n, s in shapes.items() if not _under(n, gone)}
            for s in group.slices:
                if s.name in shapes:
                    shapes[s.name][s.dim] -= (group.size - len(kept)) * s.index.shape[1]
        return sum(prod(s) for s in shapes.values())

    def macs(self, keep: Mapping[str, Tensor] | None = None) -> int:
        """Predicted multiply-adds of one forward on the traced inputs (convolutions, matrix products, attention)."""
        alive = self._alive(keep)
        gone = [
            m
            for g, kept in self._kept(keep)
            if g.whole  # what a missing expert did, others do
            for u, m in enumerate(g.modules)
            if u not in set(kept.tolist())
        ]
        total = 0
        for module, const, parts in self._costs:
            if not _under(module + ".", gone):
                total += const * prod(self._count(p, alive) for p in parts)
        return total

    def explain(self) -> str:
        """Every group: kind, number of units, share of the parameters it touches, and why it is frozen."""
        total = max(1, self.params())
        lines = [f"not reached by the trace: {name} {list(self.shapes[name])}" for name in self.unreached]
        if lines:
            lines.append("a branch that reads them may not run after a cut; trace it too, with also=[inputs]")
        for g in self.groups:
            share = self._touched(g) / total
            note = (
                f"frozen: {g.reason}"
                if g.reason
                else ("" if g.exact else "a norm or softmax mixes its units")
            )
            lines.append(
                f"{g.name:<48} {g.kind:<10} {g.size:>6} units {share:>7.1%} of parameters  {note}".rstrip()
            )
        lines += [f"operation without a rule: {name}: {why}" for name, why in self.unknown.items()]
        return "\n".join(lines)

    def endangered(self, keep: Mapping[str, Tensor]) -> list[str]:
        """Parameters out of the trace's reach with an axis that may need to shrink with what this cut removes.

        >>> graph.endangered({"fc1:neurons": torch.arange(4)})
        ['aux.weight']

        May need: it is as long as an axis that is cut, or a multiple of it (a flattened picture).
        """
        sizes = {
            self.shapes[s.name][s.dim]
            for group, kept in self._kept(keep)
            if len(kept) < group.size and not group.whole
            for s in group.slices
        }
        gone = [
            path
            for group, kept in self._kept(keep)
            for unit, path in enumerate(group.modules)
            if unit not in set(kept.tolist())
        ]
        return [
            name
            for name in self.unreached
            if not _under(name, gone) and any(n % size == 0 for n in self.shapes[name] for size in sizes)
        ]

    def _touched(self, group: Group) -> int:
        inside = [n for n in self._parameters if _under(n, group.modules)]
        own = set(self._parameters)
        return sum(prod(self.shapes[n]) for n in inside) + sum(
            s.index.numel() * prod(self.shapes[s.name]) // self.shapes[s.name][s.dim]
            for s in group.slices
            if s.name in own
        )

    def _kept(self, keep: Mapping[str, Tensor] | None) -> list[tuple[Group, Tensor]]:
        out = []
        for name, kept in (keep or {}).items():
            group = self[name]
            if group.reason is not None:
                raise SecateurError(
                    f"this group cannot be cut: {group.reason}", where=name, fix="leave it whole"
                )
            kept = torch.as_tensor(kept).cpu().long()
            if kept.ndim != 1 or len(kept) < min(1, group.least) or len(kept.unique()) != len(kept):
                raise SecateurError(
                    "kept units must be distinct, one at least", where=name, fix="keep some unit"
                )
            if len(kept) < group.least:
                raise SecateurError(
                    f"{len(kept)} kept units where the model picks among {group.least} or more",
                    where=name,
                    fix=f"keep {group.least}",
                )
            if len(kept) and (int(kept.min()) < 0 or int(kept.max()) >= group.size):
                raise SecateurError(
                    f"kept unit {int(kept.max())} of {group.size}",
                    where=name,
                    fix="use unit numbers of the graph",
                )
            out.append((group, kept.sort().values))
        return out

    def _alive(self, keep: Mapping[str, Tensor] | None) -> np.ndarray:
        alive = np.ones(len(self._open), bool) if self._left is None else self._left.copy()
        for group, kept in self._kept(keep):
            if not group.whole:
                gone = np.ones(group.size, bool)
                gone[kept.numpy()] = False
                alive[group._classes[gone]] = False
        return alive

    def _entries(self, axes: Axes, axis: int) -> Any:
        """The classes along an axis: None (constant) or an array [entries, labels of each entry]."""
        axis %= max(1, len(axes.shape))
        key = (id(axes), axis)
        if key not in self._found:
            found = None
            for layer in axes.layers:
                if layer.shape[axis] > 1:
                    if layer.size == layer.shape[axis]:
                        rows = self._class[layer.reshape(-1, 1)]
                    else:
                        rows = self._class[np.moveaxis(layer, axis, 0).reshape(layer.shape[axis], -1)]
                        if (rows == rows[:, :1]).all():
                            rows = rows[:, :1]
                    if self._open[rows].any():
                        found = rows
                    break
            self._found[key] = (found, axes)
        return self._found[key][0]

    def _count(self, part: Any, alive: np.ndarray) -> int:
        rows, start, stop, sign = part
        if rows is None:
            return sign * (stop - start)
        return sign * int(alive[rows[start:stop]].any(1).sum())

    def assign(self, keep: Mapping[str, Tensor]) -> tuple[dict[Attribute, int], list[str]]:
        """The values that integer attributes must take, and the places where none would fit."""
        changed, trouble = self._solve(keep)
        return changed, [text for text, _ in trouble]

    def troubled(self, keep: Mapping[str, Tensor]) -> list[list[str]]:
        """For each place where no attribute fits, the groups of `keep` that meet there."""
        _, trouble = self._solve(keep)
        out = []
        for _, rows in trouble:
            met = np.unique(np.concatenate([r.ravel() for r in rows])) if rows else np.zeros(0, int)
            out.append([n for n in keep if np.isin(self[n]._classes, met).any()])
        return out

    def _solve(self, keep: Mapping[str, Tensor]) -> tuple[dict[Attribute, int], list[tuple[str, list]]]:
        alive = self._alive(keep)
        want: dict[Attribute, int] = {}
        trouble: list[tuple[str, list]] = []
        pending = []

        def at(leaf: Attribute | Extent, values: Mapping[Attribute, int]) -> int:
            if isinstance(leaf, Extent):
                rows = self._entries(leaf.axes, leaf.axis)
                return self._count((rows, 0, leaf.axes.shape[leaf.axis], 1), alive)
            return values.get(leaf, self._old(leaf))

        for expr, part, where, module in self._events:
            target = self._count(part, alive)
            rows = [] if part[0] is None else [part[0]]
            if isinstance(expr, Attribute):
                if want.setdefault(expr, target) != target:
                    text = f"{module}.{expr.name} would have to be {want[expr]} and {target} ({where})"
                    trouble.append((text, rows))
            else:
                for leaf in leaves(expr):
                    found = self._entries(leaf.axes, leaf.axis) if isinstance(leaf, Extent) else None
                    rows += [] if found is None else [found]
                pending.append((expr, target, where, module, rows))
        # Two passes: an attribute solved in the first can settle an expression of several.
        for _ in range(2):
            for expr, target, _where, _module, _rows in pending:
                unknown = sorted(
                    {a for a in leaves(expr) if isinstance(a, Attribute) and a not in want}, key=str
                )
                if _try(expr, lambda leaf: at(leaf, want)) == target:
                    continue
                for leaf in unknown:
                    fits = (
                        v
                        for v in range(1, self._old(leaf) + 1)
                        if self._fits(expr, at, want, leaf, v, target)
                    )
                    value = next(fits, None)
                    if value is not None:
                        want[leaf] = value
                        break
        for expr, target, where, module, rows in pending:
            got = _try(expr, lambda leaf: at(leaf, want))
            if got != target:
                trouble.append((f"{module}: a size becomes {got} where {target} is needed ({where})", rows))
        changed = {a: v for a, v in want.items() if v != self._old(a)}
        return changed, trouble

    def _fits(self, expr: Any, at: Any, want: dict, leaf: Attribute, value: int, target: int) -> bool:
        trial = {**want, leaf: value}
        return _try(expr, lambda x: at(x, trial)) == target

    def _old(self, attribute: Attribute) -> int:
        return self._attributes[attribute]

    @property
    def _attributes(self) -> dict[Attribute, int]:
        return self.__dict__.setdefault("_attribute_values", {})


def _try(expr: Any, value: Any) -> int | None:
    try:
        return evaluate(expr, value)
    except (ZeroDivisionError, ValueError):
        return None


def _under(name: str, paths: Sequence[str]) -> bool:
    return any(name.startswith(p + ".") for p in paths)
