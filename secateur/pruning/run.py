"""Planning: from a method, a target and a model to a plan, in rounds, with rollback and resumable blocks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.graph import Graph
from secateur.method import Method
from secateur.pruning.context import Context
from secateur.pruning.method import UnitMethod, WeightMethod
from secateur.pruning.options import Options
from secateur.pruning.plan import Plan
from secateur.pruning.resume import Checkpoint
from secateur.pruning.target import Target, parse_schedule, rounds
from secateur.pruning.weights import plan_weights
from secateur.surgery import mask_units, prove, unmask_units
from secateur.surgery.changes import set_values
from secateur.utils.inputs import Inputs
from secateur.utils.types import Objective


class Undo:
    """Original tensors of what a run changes in place, so that a failure puts them back."""

    def __init__(self, model: nn.Module, active: bool = True):
        self.model, self.active = model, active
        self.originals: dict[str, Tensor] = {}

    def remember(self, name: str) -> None:
        if self.active and name not in self.originals:
            self.originals[name] = _tensor(self.model, name).detach().clone()

    def restore(self) -> None:
        unmask_units(self.model)
        with torch.no_grad():
            for name, original in self.originals.items():
                _tensor(self.model, name).copy_(original)

    def release(self) -> None:
        self.originals.clear()


@dataclass
class Run:
    """One planning run: rounds of the schedule, each scored on what the last one left."""

    model: nn.Module
    method: Method
    target: Target
    options: Options
    inputs: Inputs | None
    batches: Any
    seed: int
    loss: Objective | None
    progress: Callable[..., Iterable] | None
    checkpoint: Checkpoint
    undo: Undo
    lean: bool = False
    """The plan shares the model's tensors instead of holding copies."""
    announce: Callable[[str], None] | None = None
    refused: dict[str, str] = field(default_factory=dict)
    scores: dict[str, Tensor] = field(default_factory=dict)
    limit: float | None = None
    met: bool = True
    """Whether the plan keeps the share that was asked for."""
    skipped: dict[str, str] = field(default_factory=dict)

    def context(self, target: Target, round_: int = 0) -> Context:
        options = self.options
        return Context(
            model=self.model,
            method=self.method,
            target=target,
            inputs=self.inputs,
            data=self.batches,
            seed=self.seed,
            allocation="uniform" if options.uniform else options.allocation,
            floor=options.floor,
            round_to=options.round_to,
            kinds=options.kinds,
            uniform=options.uniform,
            loss=self.loss,
            options={k: v for k, v in dataclasses.asdict(options).items() if v != getattr(Options(), k)},
            progress=self.progress,
            checkpoint=self.checkpoint,
            round=round_,
        )

    def plan(self) -> tuple[Plan, Graph | None]:
        count = parse_schedule(self.options.schedule)
        targets = [self.target]
        if count > 1:
            targets = [
                dataclasses.replace(self.target, value=share) for share in rounds(self.target.value, count)
            ]
        if isinstance(self.method, WeightMethod):
            if self.target.kind == "share" and self.target.value == 1:
                return self.context(self.target).make_plan(), None
            for index, target in enumerate(targets):
                plan = plan_weights(self.method, self.context(target, index), self)
            plan.target = str(self.target)
            return plan, None
        if not isinstance(self.method, UnitMethod):
            raise SecateurError(f"{self.method.name} doesn't cut weights or units", where="method")
        return self._plan_units(targets)

    def _plan_units(self, targets: list[Target]) -> tuple[Plan, Graph]:
        assert isinstance(self.method, UnitMethod)
        graph: Graph | None = None
        merged: Plan | None = None
        scratch = Undo(self.model)
        for index, target in enumerate(targets):
            while True:
                context = self.context(target, index)
                if graph is not None:
                    context.graph = graph
                graph = context.graph
                if merged is not None:
                    context.gone = {
                        name: _complement(units, graph[name].size) for name, units in merged.keep.items()
                    }
                try:
                    plan = self.method.plan(context)
                except SecateurError as error:
                    raise _with_frozen(error, graph) from error
                self.scores, self.limit = context.scores, context.limit
                failures = self._prove(graph, plan) if self.options.prove else {}
                if not failures:
                    break
                for name, reason in failures.items():
                    graph[name].reason = self.refused[name] = f"the cut isn't provably right: {reason}"
            if merged is not None:
                plan.values = {**merged.values, **plan.values}
            merged = plan
            if index + 1 < len(targets):
                for name in {name for key in plan.keep for name in (s.name for s in graph[key].slices)} | set(
                    plan.values
                ):
                    if _has_tensor(self.model, name):
                        scratch.remember(name)
                grown = any(not _has_tensor(self.model, name) for name in plan.values)
                set_values(self.model, plan.values)
                mask_units(self.model, graph, plan.keep)
                graph = None if grown else graph  # a repair added a bias: the groups are traced with it
        assert merged is not None and graph is not None
        scratch.restore()
        merged.target = str(self.target)
        if not merged.keep:
            merged.values = {}
        if self.target.kind == "share":
            self.met = context.keeps_share(merged.keep)
        return merged, graph

    def _prove(self, graph: Graph, plan: Plan) -> dict[str, str]:
        assert self.inputs is not None
        return prove(self.model, graph, plan.keep, self.inputs, export=self.options.prove_export)


def _tensor(model: nn.Module, name: str) -> Tensor:
    """A parameter or buffer."""
    path, _, attribute = name.rpartition(".")
    return getattr(model.get_submodule(path), attribute)


def _has_tensor(model: nn.Module, name: str) -> bool:
    try:
        return isinstance(_tensor(model, name), Tensor)
    except AttributeError:
        return False


def _with_frozen(error: SecateurError, graph: Graph) -> SecateurError:
    """A target out of reach, told with what can't be cut and why."""
    frozen = {group.name: group.reason for group in graph.groups if group.reason}
    if error.where != "target" or not frozen:
        return error
    told = "; ".join(f"{name}: {reason}" for name, reason in list(frozen.items())[:8])
    more = f"; and {len(frozen) - 8} more" if len(frozen) > 8 else ""
    return SecateurError(f"{error.what} (not cut: {told}{more})", where=error.where, fix=error.fix)


def _complement(units: Tensor, size: int) -> Tensor:
    gone = torch.ones(size, dtype=torch.bool)
    gone[units] = False
    return gone
