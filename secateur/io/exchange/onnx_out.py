"""Writes ONNX: the file's own graph with the tensors and sizes of a cut module, or torch's exporter for any other module."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._decomp import get_decompositions
from torch.utils import _pytree as pytree

from secateur.errors import SecateurError
from secateur.io.exchange.onnx_in import INSTALL, OnnxModule, require_onnx
from secateur.io.exchange.onnx_ops import DTYPES, Step
from secateur.io.exchange.program import tensor_at
from secateur.utils.inputs import Inputs, as_call

LIMIT = 2**31 - 1


def onnx_bytes(model: nn.Module, inputs: Inputs) -> bytes:
    """The ONNX file of a module. Raises `SecateurError` where it can't be one, or would exceed 2 GiB."""
    proto = to_proto(model) if isinstance(model, OnnxModule) else _by_torch(model, inputs)
    onnx = require_onnx()
    if proto.ByteSize() > LIMIT:
        raise SecateurError("the ONNX file would exceed 2 GiB", where="export", fix="write .pt2 instead")
    onnx.checker.check_model(proto)
    return proto.SerializeToString()


def to_proto(model: OnnxModule) -> Any:
    """The graph that `model` was read from, with its present tensors, sizes and numbers of groups.

    Names and open sizes of inputs and outputs stay. Tensors keep the precision they have in the file.
    """
    onnx = require_onnx()
    proto = onnx.ModelProto()
    proto.CopyFrom(model.template.value)
    for tensor in proto.graph.initializer:
        if tensor.name in model.tensors:
            value = tensor_at(model, model.tensors[tensor.name]).detach().cpu()
            value = value.to(DTYPES[tensor.data_type]).contiguous()
            fill(tensor, value)
        elif tensor.name in model.constants:
            path, attribute = model.constants[tensor.name]
            now = torch.tensor(getattr(model.get_submodule(path), attribute), dtype=DTYPES[tensor.data_type])
            fill(tensor, now)
    for node, path in zip(proto.graph.node, model.steps, strict=True):
        step = model.get_submodule(path)
        assert isinstance(step, Step)
        own = {"group": "groups", "num_groups": "num_groups", "split": "split_sizes"}
        for attribute in node.attribute:
            if attribute.name in own and hasattr(step, own[attribute.name]):
                value = getattr(step, own[attribute.name])
                if isinstance(value, tuple):
                    attribute.ints[:] = value
                else:
                    attribute.i = value
    return proto


def fill(tensor: Any, value: Tensor) -> None:
    """Put values into an initialiser of the same type."""
    for field in ("float_data", "int32_data", "int64_data", "double_data", "uint64_data", "external_data"):
        tensor.ClearField(field)
    tensor.data_location = 0
    tensor.dims[:] = list(value.shape)
    tensor.raw_data = value.reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""


def _by_torch(model: nn.Module, inputs: Inputs) -> Any:
    require_onnx()
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise SecateurError("the onnxscript package is missing", where="ONNX", fix=INSTALL) from error
    from secateur.io.exchange.pt2 import export_program, quiet, told

    with gathered_experts(model):
        program = export_program(model, inputs)
    if any(map(_projects, program.graph.nodes)):
        with quiet():
            program = program.run_decompositions(get_decompositions([torch.ops.aten.lstm.input]))
    copy_what_moved(program)
    drop_what_does_nothing(program)
    try:
        with quiet():
            return torch.onnx.export(program, dynamo=True, verbose=False).model_proto  # type: ignore[union-attr]
    except Exception as error:  # the exporter wraps errors of its passes, and not all of them
        raise SecateurError(
            f"torch.onnx can't write this model ({told(error)})",
            where="export",
            fix="write .pt2 instead",
        ) from error


def copy_what_moved(program: Any) -> None:
    """Between a transpose and a view goes a copy. Attention is taken apart for ONNX, and what its parts return lies
    otherwise in memory than what the view was recorded on; in the file a copy is nothing."""
    aten = torch.ops.aten
    for node in list(program.graph.nodes):
        if node.target not in (aten.view.default, aten.reshape.default):
            continue
        moved = node.args[0]
        if moved.target in (aten.transpose.int, aten.permute.default):
            with program.graph.inserting_before(node):
                copied = program.graph.call_function(
                    aten.clone.default, (moved,), {"memory_format": torch.contiguous_format}
                )
            copied.meta = dict(moved.meta)
            node.replace_input_with(moved, copied)
    program.graph_module.recompile()


def drop_what_does_nothing(program: Any) -> None:
    """Checks of values, which a file can't make, and squeezes of an axis that isn't one long, which ONNX refuses."""
    aten, graph = torch.ops.aten, program.graph
    for node in list(graph.nodes):
        if str(node.target).partition(".")[2].startswith(("_assert_async", "_assert_scalar")):
            graph.erase_node(node)
        elif node.target is aten.squeeze.dim and node.args[0].meta["val"].shape == node.meta["val"].shape:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    graph.eliminate_dead_code()
    program.graph_module.recompile()


def _projects(node: Any) -> bool:
    """Whether it is an LSTM with a projection, which ONNX has only step by step."""
    if node.target is not torch.ops.aten.lstm.input:
        return False
    _, _, weights, biases, layers, _, _, both_ways, _ = node.args
    return len(weights) == layers * (2 if both_ways else 1) * (5 if biases else 3)


@contextlib.contextmanager
def gathered_experts(model: nn.Module) -> Iterator[None]:
    """Stacked experts of transformers are gathered for each token: their fused product has no ONNX operation."""
    kinds: Any = getattr(model, "get_experts_implementation", dict)()
    change: Any = getattr(model, "set_experts_implementation", None)
    fused = set(kinds.values()) - {None, "eager", "batched_mm"}
    try:
        if fused:
            change("batched_mm")
        yield
    finally:
        if fused:
            change(kinds)


def open_sizes(data: bytes) -> dict[str, list[int]]:
    """Input -> the dims whose size is open."""
    graph = require_onnx().load_model_from_string(data).graph
    shapes = {i.name: i.type.tensor_type.shape.dim for i in graph.input}
    return {name: [k for k, dim in enumerate(dims) if not dim.dim_value] for name, dims in shapes.items()}


def run_onnx(data: bytes, inputs: Inputs) -> list[Tensor]:
    """The outputs of an ONNX file in onnxruntime, on the CPU."""
    try:
        import onnxruntime
    except ImportError as error:
        raise SecateurError("the onnxruntime package is missing", where="ONNX", fix=INSTALL) from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions are made in C++ and have no public base
        raise SecateurError(
            f"onnxruntime refuses the file: {' '.join(str(error).split())[:300]}", where="ONNX"
        ) from error
    args, kwargs = as_call(inputs)
    flat = [t for t in pytree.tree_leaves(args) if isinstance(t, Tensor)]
    names = [i.name for i in session.get_inputs()]
    named = {k: v for k, v in kwargs.items() if k in names and isinstance(v, Tensor)}
    rest = [t for t in pytree.tree_leaves(list(kwargs.values())) if isinstance(t, Tensor)]
    fed = dict(zip(names, flat, strict=False)) | (named or dict(zip(names[len(flat) :], rest, strict=False)))
    types = {i.name: i.type for i in session.get_inputs()}
    given = {name: _feed(value, types[name]) for name, value in fed.items()}
    return [torch.as_tensor(v) for v in session.run(None, given)]


def _feed(value: Tensor, kind: str) -> Any:
    """A model of half precision may be computed in float32 here; the file wants its own type."""
    value = value.detach().cpu()
    wanted = {
        "tensor(float)": torch.float32,
        "tensor(float16)": torch.float16,
        "tensor(double)": torch.float64,
    }
    return (value.to(wanted[kind]) if kind in wanted else value).numpy()
