"""How much memory a calibration run will take above the model, before it starts."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from secateur.graph.blocks import Blocks, Matrix, find_matrices, find_stacks
from secateur.stats.layer import OF_INPUTS, LayerStats, check_needs
from secateur.stats.stream import Flow, states_of
from secateur.utils.batches import as_batches, batch_numel
from secateur.utils.running import flat_tensors

SWEPT = 128
"""Columns in work at once while weights are repaired."""


def estimate(
    model: nn.Module,
    batches: Any,
    needs: Iterable[str],
    matrices: Mapping[str, Matrix] | None = None,
    *,
    batch_size: int | None = None,
) -> int:
    """Bytes at the peak of a block-by-block run, above the model: hidden states, one block's activations and
    statistics, and what choosing (or, with a Hessian, repairing) its weights takes for a while.

    >>> print(f"{estimate(model, ids, {'hessian'}) / 1e6:.0f} MB")
    131 MB

    Two batches are run through one block, the one with most weights, and what they allocate is counted; the rest is
    arithmetic. The plan that a run writes (masks, repaired weights) isn't part of it, nor freed memory that the allocator
    holds back (on Linux MALLOC_MMAP_THRESHOLD_=131072 makes it give that up).
    """
    needs = check_needs(frozenset(needs)) & OF_INPUTS
    matrices = find_matrices(model) if matrices is None else matrices
    alone = {matrix.block_path for matrix in matrices.values()} == {""}
    stacks = (Blocks("", (model,)),) if alone else find_stacks(model)
    weights = [sum(m.numel for m in matrices.values() if m.block == i) for i in range(sum(map(len, stacks)))]
    number = weights.index(max(weights))
    own = {name: matrix for name, matrix in matrices.items() if matrix.block == number}
    blocks = next(stack for stack in reversed(stacks) if stack.start <= number)
    if not needs:
        return _choosing(own, {})
    chunks = as_batches(batches, batch_size)
    largest = max(chunks, key=batch_numel)
    flow = Flow(model, blocks.modules, [largest, largest], blocks.path, alone=len(stacks) == 1)
    held = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    with _Peak(held) as peak:
        stats = flow.gather(number - blocks.start, own, needs, keep_output=False)
    each = flow.state_bytes if blocks.repeated else 0
    # all batches' states between two blocks, a copy of the running one, and what the module around the stack was given
    each += sum(tensor.nbytes for tensor in flat_tensors(flow.given.get(0)))
    states = each * sum(map(batch_numel, chunks)) // max(batch_numel(largest), 1) + each
    kept = sum({id(s.inputs): _bytes(s) for s in stats.values()}.values())
    return states + max(peak.bytes, kept + _choosing(own, stats))


def of_passing(
    model: nn.Module,
    batches: list,
    modules: tuple[nn.Module, ...],
    number: int,
    measure: Callable[[Flow], None],
) -> int:
    """Bytes at the peak where `measure` runs batches through block `number`, above the model: the states of all batches, and
    what it allocates on the largest."""
    largest = max(batches, key=batch_numel)
    flow = Flow(model, modules, [largest])
    args, kwargs = flow.call(0, number)
    states = states_of(modules[number](*args, **kwargs))
    held = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    with _Peak(held) as peak:
        measure(flow)
    each = sum(state.nbytes for state in states)
    return each * sum(map(batch_numel, batches)) // max(batch_numel(largest), 1) + each + peak.bytes


def _choosing(matrices: Mapping[str, Matrix], stats: Mapping[str, LayerStats]) -> int:
    """Bytes at most while a block's masks are chosen: the results so far, and the working set of the next matrices."""
    together: dict[int, list[Matrix]] = {}
    for name, matrix in matrices.items():
        inputs = stats[name].inputs if name in stats else None
        swept = inputs is not None and inputs.outer is not None
        together.setdefault(id(inputs) if swept else id(matrix), []).append(matrix)
    results, peak = 0, 0
    for key, group in together.items():
        size, numel = group[0].shape[1], sum(m.numel for m in group)
        own = numel * (group[0].parameter.element_size() + 1)
        if key == id(group[0]):
            # scores, their partition and a masked copy
            peak = max(peak, results + 12 * numel)
        else:
            # the factor, and: its making, or two copies of the weights and their mask with a few columns, or the result
            numel //= group[0].parts
            columns = 4 * min(SWEPT, size) * (numel // size) * 5
            peak = max(peak, results + 4 * size**2 + max(4 * size**2, 9 * numel + max(columns, own)))
        results += own
    return max(peak, results)


def _bytes(stats: LayerStats) -> int:
    inputs = stats.inputs
    if inputs is None:
        return 0
    sums = (inputs.outer, inputs.square, inputs.mean, inputs.deviation, inputs.absolute)
    return sum(t.nbytes for t in sums if t is not None)


class _Peak(TorchDispatchMode):
    """Counts the bytes of tensors made while it is on, those in `held` apart."""

    def __init__(self, held: set[int]):
        super().__init__()
        self.held, self.now, self.bytes = held, 0, 0
        self.live: dict[int, list[int]] = {}

    def __torch_dispatch__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.data_ptr() in self.held:
            return
        key = storage._cdata
        if key not in self.live:
            self.live[key] = [storage.nbytes(), 0]
            self.now += storage.nbytes()
            self.bytes = max(self.bytes, self.now)
        self.live[key][1] += 1
        weakref.finalize(tensor, self._drop, key)

    def _drop(self, key: int) -> None:
        entry = self.live.get(key)
        if entry is None:
            return
        entry[1] -= 1
        if not entry[1]:
            self.now -= entry[0]
            del self.live[key]
