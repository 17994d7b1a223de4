"""A stage runs: the tokens that are left form sets, the method chooses, and its answer becomes places that stay."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.errors import SecateurError
from secateur.tokens.call import Call
from secateur.tokens.live import Live, Peek
from secateur.tokens.record import Recorder
from secateur.tokens.sets import BUDGETS, Outcome, Table, make_sets, resolve, settle
from secateur.tokens.setup import Placed
from secateur.tokens.state import TokenSets
from secateur.utils.random import seeded


def run_stage(
    call: Call,
    recorder: Recorder | None,
    placed: Placed,
    members: Tensor,
    features: Tensor,
    kind: str,
    number: int,
    peek: Peek | None = None,
) -> Outcome | None:
    """Lets the method choose among `members` [M] of the table with `features` [M, D]; None where nothing changes.

    `kind` and `number` say where in the model: "input" 0, "layer" K, "encoder" K.
    """
    setup, table, stage = call.setup, call.table, placed.stage
    if stage.clears:
        nothing = torch.zeros(len(members), dtype=torch.bool, device=members.device)
        return Outcome(nothing, members[:0], None) if len(members) else None
    if setup.whole:
        return None
    sets, competing, candidates = sets_of(call, recorder, placed, members, features, kind, number, peek)
    outcome = None
    # a target that nobody falls short of needs no answer; one the method finds itself always does
    all_stay = stage.keep is None and setup.target is not None and sets is not None
    if sets is not None and not (all_stay and bool((sets.keep >= sets.total).all())):
        outcome = _choose(placed, table, sets, features, candidates)
    if setup.method.newlines == "drop" and kind != "encoder" and not bool(competing.all()):
        outcome = _without(outcome, ~competing)
    return outcome


def sets_of(
    call: Call,
    recorder: Recorder | None,
    placed: Placed,
    members: Tensor,
    features: Tensor,
    kind: str,
    number: int,
    peek: Peek | None = None,
) -> tuple[TokenSets | None, Tensor, Tensor]:
    """The sets that a stage is asked about, which of the members [M] compete, and their positions; see `run_stage`."""
    setup, table, stage = call.setup, call.table, placed.stage
    if not bool(torch.isfinite(features).all()):
        raise SecateurError(
            "the features of a visual token aren't finite numbers",
            where=placed.label,
            fix="look for NaN in the picture and the weights",
        )
    # in the tower separators have no patches, so they never compete there
    newlines, tower = setup.method.newlines, kind == "encoder"
    competing = torch.ones_like(members, dtype=torch.bool)
    if newlines != "compete" and not tower:
        competing = ~table.newline[members]
    candidates = competing.nonzero()[:, 0]
    universe = torch.arange(len(table) if tower else table.visual, device=table.device)
    if newlines != "compete" or tower:
        universe = universe[~table.newline[universe]]

    # tiles of one picture compete, whatever the tokens' budget
    budget = setup.budget if stage.keep is None and kind != "tiles" else None
    sets = make_sets(
        table,
        members[candidates],
        features if len(candidates) == len(members) else features[candidates],
        scope=BUDGETS[budget] if budget else stage.scope or setup.method.scope,
        universe=universe,
        keep=stage.keep,
        target=setup.target,
        generator=seeded(setup.seed, "tokens", placed.label),
        facts=setup.facts,
        given=setup.given,
        noted=call.noted,
        modules=setup.modules,
        source=Live(call, recorder, kind, number, peek),
        kind=kind,
        own=budget is not None,
    )
    if budget and sets is not None and setup.method.one_crop and bool((sets.crop < 0).any()):
        raise SecateurError(
            f"crops or frames can't share a budget with {setup.method.name}: {setup.method.one_crop}",
            where=f'budget="{budget}"',
            fix="leave budget out: then each has its share",
        )
    if sets is not None and call.session is not None:
        sets.history = call.session.of(sets.row, sets.index)
    return sets, competing, candidates


def _choose(
    placed: Placed, table: Table, sets: TokenSets, features: Tensor, candidates: Tensor
) -> Outcome | None:
    reduction = settle(sets, placed.stage.select(sets), placed.label)
    carry(placed, table, sets)
    # positions among the candidates -> among all that were handed in
    sets.place.at = torch.where(sets.place.at >= 0, candidates[sets.place.at.clamp(min=0)], -1)
    outcome = resolve(sets, reduction, features)
    return outcome if outcome.changed else None


def carry(placed: Placed, table: Table, sets: TokenSets) -> None:
    """Writes the numbers that the method carries to later stages into the table, by token."""
    there = sets.place.members >= 0  # [S, n]
    for name, values in sets.carried.items():
        if tuple(values.shape) != tuple(sets.valid.shape):
            raise SecateurError(
                f"carried {name!r} is {tuple(values.shape)}, not {tuple(sets.valid.shape)}",
                where=placed.label,
            )
        before = table.carried.get(name)
        after = (
            torch.full((len(table),), torch.nan, dtype=torch.float32, device=table.device)
            if before is None
            else before.clone()
        )
        after[sets.place.members[there]] = values[there].float()
        table.carried[name] = after


def _without(outcome: Outcome | None, gone: Tensor) -> Outcome:
    """An outcome in which the places `gone` [M] leave too."""
    if outcome is None:
        keep = ~gone
        return Outcome(keep, keep.nonzero()[:, 0], None)
    stay = ~gone[outcome.keep.nonzero()[:, 0]]
    replaced = None if outcome.replaced is None else outcome.replaced[stay]
    return Outcome(outcome.keep & ~gone, outcome.source[stay], replaced)
