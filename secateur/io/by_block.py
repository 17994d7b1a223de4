"""Units that leave a model folder: its blocks are scored one after the other, then cut, proven and written, each while it alone is there."""

from __future__ import annotations

import copy
import dataclasses
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.errors import SecateurError, require
from secateur.graph import Group
from secateur.io.hollow import as_stored, same_on_noise
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
from secateur.stats.layer import InputStats, LayerStats
from secateur.stats.stream import Flow, states_of
from secateur.surgery.changes import Changes, set_values
from secateur.surgery.config import fit_config
from secateur.surgery.cut import cut_modules
from secateur.surgery.mask import mask_units
from secateur.surgery.prove import largest_gap
from secateur.utils.running import evaluating

Tensors = dict[str, Tensor]


def check_units(method: UnitMethod, target: str, options: Options) -> None:
    """Refuse what can't be cut block by block. Raises `SecateurError` with the methods that can."""
    able = [n for n in list_methods() if getattr(method_class(n), "by_block", False)]
    fix = f"take {', '.join(able[:-1])} or {able[-1]}, or prune it without --stream"
    require(method.by_block, f"{method.name} reads more than a block at a time to score its units", where="stream", fix=fix)  # fmt: skip
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
        homes = {group.name: self._homes(group) for group in context.groups}
        wide = {g.kind: g.name for g in context.groups if len(homes[g.name]) != 1 or not g.exact}
        kinds = dict.fromkeys(group.kind for group in context.groups if group.kind not in wide)
        for kind, name in wide.items():
            raise SecateurError(
                f"the {kind} of {name} reach over several blocks",
                where="kinds",
                fix=f"kinds={','.join(kinds)}" if kinds else "prune it without --stream",
            )
        for group in context.groups:
            self.groups[homes[group.name].pop()].append(group)

    def _homes(self, group: Group) -> set[int]:
        names = [*(s.name for s in group.slices), *(f"{path}." for path in group.modules)]
        starts = [f"{path}." for path in self.streamed.paths]
        return {next((i for i, start in enumerate(starts) if name.startswith(start)), -1) for name in names}

    def plan(self) -> Plan:
        """Scores of all blocks, and the budget divided over them. What lies in the run's checkpoint isn't scored again."""
        context, method = self.context, self.context.method
        assert isinstance(method, UnitMethod)
        scores: Tensors = {}
        done = 0
        while (loaded := context.checkpoint.load(f"scores-{done}")) is not None:
            scores |= self._take(loaded)
            done += 1
        for block in context.stream(propagate=False, skip=done):
            found = {f"score/{n}": s for n, s in method.scores(self._own(block.index, block.stats)).items()}
            for name, stats in block.stats.items():
                state = stats.inputs.state() if stats.inputs is not None else {}
                found |= {f"stats/{key}/{name}": tensor for key, tensor in state.items()}
            context.checkpoint.save(f"scores-{block.index}", found)
            scores |= self._take(found)
        require(bool(scores), "no linear layer reads their units", where=f"{method.name}, {context.groups[0].name}, ...")  # fmt: skip
        plan = context.make_plan(keep=method.divide(context, scores))
        check_shares(context, plan)
        return plan

    def _own(self, number: int, stats: dict[str, LayerStats]) -> Context:
        """A context that sees one block's groups and statistics."""
        own = dataclasses.replace(self.context, scores={})
        own.graph, own.groups = self.context.graph, self.groups[number]
        own.every_matrix, own.matrices = self.context.every_matrix, self.context.matrices
        own._collected = {own.method.statistics(): stats}
        return own

    def _take(self, found: Mapping[str, Tensor]) -> Tensors:
        """The scores of a block; its statistics are kept for the repair."""
        states: dict[str, Tensors] = {}
        for key, tensor in found.items():
            what, _, rest = key.partition("/")
            if what == "stats":
                part, _, name = rest.partition("/")
                states.setdefault(name, {})[part] = tensor
        needs = self.context.method.statistics()
        for name, state in states.items():
            matrix = self.context.every_matrix[name]
            device = matrix.parameter.device
            inputs = InputStats(matrix.shape[1], needs, device, len(state["tokens"])).with_state(state)
            self.stats[name] = LayerStats(inputs, name=name, seed=self.context.seed)
        return {key.partition("/")[2]: tensor for key, tensor in found.items() if key.startswith("score/")}

    @torch.no_grad()
    def cut(self, plan: Plan) -> dict[str, Any]:
        """Write all blocks as the plan leaves them, and the files that say how they are built; gives the artefact's row."""
        context, streamed, model = self.context, self.streamed, self.context.model
        dense, changes, later = copy.deepcopy(getattr(model, "config", None)), Changes(), []
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
        values: Tensors = {}
        if keep and context.options.repair is None:
            values = dict(context.method.repair(self._own(number, self.stats), keep))
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
        for name, entry in Shards(self.streamed.folder).entries.items():
            shape = list(built[name].shape) if name in built else None
            require(shape == list(entry.shape), f"{name} is written as {list(entry.shape)}, the cut model has {shape}", where=str(self.streamed.folder))  # fmt: skip


def forget_steps(folder: Path) -> None:
    """What a run that goes on would read isn't part of its result."""
    for pattern in ("scores-*.safetensors", "values-*.safetensors"):
        for file in folder.glob(pattern):
            file.unlink()
