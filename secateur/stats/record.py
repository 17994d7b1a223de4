"""Hooks that add what goes into layers to their statistics while the model runs, and the batches it runs on."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from secateur.errors import SecateurError
from secateur.graph.blocks import Matrix, plain_experts
from secateur.stats.layer import InputStats, LayerStats


class NotShared(Exception):
    """Layers that read one tensor in the first batch read different ones later."""


class Recorder:
    """Gathers the input statistics of `matrices` while its context is open.

    >>> recorder = Recorder(matrices, {"input_norm"})
    >>> with recorder:
    ...     recorder.begin(sequences=4)
    ...     model(ids)
    >>> recorder.stats[name].input_norm

    Layers that are given the same tensor (the object, not its name) share one `InputStats`; it is filled once.
    """

    def __init__(self, matrices: Mapping[str, Matrix], needs: frozenset[str], share: bool = True):
        self.matrices, self.needs, self.share = dict(matrices), needs, share
        self.inputs: dict[str, InputStats] = {}
        self._leads: dict[str, bool] = {}
        self._sequences = 0
        self._mask: Tensor | None = None
        self._seen: list[tuple[weakref.ref[Tensor], int, InputStats, tuple]] = []
        self._exit = contextlib.ExitStack()

    @property
    def stats(self) -> dict[str, LayerStats]:
        return {name: LayerStats(self.of(name), name=name) for name in self.matrices}

    def of(self, name: str) -> InputStats:
        """The layer's sums; empty ones for a layer that never ran."""
        if name not in self.inputs:
            self.inputs[name] = self._new(self.matrices[name])
        return self.inputs[name]

    def check(self) -> None:
        """Raises `SecateurError`, naming the layer, where an input was NaN or infinite."""
        for name in self.matrices:
            if name in self.inputs and self._leads.get(name, True) and not self.inputs[name].finite():
                raise SecateurError(
                    "its inputs hold NaN or infinite values",
                    where=name,
                    fix="check the calibration data and the weights",
                )

    def begin(self, sequences: int, mask: Tensor | None = None) -> None:
        """Starts a batch. `mask` [sequences, length], True for the tokens that count."""
        self._sequences += sequences
        self._mask = mask
        self._seen.clear()
        for inputs in self.inputs.values():
            inputs.sequences = self._sequences

    def __enter__(self) -> Self:
        experts = []
        for matrix in self.matrices.values():
            if matrix.kind.startswith("experts"):
                experts.append(matrix)
                self._exit.enter_context(plain_experts(matrix.module))
            else:
                hook = matrix.module.register_forward_pre_hook(self._hook(matrix), with_kwargs=True)
                self._exit.callback(hook.remove)
        if experts:
            self._exit.enter_context(_ExpertInputs(experts, self._add_expert))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._exit.close()

    def _new(self, matrix: Matrix) -> InputStats:
        inputs = InputStats(matrix.shape[1], self.needs, matrix.parameter.device, matrix.parts)
        inputs.sequences = self._sequences
        return inputs

    def _hook(self, matrix: Matrix) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            self._add(matrix, x.detach() if x.requires_grad else x)

        return hook

    def _add(self, matrix: Matrix, x: Tensor) -> None:
        name, geometry = matrix.name, _geometry(matrix)
        shared = next(
            (
                i
                for ref, version, i, g in self._seen
                if self.share and ref() is x and version == x._version and g == geometry
            ),
            None,
        )
        if name not in self._leads:
            self._leads[name] = shared is None
            self.inputs[name] = shared or self._new(matrix)
        if not self._leads[name]:
            if shared is not self.inputs[name]:
                raise NotShared(name)
            return
        inputs = self.inputs[name]
        self._seen.append((weakref.ref(x), x._version, inputs, geometry))
        if matrix.kind == "conv":
            for sample in x.split(1):
                inputs.add_parts(_unfolded(matrix.module, sample))
        else:
            inputs.add(self._visible(x))

    def _visible(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if self._mask is None or len(rows) != self._mask.numel():
            return rows
        return rows[self._mask.reshape(-1)]

    def _add_expert(self, matrix: Matrix, expert: int, rows: Tensor) -> None:
        self._leads[matrix.name] = True
        self.of(matrix.name).add(rows.detach(), expert)


class _ExpertInputs(TorchFunctionMode):
    """Sees products with a slice of an expert tensor: which expert, and the rows it is given."""

    def __init__(self, matrices: list[Matrix], add: Callable[[Matrix, int, Tensor], None]):
        super().__init__()
        self.add = add
        self.storages = {m.parameter.untyped_storage().data_ptr(): m for m in matrices}

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if (
            func in (F.linear, torch.matmul, torch.bmm, Tensor.matmul, Tensor.__matmul__, Tensor.bmm)
            and len(args) > 1
        ):
            x, weight = args[:2]
            matrix = (
                self.storages.get(weight.untyped_storage().data_ptr()) if isinstance(weight, Tensor) else None
            )
            if matrix is not None:
                each = matrix.parameter[0].numel()
                first = (weight.storage_offset() - matrix.parameter.storage_offset()) // each
                if weight.dim() == 2:
                    self.add(matrix, first, x.reshape(-1, x.shape[-1]))
                elif weight.dim() == 3 and x.dim() == 3:
                    for expert, rows in enumerate(x):
                        # a token that isn't routed to the expert comes as zeros
                        self.add(matrix, first + expert, rows[rows.any(-1)])
        return func(*args, **(kwargs or {}))


def _geometry(matrix: Matrix) -> tuple:
    """What two layers must agree in to have the same rows."""
    module = matrix.module
    if matrix.kind != "conv":
        return ("rows", matrix.shape[1])
    names = (
        "kernel_size",
        "stride",
        "dilation",
        "groups",
        "padding_mode",
        "_reversed_padding_repeated_twice",
    )
    return tuple(str(getattr(module, name)) for name in names)


def _unfolded(module: nn.Module, x: Tensor) -> Tensor:
    """The rows a convolution multiplies with its weight: [groups, positions, in / groups * kernel]."""
    conv: Any = module
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    x = F.pad(x, conv._reversed_padding_repeated_twice, mode=mode)
    spatial = len(conv.kernel_size)
    for axis, (size, stride, dilation) in enumerate(zip(conv.kernel_size, conv.stride, conv.dilation)):
        x = x.unfold(2 + axis, (size - 1) * dilation + 1, stride)[..., ::dilation]
    # [batch, channels, *positions, *kernel] -> [groups, batch * positions, channels / groups * kernel]
    x = x.unflatten(1, (conv.groups, -1))
    positions, kernel = range(3, 3 + spatial), range(3 + spatial, 3 + 2 * spatial)
    x = x.permute(1, 0, *positions, 2, *kernel)
    return x.reshape(conv.groups, -1, x.shape[2 + spatial :].numel())
