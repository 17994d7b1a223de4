"""Statistics block by block, through the model's own forward: the memory of one block, whatever the depth.

For block i of a stack the model's forward runs with the blocks before it replaced by what they gave last time, and stops
behind block i; the blocks of other stacks (a vision tower's) run as they are. Masks, rotary tables and per-layer arguments therefore come from the model itself.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.graph.blocks import Blocks, Matrix, check_weights, find_stacks
from secateur.stats.layer import OF_GRADIENTS, LayerStats, check_needs
from secateur.stats.record import NotShared, Recorder, Stop
from secateur.utils.batches import as_batches, batch_numel
from secateur.utils.running import evaluating, flat_tensors, run
from secateur.utils.screen import Screen

Given = tuple[tuple, dict[str, Any]]
"""The positional and keyword arguments of a call."""


@dataclass(repr=False)
class Block(Screen):
    """One block of the model with its matrices and their statistics, both by parameter name."""

    index: int
    path: str
    module: nn.Module
    matrices: dict[str, Matrix]
    stats: dict[str, LayerStats] = field(default_factory=dict)
    flow: Flow | None = None
    """The states that its statistics come from; None where no data was given."""


def stream(
    model: nn.Module,
    batches: Any,
    needs: Iterable[str],
    matrices: Mapping[str, Matrix],
    *,
    propagate: bool = True,
    skip: int = 0,
    flowing: bool = False,
    flow: Flow | None = None,
    progress: Callable[..., Iterable] | None = None,
    batch_size: int | None = None,
    ready: Callable[[int], None] | None = None,
) -> Iterator[Block]:
    """The blocks in order, each with the statistics of its matrices.

    >>> for block in stream(model, ids, {"input_norm"}, find_matrices(model)):
    ...     for name, matrix in block.matrices.items():
    ...         matrix.set(matrix.weight() * mask_of(matrix.weight(), block.stats[name].input_norm))

    Parameters
    ----------
    batches: token ids [N, L] (int64), pictures [N, ...], or a list of batches (tensor, tuple or dict of model inputs);
        tokens that an `attention_mask` (in a decoder beside an encoder: a `decoder_attention_mask`) hides are left out.
    needs: input_norm, hessian, input_mean, input_var; with none the blocks come without running the model.
    matrices: as `find_matrices` gives them.
    propagate: a block's inputs come from the blocks before it as the caller left them; else from the dense model.
    skip: blocks already done: run forward, without statistics, and not given.
    flowing: `block.flow` is there also where no statistics are needed, for a caller that runs blocks itself.
    flow: the states behind the skipped blocks of the first stack that isn't finished, where the caller ran them.
    progress: `secateur.utils.progress.track` or alike: (iterable, description, total) -> iterable.
    batch_size: samples a forward; None: about 2048 tokens.
    ready: called with a block's number before it is looked at, for models whose blocks aren't always in memory.

    The model is untouched between blocks, and after the last one, also when the generator is closed early.
    Raises `SecateurError` naming the layer when weights or activations are NaN or infinite.
    """
    needs = check_needs(frozenset(needs))
    if needs & OF_GRADIENTS:
        raise SecateurError(
            f"{', '.join(sorted(needs & OF_GRADIENTS))} isn't gathered block by block",
            where="stream",
            fix="use collect",
        )
    chunks = as_batches(batches, batch_size) if needs or flowing else []
    wanted = {matrix.block_path for matrix in matrices.values()}
    stacks = (Blocks("", (model,)),) if wanted == {""} else find_stacks(model)
    numbers = [
        (stack, index)
        for stack in stacks
        for index in range(len(stack))
        if stack.start + index >= skip and (stack.path in wanted or not wanted)
    ]
    for stack, index in progress(numbers, "blocks", len(numbers)) if progress is not None else numbers:
        if flow is None or flow.path != stack.path:
            flow = Flow(model, stack.modules, chunks, stack.path, alone=len(stacks) == 1)
        number = stack.start + index
        own = {name: matrix for name, matrix in matrices.items() if matrix.block == number}
        if ready is not None:
            ready(number)
        check_weights(own)
        empty = {name: LayerStats(name=name) for name in own}
        block = Block(
            number, stack.path_of(index), stack.modules[index], own, empty, flow if chunks else None
        )
        if needs:
            block.stats = flow.gather(index, own, needs, keep_output=not propagate)
        if ready is not None:
            ready(number)
        yield block
        _drop(block)


def _drop(block: Block) -> None:
    for stats in block.stats.values():
        if stats.inputs is not None:
            stats.inputs.release()
    block.stats.clear()


class Flow:
    """Hidden states between two blocks of a stack, one per batch, moved forward in place. Other stacks run as they are, and only
    once a batch: later runs start at the module around the stack, with what it was given.

    >>> flow = Flow(model, stack.modules, batches, stack.path)
    >>> for index, block in enumerate(stack.modules):
    ...     for number in range(len(batches)):
    ...         args, kwargs = flow.call(number, index)
    ...         flow.keep(number, index, block(*args, **kwargs))

    alone: whether the model has no other stack; then it always runs from its start.
    """

    def __init__(
        self,
        model: nn.Module,
        modules: tuple[nn.Module, ...],
        batches: list,
        path: str = "",
        alone: bool = True,
    ):
        self.model, self.modules, self.batches, self.path = model, modules, batches, path
        self.hidden: list[list[Tensor]] = [[] for _ in batches]
        self.level = [-1] * len(batches)
        self.outputs: dict[int, Any] = {}
        self.state_bytes = 0
        self.buffer: Tensor | None = None
        self.used = 0
        around = path.rpartition(".")[0]
        self.around = model.get_submodule(around) if around and not alone else None
        self.given: dict[int, Given | None] = {}

    def gather(
        self, index: int, matrices: Mapping[str, Matrix], needs: frozenset[str], keep_output: bool
    ) -> dict[str, LayerStats]:
        """The statistics of block `index`. The states before it (or, with `keep_output`, behind it) are kept."""
        kept = index if keep_output else index - 1
        for share in (True, False):
            recorder = Recorder(self.model, matrices, needs, share, early=not keep_output)
            try:
                with torch.no_grad(), evaluating(self.model), recorder:
                    for number, batch in enumerate(self.batches):
                        recorder.begin(batch)

                        def play(at: int, number: int = number) -> Callable[..., Any]:
                            return self._play(at, number, keep=at == kept, stop=at == index)

                        self._forward(number, index, play)
            except NotShared:
                continue
            break
        recorder.check()
        return recorder.stats

    def call(self, number: int, index: int) -> Given:
        """The arguments that block `index` is given on a batch; the blocks before it are replayed."""
        found: list[Given] = []

        def play(position: int) -> Callable[..., Any]:
            if position < index:
                return self._play(position, number, position == index - 1, False)

            def forward(*args: Any, **kwargs: Any) -> Any:
                found.append((args, kwargs))
                raise Stop

            return forward

        with torch.no_grad():
            self._forward(number, index, play)
        return found[0]

    def beside(self) -> Flow:
        """Another flow of the same batches through the same stack, at its start."""
        return Flow(self.model, self.modules, self.batches, self.path, self.around is None)

    def keep(self, number: int, index: int, output: Any) -> None:
        """The flow goes on from what block `index` gave on a batch."""
        self.outputs[index], states = _take(output)
        self.state_bytes = sum(tensor.nbytes for tensor in states)
        self._store(number, states)
        self.level[number] = index

    def _forward(self, number: int, index: int, play: Callable[[int], Callable[..., Any]]) -> None:
        """The model as far as block `index` on one batch: finished blocks replayed, the others as `play` says."""
        known = self.level[number]
        passing: list[tuple[Tensor, int]] = []
        with contextlib.ExitStack() as stack:
            for position in range(index + 1):
                forward = self._replay(position, number, passing) if position <= known else play(position)
                stack.enter_context(_forward_replaced(self.modules[position], forward))
            try:
                self._run(number)
            except Stop:
                return
        raise SecateurError(
            "the model's forward doesn't come by it",
            where=f"{self.path}.{index}" if self.path else "the model",
            fix=f"give data that uses it, or leave {self.path} out: keep='{self.path}', or name the other parts in the target"
            if self.path
            else "give data that uses it",
        )

    def _run(self, number: int) -> None:
        """The model on a batch; from the module around the stack, once it is known what that is given, in one call."""
        around, given = self.around, self.given.get(number)
        if around is None or (number in self.given and given is None):
            run(self.model, self.batches[number])
            return
        if given is not None:
            around(*given[0], **given[1])
            return
        seen: list[tuple[Given, list[int]]] = []

        def see(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            call = (args, kwargs)
            seen.append((call, [tensor._version for tensor in flat_tensors(call)]))

        hook = around.register_forward_pre_hook(see, with_kwargs=True, prepend=True)
        try:
            run(self.model, self.batches[number])
        finally:
            hook.remove()
            self.given[number] = None
            if len(seen) == 1:  # and nothing was written into what it was given
                call, versions = seen[0]
                if versions == [tensor._version for tensor in flat_tensors(call)]:
                    self.given[number] = call

    def _replay(self, position: int, number: int, passing: list[tuple[Tensor, int]]) -> Callable[..., Any]:
        """A finished block gives a copy, since a model may write into it. Only what the last finished block gives is read: those
        before it pass the copy on, which is made again where somebody wrote into it."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            last = position == self.level[number]
            if not passing or (last and any(state._version != version for state, version in passing)):
                passing[:] = [(copy, copy._version) for copy in (h.clone() for h in self.hidden[number])]
            return _fill(self.outputs[position], [state for state, _ in passing])

        return forward

    def _play(self, position: int, number: int, keep: bool, stop: bool) -> Callable[..., Any]:
        original = self.modules[position].forward

        @functools.wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            output = original(*args, **kwargs)
            if keep:
                self.keep(number, position, output)
            else:
                self.outputs[position], states = _take(output)
                self.state_bytes = sum(tensor.nbytes for tensor in states)
            if stop:
                raise Stop
            return output

        return forward

    def _store(self, number: int, states: list[Tensor]) -> None:
        kept = self.hidden[number]
        if [_layout(tensor) for tensor in kept] == [_layout(tensor) for tensor in states]:
            for old, new in zip(kept, states):
                old.copy_(new)
        else:
            self.hidden[number] = [self._room(tensor, number).copy_(tensor) for tensor in states]

    def _room(self, state: Tensor, number: int) -> Tensor:
        """A place for a state, in one buffer for all batches where they have one shape a token."""
        if self.buffer is None:
            sizes = [batch_numel(batch) for batch in self.batches]
            wanted = self.state_bytes * sum(sizes) // sizes[number] + 64 * len(sizes)
            self.buffer = torch.empty(wanted, dtype=torch.uint8, device=state.device)
        end = self.used + state.nbytes
        if not state.is_contiguous() or end > len(self.buffer) or self.buffer.device != state.device:
            return torch.empty_like(state)
        own = self.buffer[self.used : end].view(state.dtype).view(state.shape)
        self.used = -(-end // 64) * 64
        return own


def _layout(tensor: Tensor) -> tuple:
    return tensor.shape, tensor.dtype, tensor.stride(), tensor.device


def states_of(output: Any) -> list[Tensor]:
    """The hidden states in what a block gave: the first tensor, and those of its shape.

    >>> [s.shape for s in states_of((torch.zeros(1, 3, 4), torch.zeros(2), None))]
    [torch.Size([1, 3, 4])]
    """
    return _take(output)[1]


class _State:
    """Stands for the hidden state number `slot` in the form of a block's output."""

    def __init__(self, slot: int):
        self.slot = slot


def _take(output: Any) -> tuple[Any, list[Tensor]]:
    """(the output's form, its hidden states): the first tensor, and those of its shape; other tensors are dropped."""
    states: list[Tensor] = []

    def take(tensor: Tensor) -> _State | None:
        if states and tensor.shape != states[0].shape:
            return None
        states.append(tensor)
        return _State(len(states) - 1)

    return _map(output, take), states


def _fill(form: Any, states: list[Tensor]) -> Any:
    return _map(form, lambda tensor: tensor, states)


def _map(value: Any, fn: Callable[[Tensor], Any], states: list[Tensor] | None = None) -> Any:
    if isinstance(value, _State):
        return states[value.slot] if states is not None else value
    if isinstance(value, Tensor):
        return fn(value)
    if hasattr(value, "keys"):
        return type(value)(**{key: _map(item, fn, states) for key, item in value.items()})
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_map(item, fn, states) for item in value))
    if isinstance(value, tuple | list):
        return type(value)(_map(item, fn, states) for item in value)
    return value if isinstance(value, str | int | float | bool) else None


@contextlib.contextmanager
def _forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = own
