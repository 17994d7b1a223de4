"""Reads a `.pt2` program of `torch.export` as a module, and makes programs of modules."""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import logging
import operator
import os
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from secateur.errors import SecateurError, plain_text
from secateur.graph.source import line, passed_over
from secateur.io.exchange.program import Program, Spec, Template, add_step, register, tensor_at
from secateur.utils.files import check_path
from secateur.utils.inputs import Inputs, as_call
from secateur.utils.running import unchanged, without_cache

SIZES = {
    "size", "shape", "sizes", "split_size", "split_sizes", "start", "end", "length", "groups", "num_groups",
    "normalized_shape",
}  # fmt: skip
SKIPPED = ("_assert", "sym_constrain", "_guards_fn")
WRAPPERS = ("wrap_with_set_grad_enabled", "wrap_with_autocast")


def _convolution(x: Tensor, w: Tensor, b: Tensor | None, stride: Any, padding: Any, dilation: Any, transposed: bool,
                 output_padding: Any, groups: int, *_: Any) -> Tensor:  # fmt: skip
    rank = w.dim() - 3
    if transposed:
        run: Callable = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[rank]
        return run(x, w, b, stride, padding, output_padding, groups, dilation)
    return (F.conv1d, F.conv2d, F.conv3d)[rank](x, w, b, stride, padding, dilation, groups)


def _reshape(x: Tensor, sizes: Any, *_: Any) -> Tensor:
    return x.reshape(sizes)


def _expand(x: Tensor, sizes: Any, implicit: bool = False) -> Tensor:
    return x.expand(sizes)


def _unflatten(x: Tensor, dim: int, sizes: Any) -> Tensor:
    return x.unflatten(dim, sizes)


def _layer_norm(
    x: Tensor, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any
) -> Tensor:
    return F.layer_norm(x, shape, weight, bias, eps)


def _group_norm(
    x: Tensor, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any
) -> Tensor:
    return F.group_norm(x, groups, weight, bias, eps)


def _einsum(equation: str, operands: Sequence[Tensor], path: Any = None) -> Tensor:
    return torch.einsum(equation, *operands)


def _size(x: Tensor, dim: int) -> int:
    return x.shape[dim]


# what a tracer of sizes has to see as the call that a module would make
CALLS: dict[str, Callable[..., Any]] = {
    "linear": F.linear, "matmul": torch.matmul, "einsum": _einsum, "view": _reshape, "reshape": _reshape,
    "_unsafe_view": _reshape, "expand": _expand, "unflatten": _unflatten, "layer_norm": _layer_norm,
    "group_norm": _group_norm, "scaled_dot_product_attention": F.scaled_dot_product_attention,
    "conv1d": F.conv1d, "conv2d": F.conv2d, "conv3d": F.conv3d, "conv_transpose1d": F.conv_transpose1d,
    "conv_transpose2d": F.conv_transpose2d, "conv_transpose3d": F.conv_transpose3d, "convolution": _convolution,
    "_convolution": _convolution, "zeros": torch.zeros, "ones": torch.ones, "full": torch.full, "empty": torch.empty,
    "sym_size": _size, "lstm": torch.lstm, "gru": torch.gru, "rms_norm": F.rms_norm,
}  # fmt: skip


@contextlib.contextmanager
def _weights_only() -> Iterator[None]:
    """No part of an archive may run code while it is read."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        os.environ.pop(name, None)
        if before is not None:
            os.environ[name] = before


def load_pt2(path: str | Path) -> ExportedModule:
    """The program of a `.pt2` file as a `torch.nn.Module`, in eval mode.

    >>> model = load_pt2("model.pt2")  # doctest: +SKIP

    Raises `SecateurError` for a file that is missing, damaged or truncated, and for control flow.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise SecateurError("no such file", where=str(path), fix=check_path(path))
    try:
        with _weights_only(), quiet():
            program = torch.export.load(io.BytesIO(path.read_bytes()))
    except Exception as error:  # zip, JSON, pickle and torch's own checks each raise their own
        text = " ".join(str(error).split())[:200]
        raise SecateurError(
            f"it isn't a .pt2 program, or it is truncated ({type(error).__name__}: {text})",
            where=str(path),
            fix="write it again with torch.export.save",
        ) from error
    return ExportedModule(program, str(path)).eval()


@dataclass
class Context:
    """The values of a forward so far, a tensor of its device and precision, and the precision of the file."""

    values: dict[str, Any]
    like: Tensor | None
    stored: torch.dtype
    output: Any = None


class AtenStep(nn.Module):
    """One call of a program. Sizes it was given are attributes named as in the operation's schema."""

    def __init__(self, node: Node, names: dict[str, str]):
        super().__init__()
        self.target, self.node = Template(node.target), node.name
        schema = getattr(node.target, "_schema", None)
        self.op = schema.name.split("::")[1] if schema else getattr(node.target, "__name__", str(node.target))
        places = [a.name for a in schema.arguments] if schema else []
        plain = not schema and self.op != "getitem"
        self.sizes: dict[str, str] = {}
        arguments = {**{str(k): v for k, v in enumerate(node.args)}, **node.kwargs}
        for key, value in arguments.items():
            name = places[int(key)] if key.isdigit() and int(key) < len(places) else key
            if name not in SIZES and not plain:
                continue
            name = f"a{name}" if name.isdigit() else name
            if type(value) is int and value < 2**40:
                setattr(self, name, value)
                self.sizes[key] = name
            elif isinstance(value, (list, tuple)) and any(type(v) is int for v in value):
                setattr(self, name, tuple(v if type(v) is int else 0 for v in value))
                self.sizes[key] = name

        def reference(value: Node) -> Ref:
            return Ref(names[value.name])

        self.arguments = Template((_map(tuple(node.args), reference), _map(dict(node.kwargs), reference)))

    def argument(self, key: str, value: Any) -> Any:
        if key not in self.sizes:
            return value
        own = getattr(self, self.sizes[key])
        if not isinstance(own, tuple):
            return own
        return [v if isinstance(v, Ref) else n for v, n in zip(value, own, strict=True)]

    def forward(self, context: Context) -> None:
        values, like, stored = context.values, context.like, context.stored
        args, kwargs = self.arguments.value
        args = [self.argument(str(k), v) for k, v in enumerate(args)]
        kwargs = {k: self.argument(k, v) for k, v in kwargs.items()}

        def real(value: Any) -> Any:
            if isinstance(value, Ref):
                return values[value.name]
            if like is not None and isinstance(value, torch.device):
                return like.device
            if like is not None and value is stored:
                return like.dtype
            return value

        args, kwargs = _walk(args, real), _walk(kwargs, real)
        context.output = CALLS.get(self.op, self.target.value)(*args, **kwargs)

    def extra_repr(self) -> str:
        return self.op


class Ref:
    """The value of an earlier call."""

    def __init__(self, name: str):
        self.name = name


def _map(value: Any, fn: Callable[[Node], Any]) -> Any:
    return torch.fx.node.map_aggregate(value, lambda v: fn(v) if isinstance(v, Node) else v)


def _references(value: Any) -> list[str]:
    found: list[str] = []
    _walk(value, lambda v: found.append(v.name) if isinstance(v, Ref) else None)
    return found


def _walk(value: Any, fn: Callable[[Any], Any]) -> Any:
    if isinstance(value, (list, tuple)):
        return [_walk(v, fn) for v in value]
    if isinstance(value, dict):
        return {k: _walk(v, fn) for k, v in value.items()}
    return fn(value)


class ExportedModule(Program):
    """A program: its parameters and buffers under their names, its calls as modules under `ops`."""

    def __init__(self, program: ExportedProgram, where: str = "pt2"):
        super().__init__()
        graph = program.module(check_guards=False)
        assert isinstance(graph, GraphModule)
        self.template = Template(graph)
        self.tensors: dict[str, str] = {}
        self.targets: dict[str, str] = {}
        self.steps: list[str] = []
        self.places: dict[str, str] = {}
        self.fixed: dict[str, Any] = {}
        self.hints = Template({})
        self._same: dict[Any, Tensor] = {}
        stored = next((p.dtype for p in graph.parameters() if p.is_floating_point()), torch.float32)
        self.stored = Template(stored)
        specs = []
        given = program.example_inputs
        leaves = pytree.tree_leaves(given) if given is not None else []
        self.order: list[str] = []
        holders = [node for node in graph.graph.nodes if node.op == "placeholder"]
        for k, node in enumerate(holders):
            value = node.meta.get("val")
            self.order.append(node.name)
            if isinstance(value, Tensor):
                sizes = tuple(n if isinstance(n, int) else str(n) for n in value.shape)
                specs.append(Spec(node.name, sizes, value.dtype))
                if k < len(leaves) and isinstance(leaves[k], Tensor):
                    self.hints.value[node.name] = [int(n) for n in leaves[k].shape]
            else:
                self.fixed[node.name] = value
        self.specs = tuple(specs)
        names = {node.name: node.name for node in holders}
        result = self._compile(graph, "", names, where)
        self.result = Template(_map(result, lambda node: Ref(names[node.name])))
        uses: dict[str, int] = {}
        for n, path in enumerate(self.steps):
            step = self.get_submodule(path)
            assert isinstance(step, AtenStep)
            uses |= dict.fromkeys(_references(step.arguments.value), n)
        kept: set[str] = set(self.targets)
        kept |= set(_references(self.result.value))
        self.gone = [
            [name for name, at in uses.items() if at == n and name not in kept]
            for n in range(len(self.steps))
        ]
        self._same.clear()

    def _compile(self, graph: GraphModule, prefix: str, names: dict[str, str], where: str) -> Any:
        """Take the nodes of a graph, and of the graphs inside it, in order; gives the arguments of its output."""
        for node in graph.graph.nodes:
            own = f"{prefix}{node.name}"
            if node.op == "output":
                return node.args[0]
            if node.op == "get_attr":
                value = (
                    operator.attrgetter(node.target)(graph)
                    if "." not in node.target
                    else _get(graph, node.target)
                )
                names[node.name] = own
                if isinstance(value, Tensor):
                    self._tensor(own, f"{prefix.replace('/', '.')}{node.target}", value)
                continue
            if node.op == "placeholder" or any(part in str(node.target) for part in SKIPPED):
                continue
            if any(part in str(node.target) for part in WRAPPERS):
                place = next(k for k, a in enumerate(node.args) if isinstance(a, Node) and a.op == "get_attr")
                inner = _get(graph, node.args[place].target)
                holders = [n.name for n in inner.graph.nodes if n.op == "placeholder"]
                fed = [names[a.name] for a in node.args[place + 1 :]]
                inside = dict(zip(holders, fed, strict=True))
                result = self._compile(inner, f"{prefix}{node.args[place].target}/", inside, where)
                # a wrapper's outputs are picked out by getitem: a step that only passes them on
                step = _passing(node, result, inside)
            elif node.op == "call_function":
                if isinstance(node.target, torch._ops.HigherOrderOperator):
                    raise SecateurError(
                        f"holds control flow ({node.target}, node {node.name})",
                        where=where,
                        fix="export the model without torch.cond, while_loop or map",
                    )
                step = AtenStep(node, names)
            else:
                raise SecateurError(
                    f"holds a {node.op} node ({node.name})", where=where, fix="export it again"
                )
            names[node.name] = own
            path = add_step(self, own, step)
            self.steps.append(path)
            self.places[path] = own
        raise SecateurError("its graph has no output", where=where)

    def _tensor(self, name: str, target: str, value: Tensor) -> None:
        key = (value.data_ptr(), tuple(value.shape), value.stride(), value.dtype)
        if target in self.targets.values():
            self.tensors[name] = next(self.tensors[n] for n, t in self.targets.items() if t == target)
            self.targets[name] = target
            return
        parameter = isinstance(value, nn.Parameter)
        path = register(self, target, value.detach(), parameter)
        parent, _, leaf = path.rpartition(".")
        owner = self.get_submodule(parent)
        if parameter and value.numel() and key in self._same:
            owner._parameters[leaf] = self._same[key]  # type: ignore[assignment]
        self._same[key] = getattr(owner, leaf)
        self.tensors[name], self.targets[name] = path, target

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        flat = [v for v in pytree.tree_leaves(args) if isinstance(v, Tensor)]
        named = {k: v for k, v in kwargs.items() if isinstance(v, Tensor)}
        given = self.bind(flat, named)
        values: dict[str, Any] = {spec.name: v for spec, v in zip(self.specs, given, strict=True)}
        values |= self.fixed
        for name, path in self.tensors.items():
            values[name] = tensor_at(self, path)
        like = next((p for p in self.parameters() if p.is_floating_point()), None)
        context = Context(values, like, self.stored.value)
        for path, gone in zip(self.steps, self.gone, strict=True):
            step = self.get_submodule(path)
            step(context)
            values[self.places[path]] = context.output
            for name in gone:
                values.pop(name, None)
        flat_out = _walk(list(self.result.value), lambda v: values[v.name] if isinstance(v, Ref) else v)
        spec = self.template.value._out_spec
        return pytree.tree_unflatten(flat_out, spec)

    def own_call(self, inputs: Inputs) -> tuple[Sequence[Any], dict[str, Any]]:
        """The inputs as the arguments and keywords that the program itself was exported with."""
        args, kwargs = as_call(inputs)
        flat = [v for v in pytree.tree_leaves(args) if isinstance(v, Tensor)]
        given = dict(zip((s.name for s in self.specs), self.bind(flat, kwargs), strict=True))
        order = [given.get(name, self.fixed.get(name)) for name in self.order]
        return pytree.tree_unflatten(order, self.template.value._in_spec)

    def to_graph(self) -> GraphModule:
        """The program's own graph with this module's tensors and sizes."""
        graph = copy.deepcopy(self.template.value)
        for name, target in self.targets.items():
            value = tensor_at(self, self.tensors[name])
            parent, _, leaf = target.rpartition(".")
            owner = graph.get_submodule(parent)
            if leaf in owner._parameters:
                owner._parameters[leaf] = (
                    value if isinstance(value, nn.Parameter) else nn.Parameter(value, False)
                )
            elif leaf in owner._buffers:
                owner._buffers[leaf] = value
            else:
                setattr(owner, leaf, value)
        for path in self.steps:
            *inner, name = self.places[path].split("/")
            owner = graph.get_submodule(".".join(inner))
            step = self.get_submodule(path)
            if not isinstance(step, AtenStep) or not step.sizes:
                continue
            node = next(n for n in owner.graph.nodes if n.name == name)
            args, kwargs = list(node.args), dict(node.kwargs)
            for key, attribute in step.sizes.items():
                own = getattr(step, attribute)
                old = args[int(key)] if key.isdigit() else kwargs[key]
                new = own
                if isinstance(own, tuple):
                    new = [v if isinstance(v, Node) else n for v, n in zip(old, own, strict=True)]
                if key.isdigit():
                    args[int(key)] = new
                else:
                    kwargs[key] = new
            node.args, node.kwargs = tuple(args), kwargs
        for module in graph.modules():
            if isinstance(module, GraphModule):
                module.recompile()
        return graph


class _Pass(AtenStep):
    """Hands on the outputs of a graph that was taken apart."""

    def __init__(self, node: Node, result: Any, names: dict[str, str]):
        nn.Module.__init__(self)
        self.op, self.node, self.sizes = "pass", node.name, {}
        self.target = Template(lambda *values: tuple(values))
        many = list(result) if isinstance(result, (list, tuple)) else [result]
        self.arguments = Template((_map(tuple(many), lambda n: Ref(names[n.name])), {}))


def _passing(node: Node, result: Any, names: dict[str, str]) -> AtenStep:
    return _Pass(node, result, names)


def _get(root: Any, path: str) -> Any:
    for part in path.split("."):
        root = getattr(root, part)
    return root


# --- out


def export_program(model: nn.Module, inputs: Inputs) -> ExportedProgram:
    """`torch.export.export` of a module, with as many open sizes as the module allows.

    A model that was read from a file keeps the open sizes of its file. Any other is tried with open batch and, where
    integers go in, token sizes, then with an open batch size, then with the sizes of `inputs`.
    Raises `SecateurError` where torch.export cannot follow the model.
    """
    if isinstance(model, ExportedModule):
        return _export_again(model, inputs)
    args, kwargs = as_call(inputs)
    if isinstance(model, Program):
        args, kwargs = tuple(model.bind(args, kwargs)), {}
        wanted = [{k for k, n in enumerate(spec.shape) if not isinstance(n, int)} for spec in model.specs]
        tries = [wanted, [{0} & dims for dims in wanted]]
    else:
        leaves = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.dim()]
        batch = leaves[0].shape[0] if leaves else 0
        first = [{0} if t.shape[0] == batch else set() for t in leaves]
        tokens = [
            {*dims, 1} if t.dim() == 2 and not t.is_floating_point() else dims
            for t, dims in zip(leaves, first, strict=True)
        ]
        tries = [tokens, first]
    with _plain_signature(model), without_cache(model):
        for dims in (tries[0], *[t for t in tries[1:] if t != tries[0]]):
            if any(dims):
                # an export runs the model, which can fail in any way; the next try leaves fewer sizes open
                with contextlib.suppress(Exception):
                    return _export_open(model, args, kwargs, dims)
        try:
            return _export(model, args, kwargs, None)
        except Exception as error:  # as above
            raise _refused(error) from error


def _export_open(model: nn.Module, args: Any, kwargs: Any, dims: Sequence[set[int]]) -> ExportedProgram:
    """Export with these dims of the tensors open. A size of one would count as fixed: it is doubled."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    wide: list[Any] = []
    shapes: list[Any] = []
    left = list(dims)
    for value in leaves:
        own = left.pop(0) if isinstance(value, Tensor) and value.dim() else set()
        if own:  # a failed export leaves its marks on the tensors that it was given
            value = value.detach()
        for k in own:
            value = torch.cat([value, value], k) if value.shape[k] == 1 else value
        wide.append(value)
        shapes.append({k: Dim.DYNAMIC for k in own} or None)
    (args, kwargs), (in_args, in_kwargs) = (
        pytree.tree_unflatten(wide, spec),
        pytree.tree_unflatten(shapes, spec),
    )
    return _export(
        model, args, kwargs, in_kwargs if in_kwargs and not in_args else (*in_args, *in_kwargs.values())
    )


def told(error: BaseException) -> str:
    """What an exporter's error comes from, in a line without the codes that colour a terminal."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = (line.strip() for line in plain_text(str(error)).splitlines())
    return f"{type(error).__name__}: {next(filter(None, lines), '')[:200]}"


def _refused(error: Exception) -> SecateurError:
    why = told(error)
    if _packed(error):
        why = "a recurrent layer runs over a packed sequence, whose sizes are values"
    elif type(error).__name__ == "GuardOnDataDependentSymNode":
        why = f"a size follows from values, such as a number of boxes, and its code asks for it: {_asked(error)}"
    return SecateurError(
        f"torch.export can't follow this model ({why})",
        where="export",
        fix="save it as a folder instead",
    )


def _asked(error: BaseException) -> str:
    """The line of the model's code that an error was raised under."""
    places = [(f.f_code.co_filename, number) for f, number in traceback.walk_tb(error.__traceback__)]
    return next(
        (line(*p) for p in reversed(places) if not passed_over(p[0]) and "/secateur/" not in p[0]),
        told(error),
    )


def _packed(error: Exception) -> bool:
    """Whether it was raised inside a recurrent layer that was given a packed sequence."""
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    inside = (f for f in frames if f.f_code.co_filename == nn.modules.rnn.__file__)
    return any(f.f_locals.get("batch_sizes") is not None for f in inside)


def _export(model: nn.Module, args: Any, kwargs: Any, shapes: Any) -> ExportedProgram:
    with torch.no_grad(), quiet(), unchanged(model.modules()):
        return torch.export.export(model, tuple(args), dict(kwargs), dynamic_shapes=shapes, strict=False)


def _export_again(model: ExportedModule, inputs: Inputs) -> ExportedProgram:
    args, kwargs = model.own_call(inputs)
    dims = [
        {k for k, n in enumerate(spec.shape) if not isinstance(n, int)} for spec in model.specs if spec.shape
    ]
    try:
        return _export_open(model.to_graph(), args, kwargs, dims)
    except Exception as error:  # as above
        raise _refused(error) from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what torch prints while it exports: a failure is told by the exception."""
    loggers = [
        logging.getLogger(name)
        for name in ("torch", "torch.export", "torch.onnx", "torch.fx", "torch.__trace")
    ]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(action="ignore"),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def _plain_signature(model: nn.Module) -> Iterator[None]:
    """A module read from a file gets a forward that names its inputs, as torch.export wants it."""
    if not isinstance(model, Program):
        yield
        return
    names = [s.name if s.name.isidentifier() else f"input_{k}" for k, s in enumerate(model.specs)]
    run = model.forward

    def forward(*values: Any) -> Any:
        return run(*values)

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    forward.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in names])  # type: ignore[attr-defined]
    object.__setattr__(model, "forward", forward)
    try:
        yield
    finally:
        object.__delattr__(model, "forward")


def program_bytes(program: ExportedProgram) -> bytes:
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    return buffer.getvalue()


def run_program(data: bytes, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Tensor]:
    """The outputs of a written program, read again."""
    with _weights_only(), quiet():
        module = torch.export.load(io.BytesIO(data)).module()
    with torch.no_grad():
        return [t for t in pytree.tree_leaves(module(*args, **kwargs)) if isinstance(t, Tensor)]


def open_sizes(program: ExportedProgram) -> dict[str, list[int]]:
    """Input -> the dims whose size is open."""
    named = {n.name: n.meta.get("val") for n in program.graph.nodes if n.op == "placeholder"}
    shapes = {
        n: v.shape
        for n, v in named.items()
        if n in program.graph_signature.user_inputs and isinstance(v, Tensor)
    }
    return {
        n: [k for k, size in enumerate(shape) if not isinstance(size, int)] for n, shape in shapes.items()
    }
