"""Hooks that add what goes into layers to their statistics while the model runs, and the batches it runs on."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from secateur.errors import SecateurError
from secateur.graph.blocks import Matrix, language_model_of, plain_experts
from secateur.stats.layer import InputStats, LayerStats
from secateur.stats.routed import Routed
from secateur.utils.batches import sequences_in, token_mask
from secateur.utils.inputs import Inputs, map_tensors

MASKS = {"encoder": "attention_mask", "decoder": "decoder_attention_mask"}
"""Which mask hides the padding of a side; a model without two sides has only the first."""


class Stop(BaseException):
    """Ends a forward behind the last block that is needed of it."""


class NotShared(Exception):
    """Layers that read one tensor in the first batch read different ones later."""


class Recorder:
    """Gathers the input statistics of `matrices` of a model while its context is open.

    >>> recorder = Recorder(model, matrices, {"input_norm"})
    >>> with recorder:
    ...     recorder.begin(batch)
    ...     model(**batch)
    >>> recorder.stats[name].input_norm

    Layers that are given the same tensor (the object, not its name) share one `InputStats`; it is filled once. Tokens
    that a batch's `attention_mask` hides don't count, nor in a decoder beside an encoder those that its
    `decoder_attention_mask` does.

    early: raise `Stop` as soon as every layer has had its input, from the second batch on, where the first gave each layer one
    and which tokens a layer gets doesn't depend on the batch (experts).
    """

    def __init__(
        self,
        model: nn.Module,
        matrices: Mapping[str, Matrix],
        needs: frozenset[str],
        share: bool = True,
        early: bool = False,
    ):
        self.matrices, self.needs, self.share, self.early = dict(matrices), needs, share, early
        self.decoder = _decoder_of(model)
        self.inputs: dict[str, InputStats] = {}
        self._leads: dict[str, bool] = {}
        self._sequences = 0
        self._calls: dict[str, int] = {}
        self._ends = False
        self._masks: dict[str, Tensor | None] = {}
        self._encoded: Tensor | None = None
        self._counts = True
        # a mask hides tokens of the language model; a tower may have as many of its own
        self._masked = {id(module) for module in language_model_of(model).modules()}
        self._of_decoder = {id(module) for module in self.decoder.modules()} if self.decoder else set()
        self._model = model
        self._routed: Routed | None = None
        """While the context is open: it knows this recorder, whose sums would otherwise wait for the garbage collector."""
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

    def begin(self, batch: Inputs) -> None:
        """Starts a batch."""
        if self._sequences and any(self._calls.get(name) != 1 for name in self.matrices):
            self.early = False
        self._ends = self.early and self._sequences > 0
        self._calls = {}
        self._sequences += sequences_in(batch)
        self._masks = {side: token_mask(batch, key) for side, key in MASKS.items()}
        self._encoded = None
        self._seen.clear()
        for inputs in self.inputs.values():
            inputs.sequences = self._sequences

    def __enter__(self) -> Self:
        experts = []
        plain = [
            m.module for m in self.matrices.values() if not m.kind.startswith("experts") and m.kind != "conv"
        ]
        # what must run to its end, such as a router that leaves experts out, isn't stopped
        self.early &= not any(module._forward_hooks_always_called for module in self._model.modules())
        self._routed = Routed(self._model, plain, self.mask)
        self._exit.callback(setattr, self, "_routed", None)
        # before the hooks that count, so that an expert which is a single layer is known to them
        for handle in self._routed.hooks():
            self._exit.callback(handle.remove)
        if self.decoder is not None:
            self._exit.callback(
                self.decoder.register_forward_pre_hook(self._see_encoded, with_kwargs=True).remove
            )
        for matrix in self.matrices.values():
            if matrix.kind.startswith("experts"):
                experts.append(matrix)
                self._exit.enter_context(plain_experts(matrix.module))
                if "forward" not in matrix.module.__dict__:
                    self._exit.enter_context(self._parted(matrix))
            else:
                hook = matrix.module.register_forward_pre_hook(self._hook(matrix), with_kwargs=True)
                self._exit.callback(hook.remove)
        self.early = self.early and not experts and not self._picks(plain)
        if experts:
            self._exit.enter_context(_ExpertInputs(experts, self._add_expert))
        return self

    def _picks(self, modules: list[nn.Module]) -> bool:
        """Whether some of the modules lie in a list that is no stack of blocks: experts, of which a batch may skip some."""
        assert self._routed is not None
        stacks = {matrix.block_path for matrix in self.matrices.values()} - {""}
        blocks = {child for path in stacks for child in self._model.get_submodule(path).children()}
        return any(self._routed.expert[m][0] not in blocks for m in modules if m in self._routed.expert)

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
            self._calls[matrix.name] = self._calls.get(matrix.name, 0) + 1
            if self._ends and len(self._calls) == len(self.matrices):
                raise Stop

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
            inputs.add(self.visible(matrix, x))

    def _see_encoded(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._encoded = kwargs.get("encoder_hidden_states")

    def mask(self, module: nn.Module, x: Tensor, parts: int = 1) -> Tensor | None:
        """[tokens] bool, those of `x` [..., in] that count; cross-attention reads the encoder's inside the decoder."""
        if id(module) not in self._masked:
            return None
        inside = id(module) in self._of_decoder
        mask = self._masks["decoder" if inside and x is not self._encoded else "encoder"]
        rows = x.shape[:-1].numel()
        # some experts are given all tokens once for each of them, one expert after the other
        if mask is None or rows not in (mask.numel(), parts * mask.numel()):
            return None
        return mask.reshape(-1).to(x.device).repeat(rows // mask.numel())

    def rows(self, matrix: Matrix, x: Tensor) -> Tensor:
        """What the matrix multiplies of its layer's input: [parts, tokens that count, in].

        >>> recorder.begin(batch); recorder.rows(matrix, x).shape  # doctest: +SKIP
        torch.Size([1, 2048, 576])
        """
        return _unfolded(matrix.module, x) if matrix.kind == "conv" else self.visible(matrix, x)[None]

    def visible(self, matrix: Matrix, x: Tensor) -> Tensor:
        """[tokens that count, in] of the input of a layer that is no convolution."""
        rows = x.reshape(-1, x.shape[-1])
        mask = self._routed.of(matrix.module, len(rows)) if self._routed is not None else None
        mask = self.mask(matrix.module, x, matrix.parts) if mask is None else mask
        return rows if mask is None else rows[mask]

    @contextlib.contextmanager
    def _parted(self, matrix: Matrix) -> Iterator[None]:
        """Experts are given the hidden tokens of a batch in a call of their own, which isn't counted."""
        module = matrix.module
        original = module.forward

        @functools.wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            x = args[0] if args else next(iter(kwargs.values()))
            visible = self.mask(module, x, matrix.parts)
            if visible is None:
                return original(*args, **kwargs)
            result = torch.empty_like(x).reshape(-1, x.shape[-1])  # [tokens, hidden]
            for who, counts in ((visible, True), (~visible, False)):
                if who.any():
                    self._counts = counts
                    own = map_tensors((args, kwargs), functools.partial(_rows_of, who=who, lead=x.shape[:-1]))
                    result[who] = original(*own[0], **own[1]).reshape(-1, x.shape[-1])
            self._counts = True
            return result.reshape(x.shape)

        module.forward = forward
        try:
            yield
        finally:
            del module.__dict__["forward"]

    def _add_expert(self, matrix: Matrix, expert: int, rows: Tensor) -> None:
        if not self._counts:
            return
        self._leads[matrix.name] = True
        self.of(matrix.name).add(rows.detach(), expert)


def _decoder_of(model: Any) -> nn.Module | None:
    """The decoder of a model that has an encoder beside it."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return None
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    return decoder if isinstance(decoder, nn.Module) else None


def _rows_of(tensor: Tensor, who: Tensor, lead: torch.Size) -> Tensor:
    """The rows `who` [tokens] of a tensor that has one for every token; others as they are."""
    if tensor.shape[: len(lead)] == lead:
        tensor = tensor.flatten(0, len(lead) - 1)
    return tensor[who] if tensor.dim() and len(tensor) == len(who) else tensor


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
