"""The modes under which a model runs while it is traced, and its watched sizes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from secateur.graph.sizes import Attribute, Size
from secateur.graph.tracer import INTERNAL, Picked, grouped, packed, t_shape

if TYPE_CHECKING:
    from secateur.graph.tracer import Tracer


aten = torch.ops.aten
HIGH_LEVEL = {
    "linear": aten.linear.default,
    "matmul": aten.matmul.default,
    "__matmul__": aten.matmul.default,
    "einsum": aten.einsum.default,
    "scaled_dot_product_attention": aten.scaled_dot_product_attention.default,
    "lstm": aten.lstm.input,
    "gru": aten.gru.input,
    "rnn_tanh": aten.rnn_tanh.input,
    "rnn_relu": aten.rnn_relu.input,
    "one_hot": aten.one_hot.default,
    "histc": aten.histc.default,
    "bincount": aten.bincount.default,
}
RESHAPES = {"view", "reshape", "expand", "_unsafe_view", "unflatten", "broadcast_to"}
FACTORIES = {
    "zeros",
    "ones",
    "empty",
    "full",
    "rand",
    "randn",
    "new_zeros",
    "new_ones",
    "new_empty",
    "new_full",
}


class Dispatch(TorchDispatchMode):
    """Sees every operation that reaches the dispatcher."""

    def __init__(self, tracer: Tracer):
        super().__init__()
        self.tracer = tracer

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not self.tracer.off and hasattr(func, "_schema"):
            self.tracer.off += 1
            try:
                self.tracer.apply(func, args, kwargs or {}, out)
            finally:
                self.tracer.off -= 1
        return out


class Functions(TorchFunctionMode):
    """Sees what Python calls: whole contractions, and the integers given to views, slices and splits."""

    def __init__(self, tracer: Tracer):
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        t = self.tracer
        if t.off:
            return func(*args, **kwargs)
        if name in ("item", "tolist", "numpy", "__index__"):
            known = t.env.get(args[0])
            if known is not None and known.picks is not None:
                before, t.current, t.op = t.current, (name, (args,)), name
                out = func(*args, **kwargs)
                t.current = before
                if name == "__index__":
                    t.told(known.picks, int(out), alone=True)
                    return out
                if name == "item":
                    return Picked(out, t, known.picks)
                t.freeze(known.picks, t.reason("units are told apart by number"))
                return out
        if name == "__get__":
            out = func(*args, **kwargs)
            return t_shape(t, args[0], out) if type(out) is torch.Size else out
        if name == "size":
            out = func(*args, **kwargs)
            if type(out) is torch.Size:
                return t_shape(t, args[0], out)
            d = args[1] if len(args) > 1 else kwargs["dim"]
            return t_shape(t, args[0], args[0].shape)[d]
        if name in HIGH_LEVEL and not (name in ("lstm", "gru", "rnn_tanh", "rnn_relu") and packed(args)):
            t.off += 1
            try:
                out = func(*args, **kwargs)
                if name == "einsum" and not isinstance(args[1], (list, tuple)):
                    t.apply(HIGH_LEVEL[name], (args[0], list(args[1:])), {}, out)
                else:
                    t.apply(HIGH_LEVEL[name], args, kwargs, out)
            finally:
                t.off -= 1
            return out
        before, t.current = t.current, (name, (args, tuple(kwargs.values())))
        try:
            out = func(*args, **kwargs)
        finally:
            t.current = before
        if name in RESHAPES:
            t.sizes(name, args if not kwargs else (*args, *kwargs.values()), out)
        elif name in FACTORIES and isinstance(out, torch.Tensor):
            t.factory(name, args, out)
        elif name in ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "group_norm", "layer_norm",
                      "rms_norm"):  # fmt: skip
            grouped(t, name, args, kwargs)
        return out


@contextmanager
def watched_sizes(modules: Sequence[tuple[str, nn.Module]]) -> Iterator[None]:
    """Replace integer attributes by Sizes while the model runs."""
    undo: list[tuple[dict, str, Any]] = []
    seen: set[int] = set()

    def watch(owner: dict, module: str, prefix: str) -> None:
        for key, value in list(owner.items()):
            kind = type(value)
            if kind is int:
                if value < 2 or key in INTERNAL:
                    continue
                new: Any = Size(value, Attribute(module, prefix + key))
            elif kind is tuple or kind is list:
                if not value or key in INTERNAL or not all(type(v) is int for v in value):
                    continue
                new = kind(
                    Size(v, Attribute(module, prefix + key, n)) if v > 1 else v for n, v in enumerate(value)
                )
            elif key == "config" and hasattr(value, "__dict__") and not isinstance(value, nn.Module):
                if id(value) not in seen:
                    seen.add(id(value))
                    watch(value.__dict__, module, prefix + key + ".")
                continue
            else:
                continue
            undo.append((owner, key, value))
            owner[key] = new

    for path, module in modules:
        if not isinstance(module, torch.jit.ScriptModule):
            watch(module.__dict__, path, "")
    try:
        yield
    finally:
        for owner, key, value in reversed(undo):
            owner[key] = value
