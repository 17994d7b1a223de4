"""Plans of methods that remove whole units: in rounds, each proven, with what can't be proven frozen."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from secateur.errors import SecateurError
from secateur.graph import Graph
from secateur.pruning.context import Context
from secateur.pruning.fitted import repair_units
from secateur.pruning.method import UnitMethod
from secateur.pruning.plan import Plan
from secateur.pruning.protect import KEPT, OUTSIDE
from secateur.pruning.share import ALONE
from secateur.pruning.target import Target
from secateur.pruning.tokens import KIND
from secateur.pruning.undo import Undo, has_tensor
from secateur.surgery import mask_units, prove
from secateur.surgery.changes import set_values
from secateur.surgery.prove_tokens import prove_tokens
from secateur.utils.inputs import Inputs


def plan_units(method: UnitMethod, context: Context, targets: Sequence[Target]) -> tuple[Plan, Graph]:
    """(the plan of the last round, the groups it was made along); the model ends as it was.

    Each round scores what the one before left, masked. A group whose cut isn't provably right is frozen, and the round
    planned again without it. What the report tells is left in `context`.
    """
    graph: Graph | None = context.__dict__.get("graph")  # where it was traced already
    plan: Plan | None = None
    scratch = Undo(context.model)
    for index, target in enumerate(targets):
        while True:
            current = dataclasses.replace(context, target=target, round=index, scores={})
            if graph is not None:
                current.graph = graph
            graph = current.graph
            if plan is not None:
                current.gone = {
                    name: _complement(units, graph[name].size) for name, units in plan.keep.items()
                }
            try:
                proposal = method.plan(current)
                check_shares(current, proposal)
            except SecateurError as error:
                raise _with_frozen(error, graph) from error
            options, inputs = context.options, current.inputs
            failures = {}
            if options.prove and inputs is not None:
                failures = _prove_all(context, graph, proposal.keep, inputs)
            if not failures:
                break
            for name, reason in failures.items():
                graph[name].reason = context.refused[name] = f"the cut isn't provably right: {reason}"
        if plan is not None:
            proposal.values = {**plan.values, **proposal.values}
        plan = proposal
        if index + 1 < len(targets):
            graph = _leave_masked(context, graph, plan, scratch)
    assert plan is not None and graph is not None
    scratch.restore()
    plan.target = str(context.target)
    if not plan.keep:
        plan.values = {}
    if context.options.repair is not None:
        repair_units(context, graph, plan)
    context.scores, context.limit = current.scores, current.limit
    if context.target.kind in ("share", "parts"):
        context.met = current.keeps_share(plan.keep)
    return plan, graph


def _prove_all(context: Context, graph: Graph, keep: Mapping[str, Tensor], inputs: Inputs) -> dict[str, str]:
    """Groups whose cut isn't provably right, and why; a cut of the vocabulary is proven on the tokens that stay."""
    tokens = {name: units for name, units in keep.items() if graph[name].kind == KIND}
    failures = {}
    for name, units in tokens.items():
        if why := prove_tokens(context.model, graph, name, units, inputs):
            raise SecateurError(why, where=name, fix="leave vocabulary out of kinds")
    others = {name: units for name, units in keep.items() if name not in tokens}
    if others:
        export = context.options.prove_export
        failures = prove(context.model, graph, others, inputs, also=context.also, export=export)
    return failures


def _check_alike(context: Context, plan: Plan) -> None:
    """Refuse what the caller named where it makes layers unequal that `uniform` promises to be alike."""
    options, counts = context.options, dict[tuple[str, int], dict[int, str]]()
    if not (options.keep or options.only or options.share):
        return
    for group in context.graph.groups:
        if group.reason is None or KEPT in group.reason or OUTSIDE in group.reason:
            kept = len(plan.keep.get(group.name, range(group.size)))
            counts.setdefault((group.kind, group.size), {})[kept] = group.name
    for (kind, size), found in counts.items():
        if len(found) > 1 and any(name in plan.keep for name in found.values()):
            (a, first), (b, second) = list(found.items())[:2]
            raise SecateurError(
                f"{a} of {size} {kind} would stay of {first} and {b} of {second}, and uniform makes layers alike",
                where="uniform",
                fix="name every layer in keep, only and share, or leave uniform out",
            )


def check_shares(context: Context, plan: Plan) -> None:
    """Refuse a plan that doesn't keep the shares that the caller gave; note where they alone meet the target."""
    if context.options.uniform:
        _check_alike(context, plan)
    fixed = context.fixed_units
    for name, count in fixed.items():
        size = context.graph[name].size
        kept = len(plan.keep[name]) if name in plan.keep else size
        if kept != count:
            raise SecateurError(
                f"{context.method.name} keeps {kept} of the {size} {context.graph[name].kind} of {name}, and not {count}",
                where="share",
                fix="take another method, or leave share out",
            )
    if fixed and plan.keep.keys() <= fixed.keys():
        plan.notes["share"] = "; ".join(filter(None, [plan.notes.get("share"), ALONE]))


def _leave_masked(context: Context, graph: Graph, plan: Plan, scratch: Undo) -> Graph | None:
    """The model as this round's plan leaves it, for the next to score; None for the graph where it must be traced again."""
    model = context.model
    touched = {part.name for name in plan.keep for part in graph[name].slices} | set(plan.values)
    for name in touched:
        if has_tensor(model, name):
            scratch.remember(name)
    grown = any(not has_tensor(model, name) for name in plan.values)
    set_values(model, plan.values)
    mask_units(model, graph, plan.keep)
    return None if grown else graph  # a repair added a bias: the groups are traced with it


def _with_frozen(error: SecateurError, graph: Graph) -> SecateurError:
    """A target out of reach, with what can't be cut and why."""
    frozen = {group.name: group.reason for group in graph.groups if group.reason}
    if error.where != "target" or not frozen:
        return error
    reasons = "; ".join(f"{name}: {reason}" for name, reason in list(frozen.items())[:8])
    more = f"; and {len(frozen) - 8} more" if len(frozen) > 8 else ""
    return SecateurError(f"{error.what} (not cut: {reasons}{more})", where=error.where, fix=error.fix)


def _complement(units: Tensor, size: int) -> Tensor:
    gone = torch.ones(size, dtype=torch.bool)
    gone[units] = False
    return gone
