"""Models whose parameters have shapes and no memory: built from a folder, counted, and compared."""

from __future__ import annotations

import contextlib
import copy
import functools
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.graph.blocks import find_stacks
from secateur.io.reshape import BROKEN
from secateur.io.shards import Shards
from secateur.io.transformers import class_of
from secateur.utils.inputs import default_inputs
from secateur.utils.running import call, flat_tensors


def empty_model(folder: str | Path, device: str | torch.device = "cpu") -> Any:
    """The model of a folder of transformers, with parameters that have shapes and no memory, in eval mode.

    >>> model = empty_model("llama-70b")  # doctest: +SKIP
    >>> model.num_parameters()  # doctest: +SKIP
    70553706496

    Raises SecateurError for a folder that transformers can't build a model from.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig

    path = Path(folder).expanduser()
    where = str(path / "config.json")
    try:
        cls, config = class_of(path)
        config = config or AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
        build = cls.from_config if hasattr(cls, "from_config") and not issubclass(cls, nn.Module) else cls
        with init_empty_weights(include_buffers=False):
            model = build(copy.deepcopy(config))
        model.tie_weights()
    except (*BROKEN, OSError, ImportError, AssertionError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise SecateurError(f"no model can be built from it ({reason})", where=where) from error
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                empty = hollow(parameter, torch.float32, torch.device(device))
                empty = nn.Parameter(empty, requires_grad=False)
                module._parameters[name] = made.setdefault(id(parameter), empty)
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device)
    return model.eval()


APART = 16
"""Numbers between the beginnings of tensors that share memory, for products that want them aligned."""


@contextlib.contextmanager
def rows_apart(model: nn.Module) -> Iterator[None]:
    """Within, a hollow model's stacks of matrices have strides that products of many at once take: all are one matrix of zeros."""
    stacks = [p for p in model.parameters() if p.dim() == 3]
    before = [p.data for p in stacks]
    try:
        largest = max((p[0].numel() for p in stacks), default=0)
        rooms: dict[Any, Tensor] = {}
        for number, p in enumerate(stacks):
            size, key = largest + APART * len(stacks), (p.dtype, p.device)
            if key not in rooms:
                rooms[key] = torch.zeros(size, dtype=p.dtype, device=p.device)
            own = rooms[key][APART * number :][: p[0].numel()].view(1, *p.shape[1:])
            p.data = torch.from_dlpack(own).expand(
                p.shape
            )  # a storage of its own, so that none is taken for tied
        yield
    finally:
        for p, old in zip(stacks, before):
            p.data = old


def as_stored(model: nn.Module, source: Shards) -> None:
    """A hollow model's floats take the dtypes that they have in the shards; new ones that of most."""
    kinds = {name: entry.dtype for name, entry in source.entries.items() if entry.dtype is not None}
    usual = max(kinds.values(), key=[*kinds.values()].count)
    for name, parameter in model.named_parameters():
        parameter.data = hollow(parameter, kinds.get(name, usual), parameter.device)


@torch.no_grad()
def same_on_noise(model: nn.Module, twin: nn.Module) -> bool:
    """Whether the blocks of two hollow models of equal shapes give the same: on noise, which a block holds only while it runs."""
    inputs = default_inputs(model)
    ours, theirs = (_on_noise(each, inputs) for each in (model, twin))
    return len(ours) == len(theirs) > 0 and all(
        a.shape == b.shape and torch.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in zip(ours, theirs)
    )


def _on_noise(model: Any, inputs: Any) -> list[Tensor]:
    """What each block gives."""
    blocks = [(s.path_of(i), block) for s in find_stacks(model) for i, block in enumerate(s.modules)]
    inside = tuple(f"{path}." for path, _ in blocks)
    head = getattr(model.get_output_embeddings(), "weight", None)
    outside = {n: p for n, p in model.named_parameters() if not n.startswith(inside)}
    before = {name: p.dtype for name, p in outside.items()}
    given: list[Tensor] = []

    def entered(path: str, module: nn.Module, args: Any) -> None:
        _draw({f"{path}.{name}": p for name, p in module.named_parameters()})

    def left(module: nn.Module, args: Any, output: Any) -> None:
        given.append(next(flat_tensors(output)))
        for p in module.parameters():
            p.data = hollow(p, kind, p.device)

    kind = next(model.parameters()).dtype
    hooks = [block.register_forward_pre_hook(functools.partial(entered, path)) for path, block in blocks]
    hooks += [block.register_forward_hook(left) for _, block in blocks]
    try:
        _draw({name: p for name, p in outside.items() if p is not head})
        if head is not None:  # nothing looks at what it gives
            head.data = hollow(head, torch.float32, head.device)
            if head is getattr(model.get_input_embeddings(), "weight", None):
                shared: dict[str, Any] = {"embeddings": head}
                _draw(shared)
        call(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
        for name, p in outside.items():
            p.data = hollow(p, before[name], p.device)
    return given


def _draw(parameters: dict[str, Tensor]) -> None:
    """Noise of a size that layers keep, the same for the same name."""
    for name, p in parameters.items():
        noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
        p.data = (1 + 0.1 * noise if p.ndim == 1 else noise * p.shape[-1] ** -0.5).to(p.device)


def hollow(tensor: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros of the same shape in the memory of one number."""
    return torch.zeros((), dtype=dtype, device=device).expand(tensor.shape)
