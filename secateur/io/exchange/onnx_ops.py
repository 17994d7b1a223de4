"""What each ONNX operation does, as torch functions. Spec: https://onnx.ai/onnx/operators/

A value is a tensor, or, where a graph computes with sizes, a Python number or a numpy array of Python numbers: a size
then remembers where it came from while a model is traced.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.errors import SecateurError

Op = Callable[["Step", "Context", list[Any]], Any]
OPS: dict[str, Op] = {}
WHOLE = (int, torch.SymInt)
FEW = 64
"""Integer lists up to this length are sizes, held as Python numbers; longer ones are tables, held as tensors."""

DTYPES = {
    1: torch.float32, 2: torch.uint8, 3: torch.int8, 5: torch.int16, 6: torch.int32, 7: torch.int64, 9: torch.bool,
    10: torch.float16, 11: torch.float64, 16: torch.bfloat16,
}  # fmt: skip


@dataclass
class Context:
    """Where a forward runs, in which precision its numbers are, and what goes into and comes out of a step."""

    device: torch.device
    dtype: torch.dtype
    stored: torch.dtype
    inputs: list[Any] = field(default_factory=list)
    output: Any = None


class Step(nn.Module):
    """One node. Integer inputs that are constant are its attributes `in0`, `in1`, ..."""

    def __init__(
        self,
        op: str,
        label: str,
        opset: int,
        inputs: Sequence[str],
        outputs: Sequence[str],
        attributes: dict[str, Any],
        constants: dict[int, Any],
    ):
        super().__init__()
        self.op, self.label = op, label
        self.attr = {**attributes, "opset": opset}
        self.inputs, self.outputs = list(inputs), list(outputs)
        self.constants = {k: f"in{k}" for k in constants}
        for k, value in constants.items():
            setattr(self, f"in{k}", value)
        if op in ("Conv", "ConvTranspose"):
            self.groups = int(attributes.get("group", 1))
        if op == "GroupNormalization":
            self.num_groups = int(attributes["num_groups"])
        if op == "Split" and "split" in attributes:
            self.split_sizes = tuple(attributes["split"])

    def constant(self, k: int) -> Any:
        value = getattr(self, self.constants[k])
        return array(value) if isinstance(value, tuple) else value

    def forward(self, context: Context) -> None:
        context.output = OPS[self.op](self, context, context.inputs)

    def extra_repr(self) -> str:
        return self.op


def ops(*names: str) -> Callable[[Op], Op]:
    def add(function: Op) -> Op:
        for name in names:
            OPS[name] = function
        return function

    return add


# --- numbers beside tensors


def array(values: Sequence[Any]) -> np.ndarray:
    out = np.empty(len(values), object)
    for k, value in enumerate(values):
        out[k] = value
    return out


def is_host(value: Any) -> bool:
    return not isinstance(value, Tensor)


def listed(value: Any) -> list[Any]:
    """Sizes as a list; they may be traced."""
    if isinstance(value, Tensor):
        return value.reshape(-1).tolist()
    return list(value.reshape(-1)) if isinstance(value, np.ndarray) else [value]


def ints(value: Any) -> list[int]:
    return [int(v) for v in listed(value)]


def number(value: Any) -> Any:
    return listed(value)[0] if not isinstance(value, Tensor) else value.item()


def tensor(value: Any, c: Context) -> Tensor:
    if isinstance(value, Tensor):
        return value
    flat = listed(value)
    if any(isinstance(v, bool) for v in flat):
        dtype = torch.bool
    else:
        dtype = torch.int64 if all(isinstance(v, WHOLE) for v in flat) else c.dtype
    plain = [float(v) if isinstance(v, float) else v for v in flat]
    if any(isinstance(v, torch.SymInt) for v in plain):
        return torch.stack([torch.full((), v, dtype=torch.int64, device=c.device) for v in plain]).reshape(
            np.shape(value)
        )
    out = torch.tensor(plain, dtype=dtype, device=c.device)
    return out.reshape(value.shape) if isinstance(value, np.ndarray) else out.reshape(())


def axis_of(s: Step, default: int = 0) -> int:
    return int(s.attr.get("axis", default))


def argument(s: Step, v: list[Any], place: int, name: str) -> Any:
    """What newer opsets take as an input and older ones as an attribute; None where neither is given."""
    if len(v) > place and v[place] is not None:
        return v[place]
    found = s.attr.get(name)
    return array(found) if isinstance(found, list) else found


# --- element by element


def unary(name: str, on_tensor: Callable[..., Any], on_number: Callable[..., Any] | None = None) -> None:
    def run(s: Step, c: Context, v: list[Any]) -> Any:
        if is_host(v[0]) and on_number is not None:
            return np.frompyfunc(on_number, 1, 1)(v[0])
        return on_tensor(tensor(v[0], c))

    OPS[name] = run


UNARY: list[tuple[str, Any, Any]] = [
    ("Abs", torch.abs, abs), ("Neg", torch.neg, operator.neg), ("Ceil", torch.ceil, lambda x: float(math.ceil(x))),
    ("Floor", torch.floor, lambda x: float(math.floor(x))), ("Sqrt", torch.sqrt, lambda x: float(x) ** 0.5),
    ("Reciprocal", torch.reciprocal, lambda x: 1.0 / x), ("Not", torch.logical_not, lambda x: not x),
    ("Round", torch.round, None), ("Exp", torch.exp, None), ("Log", torch.log, None), ("Erf", torch.erf, None),
    ("Sin", torch.sin, None), ("Cos", torch.cos, None), ("Tan", torch.tan, None), ("Tanh", torch.tanh, None),
    ("Atan", torch.atan, None), ("Sign", torch.sign, None), ("Sigmoid", torch.sigmoid, None), ("Relu", F.relu, None),
    ("HardSwish", F.hardswish, None), ("Softplus", F.softplus, None), ("Softsign", F.softsign, None),
    ("Mish", F.mish, None), ("IsNaN", torch.isnan, None), ("IsInf", torch.isinf, None), ("Swish", F.silu, None),
]  # fmt: skip
for _name, _tensor, _number in UNARY:
    unary(_name, _tensor, _number)


def _divide(a: Any, b: Any) -> Any:
    return a // b if isinstance(a, WHOLE) and isinstance(b, WHOLE) else a / b


def _divide_tensors(a: Any, b: Any) -> Tensor:
    whole = not any(t.is_floating_point() if isinstance(t, Tensor) else isinstance(t, float) for t in (a, b))
    return torch.div(a, b, rounding_mode="trunc") if whole else a / b


def binary(name: str, on_tensors: Callable, on_numbers: Callable) -> None:
    def run(s: Step, c: Context, v: list[Any]) -> Any:
        a, b = v
        if is_host(a) and is_host(b):
            return np.frompyfunc(on_numbers, 2, 1)(a, b)
        a, b = (tensor(x, c) if isinstance(x, np.ndarray) else x for x in (a, b))
        return on_tensors(a, b)

    OPS[name] = run


for _name, _tensors, _numbers in [
    ("Add", operator.add, operator.add), ("Sub", operator.sub, operator.sub), ("Mul", operator.mul, operator.mul),
    ("Div", _divide_tensors, _divide), ("Pow", lambda a, b: a**b, operator.pow),
    ("Equal", operator.eq, lambda a, b: bool(a == b)), ("Greater", operator.gt, lambda a, b: bool(a > b)),
    ("GreaterOrEqual", operator.ge, lambda a, b: bool(a >= b)), ("Less", operator.lt, lambda a, b: bool(a < b)),
    ("LessOrEqual", operator.le, lambda a, b: bool(a <= b)), ("And", operator.and_, lambda a, b: bool(a and b)),
    ("Or", operator.or_, lambda a, b: bool(a or b)), ("Xor", operator.xor, lambda a, b: bool(a) != bool(b)),
]:  # fmt: skip
    binary(_name, _tensors, _numbers)


@ops("Mod")
def mod(s: Step, c: Context, v: list[Any]) -> Any:
    if is_host(v[0]) and is_host(v[1]):
        return np.frompyfunc(operator.mod, 2, 1)(*v)
    a, b = tensor(v[0], c), tensor(v[1], c)
    return torch.fmod(a, b) if s.attr.get("fmod") else torch.remainder(a, b)


@ops("Max", "Min", "Sum", "Mean")
def variadic(s: Step, c: Context, v: list[Any]) -> Any:
    if all(map(is_host, v)) and s.op in ("Max", "Min"):
        pick = max if s.op == "Max" else min
        out = v[0]
        for x in v[1:]:
            out = np.frompyfunc(lambda a, b: pick(a, b), 2, 1)(out, x)
        return out
    like = next((x for x in v if isinstance(x, Tensor)), None)
    xs = [tensor(x, c) for x in v]
    xs = [x.to(like.dtype) if like is not None else x for x in xs]
    join = {"Max": torch.maximum, "Min": torch.minimum}.get(s.op, torch.add)
    out = xs[0]
    for x in xs[1:]:
        out = join(out, x)
    return out / len(xs) if s.op == "Mean" else out


@ops("Where")
def where(s: Step, c: Context, v: list[Any]) -> Any:
    if all(map(is_host, v)):
        return np.frompyfunc(lambda k, a, b: a if k else b, 3, 1)(*v)
    condition = tensor(v[0], c)
    a, b = (tensor(x, c) if isinstance(x, np.ndarray) else x for x in v[1:])
    if not isinstance(a, Tensor) and not isinstance(b, Tensor):
        a = tensor(a, c)
    return torch.where(condition, a, b)


@ops("Cast", "CastLike")
def cast(s: Step, c: Context, v: list[Any]) -> Any:
    x = v[0]
    if s.op == "CastLike":
        return x if is_host(v[1]) else tensor(x, c).to(v[1].dtype)
    dtype = DTYPES.get(s.attr["to"])
    if dtype is None:
        raise SecateurError(f"casts to the ONNX type {s.attr['to']}, which has no torch type", where=s.label)
    if is_host(x):
        kind: Callable = float if dtype.is_floating_point else (bool if dtype is torch.bool else whole)
        return np.frompyfunc(kind, 1, 1)(x)
    return x.to(c.dtype if dtype == c.stored else dtype)


def whole(value: Any) -> Any:
    """An int as it is (a traced size stays one), a float cut towards zero."""
    return value if isinstance(value, WHOLE) and not isinstance(value, bool) else int(value)


@ops("Identity", "Dropout")
def identity(s: Step, c: Context, v: list[Any]) -> Any:
    return v[0]


@ops("LeakyRelu", "Elu", "Selu", "Celu", "ThresholdedRelu", "HardSigmoid", "Gelu", "PRelu", "Clip")
def activation(s: Step, c: Context, v: list[Any]) -> Any:
    x, get = v[0], s.attr.get
    if s.op == "Clip":
        low, high = argument(s, v, 1, "min"), argument(s, v, 2, "max")
        low, high = (None if n is None else number(n) for n in (low, high))
        return x if low is None and high is None else torch.clamp(tensor(x, c), low, high)
    if s.op == "LeakyRelu":
        return F.leaky_relu(x, get("alpha", 0.01))
    if s.op == "Elu":
        return F.elu(x, get("alpha", 1.0))
    if s.op == "Selu":
        return F.selu(x)
    if s.op == "Celu":
        return F.celu(x, get("alpha", 1.0))
    if s.op == "ThresholdedRelu":
        return F.threshold(x, get("alpha", 1.0), 0.0)
    if s.op == "HardSigmoid":
        alpha, beta = get("alpha", 0.2), get("beta", 0.5)
        return F.hardsigmoid(x) if abs(alpha - 1 / 6) < 1e-6 else torch.clamp(x * alpha + beta, 0.0, 1.0)
    if s.op == "Gelu":
        approximate = get("approximate", "none")
        return F.gelu(x, approximate=approximate)
    slope = tensor(v[1], c)
    return torch.where(x >= 0, x, x * slope)


@ops("Softmax", "LogSoftmax")
def softmax(s: Step, c: Context, v: list[Any]) -> Any:
    x = v[0]
    run = torch.softmax if s.op == "Softmax" else torch.log_softmax
    if s.attr["opset"] >= 13:
        return run(x, axis_of(s, -1))
    axis = axis_of(s, 1) % x.dim()
    if axis == x.dim() - 1:
        return run(x, -1)
    return run(x.flatten(axis), -1).reshape(x.shape)


# --- products and convolutions


@ops("MatMul")
def matmul(s: Step, c: Context, v: list[Any]) -> Any:
    return torch.matmul(v[0], v[1])


@ops("Gemm")
def gemm(s: Step, c: Context, v: list[Any]) -> Any:
    a, b = v[0], v[1]
    bias = v[2] if len(v) > 2 else None
    if s.attr.get("transA"):
        a = a.t()
    alpha, beta = s.attr.get("alpha", 1.0), s.attr.get("beta", 1.0)
    if s.attr.get("transB") and alpha == beta == 1.0 and (bias is None or bias.dim() == 1):
        return F.linear(a, b, bias)
    out = torch.matmul(a, b.t() if s.attr.get("transB") else b)
    out = out if alpha == 1.0 else out * alpha
    return out if bias is None else out + (bias if beta == 1.0 else bias * beta)


@ops("Einsum")
def einsum(s: Step, c: Context, v: list[Any]) -> Any:
    return torch.einsum(s.attr["equation"], *v)


def _pads(
    s: Step, x: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> list[int]:
    """[begin..., end...] of the spatial axes."""
    rank, auto = len(kernel), s.attr.get("auto_pad", "NOTSET")
    if auto == "VALID":
        return [0] * 2 * rank
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        begin, end = [], []
        for size, k, step, d in zip(x.shape[2:], kernel, stride, dilation, strict=True):
            total = max(0, (-(-int(size) // step) - 1) * step + (k - 1) * d + 1 - int(size))
            small, large = total // 2, total - total // 2
            begin.append(small if auto == "SAME_UPPER" else large)
            end.append(large if auto == "SAME_UPPER" else small)
        return begin + end
    return list(s.attr.get("pads", [0] * 2 * rank))


def _window(s: Step, x: Tensor, rank: int, kernel: Sequence[int]) -> tuple[list, list, list]:
    stride, dilation = s.attr.get("strides", [1] * rank), s.attr.get("dilations", [1] * rank)
    return list(stride), list(dilation), _pads(s, x, kernel, stride, dilation)


def _apart(x: Tensor, pads: Sequence[int], value: float = 0.0) -> tuple[Tensor, list[int]]:
    """Unequal padding as a step of its own."""
    rank = len(pads) // 2
    if list(pads[:rank]) == list(pads[rank:]):
        return x, list(pads[:rank])
    flat = [n for k in reversed(range(rank)) for n in (pads[k], pads[rank + k])]
    return F.pad(x, flat, value=value), [0] * rank


@ops("Conv", "ConvTranspose")
def conv(s: Step, c: Context, v: list[Any]) -> Any:
    x, w, b = v[0], v[1], v[2] if len(v) > 2 else None
    rank = w.dim() - 2
    kernel = [int(n) for n in w.shape[2:]]
    if s.op == "Conv":
        stride, dilation, pads = _window(s, x, rank, kernel)
        x, padding = _apart(x, pads)
        run: Callable[..., Any] = (F.conv1d, F.conv2d, F.conv3d)[rank - 1]
        return run(x, w, b, stride=stride, padding=padding, dilation=dilation, groups=s.groups)
    stride, dilation = s.attr.get("strides", [1] * rank), s.attr.get("dilations", [1] * rank)
    pads, extra = s.attr.get("pads", [0] * 2 * rank), s.attr.get("output_padding", [0] * rank)
    auto = s.attr.get("auto_pad", "NOTSET")
    if "output_shape" in s.attr or auto not in ("NOTSET", "VALID"):
        raise SecateurError(
            "ConvTranspose with output_shape or auto_pad is not read", where=s.label, fix=WRITE
        )
    begin, end = pads[:rank], pads[rank:]
    # more cut off at the end is a negative output padding
    extra = [e + b_ - a for e, a, b_ in zip(extra, end, begin, strict=True)]
    if any(e < 0 for e in extra):
        raise SecateurError("ConvTranspose with unequal pads is not read", where=s.label, fix=WRITE)
    run = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[rank - 1]
    return run(
        x, w, b, stride=stride, padding=list(begin), output_padding=extra, groups=s.groups, dilation=dilation
    )


WRITE = "export the model again with explicit values, from torch with torch.onnx.export(..., dynamo=True)"


@ops("MaxPool", "AveragePool")
def pool(s: Step, c: Context, v: list[Any]) -> Any:
    x, kernel = v[0], list(s.attr["kernel_shape"])
    rank = len(kernel)
    stride, dilation, pads = _window(s, x, rank, kernel)
    ceil = bool(s.attr.get("ceil_mode", 0))
    even = pads[:rank] == pads[rank:] and all(2 * p <= k for p, k in zip(pads, kernel, strict=False))
    if s.op == "MaxPool":
        padding = pads[:rank]
        if not even:
            flat = [n for k in reversed(range(rank)) for n in (pads[k], pads[rank + k])]
            x, padding = F.pad(x, flat, value=-math.inf), [0] * rank
        biggest = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[rank - 1]
        return biggest(x, kernel, stride, padding, dilation, ceil)
    counted = bool(s.attr.get("count_include_pad", 0))
    if any(d != 1 for d in dilation) or (not even and not counted):
        raise SecateurError(
            "AveragePool with unequal pads or dilations is not read", where=s.label, fix=WRITE
        )
    x, padding = _apart(x, pads) if counted and not even else (x, pads[:rank])
    if rank == 1:
        return F.avg_pool1d(x, kernel, stride, padding, ceil, counted)
    run: Callable[..., Any] = F.avg_pool2d if rank == 2 else F.avg_pool3d
    return run(x, kernel, stride, padding, ceil, counted)


@ops("GlobalAveragePool", "GlobalMaxPool")
def global_pool(s: Step, c: Context, v: list[Any]) -> Any:
    dims = list(range(2, v[0].dim()))
    return v[0].mean(dims, keepdim=True) if s.op == "GlobalAveragePool" else v[0].amax(dims, keepdim=True)


# --- normalisation


@ops("BatchNormalization")
def batch_norm(s: Step, c: Context, v: list[Any]) -> Any:
    if s.attr.get("training_mode"):
        raise SecateurError(
            "BatchNormalization is in training mode", where=s.label, fix="export model.eval()"
        )
    x, weight, bias, mean, var = v[:5]
    return F.batch_norm(x, mean, var, weight, bias, False, 0.0, s.attr.get("epsilon", 1e-5))


@ops("InstanceNormalization")
def instance_norm(s: Step, c: Context, v: list[Any]) -> Any:
    return F.instance_norm(v[0], weight=v[1], bias=v[2], eps=s.attr.get("epsilon", 1e-5))


@ops("LayerNormalization", "RMSNormalization")
def layer_norm(s: Step, c: Context, v: list[Any]) -> Any:
    x, eps = v[0], s.attr.get("epsilon", 1e-5)
    shape = x.shape[axis_of(s, -1) % x.dim() :]
    if s.op == "RMSNormalization":
        return F.rms_norm(x, shape, v[1], eps)
    return F.layer_norm(x, shape, v[1], v[2] if len(v) > 2 else None, eps)


@ops("GroupNormalization")
def group_norm(s: Step, c: Context, v: list[Any]) -> Any:
    return F.group_norm(v[0], s.num_groups, v[1], v[2], s.attr.get("epsilon", 1e-5))


@ops("LpNormalization")
def lp_norm(s: Step, c: Context, v: list[Any]) -> Any:
    return F.normalize(v[0], p=s.attr.get("p", 2), dim=axis_of(s, -1), eps=0.0)


@ops("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2", "ReduceSumSquare",
     "ReduceLogSumExp", "ReduceLogSum")  # fmt: skip
def reduce(s: Step, c: Context, v: list[Any]) -> Any:
    axes = argument(s, v, 1, "axes")
    if is_host(v[0]) and s.op == "ReduceProd":
        product: Any = 1
        for size in listed(v[0]):
            product = product * size
        return array([product]) if s.attr.get("keepdims", 1) else product
    x, keep = tensor(v[0], c), bool(s.attr.get("keepdims", 1))
    dims = [] if axes is None else ints(axes)
    if not dims and s.attr.get("noop_with_empty_axes"):
        return x
    dims = dims or list(range(x.dim()))
    if s.op == "ReduceMean":
        return x.mean(dims, keepdim=keep)
    if s.op in ("ReduceMax", "ReduceMin"):
        return (x.amax if s.op == "ReduceMax" else x.amin)(dims, keepdim=keep)
    if s.op == "ReduceLogSumExp":
        return x.logsumexp(dims, keepdim=keep)
    if s.op == "ReduceProd":
        for d in sorted((d % x.dim() for d in dims), reverse=True):
            x = x.prod(d, keepdim=keep)
        return x
    x = {"ReduceL1": torch.abs, "ReduceL2": torch.square, "ReduceSumSquare": torch.square}.get(
        s.op, lambda t: t
    )(x)
    out = x.sum(dims, keepdim=keep)
    return {"ReduceL2": torch.sqrt, "ReduceLogSum": torch.log}.get(s.op, lambda t: t)(out)


@ops("ArgMax", "ArgMin")
def arg_extreme(s: Step, c: Context, v: list[Any]) -> Any:
    run = torch.argmax if s.op == "ArgMax" else torch.argmin
    return run(v[0], axis_of(s), keepdim=bool(s.attr.get("keepdims", 1)))


@ops("TopK")
def topk(s: Step, c: Context, v: list[Any]) -> Any:
    return torch.topk(v[0], int(number(v[1])), axis_of(s, -1), bool(s.attr.get("largest", 1)), True)


@ops("CumSum")
def cumsum(s: Step, c: Context, v: list[Any]) -> Any:
    if s.attr.get("exclusive") or s.attr.get("reverse"):
        raise SecateurError("CumSum exclusive or reversed is not read", where=s.label, fix=WRITE)
    return torch.cumsum(tensor(v[0], c), int(number(v[1])))


@ops("Trilu")
def trilu(s: Step, c: Context, v: list[Any]) -> Any:
    k = int(number(v[1])) if len(v) > 1 and v[1] is not None else 0
    return (torch.triu if s.attr.get("upper", 1) else torch.tril)(tensor(v[0], c), k)


# --- shapes


@ops("Shape")
def shape(s: Step, c: Context, v: list[Any]) -> Any:
    sizes = array(list(v[0].shape) if isinstance(v[0], Tensor) else list(np.shape(v[0])))
    return sizes[s.attr.get("start", 0) : s.attr.get("end")]


@ops("Size")
def size(s: Step, c: Context, v: list[Any]) -> Any:
    out: Any = 1
    for n in v[0].shape:
        out = out * n
    return out


@ops("Reshape")
def reshape(s: Step, c: Context, v: list[Any]) -> Any:
    x, target = v[0], listed(v[1])
    if is_host(x):
        return np.reshape(x if isinstance(x, np.ndarray) else array([x]), [int(n) for n in target])
    if not s.attr.get("allowzero"):
        target = [x.shape[k] if isinstance(n, int) and n == 0 else n for k, n in enumerate(target)]
    return x.reshape(target)


@ops("Flatten")
def flatten(s: Step, c: Context, v: list[Any]) -> Any:
    x = v[0]
    axis = axis_of(s, 1) % (x.dim() + 1) if axis_of(s, 1) < 0 else axis_of(s, 1)
    if axis == 0:
        return x.reshape(1, -1)
    x = x.unsqueeze(-1) if axis == x.dim() else x
    x = torch.flatten(x, axis)
    return x if axis == 1 else torch.flatten(x, 0, axis - 1)


@ops("Squeeze")
def squeeze(s: Step, c: Context, v: list[Any]) -> Any:
    axes, x = argument(s, v, 1, "axes"), v[0]
    if is_host(x):
        return np.reshape(x, -1)[0]
    if axes is None:
        return x.squeeze()
    dims = ints(axes)
    return x.squeeze(dims[0]) if len(dims) == 1 else x.squeeze(tuple(dims))


@ops("Unsqueeze")
def unsqueeze(s: Step, c: Context, v: list[Any]) -> Any:
    x, axes = v[0], ints(argument(s, v, 1, "axes"))
    if is_host(x):
        return array([x]) if not isinstance(x, np.ndarray) else np.expand_dims(x, tuple(axes))
    rank = x.dim() + len(axes)
    for axis in sorted(a % rank for a in axes):
        x = x.unsqueeze(axis)
    return x


@ops("Transpose")
def transpose(s: Step, c: Context, v: list[Any]) -> Any:
    if is_host(v[0]):
        return np.transpose(v[0], s.attr.get("perm"))
    x = v[0]
    return x.permute(s.attr.get("perm", list(reversed(range(x.dim())))))


@ops("Expand")
def expand(s: Step, c: Context, v: list[Any]) -> Any:
    x, target = tensor(v[0], c), listed(v[1])
    own = [1] * (len(target) - x.dim()) + list(x.shape)
    target = [1] * (len(own) - len(target)) + target
    return x.expand([m if isinstance(n, int) and n == 1 else n for n, m in zip(target, own, strict=True)])


@ops("Tile")
def tile(s: Step, c: Context, v: list[Any]) -> Any:
    return tensor(v[0], c).repeat(ints(v[1]))


@ops("Concat")
def concat(s: Step, c: Context, v: list[Any]) -> Any:
    if all(map(is_host, v)):
        return np.concatenate([x if isinstance(x, np.ndarray) else array([x]) for x in v])
    return torch.cat([tensor(x, c) for x in v], axis_of(s))


@ops("Split")
def split(s: Step, c: Context, v: list[Any]) -> Any:
    x, axis = v[0], axis_of(s)
    sizes = listed(v[1]) if len(v) > 1 and v[1] is not None else list(getattr(s, "split_sizes", ()))
    if is_host(x):
        return np.split(x, np.cumsum([int(n) for n in sizes])[:-1])
    if not sizes:
        return torch.chunk(x, len(s.outputs), axis)
    return torch.split(x, sizes, axis)


@ops("Slice")
def slice_(s: Step, c: Context, v: list[Any]) -> Any:
    x = v[0]
    starts, ends = listed(argument(s, v, 1, "starts")), listed(argument(s, v, 2, "ends"))
    axes, steps = argument(s, v, 3, "axes"), argument(s, v, 4, "steps")
    rank = max(1, np.ndim(x)) if is_host(x) else x.dim()
    dims = ints(axes) if axes is not None else list(range(len(starts)))
    pace = ints(steps) if steps is not None else [1] * len(starts)
    index = [slice(None)] * rank
    flips = []
    for start, end, d, step in zip(starts, ends, dims, pace, strict=True):
        d %= rank
        first = start if start else None
        last = None if abs(end) > 2**30 else end
        if step < 0 and not is_host(x):
            n = int(x.shape[d])
            low, high, _ = slice(None if abs(start) > 2**30 else start, last, step).indices(n)
            flips.append(d)
            index[d] = slice(n - 1 - low, n - 1 - high, -step)
        else:
            index[d] = slice(first, last, step if step != 1 else None)
    if is_host(x):
        return np.asarray(x, object)[tuple(index)]
    if flips:
        x = torch.flip(x, flips)
    return x[tuple(index)]


@ops("Gather")
def gather(s: Step, c: Context, v: list[Any]) -> Any:
    x, at, axis = v[0], v[1], axis_of(s)
    if is_host(x):
        picked = np.asarray(x, object)[at if isinstance(at, int) else np.asarray(ints(at), int)]
        return picked
    axis %= x.dim()
    if isinstance(at, int):
        return x.select(axis, int(at))
    at = tensor(at, c)
    if axis == 0 and x.dim() == 2 and x.is_floating_point() and not isinstance(v[1], np.ndarray):
        return F.embedding(at.long(), x)
    flat = at.reshape(-1).long()
    flat = torch.where(flat < 0, flat + x.shape[axis], flat)
    picked = x.index_select(axis, flat)
    if at.dim() == 1:
        return picked
    if at.dim() == 0:
        return picked.squeeze(axis)
    return picked.reshape([*x.shape[:axis], *at.shape, *x.shape[axis + 1 :]])


@ops("GatherElements")
def gather_elements(s: Step, c: Context, v: list[Any]) -> Any:
    return torch.gather(v[0], axis_of(s), tensor(v[1], c).long())


@ops("GatherND")
def gather_nd(s: Step, c: Context, v: list[Any]) -> Any:
    if s.attr.get("batch_dims"):
        raise SecateurError("GatherND with batch_dims is not read", where=s.label, fix=WRITE)
    return tensor(v[0], c)[tuple(tensor(v[1], c).long().movedim(-1, 0))]


@ops("ScatterND")
def scatter_nd(s: Step, c: Context, v: list[Any]) -> Any:
    if s.attr.get("reduction", "none") != "none":
        raise SecateurError("ScatterND with a reduction is not read", where=s.label, fix=WRITE)
    x, at = tensor(v[0], c), tensor(v[1], c).long()
    return torch.index_put(x, tuple(at.movedim(-1, 0)), tensor(v[2], c).to(x.dtype))


@ops("OneHot")
def one_hot(s: Step, c: Context, v: list[Any]) -> Any:
    off, on = (float(x) for x in listed(v[2]))
    hot = F.one_hot(tensor(v[0], c).long(), int(number(v[1]))).to(c.dtype) * (on - off) + off
    return hot.movedim(-1, axis_of(s, -1))


@ops("ConstantOfShape")
def constant_of_shape(s: Step, c: Context, v: list[Any]) -> Any:
    value = s.attr.get("value", 0.0)
    sizes = listed(v[0])
    if isinstance(value, int) and not isinstance(value, bool) and len(sizes) == 1 and int(sizes[0]) <= FEW:
        return array([value] * int(sizes[0]))
    dtype = torch.bool if isinstance(value, bool) else (torch.int64 if isinstance(value, int) else c.dtype)
    return torch.full(sizes, value, dtype=dtype, device=c.device)


@ops("Range")
def range_(s: Step, c: Context, v: list[Any]) -> Any:
    start, stop, step = (number(x) for x in v)
    kinds = all(isinstance(n, WHOLE) for n in (start, stop, step))
    return torch.arange(start, stop, step, dtype=torch.int64 if kinds else c.dtype, device=c.device)


@ops("EyeLike", "NonZero")
def from_values(s: Step, c: Context, v: list[Any]) -> Any:
    if s.op == "NonZero":
        return torch.nonzero(tensor(v[0], c)).t()
    dtype = DTYPES.get(s.attr["dtype"]) if "dtype" in s.attr else v[0].dtype
    rows, columns = (int(n) for n in v[0].shape)
    return torch.eye(rows, columns, dtype=dtype, device=c.device)


@ops("Pad")
def pad(s: Step, c: Context, v: list[Any]) -> Any:
    x, sizes = tensor(v[0], c), ints(argument(s, v, 1, "pads"))
    fill = v[2] if len(v) > 2 and v[2] is not None else s.attr.get("value", 0.0)
    axes = ints(v[3]) if len(v) > 3 and v[3] is not None else list(range(x.dim()))
    half = len(sizes) // 2
    by_axis = {a % x.dim(): (sizes[k], sizes[half + k]) for k, a in enumerate(axes)}
    mode = {"edge": "replicate", "wrap": "circular"}.get(m := s.attr.get("mode", "constant"), m)
    needed = [a for a, pair in by_axis.items() if any(pair)]
    if not needed:
        return x
    flat = [n for a in reversed(range(min(needed), x.dim())) for n in by_axis.get(a, (0, 0))]
    if mode == "constant":
        return F.pad(x, flat, value=number(fill))
    return F.pad(x, flat, mode=mode)


@ops("Resize", "Upsample")
def resize(s: Step, c: Context, v: list[Any]) -> Any:
    x = v[0]
    modern = s.op == "Resize" and s.attr["opset"] > 10
    scales, sizes = (v[2] if len(v) > 2 else None, v[3] if len(v) > 3 else None) if modern else (v[1], None)
    mode = s.attr.get("mode", "nearest")
    how = s.attr.get("coordinate_transformation_mode", "half_pixel" if modern else "asymmetric")
    flat = listed(scales) if scales is not None and np.size(_plain(scales)) else None
    given = {"size": ints(sizes)[2:]} if sizes is not None and flat is None else {"scale_factor": [float(n) for n in (flat or [])][2:]}  # fmt: skip
    names: Any = {"linear": {1: "linear", 2: "bilinear", 3: "trilinear"}.get(x.dim() - 2), "cubic": "bicubic"}
    if "axes" in s.attr or s.attr.get("antialias"):
        raise SecateurError("Resize with axes or antialias is not read", where=s.label, fix=WRITE)
    if mode == "nearest":
        rounding = s.attr.get("nearest_mode", "round_prefer_floor" if modern else "floor")
        times = given.get("scale_factor") or [
            b / int(a) for a, b in zip(x.shape[2:], given["size"], strict=True)
        ]
        exact = all(float(f).is_integer() for f in times)
        if how == "asymmetric" and rounding == "floor" or exact and how == "half_pixel":
            return F.interpolate(x, mode="nearest", **given)
    elif how in ("half_pixel", "pytorch_half_pixel") and s.attr.get("cubic_coeff_a", -0.75) == -0.75:
        return F.interpolate(x, mode=names[mode], align_corners=False, **given)
    elif how == "align_corners":
        return F.interpolate(x, mode=names[mode], align_corners=True, **given)
    raise SecateurError(f"Resize {mode} with {how} coordinates is not read", where=s.label, fix=WRITE)


def _plain(value: Any) -> Any:
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else value


@ops("DepthToSpace", "SpaceToDepth")
def depth_space(s: Step, c: Context, v: list[Any]) -> Any:
    x, block = v[0], s.attr["blocksize"]
    if s.op == "DepthToSpace" and s.attr.get("mode", "DCR") == "CRD":
        return F.pixel_shuffle(x, block)
    n, channels, height, width = x.shape
    if s.op == "DepthToSpace":
        x = x.reshape(n, block, block, channels // block**2, height, width).permute(0, 3, 4, 1, 5, 2)
        return x.reshape(n, channels // block**2, height * block, width * block)
    x = x.reshape(n, channels, height // block, block, width // block, block).permute(0, 3, 5, 1, 2, 4)
    return x.reshape(n, channels * block**2, height // block, width // block)
