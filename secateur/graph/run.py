"""Running a model under a tracer: every operation that it does is given to the rule that knows it."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from secateur.errors import SecateurError
from secateur.graph.labels import Axes, NoRule
from secateur.graph.notes import RuleError, Run, some_of
from secateur.graph.operations import bind, described
from secateur.graph.rules import RULES, Call
from secateur.graph.rules.multihead import multihead, tensors_of
from secateur.graph.rules.pick import numbers
from secateur.graph.rules.pointwise import pointwise
from secateur.graph.sparing import Looked, Spared, sparing
from secateur.graph.tracer import Picked, Tracer
from secateur.graph.watch import note_sizes, sized_shape, watched_comparisons, watched_sizes
from secateur.utils.inputs import as_call, describe
from secateur.utils.running import (
    _flat,
    evaluating,
    flat_tensors,
    unchanged,
    without_cache,
    without_stale,
)

STRICT = "SECATEUR_STRICT_RULES"
"""Set to 1, a rule that fails raises instead of freezing what it touches: for work on the rules."""

aten = torch.ops.aten
RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu")
WHOLE = {
    "linear": aten.linear.default,
    "matmul": aten.matmul.default,
    "__matmul__": aten.matmul.default,
    "einsum": aten.einsum.default,
    "scaled_dot_product_attention": aten.scaled_dot_product_attention.default,
    "lstm": aten.lstm.input,
    "gru": aten.gru.input,
    "rnn_tanh": aten.rnn_tanh.input,
    "rnn_relu": aten.rnn_relu.input,
    "_pack_padded_sequence": aten._pack_padded_sequence.default,
    "_pad_packed_sequence": aten._pad_packed_sequence.default,
    "one_hot": aten.one_hot.default,
    "histc": aten.histc.default,
    "bincount": aten.bincount.default,
}
"""Python calls that one rule sees as a whole: what they dispatch to says less."""


def run_model(
    t: Tracer, inputs: Any, training: Collection[nn.Module] = (), spare: bool = False
) -> list[Axes]:
    """The axes of the model's outputs, after one run in which the tracer has noted everything else.

    The modules in `training` run in train mode. A further run of the same tracer adds constraints only: costs and
    calls stay those of the first. With `spare` convolutions are not computed; `Looked` is raised where that would show.
    """
    args, kwargs = as_call(inputs)
    modules = list(t.unique())
    costs, calls, further = t.notes.costs, t.notes.calls, bool(t.notes.runs)
    layers = len(t.notes.layers)
    if further:
        t.notes.costs, t.notes.calls = [], {}
    t.notes.ops = 0
    given = _flat((args, kwargs), [])
    for value in given:
        t.env[value] = Axes(tuple(value.shape), [], None)
    with ExitStack() as stack:
        for context in (
            unchanged(module for _, module in modules),
            evaluating(t.model),
            without_stale(module for _, module in modules),
            torch.no_grad(),
            watched_sizes(modules),
            watched_comparisons(t),
            without_cache(t.model),
            _followed(t, modules),
        ):
            stack.enter_context(context)
        spared = stack.enter_context(sparing(t, given)) if spare else None
        stack.enter_context(Dispatch(t, spared))
        stack.enter_context(Functions(t, spared))
        for module in training:
            module.training = True
        try:
            output = t.model(*args, **kwargs)
        except (SecateurError, RuleFailure):
            raise
        except Exception as error:  # the model is the user's: it can fail in any way
            if spared is not None:
                raise Looked from error
            raise SecateurError(
                f"the model does not run on these inputs: {type(error).__name__}: {error}",
                where="trace",
                fix="give inputs on which model(*inputs) or model(**inputs) works",
            ) from error
    if further:
        t.notes.costs, t.notes.calls = costs, {**t.notes.calls, **calls}
        del t.notes.layers[layers:]
    outputs = list(flat_tensors(output))
    if spared is not None and spared.any:
        t.notes.runs.append(
            Run(str(describe(inputs)), t.notes.ops, [tuple(v.shape) for v in outputs], None, [])
        )
    elif not training:
        finite = [bool(torch.isfinite(value).all()) for value in outputs]
        shapes = [tuple(v.shape) for v in outputs]
        t.notes.runs.append(Run(str(describe(inputs)), t.notes.ops, shapes, finite, some_of(outputs)))
    return [t.axes(value) for value in outputs]


# --- what is seen: operations, Python calls, modules


class Dispatch(TorchDispatchMode):
    """Sees every operation that reaches the dispatcher."""

    def __init__(self, tracer: Tracer, spared: Spared | None):
        super().__init__()
        self.tracer, self.spared = tracer, spared

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # a wrapper around every operation that only compiling needs

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        notes = self.tracer.notes
        notes.ops = hash((notes.ops, id(func)))
        out = None if self.spared is None else self.spared(func, args, kwargs)
        if out is None:
            out = func(*args, **(kwargs or {}))
        if not self.tracer.off and hasattr(func, "_schema"):
            self.tracer.off += 1
            try:
                apply(self.tracer, func, args, kwargs or {}, out)
            finally:
                self.tracer.off -= 1
        return out


class Functions(TorchFunctionMode):
    """Sees what Python calls: whole contractions, and the integers given to views, slices and splits."""

    def __init__(self, tracer: Tracer, spared: Spared | None):
        super().__init__()
        self.tracer, self.spared = tracer, spared

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        t = self.tracer
        if t.off:
            return func(*args, **kwargs)
        if self.spared is not None:
            self.spared.called(name)
        if name == "__get__":  # a property such as `x.shape`
            out = func(*args, **kwargs)
            return sized_shape(t, args[0], out) if type(out) is torch.Size else out
        if name == "size":
            out = func(*args, **kwargs)
            if type(out) is torch.Size:
                return sized_shape(t, args[0], out)
            return sized_shape(t, args[0], args[0].shape)[args[1] if len(args) > 1 else kwargs["dim"]]
        if name in ("item", "tolist", "numpy", "__index__"):
            axes = t.env.get(args[0])
            if axes is not None and axes.picks is not None:
                return _number(t, axes, name, func, args, kwargs)
        if name == "multi_head_attention_forward":
            return _multihead(t, func, args, kwargs)
        if name in WHOLE:
            op = WHOLE[name]
            if name in RECURRENT and not isinstance(args[3], bool):  # packed: sizes of batches come second
                op = getattr(aten, name).data
            t.off += 1
            try:
                out = func(*args, **kwargs)
                if name == "einsum" and not isinstance(args[1], (list, tuple)):
                    args = (args[0], list(args[1:]))
                apply(t, op, args, kwargs, out)
            finally:
                t.off -= 1
            return out
        # Everything else: the rule sees what is dispatched, and looks up what it was called with.
        before, t.current = t.current, (name, (args, tuple(kwargs.values())))
        try:
            out = func(*args, **kwargs)
        finally:
            t.current = before
        note_sizes(t, name, args, kwargs, out)
        return out


def _multihead(t: Tracer, func: Any, args: Any, kwargs: Any) -> Any:
    """PyTorch's attention is seen as a whole: within it nothing that Python calls is."""
    t.op = func.__name__
    t.off += 1
    try:
        out = func(*args, **kwargs)
        xs = [t.axes(v) for v in tensors_of(args, kwargs).values()]
        _used(t, xs)
        try:
            multihead(t, args, kwargs, out)
        except Exception as error:  # noqa: BLE001  a defect of the rule, which is noted
            _failed(t, func.__name__, xs, error)
    finally:
        t.off -= 1
    return out


def _number(t: Tracer, axes: Axes, name: str, func: Any, args: Any, kwargs: Any) -> Any:
    """The number of a unit becomes a Python value: followed where it stays an integer."""
    assert axes.picks is not None
    before, t.current, t.op = t.current, (name, (args,)), name
    out = func(*args, **kwargs)
    t.current = before
    if name == "item":
        return Picked(out, t, axes.picks)
    if name == "__index__":
        t.by_number(axes.picks, int(out), alone=True)
    else:
        t.freeze(axes.picks, t.reason("units are told apart by number"))
    return out


@contextmanager
def _followed(t: Tracer, modules: Sequence[tuple[str, nn.Module]]) -> Iterator[None]:
    """Know which module runs, and of modules in a list what goes in and comes out.

    The class is asked and not each module: hooks of hundreds of modules cost more than all that they would note.
    """
    paths = {id(module): path for path, module in modules if not isinstance(module, torch.jit.ScriptModule)}
    plain = nn.Module.__call__

    def call(module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
        path = paths.get(id(module))
        if path is None:
            return plain(module, *args, **kwargs)
        t.stack.append(path)
        try:
            if path not in t.listed:
                return plain(module, *args, **kwargs)
            _entered(t, path, args, kwargs)
            output = plain(module, *args, **kwargs)
        finally:
            t.stack.pop()
        _left(t, path, output)
        return output

    nn.Module.__call__ = call  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.__call__ = plain  # type: ignore[method-assign]


def _entered(t: Tracer, path: str, args: Any, kwargs: Any) -> None:
    t.off += 1
    inputs = [t.axes(v) for v in _flat(kwargs, _flat(args, []))]
    t.off -= 1
    t.notes.calls.setdefault(path, []).append((inputs, None))  # type: ignore[arg-type]
    # A module of a list is an expert if its position was just asked for.
    if path in t.places and t.last_number is not None:
        container, place, count = t.places[path]
        ids, value = t.last_number
        if value == place and len(ids) == count:
            t.notes.experts.setdefault(container, ids)


def _left(t: Tracer, path: str, output: Any) -> None:
    calls = t.notes.calls[path]
    first = output if isinstance(output, torch.Tensor) else next(iter(_flat(output, [])), None)
    if first is None:
        return
    t.off += 1
    out = t.axes(first)
    t.off -= 1
    inputs: Any = calls[-1][0]
    if isinstance(inputs, list):
        calls[-1] = (next((x for x in inputs if x.shape == out.shape), None), out)


# --- one operation


def apply(t: Tracer, op: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> None:
    """Label the results of one operation."""
    known = described(op)
    t.op = known.full
    named = bind(known, args, kwargs)
    axes: dict[str, Any] = {}
    for key, value in named.items():
        if isinstance(value, torch.Tensor):
            axes[key] = t.axes(value)
        elif isinstance(value, (list, tuple)) and any(isinstance(v, torch.Tensor) for v in value):
            axes[key] = [t.axes(v) if isinstance(v, torch.Tensor) else None for v in value]
    outs = [result] if isinstance(result, torch.Tensor) else _flat(result, [])
    call = Call(known.name, named, axes, [tuple(o.shape) for o in outs])
    xs = call.tensors()
    _used(t, xs)
    if not outs:
        _left_tensors(t, axes.get("self"))
        return
    labelled = _labelled(t, call, xs, known.pointwise)
    for x in xs:
        if x.picks is not None:
            numbers(t, call, labelled)
            break
    for n, out in enumerate(outs):
        new = labelled[n] if n < len(labelled) else None
        if new is None or new.shape != call.outs[n]:  # a rule that answers for the first result only
            same = call.outs[n] == labelled[0].shape
            new = Axes(call.outs[n], labelled[0].layers if same else [], labelled[0].params)
        if known.in_place and n == 0:
            _written(t, out, new)
        t.env[out] = new


def _labelled(t: Tracer, call: Call, xs: Sequence[Axes], is_pointwise: bool) -> list[Axes]:
    """The results as their rule labels them; without a rule, what the operation touches is frozen."""
    if any(x.layers or x.picks is not None for x in xs):
        rule = RULES.get(call.name, pointwise if is_pointwise else None)
        try:
            if rule is None:
                raise NoRule
            results = rule(t, call)
            return [results] if isinstance(results, Axes) else results
        except Exception as error:  # noqa: BLE001  a defect of the rule, which is noted
            _failed(t, call.name, xs, error)
    return [Axes(shape, [], t.origin(xs)) for shape in call.outs]


def _used(t: Tracer, xs: Sequence[Axes]) -> None:
    """Note the parameters that an operation reads."""
    uses = t.notes.uses
    for x in xs:
        if x.params and not x.params <= uses.keys():
            for used in sorted(x.params):
                uses.setdefault(used, len(uses))


def _failed(t: Tracer, name: str, xs: Sequence[Axes], error: Exception) -> None:
    """No rule for an operation, or one that failed: what it touches is frozen."""
    why = str(t.reason(f"no rule for this {name}"))
    if not isinstance(error, NoRule):  # a defect of the rule: said, counted and never taken for an answer
        if os.environ.get(STRICT) == "1":
            raise RuleFailure(name) from error
        text = f"{type(error).__name__} {error}"
        t.notes.rule_errors.append(RuleError(name, t.stack[-1], text))
        why = str(t.reason(f"no rule for this {name}: {text}"))
    t.notes.unknown.setdefault(name, why)
    for x in xs:
        for layer in [*x.layers, *([] if x.picks is None else [x.picks])]:
            t.freeze(layer, why)


class RuleFailure(Exception):
    """A rule failed while failures were asked for."""


def _left_tensors(t: Tracer, x: Any) -> None:
    """An operation gave Python a value: numbers of units are lost unless `Functions` follows them."""
    followed = t.current[0] in ("__getitem__", "item", "__index__")
    if isinstance(x, Axes) and x.picks is not None and not followed:
        t.freeze(x.picks, t.reason("units are told apart by number"))


def _written(t: Tracer, out: torch.Tensor, axes: Axes) -> None:
    """A write into a view reaches its base: labels that the base does not know cannot be cut."""
    if out._base is None or not axes.layers:
        return
    before = t.env.get(out)
    labelled = {k for layer in (before.layers if before else []) for k, n in enumerate(layer.shape) if n > 1}
    for layer in axes.layers:
        if any(k not in labelled for k, n in enumerate(layer.shape) if n > 1):
            t.freeze(layer, t.reason("written into a part of another tensor"))
