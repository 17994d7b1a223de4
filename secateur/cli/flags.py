"""Flags of the command line, made from dataclasses and signatures of the Python API."""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any

from cyclopts import Group, Parameter

Command = Callable[..., Any]


def flag(
    name: str, kind: Any = str, default: Any = inspect.Parameter.empty, help: str = "", group: Any = None
) -> inspect.Parameter:
    """One keyword flag; `foo_bar` becomes `--foo-bar`."""
    extra: dict[str, Any] = {"group": group} if group else {}
    if kind is bool and default is False:
        extra["negative"] = ""
    if default is None or default is False or default == ():
        extra["show_default"] = False
    note = Annotated[kind, Parameter(name=f"--{name.replace('_', '-')}", help=help, **extra)]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=note)


def word(
    name: str, kind: Any = str, default: Any = inspect.Parameter.empty, help: str = ""
) -> inspect.Parameter:
    """One positional argument."""
    note = Annotated[kind, Parameter(help=help)]
    return inspect.Parameter(name, inspect.Parameter.POSITIONAL_ONLY, default=default, annotation=note)


def words(name: str, help: str = "") -> inspect.Parameter:
    """Any number of positional arguments."""
    return inspect.Parameter(
        name, inspect.Parameter.VAR_POSITIONAL, annotation=Annotated[str, Parameter(help=help)]
    )


def fields_as_flags(
    cls: type, group: Any = None, rename: Callable[[str], str] = str
) -> list[inspect.Parameter]:
    """The fields of a dataclass as flags: names, types, defaults, and help from `metadata["help"]`.

    Tuples are written with commas. Fields that a command line cannot say (functions, tensors) are left out.
    """
    hints = typing.get_type_hints(cls)
    made = []
    for item in dataclasses.fields(cls):
        kind = _flag_type(hints[item.name])
        if not item.init or kind is None:
            continue
        default = item.default
        if item.default_factory is not dataclasses.MISSING:
            default = item.default_factory()
        if isinstance(default, tuple | list):
            default = ",".join(map(str, default))
        required = default is dataclasses.MISSING
        default = inspect.Parameter.empty if required else default
        made.append(flag(rename(item.name), kind, default, item.metadata.get("help", ""), group))
    return made


def _flag_type(hint: Any) -> Any:
    if typing.get_origin(hint) is typing.Literal or hint in (int, float, bool, str):
        return hint
    members = typing.get_args(hint)
    if typing.get_origin(hint) in (tuple, list):
        return str
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        kinds = [_flag_type(member) for member in members if member is not type(None)]
        known = [kind for kind in kinds if kind is not None]
        if not known:
            return None
        return typing.Union[(*known, *([None] if type(None) in members else []))]
    return None


def listed(text: str | None) -> tuple[str, ...]:
    """`a,b` -> ("a", "b")"""
    return tuple(part.strip() for part in (text or "").split(",") if part.strip())


def command(parameters: Sequence[inspect.Parameter], function: Command, help: str) -> Command:
    """`function` with the signature that the command line shows."""

    signature = inspect.Signature(list(parameters))

    def run(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return function(*bound.args, **bound.kwargs)

    run.__signature__ = signature  # type: ignore[attr-defined]
    run.__name__, run.__doc__ = function.__name__, help
    return run


def own_flag(method: str, field: str, taken: Iterable[str]) -> str:
    """A hyperparameter's name as a flag: its own, or with the method's before it where a general flag has that name."""
    return f"{method.replace('-', '_')}_{field}" if field in taken else field


def in_group(parameter: inspect.Parameter, group: Group) -> inspect.Parameter:
    """The same flag under another heading of the help."""
    kind, note = typing.get_args(parameter.annotation)
    return parameter.replace(annotation=Annotated[kind, note, Parameter(group=group)])


def named_method(argv: Sequence[str]) -> str | None:
    """The value of `--method`, found before the flags are parsed, because it decides which flags there are."""
    for index, token in enumerate(argv):
        if token == "--method" and index + 1 < len(argv):
            return argv[index + 1]
        if token.startswith("--method="):
            return token.partition("=")[2]
    return None


def on_off(argv: Sequence[str], switches: Mapping[str, bool]) -> list[str]:
    """`--prove off` as `--no-prove`, for every yes-or-no flag. `switches`: name -> whether it has a `--no-` form."""
    out: list[str] = []
    words_ = {"on": True, "off": False, "true": True, "false": False, "yes": True, "no": False}
    for token in argv:
        name, equals, value = token.partition("=")
        if equals and name in switches and value.lower() in words_:
            out += _switch(name, words_[value.lower()], switches)
        elif out and out[-1] in switches and token.lower() in words_:
            out += _switch(out.pop(), words_[token.lower()], switches)
        else:
            out.append(token)
    return out


def _switch(name: str, on: bool, switches: Mapping[str, bool]) -> list[str]:
    if on:
        return [name]
    return [f"--no-{name.removeprefix('--')}"] if switches[name] else []


def switches_of(parameters: Iterable[inspect.Parameter]) -> dict[str, bool]:
    """The yes-or-no flags, and whether they have a `--no-` form."""
    found = {}
    for parameter in parameters:
        kind = typing.get_args(parameter.annotation)[0]
        if kind in (bool, bool | None):
            found[f"--{parameter.name.replace('_', '-')}"] = parameter.default is not False
    return found
