"""Units that leave a model folder: its blocks are scored one after the other, then cut, proven and written, each while it alone is there."""

from __future__ import annotations

import copy
import dataclasses
import functools
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import SecateurError, require
from secateur.graph import Group
from secateur.io.hollow import as_stored, same_on_noise
from secateur.io.renamed import named
from secateur.io.shards import Shards
from secateur.io.streamed import Streamed
from secateur.io.transformers import _save_transformers
from secateur.method import list_methods, method_class
from secateur.pruning.allocate import MEASURED
from secateur.pruning.context import Context
from secateur.pruning.method import UnitMethod
from secateur.pruning.options import Options
from secateur.pruning.plan import Plan
from secateur.pruning.units import check_shares
from secateur.stats.collect import singly
from secateur.stats.layer import InputStats, LayerStats
from secateur.stats.memory import of_passing
from secateur.stats.stream import Flow, states_of
from secateur.surgery.changes import Changes, set_values
from secateur.surgery.config import fit_config
from secateur.surgery.cut import cut_modules
from secateur.surgery.mask import mask_units
from secateur.surgery.prove import largest_gap
from secateur.utils.batches import as_batches
from secateur.utils.running import evaluating

Tensors = dict[str, Tensor]


def check_units(method: UnitMethod, target: str, options: Options) -> None:
    """Refuse what can't be cut block by block. Raises `SecateurError` with the methods that can."""
    able = [n for n in list_methods() if getattr(method_class(n), "by_block", False)]
    fix = f"take {', '.join(able[:-1])} or {able[-1]}, or prune it without --stream"
    require(method.by_block, f"{method.name} needs more than a block and what passes through it", where="stream", fix=fix)  # fmt: skip
    method.passes()
    require(target != "latency", "a cut copy of the whole model would be timed", where="target", fix="give a share, params, macs or size")  # fmt: skip
    require(options.divides != MEASURED, "predictions of the whole model would be compared", where=f"allocation {MEASURED}", fix="take another")  # fmt: skip
    require(options.repair in (None, "none"), f"units are repaired ({options.repair}) with the whole model in memory", where="repair", fix="leave it out")  # fmt: skip
    require(
        not options.prove_export, "torch.export takes whole models", where="prove_export", fix="leave it out"
    )


class Blocks:
    """What is cut of each block of a folder.

    >>> blocks = Blocks(context, streamed)  # doctest: +SKIP
    >>> plan = blocks.plan(); about = blocks.cut(plan)  # doctest: +SKIP

    Raises `SecateurError` where units reach over several blocks.
    """

    def __init__(self, context: Context, streamed: Streamed):
        self.context, self.streamed = context, streamed
        self.stats: dict[str, LayerStats] = {}
        require(
            len(streamed.stacks) == 1,
            f"it has {len(streamed.stacks)} lists of blocks, and units leave one block by block",
            where=type(context.model).__name__,
            fix="prune it without --stream",
        )
        self.groups: list[list[Group]] = [[] for _ in streamed.modules]
        method = context.method
        assert isinstance(method, UnitMethod)
        self.method, self.passes = method, method.passes()
        groups = [group for group in context.groups if method.cuts(group)]
        self.layers = (
            groups[0] if self.passes == "batches" and [g.kind for g in groups] == ["layers"] else None
        )
        if self.layers is not None:
            self._share_out(self.layers)
            return
        homes = {group.name: self._homes(group) for group in groups}
        wide = {g.kind: g.name for g in groups if len(homes[g.name]) != 1 or not g.exact}
        kinds = dict.fromkeys(group.kind for group in groups if group.kind not in wide)
        for kind, name in wide.items():
            raise SecateurError(
                f"the {kind} of {name} reach over several blocks",
                where="kinds",
                fix=f"kinds={','.join(kinds)}" if kinds else "prune it without --stream",
            )
        for group in groups:
            self.groups[homes[group.name].pop()].append(group)

    def _share_out(self, layers: Group) -> None:
        """Each block scores itself, as a group of one."""
        for number, path in enumerate(self.streamed.paths):
            if path in layers.modules:
                self.groups[number] = [dataclasses.replace(layers, size=1, modules=(path,))]

    def _homes(self, group: Group) -> set[int]:
        names = [*(s.name for s in group.slices), *(f"{path}." for path in group.modules)]
        starts = [f"{path}." for path in self.streamed.paths]
        return {next((i for i, start in enumerate(starts) if name.startswith(start)), -1) for name in names}

    def plan(self) -> Plan:
        """What all blocks gather, and the budget divided over them. What lies in the run's checkpoint isn't gathered again."""
        context, method = self.context, self.method
        found: Tensors = {}
        done = 0
        while (loaded := context.checkpoint.load(f"scores-{done}")) is not None:
            self._take(loaded, found)
            done += 1
        for number, gathered in self._by_inputs(done) if self.passes == "inputs" else self._by_passes(done):
            context.checkpoint.save(f"scores-{number}", gathered)
            self._take(gathered, found)
        require(bool(found), "no linear layer reads their units", where=f"{method.name}, {context.groups[0].name}, ...")  # fmt: skip
        plan = method.decide(context, found)
        check_shares(context, plan)
        return plan

    def _by_inputs(self, done: int) -> Iterator[tuple[int, Tensors]]:
        """(a block's number, what it gathers), where that comes from statistics of its inputs."""
        for block in self.context.stream(propagate=False, skip=done):
            own = self.method.gather(self._own(block.index, block.stats))
            found = {f"score/{name}": scores for name, scores in own.items()}
            for name, stats in block.stats.items():
                state = stats.inputs.state() if stats.inputs is not None else {}
                found |= {f"stats/{key}/{name}": tensor for key, tensor in state.items()}
            yield block.index, found

    def _by_passes(self, done: int) -> Iterator[tuple[int, Tensors]]:
        """(a block's number, what it gathers), where the method runs the data through it."""
        context, stack = self.context, self.streamed.stacks[0]
        flow = Flow(context.model, stack.modules, self._batches(), stack.path)
        numbers = range(len(self.groups))
        for number in context.progress(numbers, "blocks", len(numbers)) if context.progress else numbers:
            gathered: Tensors = {}
            with evaluating(context.model):
                if number >= done and self.groups[number]:
                    self.streamed.enter(number)
                    gathered = self._gathered(number, flow)
                else:  # only what comes before it is needed
                    for batch in range(len(flow.batches)):
                        flow.call(batch, number)
            if number >= done:
                yield number, {f"score/{name}": tensor for name, tensor in gathered.items()}

    def _gathered(self, number: int, flow: Flow) -> Tensors:
        own = self._own(number, {})
        own.data, own.progress, own.play = flow.batches, None, functools.partial(_through, flow, number)
        return self.method.gather(own)

    def _batches(self) -> list:
        data = self.context.require_data()
        return singly(data) if self.passes == "samples" else as_batches(data)

    def memory(self) -> int:
        """Bytes at the peak of a run, above the weights, where data goes through blocks: one batch is, through the largest."""
        batches, streamed, stack = self._batches(), self.streamed, self.streamed.stacks[0]
        sizes = [sum(streamed.source.entries[n].nbytes for n in own) for own in streamed.own]
        number = max((i for i, groups in enumerate(self.groups) if groups), key=lambda i: sizes[i])

        def measure(flow: Flow) -> None:
            self._gathered(number, flow)

        with evaluating(self.context.model):
            return of_passing(self.context.model, batches, stack.modules, number, measure)

    def _own(self, number: int, stats: dict[str, LayerStats]) -> Context:
        """A context that sees one block's groups and statistics."""
        own = dataclasses.replace(self.context, scores={})
        own.graph, own.groups = self.context.graph, self.groups[number]
        own.every_matrix, own.matrices = self.context.every_matrix, self.context.matrices
        own._collected = {own.method.statistics(): stats}
        return own

    def _take(self, gathered: Mapping[str, Tensor], found: Tensors) -> None:
        """What a block gathered joins what there is; its statistics are kept for the repair."""
        states: dict[str, Tensors] = {}
        for key, tensor in gathered.items():
            what, _, rest = key.partition("/")
            if what == "stats":
                part, _, name = rest.partition("/")
                states.setdefault(name, {})[part] = tensor
            elif self.layers is not None and rest in found:  # blocks come in order
                found[rest] = torch.cat([found[rest], tensor])
            else:
                found[rest] = tensor
        needs = self.context.method.statistics()
        for name, state in states.items():
            matrix = self.context.every_matrix[name]
            device = matrix.parameter.device
            inputs = InputStats(matrix.shape[1], needs, device, len(state["tokens"])).with_state(state)
            self.stats[name] = LayerStats(inputs, name=name, seed=self.context.seed)

    @torch.no_grad()
    def cut(self, plan: Plan) -> dict[str, Any]:
        """Write all blocks as the plan leaves them, and the files that say how they are built; gives the artefact's row."""
        context, streamed, model = self.context, self.streamed, self.context.model
        dense, changes, later = copy.deepcopy(getattr(model, "config", None)), Changes(), []
        if self.layers is not None and plan.keep:
            self._cut_layers(plan)
            about = self._describe(plan, dense)
            self._check_written()
            return about
        flow = Flow(model, streamed.stacks[0].modules, [context.example], streamed.stacks[0].path)
        with evaluating(model):
            numbers = range(len(self.groups))
            every = context.progress(numbers, "cut", len(numbers)) if context.progress else numbers
            for number in every:
                values = (
                    context.checkpoint.load(f"values-{number}") if streamed.file(number).exists() else None
                )
                if values is None:
                    values = self._block(number, plan, flow, changes)
                else:  # a later block may be proven on what the dense one gives
                    later.append((number, values))
                plan.values |= values
            for number, values in later:
                streamed.enter(number)
                set_values(model, values)
                changes.join(cut_modules(model, context.graph, self._kept(number, plan)))
                streamed.leave(number)
        streamed.close()
        as_stored(model, streamed.source)
        if plan.keep:
            fit_config(model, context.graph, context.graph._kept(plan.keep), changes)
        about = self._describe(plan, dense)
        self._check_written()
        return about

    def _cut_layers(self, plan: Plan) -> None:
        """Blocks leave: those that stay are proven to give together what they give beside blocks that pass their input on, and are
        written as they are."""
        context, streamed, model = self.context, self.streamed, self.context.model
        layers = self.layers
        assert layers is not None
        left = {
            path for unit, path in enumerate(layers.modules) if unit not in plan.keep[layers.name].tolist()
        }
        kept = [number for number, path in enumerate(streamed.paths) if path not in left]
        with evaluating(model):
            masked: list[Tensor] = []
            if context.options.prove:
                mask_units(model, context.graph, plan.keep)
                masked = self._last(streamed.modules)
            changes = cut_modules(model, context.graph, plan.keep)
            fit_config(model, context.graph, context.graph._kept(plan.keep), changes)
            modules = tuple(streamed.modules[number] for number in kept)
            if masked and (off := largest_gap(self._last(modules), masked)) is not None:
                raise SecateurError(
                    f"the cut isn't provably right: without the blocks and past them differ by {off:.2g}",
                    where=layers.name,
                    fix="take a method that cuts within blocks",
                )
        streamed.keep_only(kept)
        as_stored(model, streamed.source)

    def _last(self, modules: Sequence[nn.Module]) -> list[Tensor]:
        """What the last of these blocks gives on the example, one block after the other."""
        flow = Flow(self.context.model, tuple(modules), [self.context.example], self.streamed.stacks[0].path)
        for number, module in enumerate(modules):
            args, kwargs = flow.call(0, number)
            output = module(*args, **kwargs)
            flow.keep(0, number, output)
        return [state.clone() for state in states_of(output)]

    def _describe(self, plan: Plan, dense: Any) -> dict[str, Any]:
        """The files that build the cut model; transformers clears a folder of shards before it writes into it."""
        folder, beside = self.streamed.folder, self.streamed.folder / "built"
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir()
        about = _save_transformers(self.context.model, beside, plan, dense, same=same_on_noise)
        for made in beside.iterdir():
            os.replace(made, folder / made.name)
        beside.rmdir()
        return about

    def _kept(self, number: int, plan: Plan) -> Tensors:
        return {group.name: plan.keep[group.name] for group in self.groups[number] if group.name in plan.keep}

    def _block(self, number: int, plan: Plan, flow: Flow, changes: Changes) -> Tensors:
        """Cut one block and write it; gives what its repair changed."""
        context, streamed, model = self.context, self.streamed, self.context.model
        assert isinstance(context.method, UnitMethod)
        module, path, keep = streamed.modules[number], streamed.paths[number], self._kept(number, plan)
        streamed.enter(number)
        values = {name: value for name, value in plan.values.items() if name.startswith(f"{path}.")}
        if keep and context.options.repair is None:
            values |= context.method.repair(self._own(number, self.stats), keep)
        unsaved = {f"{path}.{name}" for name in module.state_dict()} - streamed.source.entries.keys()
        given = flow.call(0, number) if keep and context.options.prove else None
        if given is not None:
            flow.keep(0, number, module(*given[0], **given[1]))
        set_values(model, values)
        masked: list[Tensor] = []
        if given is not None:
            mask_units(model, context.graph, keep)
            masked = states_of(module(*given[0], **given[1]))
        changes.join(cut_modules(model, context.graph, keep))
        if (
            given is not None
            and (off := largest_gap(states_of(module(*given[0], **given[1])), masked)) is not None
        ):
            raise SecateurError(
                f"the cut isn't provably right: slicing and masking differ by {off:.2g}",
                where=", ".join(keep),
                fix=f"keep='{path}' leaves the block whole",
            )
        state = {f"{path}.{name}": tensor for name, tensor in module.state_dict().items()}
        context.checkpoint.save(f"values-{number}", values)
        streamed.finish_as(number, {name: t for name, t in state.items() if name not in unsaved})
        return values

    def _check_written(self) -> None:
        """The files hold what the cut model has."""
        built = self.context.model.state_dict()
        for name, entry in named(Shards(self.streamed.folder), self.context.model).entries.items():
            shape = list(built[name].shape) if name in built else None
            require(shape == list(entry.shape), f"{name} is written as {list(entry.shape)}, the cut model has {shape}", where=str(self.streamed.folder))  # fmt: skip


def _through(flow: Flow, index: int, number: int) -> None:
    """A batch through one block, on what the dense blocks before it give."""
    args, kwargs = flow.call(number, index)
    with torch.no_grad():
        flow.modules[index](*args, **kwargs)


def forget_steps(folder: Path) -> None:
    """What a run that goes on would read isn't part of its result."""
    for pattern in ("scores-*.safetensors", "values-*.safetensors"):
        for file in folder.glob(pattern):
            file.unlink()
