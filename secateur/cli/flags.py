"""Flags of the command line: dataclasses, written by hand or made from the catalogue of methods."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import operator
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, cast

from cyclopts import Group, Parameter

SWITCH = Parameter(negative="", show_default=False)
"""A yes-or-no flag that is off and has no `--no-` form."""
OUTPUT = Parameter(group=Group("Output", sort_key=4))
KINDS: dict[str, Any] = {
    "int": int,
    "float": float,
    "bool": bool,
    "str": str,
    "list": list[str],
    "None": None,
}

Row = Mapping[str, Any]


def flag(help: str, default: Any = dataclasses.MISSING) -> Any:
    """A field of a verb's flags; `foo_bar` is `--foo-bar`."""
    return dataclasses.field(default=default, metadata={"help": help})


class Settings:
    """Flags that only the catalogue knows: hyperparameters, options, recipes."""


def settings(rows: Iterable[Row], group: str | None = None, order: int = 1, prefix: str = "", taken: Iterable[str] = (),
             optional: bool = False) -> type:  # fmt: skip
    """A dataclass with a flag for each row that a command line can say.

    >>> made = settings([{"name": "depth", "type": "int", "default": 2, "help": "layers"}])
    >>> made(depth=3)
    Settings(depth=3)

    Args:
        rows: name, type, default and help, as the catalogue has them. Tuples are written with commas; a list may be given in
            several flags too.
        group: the heading of the help; order: its place there.
        prefix: stands before a flag whose name is among `taken`.
        optional: what isn't given is None, whatever the default is.
    """
    heading: dict[str, Any] = {"group": Group(group, sort_key=order)} if group else {}
    taken = set(taken)
    fields: list[tuple[str, Any, Any]] = []
    for row in rows:
        name, kind = row["name"], row["type"]
        if kind is None:
            continue
        default = None if optional else row.get("default", dataclasses.MISSING)
        if isinstance(default, list | tuple) and "list" not in kind:
            default = ",".join(map(str, default))
        hint: Any = functools.reduce(operator.or_, (KINDS[part] for part in kind.split(" | ")))
        hint = hint | None if optional else hint
        extra: dict[str, Any] = (
            {"negative": "", "show_default": False} if kind == "bool" and default is False else {}
        )
        spelled = f"--{prefix}-{name}" if name in taken else f"--{name}"
        note = Parameter(name=spelled.replace("_", "-"), help=row["help"], **heading, **extra)
        field = flag(row["help"], default)
        fields.append((name, Annotated[hint, note], field))
    # cyclopts takes a class of `types`, where make_dataclass puts it, for one of Python's own
    space = {"__module__": __name__}
    return dataclasses.make_dataclass("Settings", fields, bases=(Settings,), namespace=space, kw_only=True)


RECIPE = Group("Recipe", sort_key=5)
RECIPE_FLAGS = {
    "from_recipe": ("--recipe", "read arguments and flags from this file; what stands on the command line wins"),
    "save_recipe": ("--save-recipe", "write the file that repeats this run; a result's folder always holds one, recipe.yaml"),
}  # fmt: skip

Done = Callable[[list[str], dict[str, Any], str | None], None]


def command(
    function: Callable[..., Any], line: str = "", done: Done | None = None, **kinds: type
) -> Callable[..., Any]:
    """`function` as cyclopts calls it: the fields of its dataclasses are flags.

    line: the command line as text, for a function that has a parameter of this name. done: called after a run with its
    arguments, the values of its flags (`said`), and what --save-recipe says. kinds: what stands in for the type of a parameter,
    where it depends on the method that is named.
    """
    hints = typing.get_type_hints(function, include_extras=True) | kinds
    passed = {"line": line} if "line" in hints else {}
    shown = []
    for parameter in inspect.signature(function).parameters.values():
        kind, default = hints[parameter.name], parameter.default
        if dataclasses.is_dataclass(kind):
            required = any(_required(item) for item in dataclasses.fields(kind))
            default = parameter.empty if required else cast(type, kind)()
            kind = Annotated[kind, Parameter(name="*")]
        if parameter.name != "line" and kind is not Settings:
            shown.append(parameter.replace(annotation=kind, default=default))
    absent = {name: Settings() for name, kind in hints.items() if kind is Settings}
    for name, (spelled, help) in RECIPE_FLAGS.items():
        hint = Annotated[str | None, Parameter(name=spelled, help=help, group=RECIPE)]
        shown.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=hint))

    signature = inspect.Signature(shown)

    def run(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        files = {name: bound.arguments.pop(name) for name in RECIPE_FLAGS}
        code = function(*bound.args, **bound.kwargs, **passed, **absent)
        if done is not None:
            done(*said(bound.arguments, signature), files["save_recipe"])
        return code

    run.__signature__ = signature  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in shown}
    run.__name__, run.__doc__ = function.__name__, function.__doc__
    return run


def said(values: Mapping[str, Any], signature: inspect.Signature) -> tuple[list[str], dict[str, Any]]:
    """(the arguments, the value of every flag that has one) of a call, as text and lists of text.

    What only says where results go and who works (the group Output, --json) is left out.
    """
    arguments, flags = [], {}
    for name, value in values.items():
        if not dataclasses.is_dataclass(value):
            parameter = signature.parameters[name]
            if parameter.kind is inspect.Parameter.POSITIONAL_ONLY and value is not None:
                arguments += [str(item) for item in (value if isinstance(value, tuple | list) else [value])]
            continue
        hints = typing.get_type_hints(type(value), include_extras=True)
        for item in dataclasses.fields(value):
            notes = [n for n in getattr(hints[item.name], "__metadata__", ()) if isinstance(n, Parameter)]
            found = getattr(value, item.name)
            if found is None or item.name == "json" or OUTPUT in notes:
                continue
            spelled = next((next(iter(n.name)) for n in notes if n.name), item.name.replace("_", "-"))
            flags[spelled.removeprefix("--")] = _text(found)
    return arguments, flags


def _text(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_text(item) for item in value]
    number = isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))
    return value if number else str(value)


def _required(item: dataclasses.Field) -> bool:
    return item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING


def flag_names(function: Callable[..., Any], *others: type) -> set[str]:
    """The names of all flags of a verb and of `others`."""
    kinds = [*typing.get_type_hints(function).values(), *others]
    return {
        item.name for kind in kinds if dataclasses.is_dataclass(kind) for item in dataclasses.fields(kind)
    }


def listed(text: str | Iterable[str] | None) -> tuple[str, ...]:
    """`a,b` -> ("a", "b"), as ["a", "b"] does."""
    text = text if isinstance(text, str) else ",".join(text or ())
    return tuple(part.strip() for part in text.split(",") if part.strip())


def named_method(argv: Sequence[str]) -> str | None:
    """The value of `--method`, read before the flags are parsed, because it decides which flags there are."""
    for index, token in enumerate(argv):
        if token == "--method" and index + 1 < len(argv):
            return argv[index + 1]
        if token.startswith("--method="):
            return token.partition("=")[2]
    return None


WORDS = {"on": True, "off": False, "true": True, "false": False, "yes": True, "no": False}


def on_off(argv: Sequence[str], switches: Mapping[str, bool]) -> list[str]:
    """`--prove off` as `--no-prove`, for every yes-or-no flag, and `--data -` as `--data=-`. `switches`: name -> whether it has a
    `--no-` form."""
    out: list[str] = []
    for token in argv:
        name, equals, value = token.partition("=")
        if equals and name in switches and value.lower() in WORDS:
            out += _switch(name, WORDS[value.lower()], switches)
        elif out and out[-1] in switches and token.lower() in WORDS:
            out += _switch(out.pop(), WORDS[token.lower()], switches)
        elif token == "-" and out and out[-1].startswith("--") and "=" not in out[-1]:
            out[-1] += "=-"  # cyclopts takes what begins with a hyphen for a flag
        else:
            out.append(token)
    return out


def _switch(name: str, on: bool, switches: Mapping[str, bool]) -> list[str]:
    if on:
        return [name]
    return [f"--no-{name.removeprefix('--')}"] if switches[name] else []
