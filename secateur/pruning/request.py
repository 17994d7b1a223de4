"""What a caller asks for, read once: a method of this verb, its settings, and a target that they fit."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from secateur.errors import SecateurError, choose
from secateur.graph.groups import KINDS
from secateur.method import Method, expect, make_method, method_class
from secateur.pruning.allocate import MEASURED, ORDERS
from secateur.pruning.method import UnitMethod, WeightMethod
from secateur.pruning.options import Options
from secateur.pruning.target import Target, parse_target
from secateur.pruning.tokens import KIND
from secateur.pruning.vocabulary import TokenFrequency
from secateur.pruning.weights import ALLOCATIONS, TAKE_A_NUMBER

OPTIONS = tuple(item.name for item in dataclasses.fields(Options))
OF_UNITS = ("macs", "size", "latency")
"""Targets that zeros in dense tensors don't move."""


@dataclass(frozen=True)
class Request:
    """A method, a target, the options, and the settings that are neither (such as those of a recipe)."""

    method: Method
    target: Target
    options: Options
    others: dict[str, Any]


def read_request(
    verb: str,
    method: str | Method,
    target: str | float | Target | None,
    settings: Mapping[str, Any],
    *,
    options: Collection[str] = OPTIONS,
    others: Collection[str] = (),
) -> Request:
    """The parts of a call of `verb`, checked against each other before anything is run.

    >>> request = read_request("prune", "ria", "50%", {"a": 1.0, "seqlen": 64})
    >>> request.method, request.options.seqlen
    (RIA(a=1.0, scope='layer'), 64)

    Args:
        verb: "prune" or "train_prune".
        settings: keywords of the call; `options` and `others` name those that aren't hyperparameters.

    Raises:
        SecateurError: an unknown method or setting, a value out of its range, a method of another verb, a target that
            the method can't meet.
    """
    apart = {*options, *others}
    if meaningless := (settings.keys() & {*OPTIONS}) - apart:
        own = {item.name for item in dataclasses.fields(make_method(method))}
        for name in sorted(meaningless - own):
            fix = f"leave it out; of the options it takes {', '.join(options)}"
            raise SecateurError(f"{verb} has no use for {name}", where=name, fix=fix)
    read = Options(**{key: value for key, value in settings.items() if key in options})
    read.check()
    goal = parse_target(_target_of(method, target))
    if goal.kind == KIND:
        read = dataclasses.replace(read, kinds=read.kinds or (KIND,))
    alone = verb == "prune" and isinstance(read.kinds, tuple) and set(read.kinds) == {KIND}
    given = {key: value for key, value in settings.items() if key not in apart}
    chosen = make_method(_of_tokens(method) if alone else method, **given)
    expect(chosen, verb)
    _check_vocabulary(verb, goal, read, alone)
    _check_pair(chosen, goal)
    if read.schedule != "once" and goal.kind != "share":
        raise SecateurError(
            "an iterative schedule needs a share",
            where=f"target {goal}",
            fix="give a share, or schedule=once",
        )
    _check_allocation(chosen, read.divides)
    _check_repair(chosen, goal, read)
    _check_kinds(chosen, read.kinds)
    return Request(chosen, goal, read, {key: value for key, value in settings.items() if key in others})


def _target_of(method: str | Method, target: str | float | Target | None) -> str | float | Target:
    """100 % for methods that remove work instead of weights, which take no other target."""
    kind = method_class(method) if isinstance(method, str) else method
    if getattr(kind, "removes", "") == "work":
        if target is not None and parse_target(target).value != 1:
            raise SecateurError(
                f"{kind.name} removes no weights: it skips work while the network runs",
                where=f"target {target}",
                fix="leave the target out; the method's own settings say how much is skipped",
            )
        return "100%"
    if target is None:
        raise SecateurError("nothing says how much stays", where="target", fix="give a target, such as 50%")
    return target


def _of_tokens(method: str | Method) -> Method:
    """What ranks tokens: how often a text uses them. No other method scores a token."""
    if isinstance(method, TokenFrequency) or method == TokenFrequency.name:
        return TokenFrequency()
    raise SecateurError(
        f"{method if isinstance(method, str) else method.name} scores no tokens",
        where="method",
        fix="leave it out where the vocabulary alone is cut, or add kinds that it cuts: vocabulary,neurons",
    )


def _check_vocabulary(verb: str, target: Target, options: Options, alone: bool) -> None:
    """The vocabulary is cut before the method cuts other kinds, at once, and by `prune`."""
    if target.kind == KIND and not alone:
        raise SecateurError(
            "it says nothing of other kinds",
            where=f"target {target}",
            fix="leave kinds and other verbs out, or give such as params<=50%",
        )
    if KIND not in (options.kinds or ()):
        return
    if verb != "prune":
        raise SecateurError(f"{verb} cuts no vocabulary", where="kinds", fix="cut it with prune, then train")
    if options.fits:
        raise SecateurError(
            f"the repair {options.repair} doesn't go with a cut of the vocabulary",
            where="kinds",
            fix="cut the vocabulary first, then the rest of the result",
        )
    if options.schedule != "once" or target.kind == "parts":
        raise SecateurError(
            "the vocabulary is cut at once, and from the whole model",
            where="kinds",
            fix="leave schedule and parts out, or vocabulary",
        )


def removes_units(method: Method) -> bool:
    """Whether it makes tensors smaller, or else sets single weights to zero."""
    return isinstance(method, UnitMethod) or getattr(method, "removes", "") == "units"


def _check_pair(method: Method, target: Target) -> None:
    if target.kind == "tokens":
        raise SecateurError(
            f"{method.name} cuts weights, not tokens", where=f"target {target}", fix="give a share"
        )
    if not removes_units(method) and target.kind in OF_UNITS:
        raise SecateurError(
            f"{method.name} sets single weights to zero, so no {target.kind} target can be met",
            where=f"target {target}",
            fix="use a structured method, or a share, params<= or N:M target",
        )
    patterns = isinstance(method, WeightMethod) or "N:M" in method.info.members("granularity")
    if target.n_m and not patterns:
        raise SecateurError(
            f"{method.name} makes no N:M pattern",
            where=f"target {target}",
            fix="give a share such as 20%, or take an unstructured method",
        )


def _check_repair(method: Method, target: Target, options: Options) -> None:
    if options.repair is None:
        return
    if why := getattr(method, "unrepaired", ""):
        raise SecateurError(f"{method.name} takes none: {why}", where="repair", fix="leave repair out")
    if isinstance(method, WeightMethod) and options.schedule != "once":
        raise SecateurError(
            "a later round would be fitted to what an earlier one left, not to the dense model",
            where="repair",
            fix="schedule=once",
        )
    if isinstance(method, WeightMethod) and (options.everywhere or method.everywhere) and options.fits:
        raise SecateurError(
            "it goes block by block, and everywhere has weights pruned outside the blocks",
            where="repair",
            fix="leave everywhere out, or repair=none",
        )
    if options.repair == "bias" and target.kind in ("params", "size"):
        raise SecateurError(
            f"the biases that it adds are parameters, which target {target} bounds",
            where="repair",
            fix="give a share, or repair=reconstruct",
        )


def _check_allocation(method: Method, allocation: str | None) -> None:
    if allocation is not None:
        known, what = ((*ORDERS, MEASURED), "units") if removes_units(method) else (ALLOCATIONS, "weights")
        name, colon, number = allocation.partition(":")
        choose(name, known, what=f"allocation for {what}", where="allocation")
        if colon and name not in TAKE_A_NUMBER:
            raise SecateurError(f"{name} takes no number", where="allocation", fix=f"write {name}")
        if colon and not re.fullmatch(r"-?(\d+(\.\d*)?|\.\d+)(e-?\d+)?", number):
            raise SecateurError(
                f"{number!r} isn't a number", where=f"allocation {allocation}", fix=f"such as {name}:0.01"
            )


def _check_kinds(method: Method, kinds: Sequence[str] | str | None) -> None:
    for kind in (kinds,) if isinstance(kinds, str) else kinds or ():
        choose(kind, KINDS, what="kind of unit", where="kinds", near=2)
    if kinds and not removes_units(method) and set(kinds) != {KIND}:
        raise SecateurError(
            f"{method.name} sets single weights to zero and removes no {', '.join(kinds)}",
            where="kinds",
            fix="leave kinds out, or take a method that removes units",
        )
    if isinstance(kinds, str):
        raise SecateurError(f"{kinds!r} is text", where="kinds", fix=f"give a tuple such as ({kinds!r},)")
