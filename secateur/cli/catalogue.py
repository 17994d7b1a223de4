"""`secateur methods` and `secateur recommend`."""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing
from collections.abc import Iterable
from typing import Any

from secateur.cli.flags import flag, words
from secateur.cli.shared import plain, show
from secateur.taxonomy import MethodInfo
from secateur.taxonomy import recommend as advise
from secateur.taxonomy.axes import AXES, FLAGS, MEANING, RECORDS


def methods(*text: str, **given: Any) -> None:
    from secateur.method import list_methods, method_class
    from secateur.report.terminal import print_method, print_methods

    filters = {key: value for key, value in given.items() if key != "json" and value is not None}
    names = list_methods()
    key = "-".join(text).strip().lower().replace("_", "-")
    if key in names and not filters:
        cls = method_class(key)
        found = describe_method(cls.info)
        found["hyperparameters"] = [
            {"name": item.name, "default": _default(item), "help": item.metadata.get("help", "")}
            for item in dataclasses.fields(cls)
            if item.init
        ]
        found["needs"] = sorted(cls.needs)
        found["doc"] = inspect.cleandoc(cls.__doc__ or "")
        show(found, given["json"], lambda console: print_method(found, cls.info, console))
        return
    matching = list_methods(search=" ".join(text) or None, **filters)
    if not matching and len(text) == 1 and not filters:
        method_class(text[0])
    records = [method_class(name).info for name in matching]
    value = {"methods": [describe_method(info) for info in records]}
    show(value, given["json"], lambda console: print_methods(records, console))


def recommend(**given: Any) -> None:
    from secateur.method import list_methods, method_class
    from secateur.report.terminal import print_advice

    as_json, published = given.pop("json"), given.pop("published")
    records: Iterable[MethodInfo] = RECORDS
    if not published:
        records = [method_class(name).info for name in list_methods()]
    advice = advise(records, **given)
    value = {"methods": [{**describe_method(info), "why": why} for info, why in advice]}
    show(value, as_json, lambda console: print_advice(advice, console))


def describe_method(info: MethodInfo) -> dict[str, Any]:
    """A record as JSON: axes as lists of members."""
    fields = {item.name: getattr(info, item.name) for item in dataclasses.fields(info)}
    axes = {axis: sorted(info.members(axis)) for axis in AXES}
    flags = {name: getattr(info, name) for name in FLAGS}
    return plain({"name": info.name or info.spec, **fields, **axes, **flags, "links": info.links})


def _default(item: dataclasses.Field) -> Any:
    if item.default_factory is not dataclasses.MISSING:
        return item.default_factory()
    return None if item.default is dataclasses.MISSING else item.default


def _filters() -> list[inspect.Parameter]:
    made = [words("text", "words to look for in names, titles and descriptions; or the name of one method")]
    for axis, members in AXES.items():
        named = ", ".join(f"{m} ({MEANING[m]})" if m in MEANING else m for m in members)
        made.append(flag(axis, str | None, None, f"one or several as a/b: {named}"))
    for name in FLAGS:
        made.append(
            flag(name, bool | None, None, _first_line(getattr(MethodInfo, name)) or name.replace("_", " "))
        )
    return made


def _first_line(documented: Any) -> str:
    return (documented.__doc__ or "").split("\n")[0]


def _advice() -> list[inspect.Parameter]:
    """The keywords of `taxonomy.recommend`; its docstring is their help."""
    text = " ".join((advise.__doc__ or "").split())
    hints = typing.get_type_hints(advise)
    made = []
    for name, parameter in inspect.signature(advise).parameters.items():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            found = re.search(rf"`{name}`: (.+?)(?=\. `|\. Raises)", text)
            made.append(flag(name, hints[name], parameter.default, found[1] if found else ""))
    made.append(
        flag("published", bool, False, "choose among all published systems, also those not in this library")
    )
    return made
