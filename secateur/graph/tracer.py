"""The tracer: which label every index of every value carries, and what rules may ask and note.

It runs nothing and knows no rule: `secateur.graph.run` runs the model and lets rules call this.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import Any, Self

import numpy as np
import torch
from torch import nn

from secateur.graph.labels import Axes, Labels, along
from secateur.graph.notes import Event, Layer, Notes, Part
from secateur.graph.sizes import Attribute, Size, leaves
from secateur.graph.source import source_line, source_place
from secateur.utils.running import flat_ints, flat_items, module_paths


class AxesByTensor:
    """The axes of each living tensor: a dictionary by identity that forgets tensors when they are freed."""

    def __init__(self) -> None:
        self.entries: dict[int, tuple[Axes, weakref.ref | None]] = {}
        entries = self.entries

        def forget(ref: weakref.ref) -> None:
            entries.pop(ref.key, None)  # type: ignore[attr-defined]

        self.forget = forget

    def get(self, tensor: torch.Tensor) -> Axes | None:
        pair = self.entries.get(id(tensor))
        return None if pair is None else pair[0]

    def hold(self, tensor: torch.Tensor, axes: Axes) -> None:
        """For a tensor that someone keeps as long as this lives: there is nothing to forget."""
        self.entries[id(tensor)] = (axes, None)

    def __setitem__(self, tensor: torch.Tensor, axes: Axes) -> None:
        key = id(tensor)
        pair = self.entries.get(key)
        self.entries[key] = (axes, Key(tensor, self.forget) if pair is None else pair[1])


class Key(weakref.ref):
    """A weak reference that knows the identity of what it refers to."""

    __slots__ = ("key",)
    key: int

    def __new__(cls, tensor: torch.Tensor, forget: Any) -> Self:
        self = super().__new__(cls, tensor, forget)
        self.key = id(tensor)
        return self


class Reason:
    """Why the running operation freezes labels; the text, with the line of the model's code, is made when asked for."""

    __slots__ = ("made", "text", "tracer")

    def __init__(self, tracer: Tracer, text: str):
        self.tracer, self.text, self.made = tracer, text, ""

    def __str__(self) -> str:
        if not self.made:
            module = self.tracer.stack[-1]
            self.made = f"{self.text} ({self.tracer.op}{' in ' + module if module else ''}, {source_line()})"
        return self.made


class Tracer:
    """The labels of a model's tensors, where the run is now, and the notes that rules take.

    What rules use: `labels` (tie, find, flag, new), `notes`, the two switches `inner` and `whole_groups`, and the
    methods under "what rules call". What the run sets: `stack` (paths of the running modules), `op` (the operation),
    `current` (the Python call around it), `off` (above zero: operations are not looked at).
    """

    def __init__(self, model: nn.Module, whole_groups: frozenset[str] = frozenset(), inner: bool = False):
        self.model, self.whole_groups, self.inner = model, whole_groups, inner
        self.notes = Notes()
        self.env = AxesByTensor()
        self.stack: list[str] = [""]
        self.op = ""
        self.off = 0
        self.current: tuple[str, Sequence[Any]] = ("", ())
        self.last_number: tuple[np.ndarray, int] | None = None
        self.ids: dict[tuple[str, int], np.ndarray] = {}  # (parameter, dim) -> its labels
        self.own: dict[str, Axes] = {}
        self.aliases: dict[str, str] = {}
        self.by_storage: dict[tuple, Axes] = {}
        self.paths = list(module_paths(model))
        self.modules = {id(item[1]): item for item in reversed(self.paths)}
        self.places = {
            f"{path}.{name}".lstrip("."): (path, n, len(module))
            for path, module in self.unique()
            if isinstance(module, nn.ModuleList) and len(module) > 1
            for n, name in enumerate(module._modules)
        }
        self.listed = {
            f"{path}.{name}".lstrip(".")
            for path, module in self.unique()
            if isinstance(module, (nn.ModuleList, nn.Sequential))
            for name in module._modules
        }
        self._label_parameters()

    # --- the model's modules and tensors

    def unique(self) -> Iterator[tuple[str, nn.Module]]:
        """Every module once, by its first path, in the order of `named_modules`."""
        return (item for item in self.paths if self.modules[id(item[1])] is item)

    def tensors(self, kind: str) -> Iterator[tuple[str, torch.Tensor]]:
        """Named parameters or buffers (`_parameters`, `_buffers`), shared ones by all their names."""
        for path, module in self.paths:
            if held := getattr(module, kind):
                start = path + "." if path else ""
                for name, tensor in held.items():
                    if tensor is not None:
                        yield start + name, tensor

    def unreached(self) -> list[str]:
        """Parameters that no operation of a run has read, by their first names."""
        return [
            name
            for name, tensor in self.parameters
            if name in self.own and tensor.numel() and name not in self.notes.uses
        ]

    def _label_parameters(self) -> None:
        """Fresh labels for every index of every axis; two names of one storage share theirs."""
        names: dict[tuple, str] = {}
        self.parameters = list(self.tensors("_parameters"))
        self.buffers = list(self.tensors("_buffers"))
        named = [*self.parameters, *self.buffers]
        self.labels = Labels(1024 + sum(sum(v.shape) for _, v in named if v.is_floating_point()))
        fresh, at = self.labels.parent.copy(), 0
        for name, tensor in named:
            if not tensor.is_floating_point():
                continue
            key = storage_key(tensor)
            if tensor.numel() and key in names:
                self.aliases[name] = names[key]
                self.env.hold(tensor, self.by_storage[key])
                continue
            shape, layers = tuple(tensor.shape), []
            for d, n in enumerate(shape):
                if n > 1:
                    ids = self.ids[name, d] = fresh[at : at + n]
                    at += n
                    layers.append(along(ids, len(shape), d))
            axes = self.own[name] = Axes(shape, layers, frozenset([name]))
            self.env.hold(tensor, axes)
            if tensor.numel():
                names[key], self.by_storage[key] = name, axes
        self.labels.new(at)

    def axes(self, tensor: torch.Tensor) -> Axes:
        """The axes of a tensor; an unseen one is a constant, unless it is a parameter's `.data`."""
        axes = self.env.get(tensor)
        if axes is None:
            if tensor.is_floating_point() and tensor.layout == torch.strided:
                axes = self.by_storage.get(storage_key(tensor))
            if axes is None:
                axes = Axes(tuple(tensor.shape), [], frozenset())
            self.env[tensor] = axes
        return axes

    # --- what rules call

    def reason(self, text: str) -> Reason:
        """A reason with the running operation, module and line, made a text only where it is needed."""
        return Reason(self, text)

    def freeze(self, ids: np.ndarray, why: object) -> None:
        """These labels can't leave."""
        self.labels.freeze(ids, why)

    def weight(self, x: Axes, outs: Sequence[int], ins: Sequence[int]) -> None:
        """A value made of parameters only is used as a weight: note the role of their dims."""
        if not x.params:
            return
        ids, roles, find = self.ids, self.notes.roles, self.labels.find
        name = next(iter(x.params))
        if self.own.get(name) is x:
            for role, dims in (("out", outs), ("in", ins)):
                for d in dims:
                    key = (name, d if d >= 0 else d + len(x.shape))
                    if key in ids:
                        roles.setdefault(key, role)
            return
        # Computed from parameters: a dim has the role of the axis that its labels have come to.
        candidates = ids if len(x.params) > 1 else [(name, d) for d in range(8) if (name, d) in ids]
        keys = [key for key in candidates if key[0] in x.params and key not in roles]
        for role, axes in (("out", outs), ("in", ins)):
            for axis in axes:
                for layer in x.layers:
                    if axis < layer.ndim and layer.shape[axis] > 1:
                        met = np.zeros(self.labels.count, bool)
                        met[find(np.ravel(layer))] = True
                        for key in keys:
                            if key not in roles and met[find(ids[key])].any():
                                roles[key] = role

    def origin(self, xs: Sequence[Axes | None]) -> frozenset[str] | None:
        """The parameters that a value was computed from; None when an activation is among its operands."""
        names: frozenset[str] = frozenset()
        for x in xs:
            if x is None:
                continue
            if x.params is None:
                return None
            names |= x.params
        return names

    def rigid(self, layer: np.ndarray, axis: int, why: object) -> None:
        """This axis can't shrink: another of the same labels must, or none."""
        self.notes.rigids.append((layer, axis, str(why)))

    def choice(self, name: str, layer: np.ndarray) -> None:
        """Units compete here (softmax, topk): a masked model must leave the removed ones out."""
        self.notes.choices.append((self.stack[-1], name.strip("_").removeprefix("safe_"), layer))

    def cost(self, dims: list[Any]) -> None:
        """The running module does as many multiply-adds as the product of these sizes: ints or (axes, axis)."""
        self.notes.costs.append((self.stack[-1], dims))

    def layer(
        self,
        tensors: Mapping[str, Axes | None],
        dims: tuple[int, int] = (0, 1),
        reads: np.ndarray | None = None,
        groups: int = 1,
        transposed: bool = False,
    ) -> None:
        """These tensors work on channels here; those that depend on the input are none of the layer's."""
        names = {
            part: self._parameter(x) for part, x in tensors.items() if x is not None and x.params is not None
        }
        if names:
            self.notes.layers.append(Layer(self.stack[-1], names, dims, reads, groups, transposed))

    def _parameter(self, x: Axes) -> str:
        """The tensor of the model that a value is, or is a view of; "" where there is none."""
        name = next(iter(x.params)) if x.params and len(x.params) == 1 else ""
        own = self.own.get(name)
        return name if own is x or (own is not None and prod(own.shape) == prod(x.shape)) else ""

    def event(self, expr: Any, part: Part, place: tuple[str, int] | None = None) -> None:
        """The code passed a size with this expression where `part` says what it has to be."""
        self.notes.events.append(Event(expr, part, place or source_place(), self.stack[-1]))

    def sized(self, value: Any, axes: Axes, axis: int) -> None:
        """An operation was given the size of this axis of its result."""
        if isinstance(value, Size):
            self.event(value.expr, Part(axes, axis, 0, axes.shape[axis]))

    def by_number(self, ids: np.ndarray, value: int, alone: bool = False) -> None:
        """The code treats one unit by its number: sound where it does so to all, as a loop over expert modules does."""
        extra = set(self.beyond(ids))
        ids = ids[[n for n in range(len(ids)) if n not in extra]]
        why = str(self.reason("units are told apart by number"))
        self.notes.numbered.append((ids, None if alone else value, why))
        self.last_number = (ids, value)

    def beyond(self, picks: np.ndarray) -> list[int]:
        """Positions that belong to no unit, such as one more class than there are experts."""
        extras = self.notes.extras
        return [n for n, label in enumerate(picks.tolist()) if label in extras] if extras else []

    def picked_by(self, value: int) -> np.ndarray | None:
        """The labels that an integer index of the running call is a position among."""
        for arg in flat_items(self.current[1]):
            if isinstance(arg, Picked) and int(arg) == value:
                return arg.picks
            if isinstance(arg, torch.Tensor) and arg.dim() == 0 and not arg.is_floating_point():
                axes = self.env.get(arg)
                if axes is not None and axes.picks is not None and int(arg) == value:
                    return axes.picks
        return None

    def part(self, x: Axes, d: int, parts: list[tuple[int, int]], step: int) -> None:
        """A labelled axis is cut at these places: they follow from attributes, or the blocks stay in step."""
        sizes = [v for v in flat_ints(self.current[1]) if isinstance(v, Size)]
        settable = [v for v in sizes if any(isinstance(leaf, Attribute) for leaf in leaves(v.expr))]
        if settable and step == 1:
            self._part_by_attribute(x, d, parts, settable)
        else:
            self._part_at_constants(x, d, parts, step)

    def _part_by_attribute(self, x: Axes, d: int, parts: list[tuple[int, int]], sizes: list[Size]) -> None:
        """An attribute that equals a bound (from the front or the end) or a length must follow it."""
        size, where = x.shape[d], source_place()
        for a, b in parts:
            for v in sizes:
                n, part = int(v), None
                if len(parts) > 1:
                    part = Part(x, d, a, b) if n == b - a else None
                elif n >= 0:
                    part = Part(x, d, 0, n) if n in (a, b) else None
                elif size + n in (a, b):
                    part = Part(x, d, size + n, size, -1)
                if part is not None:
                    self.event(v.expr, part, where)

    def _part_at_constants(self, x: Axes, d: int, parts: list[tuple[int, int]], step: int) -> None:
        """Equal blocks can lose the same entries of each; otherwise the axis is rigid."""
        size, (first, last) = x.shape[d], parts[0]
        length = last - first
        even = step == 1 and length > 0 and size % length == 0
        even = even and all(b - a == length and a % length == 0 for a, b in parts)
        strided = step > 1 and size % step == 0 and first < step and last == size
        for layer in x.layers:
            if layer.shape[d] == 1:
                continue
            width = step if strided else length
            blocks = layer
            if strided or even:  # [..., size, ...] -> [..., blocks, width, ...]
                blocks = layer.reshape(*layer.shape[:d], size // width, width, *layer.shape[d + 1 :])
            if strided:
                self.rigid(blocks, d + 1, self.reason("every other entry of this axis is taken"))
            else:
                self.rigid(blocks, d, self.reason("this axis is cut at constant places"))


def storage_key(tensor: torch.Tensor) -> tuple:
    """What two names of one parameter, and its `.data`, have in common."""
    return (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.device)


# --- numbers of units that have become Python integers


class Picked(int):
    """The number of a unit, read from a tensor. To calculate with it freezes the units."""

    picks: np.ndarray
    tracer: Tracer

    def __new__(cls, value: int, tracer: Tracer, picks: np.ndarray) -> Self:
        self = int.__new__(cls, value)
        self.tracer, self.picks = tracer, picks
        return self

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, int) or int(other) not in (len(self.picks), *self.tracer.beyond(self.picks)):
            self._used()
        return int(self) == other

    def __hash__(self) -> int:
        self._used()
        return hash(int(self))

    def _used(self) -> None:
        self.tracer.freeze(self.picks, self.tracer.reason("units are told apart by number"))


def _frozen_by(name: str) -> None:
    plain = getattr(int, name)

    def method(self: Picked, *args: Any) -> Any:
        self._used()
        return plain(int(self), *args)

    setattr(Picked, name, method)


for _name in ("add", "radd", "sub", "rsub", "mul", "rmul", "floordiv", "rfloordiv", "mod", "rmod", "lt", "le", "gt", "ge",
              "neg", "pow", "str", "repr", "format"):  # fmt: skip
    _frozen_by(f"__{_name}__")
