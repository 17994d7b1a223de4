"""What a model costs: parameters, multiply-adds, bytes on disk, bytes in memory. Any model, not only language models."""

import contextlib
import inspect
import warnings
import weakref
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from secateur.errors import SecateurError
from secateur.utils.files import check_path
from secateur.utils.inputs import Inputs
from secateur.utils.running import call, evaluating


def run(model: nn.Module, inputs: Inputs) -> Any:
    """`call(model, inputs)` without gradients."""
    with torch.no_grad():
        return call(model, inputs)


def params(model: nn.Module) -> int:
    """The number of parameters; a tied one counts once.

    >>> params(nn.Linear(3, 4))
    16
    """
    return sum(p.numel() for p in model.parameters())


def params_nonzero(model: nn.Module) -> int:
    """The number of parameters that are not exactly zero; a tied one counts once."""
    return sum(int(torch.count_nonzero(p)) for p in model.parameters())


def size_bytes(model_or_path: nn.Module | str | Path) -> int:
    """Bytes of weights: of all files below a path, or of the safetensors that a model would write.

    >>> size_bytes(nn.Linear(3, 4))
    64

    For a model: the persistent state dict, tied tensors once, without the header of a few kB.
    Raises SecateurError where the path does not exist.
    """
    if isinstance(model_or_path, (str, Path)):
        path = Path(model_or_path)
        if not path.exists():
            raise SecateurError("no such file or folder", where=str(path), fix=check_path(path))
        return sum(f.stat().st_size for f in ([path] if path.is_file() else path.rglob("*")) if f.is_file())
    tensors = {
        (t.device, t.untyped_storage().data_ptr(), t.storage_offset(), t.shape, t.stride(), t.dtype): t
        for t in model_or_path.state_dict().values()
        if isinstance(t, Tensor)
    }
    return sum(t.numel() * t.element_size() for t in tensors.values())


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Flops of softmax(q k^T) v, [B, H, L, D]; key and value may have fewer heads (grouped-query attention)."""
    batch, heads, length, width = query
    return 2 * batch * heads * length * key[-2] * (width + value[-1])


def _grouped_mm(left: Any, right: Any, *_: Any, **__: Any) -> int:
    """Flops of a mixture of experts: each row of `left` [T, K] meets one matrix of `right` [E, K, N]."""
    if len(left) == len(right) == 2:  # [M, T] x [T, N], the groups along T
        return 2 * left[0] * left[1] * right[1]
    rows = prod(left[:-1])
    return 2 * rows * left[-1] * right[-1] // (1 if len(right) == 3 else left[0])


def _mv(matrix: Any, *_: Any, **__: Any) -> int:
    return 2 * prod(matrix)


def _formulas() -> dict[Any, Any]:
    aten = torch.ops.aten
    extra = {"mv": _mv, "_grouped_mm": _grouped_mm}
    extra |= {
        f"_scaled_dot_product_{kind}": _attention
        for kind in ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention")
    }
    return {getattr(aten, name): formula for name, formula in extra.items() if hasattr(aten, name)}


def macs(model: nn.Module, inputs: Inputs) -> int:
    """Multiply-adds of one forward on `inputs`: matrix products, convolutions, attention, recurrent layers.

    >>> macs(nn.Linear(3, 4), torch.ones(2, 3))
    24

    Counts what `torch.utils.flop_counter` counts, halved, and what it leaves out: attention on a CPU (also inside
    nn.MultiheadAttention), grouped heads, mixture-of-experts products, matrix times vector, LSTM and GRU.
    Causal attention counts in full, as it does there; element-wise work (norms, scans, activations) does not count.
    """
    with evaluating(model), _unfused(model), _counter() as counter:
        run(model, inputs)
    return counter.get_total_flops() // 2


def _counter() -> FlopCounterMode:
    counter = FlopCounterMode(display=False, custom_mapping=_formulas())
    counter.mod_tracker = _Whole()  # type: ignore[assignment]
    return counter


FUSED = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.RNNBase)
"""Modules that are counted on another way than the one they take when they run."""


class _Whole(contextlib.nullcontext):
    """Counts for the whole model only: telling modules apart hooks their gradients, which fails on a parameter that is
    handed to a module."""

    parents = frozenset({"Global"})


@contextlib.contextmanager
def _unfused(model: nn.Module) -> Iterator[None]:
    """nn.MultiheadAttention, LSTM and GRU as plain matrix products, not as one fused op that nobody counts."""
    with contextlib.ExitStack() as stack:
        stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)
        if any(isinstance(module, nn.RNNBase) for module in model.modules()):
            stack.enter_context(warnings.catch_warnings(action="ignore"))
            stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        yield


class _Live(TorchDispatchMode):
    """Bytes of the storages that a forward makes, while they live, and their peak."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # a wrapper around every operation that only compiling needs

    def __init__(self, known: set[int]):
        super().__init__()
        self.known, self.now, self.peak = known, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in (out,) if isinstance(out, Tensor) else tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.known:
                    self.known.add(storage._cdata)
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())
        return out

    def _forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def peak_memory(model: nn.Module, inputs: Inputs) -> int:
    """Bytes at the highest point of one forward without gradients: parameters, buffers, and what it allocates.

    On CUDA what the allocator says (workspaces included); elsewhere the tensors alive at once, op by op, which
    is the same on every machine but does not see the scratch space inside an op.
    """
    own, weights = _storages(model)
    device = next((t.device for t in [*model.parameters(), *model.buffers()]), torch.device("cpu"))
    with evaluating(model):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            run(model, inputs)
            torch.cuda.synchronize(device)
            return weights + torch.cuda.max_memory_allocated(device) - before
        given = {t.untyped_storage()._cdata for t in tree_leaves(inputs) if isinstance(t, Tensor)}
        with _Live(own | given) as live:
            run(model, inputs)
        return weights + live.peak


@contextlib.contextmanager
def counting(model: nn.Module, inputs: Inputs, counted: list[int]) -> Iterator[None]:
    """Counts the one forward on `inputs` that is run within: `counted` is [`macs`, `peak_memory`] at the end.

    >>> model, inputs, counted = nn.Linear(3, 4), torch.ones(2, 3), []
    >>> with counting(model, inputs, counted), torch.no_grad():
    ...     _ = model(inputs)
    >>> counted
    [24, 96]

    The list stays empty where the two take different ways through a model, where memory is the allocator's to tell, and
    where a cache would count that the caller leaves out.
    """
    caches = getattr(getattr(model, "config", None), "use_cache", False)
    device = next((t.device for t in [*model.parameters(), *model.buffers()]), torch.device("cpu"))
    if caches or device.type == "cuda" or any(isinstance(m, FUSED) for m in model.modules()):
        yield
        return
    own, weights = _storages(model)
    given = {t.untyped_storage()._cdata for t in tree_leaves(inputs) if isinstance(t, Tensor)}
    with evaluating(model), _Live(own | given) as live, _counter() as counter:
        yield
    counted += [counter.get_total_flops() // 2, weights + live.peak]


def macs_and_memory(model: nn.Module, inputs: Inputs) -> tuple[int, int]:
    """`macs` and `peak_memory`, from one forward where that is possible."""
    counted: list[int] = []
    with counting(model, inputs, counted):
        run(model, inputs)
    return (counted[0], counted[1]) if counted else (macs(model, inputs), peak_memory(model, inputs))


def _storages(model: nn.Module) -> tuple[set[int], int]:
    """(keys of the memory that a model's tensors lie in, its bytes)."""
    own = {t.untyped_storage()._cdata: t.untyped_storage() for t in [*model.parameters(), *model.buffers()]}
    return set(own), sum(storage.nbytes() for storage in own.values())


def accepts(model: nn.Module, name: str) -> bool:
    """Whether `model.forward` has a parameter of this name."""
    return name in inspect.signature(model.forward).parameters
