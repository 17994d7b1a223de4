"""Reads an ONNX file as a module. The graph itself is kept, so that writing it back changes only what was cut."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from secateur.errors import SecateurError
from secateur.io.exchange.onnx_ops import DTYPES, FEW, OPS, Context, Step
from secateur.io.exchange.program import Program, Spec, Template, add_step, register, tensor_at
from secateur.utils.files import check_path

INSTALL = "pip install secateur[onnx]"
DAMAGED = "get the file again, or export the model again"
DOMAINS = ("", "ai.onnx")


def require_onnx() -> Any:
    """The `onnx` package; a `SecateurError` says how to get it."""
    try:
        import onnx
    except ImportError as error:
        raise SecateurError("the onnx package is missing", where="ONNX", fix=INSTALL) from error
    return onnx


def load_onnx(path: str | Path) -> OnnxModule:
    """The graph of an ONNX file as a `torch.nn.Module`, in eval mode.

    >>> model = load_onnx("model.onnx")  # doctest: +SKIP
    >>> model(torch.randn(1, 3, 224, 224))  # doctest: +SKIP

    Raises `SecateurError` for a file that is missing, damaged or truncated, and for operations that are not read.
    """
    onnx = require_onnx()
    path = Path(path).expanduser()
    if not path.is_file():
        raise SecateurError("no such file", where=str(path), fix=check_path(path))
    try:
        model = onnx.load(path)
    except Exception as error:  # what protobuf raises depends on how it was built
        raise SecateurError(
            f"it isn't an ONNX file, or it is truncated ({_short(error)})", where=str(path), fix=DAMAGED
        ) from error
    if not model.graph.node or not model.graph.output:
        raise SecateurError("it holds no graph", where=str(path), fix=DAMAGED)
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    _check_ops(model, str(path))
    try:
        onnx.checker.check_model(model)
    except Exception as error:  # beside its ValidationError the checker passes on errors of C++
        raise SecateurError(
            f"the graph is damaged ({_short(error)})", where=str(path), fix=DAMAGED
        ) from error
    try:
        return OnnxModule(_unshare(model)).eval()
    except (KeyError, ValueError, TypeError) as error:
        raise SecateurError(
            f"the graph can't be read ({type(error).__name__}: {_short(error)})", where=str(path), fix=DAMAGED
        ) from error


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


def _check_ops(model: Any, where: str) -> None:
    """Name the operations that are not read, with the first node of each."""
    unknown: dict[str, str] = {}
    for node in model.graph.node:
        known = node.domain in DOMAINS and (node.op_type in OPS or node.op_type == "Constant")
        if not known:
            name = node.op_type if node.domain in DOMAINS else f"{node.domain}.{node.op_type}"
            unknown.setdefault(name, node.name or (node.output[0] if node.output else "?"))
    if unknown:
        named = ", ".join(f"{op} (node {name})" for op, name in list(unknown.items())[:5])
        raise SecateurError(
            f"uses operations that are not read: {named}",
            where=where,
            fix="export the model again with a plain opset (13 to 20), or prune the torch module it came from",
        )
    opset = next((o.version for o in model.opset_import if o.domain in DOMAINS), 0)
    if opset < 9:
        raise SecateurError(f"opset {opset} is too old", where=where, fix="convert it to opset 13 or newer")


def _unshare(model: Any) -> Any:
    """The same model where every constant is an initialiser, and vectors and sizes belong to one node each.

    Exporters store equal tensors once (all zero biases, all sizes [1, 197, 768], all the scales and zeros of a freshly
    built network); cutting one must not cut the others. A matrix that several nodes read is one: tied weights.
    """
    onnx = require_onnx()
    out = onnx.ModelProto()
    out.CopyFrom(model)
    graph = out.graph
    tensors = {t.name: t for t in graph.initializer}
    outputs = {o.name for o in graph.output}
    renamed: dict[str, str] = {}
    nodes = []
    for node in model.graph.node:
        source = renamed.get(node.input[0], node.input[0]) if node.input else ""
        if node.op_type == "Constant" and node.output[0] not in outputs:
            tensors[node.output[0]] = _constant(node)
        elif node.op_type == "Identity" and source in tensors and node.output[0] not in outputs:
            if not _equal_by_chance(tensors[source]):
                renamed[node.output[0]] = source
            else:
                copy = onnx.TensorProto()
                copy.CopyFrom(tensors[source])
                copy.name = node.output[0]
                tensors[copy.name] = copy
        else:
            kept = onnx.NodeProto()
            kept.CopyFrom(node)
            kept.input[:] = [renamed.get(name, name) for name in node.input]
            nodes.append(kept)
    uses: Counter[str] = Counter()
    made: dict[str, Any] = {name: tensor for name, tensor in tensors.items() if name in outputs}
    for node in nodes:
        for k, name in enumerate(node.input):
            if name not in tensors:
                continue
            tensor, uses[name] = tensors[name], uses[name] + 1
            if uses[name] > 1 and _equal_by_chance(tensor):
                copy = onnx.TensorProto()
                copy.CopyFrom(tensor)
                copy.name = f"{name}::{uses[name]}"
                node.input[k], made[copy.name] = copy.name, copy
            else:
                made[name] = tensor
    del graph.node[:], graph.initializer[:], graph.value_info[:]
    graph.node.extend(nodes)
    graph.initializer.extend(made.values())
    inputs = [i for i in graph.input if i.name not in tensors]
    del graph.input[:]
    graph.input.extend(inputs)
    return out


def _equal_by_chance(tensor: Any) -> bool:
    """Is it a vector, of any rank, or filled with one number, so that being shared doesn't mean being tied?"""
    if sum(size > 1 for size in tensor.dims) < 2:
        return True
    values = require_onnx().numpy_helper.to_array(tensor)
    return bool(values.size) and bool((values == values.flat[0]).all())


def _constant(node: Any) -> Any:
    onnx = require_onnx()
    attribute = node.attribute[0]
    if attribute.name == "value":
        tensor = onnx.TensorProto()
        tensor.CopyFrom(attribute.t)
        tensor.name = node.output[0]
        return tensor
    value = onnx.helper.get_attribute_value(attribute)
    if attribute.name not in ("value_int", "value_ints", "value_float", "value_floats"):
        raise SecateurError(
            f"a Constant with {attribute.name} is not read", where=node.name or node.output[0]
        )
    dtype = np.int64 if "int" in attribute.name else np.float32
    return onnx.numpy_helper.from_array(np.array(value, dtype), node.output[0])


def to_tensor(proto: Any, where: str = "") -> Tensor:
    onnx = require_onnx()
    if proto.data_type not in DTYPES:
        kind = onnx.TensorProto.DataType.Name(proto.data_type)
        raise SecateurError(f"holds {kind} values, which are not read", where=where or proto.name)
    values = np.ascontiguousarray(onnx.numpy_helper.to_array(proto)).reshape(tuple(proto.dims))
    if proto.data_type == onnx.TensorProto.BFLOAT16:
        return torch.from_numpy(values.astype(np.float32)).bfloat16()
    return torch.from_numpy(values.copy())


ROLES = {
    "BatchNormalization": {1: "weight", 2: "bias", 3: "running_mean", 4: "running_var"},
    "MatMul": {0: "weight", 1: "weight"},
    "Add": {0: "bias", 1: "bias"},
    "Gather": {0: "weight"},
}


def _scope(node: Any) -> str:
    """The path of the torch module that a node came from, as exporters note it; "" where they don't."""
    for entry in node.metadata_props:
        if entry.key == "pkg.torch.onnx.name_scopes":
            parts = re.findall(r"'([^']*)'", entry.value)
            return parts[-2] if len(parts) > 1 and not parts[-2].startswith("_") else ""
    parts = [part for part in node.name.split("/") if part][:-1]
    done: list[str] = []
    for part in parts:
        if (
            done
            and part.startswith(done[-1].rsplit(".", 1)[-1] + ".")
            or done
            and part.startswith(done[-1] + ".")
        ):
            done[-1] = part
        else:
            done.append(part)
    return ".".join(done)


def _path(name: str, node: Any, place: int, rank: int, taken: set[str]) -> str:
    """Where a tensor goes: its own name if it is a torch name, else the node's module and the tensor's role."""
    if "::" not in name and "/" not in name and not re.fullmatch(r"\w*\d+|\d.*", name):
        return name
    role = ROLES.get(node.op_type, {1: "weight", 2: "bias"}).get(place, "value")
    role = "value" if role == "bias" and rank != 1 else role
    path = f"{_scope(node)}.{role}" if _scope(node) else re.sub(r"\W+", "_", name).strip("_")
    base, number = path, 2
    while path in taken:
        path, number = f"{base}_{number}", number + 1
    return path


class OnnxModule(Program):
    """The graph of an ONNX file: initialisers as parameters and buffers, nodes as modules under `ops`."""

    def __init__(self, proto: Any):
        super().__init__()
        self.tensors: dict[str, str] = {}
        self.constants: dict[str, tuple[str, str]] = {}
        self.steps: list[str] = []
        opset = next(o.version for o in proto.opset_import if o.domain in DOMAINS)
        self.specs = tuple(_spec(value) for value in proto.graph.input)
        self.results = [value.name for value in proto.graph.output]
        initialisers = {t.name: t for t in proto.graph.initializer}
        taken = set(initialisers)
        last: dict[str, int] = {}
        for n, node in enumerate(proto.graph.node):
            label = node.name or node.output[0]
            constants: dict[int, Any] = {}
            for k, name in enumerate(node.input):
                last[name] = n
                if name not in initialisers or name in self.tensors:
                    continue
                found = initialisers[name]
                value = to_tensor(found, label)
                number = value.dim() == 0 or not value.is_floating_point() and value.dim() == 1
                if number and value.numel() <= FEW and name not in self.results:
                    flat = value.tolist()
                    constants[k] = tuple(flat) if isinstance(flat, list) else flat
                    continue
                statistics = node.op_type == "BatchNormalization" and k in (3, 4)
                path = _path(name, node, k, value.dim(), taken)
                taken.add(path)
                finite = value.is_floating_point() and bool(torch.isfinite(value).all())  # a mask is not
                parameter = finite and not statistics
                self.tensors[name] = register(self, path, value, parameter)
            attributes = {a.name: _attribute(a) for a in node.attribute}
            step = Step(node.op_type, label, opset, node.input, node.output, attributes, constants)
            path = add_step(self, label if node.name else f"{node.op_type}_{n}", step)
            self.steps.append(path)
            for k in constants:
                self.constants[node.input[k]] = (path, f"in{k}")
        for name in self.results:
            last[name] = len(self.steps)
            if name in initialisers and name not in self.tensors:
                self.tensors[name] = register(self, name, to_tensor(initialisers[name]), False)
        self.gone = [[name for name, at in last.items() if at == n] for n in range(len(self.steps))]
        for tensor in proto.graph.initializer:
            if tensor.name in self.tensors:
                for field in (
                    "raw_data",
                    "float_data",
                    "int32_data",
                    "int64_data",
                    "double_data",
                    "uint64_data",
                ):
                    tensor.ClearField(field)
        self.template = Template(proto)
        stored = Counter(t.dtype for t in self.parameters())
        self.stored = Template(max(stored, key=stored.__getitem__) if stored else torch.float32)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = self.bind(args, kwargs)
        values: dict[str, Any] = {spec.name: v for spec, v in zip(self.specs, given, strict=True)}
        like = next((p for p in self.parameters() if p.is_floating_point()), None)
        device = next((t.device for t in (like, *given) if t is not None), torch.device("cpu"))
        context = Context(device, self.stored.value if like is None else like.dtype, self.stored.value)
        tensors = {name: tensor_at(self, path) for name, path in self.tensors.items()}
        for n, path in enumerate(self.steps):
            step = self.get_submodule(path)
            assert isinstance(step, Step)
            inputs: list[Any] = []
            for k, name in enumerate(step.inputs):
                if not name:
                    inputs.append(None)
                elif k in step.constants:
                    inputs.append(step.constant(k))
                else:
                    inputs.append(values[name] if name in values else tensors[name])
            context.inputs = inputs
            step(context)
            out = context.output
            made = out if isinstance(out, (tuple, list)) else [out]
            values.update(zip(step.outputs, made, strict=False))
            for name in self.gone[n]:
                values.pop(name, None)
        results = [values[name] if name in values else tensors[name] for name in self.results]
        results = [r if isinstance(r, Tensor) else torch.as_tensor(np.asarray(r).tolist()) for r in results]
        return results[0] if len(results) == 1 else tuple(results)


def _attribute(attribute: Any) -> Any:
    onnx = require_onnx()
    if attribute.type == onnx.AttributeProto.TENSOR:
        value = to_tensor(attribute.t).reshape(-1)
        return value[0].item() if value.numel() == 1 else value
    value = onnx.helper.get_attribute_value(attribute)
    if isinstance(value, bytes):
        return value.decode()
    return list(value) if isinstance(value, (list, tuple)) or hasattr(value, "extend") else value


def _spec(value: Any) -> Spec:
    kind = value.type.tensor_type
    if not value.type.HasField("tensor_type") or kind.elem_type not in DTYPES:
        raise SecateurError(
            "isn't a tensor of numbers", where=f"input {value.name}", fix="export the model again"
        )
    sizes: list[int | str | None] = []
    for dim in kind.shape.dim:
        if dim.HasField("dim_value"):
            sizes.append(dim.dim_value if dim.dim_value > 0 else None)
        else:
            sizes.append(dim.dim_param or None)
    return Spec(value.name, tuple(sizes), DTYPES[kind.elem_type])
