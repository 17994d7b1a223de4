"""Writes `taxonomy/catalogue.json`: what the code says about every method and every shared setting, as data."""

from __future__ import annotations

import dataclasses
import inspect
import json
import types
import typing
from collections.abc import Mapping
from typing import Any

from secateur.attention.method import AttentionMethod
from secateur.method import Method, own_methods
from secateur.prompts.method import PromptMethod
from secateur.pruning.options import Options
from secateur.saliency.method import SaliencyMethod
from secateur.saliency.objects.method import ObjectMethod
from secateur.tasks.minigrid.train import Recipe as RoomsRecipe
from secateur.tasks.scenes.train import Recipe as ScenesRecipe
from secateur.taxonomy.catalogue import FILE
from secateur.tokens.method import TokenMethod, WorkMethod
from secateur.training.method import TrainMethod
from secateur.training.recipe import Recipe
from secateur.training.train_prune import MEANT
from secateur.utils.files import atomic_write_text

PLAIN = {int: "int", float: "float", bool: "bool", str: "str", type(None): "None"}


def flag_type(hint: Any) -> str | None:
    """How a field is written on a command line: `int`, `float | None`; tuples as text; None where it can't be.

    >>> flag_type(tuple[float, ...]), flag_type(float | None), flag_type(dict)
    ('str', 'float | None', None)
    """
    if hint in PLAIN:
        return PLAIN[hint]
    origin, members = typing.get_origin(hint), typing.get_args(hint)
    if origin in (tuple, list):
        return "str"
    if origin in (typing.Union, types.UnionType):
        names = dict.fromkeys(filter(None, map(flag_type, members)))
        return " | ".join(names) if names.keys() - {"None"} else None
    return None


def settings(cls: type) -> list[dict[str, Any]]:
    """The fields of a dataclass: name, type, default (absent where there is none) and help."""
    hints = typing.get_type_hints(cls)
    rows = []
    for item in dataclasses.fields(cls):
        if not item.init:
            continue
        kind = flag_type(hints[item.name])
        if item.metadata.get("several"):
            kind = (kind or "str").replace("str", "list")
        row = {"name": item.name, "type": kind, "help": item.metadata.get("help", "")}
        if item.default_factory is not dataclasses.MISSING:
            row["default"] = item.default_factory()
        elif item.default is not dataclasses.MISSING:
            row["default"] = item.default
        rows.append(row)
    return rows


def _verb(cls: type[Method]) -> str:
    verbs = {
        TrainMethod: "train-prune",
        TokenMethod: "tokens",
        WorkMethod: "tokens",
        SaliencyMethod: "saliency",
        ObjectMethod: "train sod",
        AttentionMethod: "attach",
        PromptMethod: "prompts",
    }
    return next((verb for kind, verb in verbs.items() if issubclass(cls, kind)), "prune")


def entry(cls: type[Method]) -> dict[str, Any]:
    """What the catalogue says of one method, this library's or not."""
    record = {item.name: getattr(cls.info, item.name) for item in dataclasses.fields(cls.info)}
    file = cls.__module__.rpartition(".")[2]  # a name may begin with a digit, a module's may not
    return {
        **({} if file == cls.name.replace("-", "_") else {"file": file}),
        "verb": _verb(cls),
        "info": record,
        "needs": sorted(cls.needs),
        "doc": ""
        if (cls.__doc__ or "").startswith(f"{cls.__name__}(")
        else inspect.cleandoc(cls.__doc__ or ""),
        "settings": settings(cls),
    }


def catalogue() -> dict[str, Any]:
    """All that `taxonomy/catalogue.json` holds, from the code as it is now."""
    options = settings(Options)
    data = {
        "methods": {name: entry(cls) for name, cls in own_methods().items()},
        "settings": {
            "prune": options,
            "train-prune": [row for row in options if row["name"] in MEANT],
            "recipe": settings(Recipe),
            "scenes": settings(ScenesRecipe),
            "minigrid": settings(RoomsRecipe),
        },
    }
    return json.loads(json.dumps(data, default=_sorted))


def _sorted(value: Any) -> list[Any]:
    if isinstance(value, set | frozenset):
        return sorted(value)
    raise TypeError(f"{value!r} has no place in JSON")


def write_catalogue(data: Mapping[str, Any] | None = None) -> bool:
    """Renew the file; whether it changed."""
    text = json.dumps(data or catalogue(), indent=1, ensure_ascii=False) + "\n"
    if FILE.exists() and FILE.read_text(encoding="utf-8") == text:
        return False
    atomic_write_text(FILE, text)
    return True
