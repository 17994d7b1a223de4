"""The repair that the caller asked for, block by block: of single weights as they are pruned, of units once they are chosen."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.graph import Graph
from secateur.graph.blocks import Blocks, find_stacks
from secateur.pruning.context import Context, block_index
from secateur.pruning.plan import Plan
from secateur.pruning.undo import remove_parameter, tensor_of
from secateur.repair.blocks import PrunedBlock, Repair, dense_copy
from secateur.stats.stream import Block, Flow
from secateur.surgery.changes import set_values
from secateur.surgery.mask import leave_out, unit_masks, unmask_units
from secateur.utils.batches import as_batches, batch_numel
from secateur.utils.running import evaluating, flat_tensors
from secateur.utils.screen import Screen

Tensors = dict[str, Tensor]
ERRORS = "fit/errors"
"""Beside the tensors of a finished block: its errors before and after the steps."""


class Fitted:
    """Repairs the blocks of a run over single weights, each as soon as it is pruned, so that the next is pruned behind it.

    propagate: whether the run's own states are those of the pruned model; else they are gone through beside it.
    """

    def __init__(self, context: Context, propagate: bool):
        self.context, self.propagate = context, propagate
        self.repair = _repair(context)
        self.flow: Flow | None = None

    def block(self, block: Block, result: Tensors, install: Callable[[], None]) -> Tensors:
        """What the repair changes, as `value/NAME`; `result` holds the block's masks, and `install` puts them in."""
        assert block.flow is not None
        if self.flow is None or self.flow.path != block.flow.path:
            self.flow = block.flow if self.propagate else block.flow.beside()
        masks = {key[5:]: mask for key, mask in result.items() if key.startswith("mask/")}
        whole = dense_copy(block.module) if masks else block.module
        free = {name: m for name, m in block.matrices.items() if name in self.context.matrices}
        if (undo := self.context.undo) is not None:
            for matrix in free.values():
                undo.remember(matrix.name)
                undo.remember(matrix.bias[0])
        install()
        start = block.index - _stack_of(find_stacks(self.context.model), block.index).start
        part = PrunedBlock(start, block.path, block.module, whole, free, masks)
        changed = {f"value/{name}": value for name, value in self.repair.block(self.flow, part).items()}
        return changed | _told(self.repair, bool(masks))

    def resume(self, finished: Mapping[int, Tensors], install: Callable[[Tensors], None]) -> Flow | None:
        """Installs blocks that an earlier run finished, and runs the dense model through them."""
        model = self.context.model
        stacks, chunks = find_stacks(model), as_batches(self.context.require_data(), self.context.batch_size)
        for number in range(max(finished, default=-1) + 1):
            stack = _stack_of(stacks, number)
            if self.flow is None or self.flow.path != stack.path:
                self.flow = Flow(model, stack.modules, chunks, stack.path, alone=len(stacks) == 1)
            index = number - stack.start
            module = stack.modules[index]
            whole = self._original(number, module)
            loaded = finished.get(number, {})
            _hear(self.repair, loaded)
            self.repair.finished(self.flow, index, whole)
            install(loaded)
        return self.flow

    def _original(self, number: int, module: nn.Module) -> nn.Module:
        """A block before it was pruned: it is that still, unless the model is read from where an earlier run wrote."""
        context = self.context
        if context.ready is not None:
            context.ready(number)
        if context.original is None or self.repair.how != "reconstruct":
            return module
        stack = _stack_of(find_stacks(context.model), number)
        prefix, whole = f"{stack.path_of(number - stack.start)}.", dense_copy(module)
        own = dict(whole.state_dict(keep_vars=True))
        with torch.no_grad():
            for name, tensor in context.original(number).items():
                own[name.removeprefix(prefix)].copy_(tensor)
        return whole

    def notes(self) -> dict[str, str]:
        return _notes(self.repair)


def repair_units(context: Context, graph: Graph, plan: Plan) -> None:
    """Repairs a plan that removes units: what it changes is written into `plan.values`; the model stays dense.

    The method's own repair is dropped. A block before blocks that left is fitted to what the dense model gives behind those.

    Raises `SecateurError` where units reach over several blocks.
    """
    model, plan.values = context.model, {}
    if not context.options.fits or not plan.keep:
        return
    stacks = find_stacks(model)
    _check_inside(graph, plan, stacks)
    keep = {name: units for name, units in plan.keep.items() if plan.kinds[name] != "layers"}
    leaving = Leaving(unit_masks(model, graph, keep), _gone(graph, plan))
    leave_out(model, graph, keep)
    chunks = as_batches(context.require_data(), context.batch_size)
    blocks = [(stack, index) for stack in stacks for index in range(len(stack))]
    repair, flow = _repair(context), None
    try:
        for stack, index in context.progress(blocks, "repair", len(blocks)) if context.progress else blocks:
            if flow is None or flow.path != stack.path:
                flow = Flow(model, stack.modules, chunks, stack.path, alone=len(stacks) == 1)
            plan.values |= _repair_block(context, repair, flow, stack, index, leaving)
    finally:
        unmask_units(model)
    plan.notes |= _notes(repair)


@dataclass(repr=False)
class Leaving(Screen):
    """What units that leave take along: zeros by parameter name, and the paths of blocks."""

    masks: Tensors
    blocks: set[str]


def _gone(graph: Graph, plan: Plan) -> set[str]:
    return {
        path
        for name, units in plan.keep.items()
        if plan.kinds[name] == "layers"
        for unit, path in enumerate(graph[name].modules)
        if unit not in units.tolist()
    }


def _repair_block(
    context: Context, repair: Repair, flow: Flow, stack: Blocks, index: int, leaving: Leaving
) -> Tensors:
    """What the repair of one block changes; the block is masked meanwhile, and dense again afterwards."""
    model, path, module = context.model, stack.path_of(index), stack.modules[index]

    def inside(name: str) -> bool:
        return not path or name.startswith(f"{path}.")

    masks = {name: mask for name, mask in leaving.masks.items() if inside(name)}
    matrices = {name: matrix for name, matrix in context.matrices.items() if inside(name)}
    ahead: list[nn.Module] = []
    while stack.repeated and index + len(ahead) + 1 < len(stack):
        if stack.path_of(index + len(ahead) + 1) not in leaving.blocks:
            break
        ahead.append(stack.modules[index + len(ahead) + 1])
    fits_ahead = bool(ahead) and repair.how == "reconstruct"
    if path in leaving.blocks or not (masks or fits_ahead):
        repair.finished(flow, index, module)
        repair.go_on(index, module, gone=path in leaving.blocks)
        return {}
    whole = dense_copy(module)
    unmask_units(whole)

    def install(values: Tensors) -> None:
        set_values(model, values)
        with torch.no_grad():
            for name, mask in masks.items():
                tensor = tensor_of(model, name)
                tensor.masked_fill_(~mask.to(tensor.device), 0)

    key = f"round-{context.round}-repair-{stack.start + index}"
    values = context.checkpoint.load(key)
    try:
        if values is None:
            install({})
            part = PrunedBlock(index, path, module, whole, matrices, masks, units=True, ahead=tuple(ahead))
            values = {name: tensor.clone().cpu() for name, tensor in repair.block(flow, part).items()}
            context.checkpoint.save(key, values | _told(repair, True))
        else:
            _hear(repair, values)
            repair.finished(flow, index, whole, ahead=tuple(ahead))
            install(values)
        repair.go_on(index, module)
    finally:
        _put_back(model, module, whole, path)
    return values


def _put_back(model: nn.Module, module: nn.Module, whole: nn.Module, path: str) -> None:
    before = dict(whole.named_parameters())
    with torch.no_grad():
        for name, parameter in list(module.named_parameters()):
            if name in before:
                parameter.copy_(before[name])
            else:
                remove_parameter(model, f"{path}.{name}" if path else name)


def _check_inside(graph: Graph, plan: Plan, stacks: tuple[Blocks, ...]) -> None:
    for name in plan.keep:
        if plan.kinds[name] == "layers":
            continue
        homes = {_home(part.name, stacks) for part in graph[name].slices}
        if len(homes) > 1 or None in homes:
            raise SecateurError(
                f"the {plan.kinds[name]} of {name} reach over several blocks, and it goes block by block",
                where="repair",
                fix=f"cut others than {plan.kinds[name]} (kinds=), or repair=none",
            )


def _home(name: str, stacks: tuple[Blocks, ...]) -> tuple[str, int] | None:
    for stack in stacks:
        if not stack.repeated:
            return "", 0
        index = block_index(name, stack.path)
        if index is not None:
            return stack.path, index
    return None


def _stack_of(stacks: tuple[Blocks, ...], number: int) -> Blocks:
    return next(stack for stack in reversed(stacks) if stack.start <= number)


def _repair(context: Context) -> Repair:
    how, passes = context.options.repair, context.options.repair_passes
    return Repair(context.model, str(how), passes=passes, seed=context.seed)


def repair_bytes(context: Context) -> int:
    """What a repair holds at least beside the calibration: copies of the largest block, and the dense model's states."""
    stacks = find_stacks(context.model)
    block = max(
        (m for stack in stacks for m in stack.modules), key=lambda m: sum(p.numel() for p in m.parameters())
    )
    low = any(p.dtype.itemsize < 4 for p in block.parameters())
    numbers = sum(p.numel() for p in block.parameters())
    if context.options.repair != "reconstruct":
        return numbers * (4 + 8 * low)
    stack = next(stack for stack in stacks if block in stack.modules)
    chunks = as_batches(context.require_data(), context.batch_size)
    flow = Flow(context.model, stack.modules, chunks, stack.path, alone=len(stacks) == 1)
    with evaluating(context.model):
        given = next(flat_tensors(flow.call(0, 0)))
    states = given.nbytes * sum(map(batch_numel, chunks)) // batch_numel(chunks[0])
    # the dense block, what it was before the steps, gradients and two moments of Adam
    return states + numbers * 4 * (5 + 2 * low)


def _told(repair: Repair, fitted: bool) -> Tensors:
    """The last block's errors, to lie beside what was changed of it."""
    return {ERRORS: torch.tensor(repair.errors[-1], dtype=torch.float64)} if fitted and repair.errors else {}


def _hear(repair: Repair, loaded: Tensors) -> None:
    """Takes the errors out of what an earlier run left of a block."""
    if (errors := loaded.pop(ERRORS, None)) is not None:
        repair.errors.append((float(errors[0]), float(errors[1])))


def _notes(repair: Repair) -> dict[str, str]:
    notes = []
    if repair.errors:
        first, last = (sum(each) / len(each) for each in zip(*repair.errors))
        notes.append(
            f"what the blocks give was {first:.3g} off the dense model's after the closed form, and is {last:.3g} off (share of the square)"
        )
    if repair.left:
        notes.append(f"not solved for: {', '.join(repair.left[:4])}{', ...' if len(repair.left) > 4 else ''}")
    return {"repair": "; ".join(notes)} if notes else {}
