"""`secateur methods` and `secateur recommend`."""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing
from collections.abc import Iterable
from typing import Annotated, Any

from cyclopts import Parameter

from secateur.cli.flags import Settings, settings
from secateur.cli.shared import Shown, entries, method_entry, plain, show
from secateur.taxonomy import MethodInfo, filter_records
from secateur.taxonomy import recommend as advise
from secateur.taxonomy.axes import AXES, FLAGS, MEANING, RECORDS
from secateur.taxonomy.catalogue import info as info_of
from secateur.utils.code import read_spec

TEXT = Parameter(
    help="words to look for in names, titles and descriptions; or the name of one method, or file.py:Class",
    show_default=False,
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
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
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
    published = "choose among all published systems, also those not in this library"
    return settings([*rows, {"name": "published", "type": "bool", "default": False, "help": published}])


def methods(*text: Annotated[str, TEXT], flags: Settings, shown: Shown) -> None:
    """List the methods, search them, or show one."""
    from secateur.report.terminal import print_method, print_methods

    filters = {key: value for key, value in vars(flags).items() if value is not None}
    key = "-".join(text).strip().lower().replace("_", "-")
    file = text[0] if len(text) == 1 and read_spec(text[0]) else None
    if file or (key in entries() and not filters):
        entry = method_entry(file or key)
        info = info_of(entry)
        rows = [
            {"name": row["name"], "default": row.get("default"), "help": row["help"]}
            for row in entry["settings"]
        ]
        one = describe_method(info) | {"hyperparameters": rows, "needs": entry["needs"], "doc": entry["doc"]}
        show(one, shown.json, lambda console: print_method(one, info, console))
        return
    records = filter_records(map(info_of, entries().values()), search=" ".join(text) or None, **filters)
    if not records and len(text) == 1 and not filters:
        method_entry(text[0])
    value = {"methods": [describe_method(info) for info in records]}
    show(value, shown.json, lambda console: print_methods(records, console))


def recommend(*, flags: Settings, shown: Shown) -> None:
    """Methods that fit, best first, with reasons."""
    from secateur.report.terminal import print_advice

    situation = vars(flags).copy()
    published: Iterable[MethodInfo] = RECORDS
    own = map(info_of, entries().values())
    advice = advise(published if situation.pop("published") else own, **situation)
    value = {"methods": [{**describe_method(info), "why": why} for info, why in advice]}
    show(value, shown.json, lambda console: print_advice(advice, console))


def describe_method(info: MethodInfo) -> dict[str, Any]:
    """A record as JSON: axes as lists of members."""
    fields = {item.name: getattr(info, item.name) for item in dataclasses.fields(info)}
    axes = {axis: sorted(info.members(axis)) for axis in AXES}
    flags = {name: getattr(info, name) for name in FLAGS}
    return plain({"name": info.name or info.spec, **fields, **axes, **flags, "links": info.links})
