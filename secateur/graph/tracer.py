"""The tracer: which label every index of every value carries, and what follows from an operation."""

from __future__ import annotations

import functools
import linecache
import sys
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Self

import numpy as np
import torch
from torch import nn

from secateur.errors import SecateurError
from secateur.graph.labels import Axes, Labels, NoRule, along
from secateur.graph.rules import RULES, Call
from secateur.graph.rules.moves import pointwise
from secateur.graph.rules.pick import numbers
from secateur.graph.sizes import Attribute, Extent, Size, expression, leaves
from secateur.utils.inputs import as_call
from secateur.utils.running import (
    _flat,
    evaluating,
    flat_ints,
    flat_items,
    flat_tensors,
    without_cache,
    without_stale,
)


class Part:
    """The number of entries kept between two places of an axis; negative when counted from the end."""

    def __init__(self, axes: Axes, axis: int, start: int, stop: int, sign: int = 1):
        self.axes, self.axis, self.start, self.stop, self.sign = (
            axes,
            axis % len(axes.shape),
            start,
            stop,
            sign,
        )


class Event:
    """A size that was passed to an operation, and what it has to be."""

    def __init__(self, expr: Any, part: Part, place: tuple[str, int], module: str):
        self.expr, self.part, self.place, self.module = expr, part, place, module

    @property
    def where(self) -> str:
        return line(*self.place)


class Known:
    """What is known of each living tensor: a dictionary by identity that forgets tensors when they are freed."""

    def __init__(self) -> None:
        self.found: dict[int, tuple[Axes, weakref.ref]] = {}
        found = self.found

        def forget(ref: weakref.ref) -> None:
            found.pop(ref.key, None)  # type: ignore[attr-defined]

        self.forget = forget

    def get(self, tensor: torch.Tensor) -> Axes | None:
        pair = self.found.get(id(tensor))
        return None if pair is None else pair[0]

    def __setitem__(self, tensor: torch.Tensor, axes: Axes) -> None:
        key = id(tensor)
        pair = self.found.get(key)
        self.found[key] = (axes, Key(tensor, self.forget) if pair is None else pair[1])


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

    __slots__ = ("text", "tracer")

    def __init__(self, tracer: Tracer, text: str):
        self.tracer, self.text = tracer, text

    def __str__(self) -> str:
        module = self.tracer.stack[-1]
        return f"{self.text} ({self.tracer.op}{' in ' + module if module else ''}, {source_line()})"


class Tracer:
    """Labels, and what was learnt on the way: splits, rigid axes, sizes, costs, uses of weights, calls of modules."""

    def __init__(self, model: nn.Module, whole_groups: frozenset[str] = frozenset(), inner: bool = False):
        self.model = model
        self.inner = inner
        self.rescaled: list[tuple[np.ndarray, list[np.ndarray], str]] = []
        self.whole_groups = whole_groups
        self.grouped: dict[str, np.ndarray] = {}
        self.env = Known()
        self.splits: list[np.ndarray] = []
        self.rigids: list[tuple[np.ndarray, int, str]] = []
        self.events: list[Event] = []
        self.costs: list[tuple[str, list[Any]]] = []
        self.roles: dict[tuple[str, int], str] = {}
        self.ids: dict[tuple[str, int], np.ndarray] = {}
        self.own: dict[str, Axes] = {}
        self.aliases: dict[str, str] = {}
        self.calls: dict[str, list[tuple[Axes | None, Axes | None]]] = {}
        self.stack: list[str] = [""]
        self.op = ""
        self.off = 0
        self.current: tuple[str, Sequence[Any]] = ("", ())
        self.unknown: dict[str, str] = {}
        self.uses: dict[str, int] = {}
        self.normalised: set[str] = set()
        self.floors: list[tuple[np.ndarray, int]] = []
        self.choices: list[tuple[str, str, np.ndarray]] = []
        self.extras: set[int] = set()
        self.numbered: list[tuple[np.ndarray, int | None, str]] = []
        self.last_number: tuple[np.ndarray, int] | None = None
        self.experts: dict[str, np.ndarray] = {}
        self.paths = list(module_paths(model))
        self.modules = {id(item[1]): item for item in reversed(self.paths)}
        self.places = {
            f"{path}.{name}".lstrip("."): (path, n, len(module))
            for path, module in self.unique()
            if isinstance(module, nn.ModuleList) and len(module) > 1
            for n, name in enumerate(module._modules)
        }
        self.grains: list[tuple[np.ndarray, int]] = []
        self._label_parameters()

    # --- parameters

    def unique(self) -> Iterator[tuple[str, nn.Module]]:
        """Every module once, by its first path, in the order of `named_modules`."""
        return (item for item in self.paths if self.modules[id(item[1])] is item)

    def tensors(self, kind: str) -> Iterator[tuple[str, torch.Tensor]]:
        """Named parameters or buffers (`_parameters`, `_buffers`), shared ones by all their names."""
        for path, module in self.paths:
            start = path + "." if path else ""
            for name, tensor in getattr(module, kind).items():
                if tensor is not None:
                    yield start + name, tensor

    def _label_parameters(self) -> None:
        by_storage: dict[tuple, str] = {}
        named = [*self.tensors("_parameters"), *self.tensors("_buffers")]
        self.labels = Labels(1024 + sum(sum(v.shape) for _, v in named if v.is_floating_point()))
        self.by_storage: dict[tuple, Axes] = {}
        for name, tensor in named:
            if not tensor.is_floating_point():
                continue
            key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.device)
            if tensor.numel() and key in by_storage:
                self.aliases[name] = by_storage[key]
                self.env[tensor] = self.by_storage[key]
                continue
            shape, layers = tuple(tensor.shape), []
            for d, n in enumerate(shape):
                if n > 1:
                    self.ids[name, d] = self.labels.new(n)
                    layers.append(along(self.ids[name, d], len(shape), d))
            axes = self.own[name] = Axes(shape, layers, frozenset([name]))
            self.env[tensor] = axes
            if tensor.numel():
                by_storage[key] = name
                self.by_storage[key] = axes

    def axes(self, tensor: torch.Tensor) -> Axes:
        """What is known of a tensor; an unseen one is a constant, unless it is a parameter's `.data`."""
        found = self.env.get(tensor)
        if found is None:
            if tensor.is_floating_point() and tensor.layout == torch.strided:
                key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.device)
                found = self.by_storage.get(key)
            if found is None:
                found = Axes(tuple(tensor.shape), [], frozenset())
            self.env[tensor] = found
        return found

    # --- what rules call

    def reason(self, text: str) -> Reason:
        return Reason(self, text)

    def freeze(self, ids: np.ndarray, why: object) -> None:
        self.labels.freeze(ids, why)

    def weight(self, x: Axes, outs: Sequence[int], ins: Sequence[int]) -> None:
        """A value made of parameters only is used as a weight: note the role of their dims."""
        if not x.params:
            return
        name = next(iter(x.params))
        if self.own.get(name) is x:
            for role, dims in (("out", outs), ("in", ins)):
                for d in dims:
                    key = (name, d if d >= 0 else d + len(x.shape))
                    if key in self.ids:
                        self.roles.setdefault(key, role)
            return
        names = [key for key in self.ids if key[0] in x.params and key not in self.roles] if len(x.params) > 1 else [
            (name, d) for name in x.params for d in range(8) if (name, d) in self.ids and (name, d) not in self.roles
        ]  # fmt: skip
        for role, axes in (("out", outs), ("in", ins)):
            for axis in axes:
                for layer in x.layers:
                    if axis < layer.ndim and layer.shape[axis] > 1:
                        met = np.zeros(self.labels.count, bool)
                        met[self.labels.find(np.ravel(layer))] = True
                        for key in names:
                            if key not in self.roles and met[self.labels.find(self.ids[key])].any():
                                self.roles[key] = role

    def origin(self, xs: Sequence[Axes | None]) -> frozenset[str] | None:
        names: frozenset[str] = frozenset()
        for x in xs:
            if x is None:
                continue
            if x.params is None:
                return None
            names |= x.params
        return names

    def rigid(self, layer: np.ndarray, axis: int, why: object) -> None:
        self.rigids.append((layer, axis, str(why)))

    def choice(self, name: str, layer: np.ndarray) -> None:
        """Units compete here (softmax, topk): a masked model must leave the removed ones out."""
        self.choices.append((self.stack[-1], name.strip("_").removeprefix("safe_"), layer))

    def sized(self, value: Any, axes: Axes, axis: int) -> None:
        """An operation was given the size of this axis of its result."""
        if isinstance(value, Size):
            part = Part(axes, axis, 0, axes.shape[axis])
            self.events.append(Event(value.expr, part, source_place(), self.stack[-1]))

    def told(self, ids: np.ndarray, value: int, alone: bool = False) -> None:
        """The code treats one unit by its number: sound where it does so to all, as a loop over expert modules does."""
        ids = ids[[n for n in range(len(ids)) if n not in self.beyond(ids)]]
        self.numbered.append(
            (ids, None if alone else value, str(self.reason("units are told apart by number")))
        )
        self.last_number = (ids, value)

    def called(self, path: str) -> None:
        """A module of a list runs; it is an expert if its position was just asked for."""
        if path in self.places and self.last_number is not None:
            container, place, count = self.places[path]
            ids, value = self.last_number
            if value == place and len(ids) == count:
                self.experts.setdefault(container, ids)

    def beyond(self, picks: np.ndarray) -> list[int]:
        """Positions that belong to no unit, such as one more class than there are experts."""
        return [n for n, label in enumerate(picks.tolist()) if label in self.extras]

    def picked_by(self, value: int) -> np.ndarray | None:
        """The labels that an integer index of the running call is a position among."""
        for arg in flat_items(self.current[1]):
            if isinstance(arg, Picked) and int(arg) == value:
                return arg.picks
            if isinstance(arg, torch.Tensor) and arg.dim() == 0 and not arg.is_floating_point():
                known = self.env.get(arg)
                if known is not None and known.picks is not None and int(arg) == value:
                    return known.picks
        return None

    def cost(self, dims: list[Any]) -> None:
        self.costs.append((self.stack[-1], dims))

    def part(self, x: Axes, d: int, parts: list[tuple[int, int]], step: int) -> None:
        """A labelled axis is cut at given places: they follow from attributes, or the blocks stay in step."""
        size = x.shape[d]
        sizes = [v for v in flat_ints(self.current[1]) if isinstance(v, Size)]
        settable = [v for v in sizes if any(isinstance(leaf, Attribute) for leaf in leaves(v.expr))]
        where = source_place()
        if settable and step == 1:
            single = len(parts) == 1
            for a, b in parts:
                for v in settable:
                    targets = []
                    if single and int(v) >= 0:
                        targets = [Part(x, d, 0, int(v))] if int(v) in (a, b) else []
                    elif single:
                        targets = [Part(x, d, size + int(v), size, -1)] if size + int(v) in (a, b) else []
                    elif int(v) == b - a:
                        targets = [Part(x, d, a, b)]
                    self.events += [Event(v.expr, target, where, self.stack[-1]) for target in targets]
            return
        length = parts[0][1] - parts[0][0]
        even = all(b - a == length and a % length == 0 for a, b in parts) if length else False
        for layer in x.layers:
            if layer.shape[d] == 1:
                continue
            if step > 1 and size % step == 0 and parts[0][0] < step and parts[0][1] == size:
                blocks = layer.reshape(*layer.shape[:d], size // step, step, *layer.shape[d + 1 :])
                self.rigid(blocks, d + 1, self.reason("every other entry of this axis is taken"))
            elif even and size % length == 0 and step == 1:
                blocks = layer.reshape(*layer.shape[:d], size // length, length, *layer.shape[d + 1 :])
                self.rigid(blocks, d, self.reason("this axis is cut at constant places"))
            else:
                self.rigid(layer, d, self.reason("this axis is cut at constant places"))

    # --- running

    def run(self, inputs: Any) -> list[Axes]:
        from secateur.graph.run import Dispatch, Functions, watched_sizes

        args, kwargs = as_call(inputs)
        modules = list(self.unique())
        for value in flat_tensors((args, kwargs)):
            self.env[value] = Axes(tuple(value.shape), [], None)
        with ExitStack() as stack:
            stack.enter_context(evaluating(self.model))
            stack.enter_context(without_stale(modules))
            stack.enter_context(torch.no_grad())
            stack.enter_context(watched_sizes(modules))
            stack.enter_context(without_cache(self.model))
            stack.enter_context(self._hooked(modules))
            stack.enter_context(Dispatch(self))
            stack.enter_context(Functions(self))
            try:
                output = self.model(*args, **kwargs)
            except SecateurError:
                raise
            except Exception as error:
                raise SecateurError(
                    f"the model does not run on these inputs: {type(error).__name__}: {error}",
                    where="trace",
                    fix="give inputs on which model(*inputs) or model(**inputs) works",
                ) from error
        return [self.axes(value) for value in flat_tensors(output)]

    @contextmanager
    def _hooked(self, modules: Sequence[tuple[str, nn.Module]]) -> Iterator[None]:
        """Know which module runs, and what goes in and comes out."""
        handles = []
        for path, module in modules:
            if not isinstance(module, torch.jit.ScriptModule):
                enter, leave = functools.partial(self._enter, path), functools.partial(self._leave, path)
                handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
                handles.append(module.register_forward_hook(leave))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, path: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.stack.append(path)
        self.off += 1
        seen = [self.axes(v) for v in _flat(kwargs, _flat(args, []))]
        self.off -= 1
        self.calls.setdefault(path, []).append((seen, None))  # type: ignore[arg-type]
        self.called(path)

    def _leave(self, path: str, module: nn.Module, args: Any, output: Any) -> None:
        self.stack.pop()
        calls = self.calls[path]
        first = output if isinstance(output, torch.Tensor) else next(iter(_flat(output, [])), None)
        if first is None:
            return
        self.off += 1
        out = self.axes(first)
        self.off -= 1
        seen: Any = calls[-1][0]
        if isinstance(seen, list):
            calls[-1] = (next((x for x in seen if x.shape == out.shape), None), out)

    def apply(self, op: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> None:
        """Label the results of one operation."""
        full, name, in_place, is_pointwise = described(op)
        self.op = full
        named = bind(op, args, kwargs)
        tensors: dict[str, Any] = {}
        for key, value in named.items():
            if isinstance(value, torch.Tensor):
                tensors[key] = self.axes(value)
            elif isinstance(value, (list, tuple)) and any(isinstance(v, torch.Tensor) for v in value):
                tensors[key] = [self.axes(v) if isinstance(v, torch.Tensor) else None for v in value]
        outs = list(flat_tensors(result))
        if not outs:
            first = tensors.get("self")
            if (
                isinstance(first, Axes)
                and first.picks is not None
                and self.current[0] not in ("__getitem__", "item", "__index__")
            ):
                self.freeze(first.picks, self.reason("units are told apart by number"))
            return
        shapes = [tuple(o.shape) for o in outs]
        call = Call(name, named, tensors, shapes)
        xs = call.tensors()
        try:
            if any(x.layers or x.picks is not None for x in xs):
                if name in RULES:
                    made = RULES[name](self, call)
                elif is_pointwise:
                    made = pointwise(self, call)
                else:
                    raise NoRule
            else:
                made = [Axes(shape, [], self.origin(xs)) for shape in shapes]
        except (
            NoRule,
            NotImplementedError,
            IndexError,
            KeyError,
            ValueError,
            TypeError,
            AssertionError,
        ) as error:
            told = "" if isinstance(error, NoRule) else f": {type(error).__name__} {error}"
            why = str(self.reason(f"no rule for this {name}{told}"))
            self.unknown.setdefault(name, why)
            for x in xs:
                for layer in [*x.layers, *([] if x.picks is None else [x.picks])]:
                    self.freeze(layer, why)
            made = [Axes(shape, [], self.origin(xs)) for shape in shapes]
        if isinstance(made, Axes):
            made = [made]
        if any(x.picks is not None for x in xs):
            numbers(self, call, made)
        for n, out in enumerate(outs):
            axes = made[n] if n < len(made) else None
            if axes is None or axes.shape != shapes[n]:
                same = shapes[n] == made[0].shape
                axes = Axes(shapes[n], made[0].layers if same else [], made[0].params)
            if in_place and n == 0:
                self._written(out, axes, named)
            self.env[out] = axes
        for name in self.origin(xs) or ():
            self.uses.setdefault(name, len(self.uses))
        for x in xs:
            if x.params:
                for name in x.params:
                    self.uses.setdefault(name, len(self.uses))

    def _written(self, out: torch.Tensor, axes: Axes, named: Mapping[str, Any]) -> None:
        """A write into a view reaches its base: labels that the base does not know cannot be cut."""
        before = self.env.get(out)
        base = out._base
        if base is None or not axes.layers:
            return
        known = {k for layer in (before.layers if before else []) for k, n in enumerate(layer.shape) if n > 1}
        for layer in axes.layers:
            if any(k not in known for k, n in enumerate(layer.shape) if n > 1):
                self.freeze(layer, self.reason("written into a part of another tensor"))

    def sizes(self, name: str, args: Sequence[Any], result: Any) -> None:
        """Note the integers that a reshaping call was given."""
        out = result if isinstance(result, torch.Tensor) else None
        if out is None:
            return
        axes = self.axes(out)
        ints = list(args[1:]) if not isinstance(args[0], int) else list(args)
        if name == "unflatten":
            first = int(ints[0]) % args[0].dim() if isinstance(ints[0], int) else 0
            ints = [None] * first + list(ints[1])
            ints += [None] * (axes_rank(axes) - len(ints))
        elif len(ints) == 1 and isinstance(ints[0], (tuple, list)):
            ints = list(ints[0])
        if len(ints) != axes_rank(axes):
            return
        where = source_place()
        if name == "expand":
            self.expanded(args[0], out, ints)
            axes = self.axes(out)
        for k, value in enumerate(ints):
            if isinstance(value, Size):
                self.events.append(Event(value.expr, Part(axes, k, 0, axes.shape[k]), where, self.stack[-1]))

    def expanded(self, source: torch.Tensor, out: torch.Tensor, ints: Sequence[Any]) -> None:
        """An axis expanded to a size that an attribute holds can shrink: it gets labels of its own."""
        axes, pad = self.axes(out), out.dim() - source.dim()
        layers = list(axes.layers)
        for k, value in enumerate(ints):
            grown = k < pad or source.shape[k - pad] == 1
            settable = any(isinstance(a, Attribute) for a in leaves(expression(value)))
            if grown and settable and value > 1 and not axes.has(k):
                layers.append(along(self.labels.new(int(value)), out.dim(), k))
        self.env[out] = Axes(axes.shape, layers, axes.params)

    def factory(self, name: str, args: Sequence[Any], result: torch.Tensor) -> None:
        """A tensor made with the size of a labelled axis shrinks with it."""
        shape = args[1:] if name.startswith("new_") else args
        if shape and isinstance(shape[0], (tuple, list)):
            shape = shape[0]
        rank, layers = result.dim(), []
        for k, value in enumerate(shape[:rank]):
            expr = expression(value)
            if isinstance(expr, Extent) and int(value) > 1:
                for layer in expr.axes.layers:
                    if layer.shape[expr.axis] > 1 and sum(n > 1 for n in layer.shape) == 1:
                        layers.append(along(layer.reshape(-1), rank, k))
                        break
            elif isinstance(expr, Attribute) and int(value) > 1:
                layers.append(along(self.labels.new(int(value)), rank, k))
            if isinstance(value, Size):
                part = Part(Axes(tuple(result.shape), layers), k, 0, int(value))
                self.events.append(Event(value.expr, part, source_place(), self.stack[-1]))
        if layers:
            self.env[result] = Axes(tuple(result.shape), layers, frozenset())


def axes_rank(axes: Axes) -> int:
    return len(axes.shape)


def t_shape(t: Tracer, tensor: torch.Tensor, shape: torch.Size) -> torch.Size:
    """The shape with its labelled entries as Sizes."""
    known = t.env.get(tensor)
    if known is None or not known.layers:
        return shape
    return torch.Size(Size(n, Extent(known, k)) if known.has(k) else n for k, n in enumerate(shape))


def packed(args: Sequence[Any]) -> bool:
    """Recurrent layers on packed sequences have another signature."""
    return isinstance(args[2], torch.Tensor)


def grouped(t: Tracer, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Groups that equal the channels shrink with them; normalised shapes follow the tensor."""
    x = t.axes(args[0])
    where, module = source_place(), t.stack[-1]
    if name in ("layer_norm", "rms_norm"):
        shape = args[1] if len(args) > 1 else kwargs["normalized_shape"]
        for k, value in enumerate(shape):
            axis = len(x.shape) - len(shape) + k
            if isinstance(value, Size):
                t.events.append(Event(value.expr, Part(x, axis, 0, x.shape[axis]), where, module))
        return
    if name == "group_norm":
        groups, channel = (args[1] if len(args) > 1 else kwargs["num_groups"]), 1
    else:
        place = 7 if name.startswith("conv_t") else 6
        groups = args[place] if len(args) > place else kwargs.get("groups", 1)
        if name.startswith("conv_t") and "groups" not in kwargs and len(args) > 6:
            groups = args[6]
        w = t.axes(args[1] if len(args) > 1 else kwargs["weight"])
        channel = len(x.shape) - (len(w.shape) - 2) - 1
    if isinstance(groups, Size) and int(groups) > 1:
        if int(groups) == x.shape[channel]:
            t.events.append(Event(groups.expr, Part(x, channel, 0, x.shape[channel]), where, module))
        elif module in t.whole_groups and x.has(channel):
            heads = [
                v.take(range(0, x.shape[channel], x.shape[channel] // int(groups)), channel) for v in x.layers
            ]
            part = Part(
                Axes((*x.shape[:channel], int(groups), *x.shape[channel + 1 :]), heads),
                channel,
                0,
                int(groups),
            )
            t.events.append(Event(groups.expr, part, where, module))
        else:
            fixed = Axes((int(groups),))
            t.events.append(Event(groups.expr, Part(fixed, 0, 0, int(groups)), where, module))


# --- small helpers


def module_paths(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """`named_modules` with every path of a shared module, without a generator for each level."""
    stack = [(path, module)]
    while stack:
        path, module = stack.pop()
        yield path, module
        start = path + "." if path else ""
        stack += [
            (start + name, child) for name, child in reversed(module._modules.items()) if child is not None
        ]


def bind(op: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by the names of an operation's schema, defaults filled in."""
    names, defaults = arguments(op)
    out = dict(zip(names, args, strict=False))
    for name in names[len(args) :]:
        if name in kwargs:
            out[name] = kwargs[name]
        elif name in defaults:
            out[name] = defaults[name]
    return out


@functools.cache
def arguments(op: Any) -> tuple[list[str], dict[str, Any]]:
    """Names of an operation's arguments, and the defaults of those that have one."""
    known = op._schema.arguments
    return [a.name for a in known], {a.name: a.default_value for a in known if a.has_default_value()}


@functools.cache
def described(op: Any) -> tuple[str, str, bool, bool]:
    """Name, name of its rule, whether it works in place, whether it is elementwise."""
    full = op._schema.name.split("::")[1]
    in_place = full.endswith("_") and not full.endswith("__")
    name = full.rstrip("_") if in_place else full
    if name in ("__and__", "__or__", "__xor__", "__iand__", "__ior__"):
        name = "bitwise"
    return full, name, in_place, name == "bitwise" or torch.Tag.pointwise in op.tags


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


SKIP = ("/torch/", "/secateur/graph/", "/contextlib.py")


@functools.cache
def passed_over(name: str) -> bool:
    """Is this file no part of the model's code?"""
    return any(part in name for part in SKIP)


def source_place() -> tuple[str, int]:
    """File and line of the model's code that is running."""
    frame = last = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if not passed_over(name):
            return name, frame.f_lineno
        last, frame = frame, frame.f_back  # type: ignore[assignment]
    return last.f_code.co_filename, last.f_lineno


def source_line() -> str:
    """The line of the model's code that is running: `file.py:12: code`."""
    return line(*source_place())


def line(name: str, number: int) -> str:
    """`file.py:12: code`."""
    if passed_over(name):
        return f"{name}:{number}"
    return f"{name.rsplit('/', 1)[-1]}:{number}: {linecache.getline(name, number).strip()[:100]}"


INTERNAL = {"training", "call_super_init", "dump_patches", "padding_idx", "_version"}
