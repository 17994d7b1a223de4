"""What the schema of an operation says, and arguments by their names."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch


class Operation(NamedTuple):
    """What is known of an operation of the dispatcher."""

    full: str
    name: str  # of its rule
    in_place: bool
    pointwise: bool
    arguments: list[str]
    defaults: dict[str, Any]


@functools.cache
def described(op: Any) -> Operation:
    """An operation, as its schema says it."""
    full = op._schema.name.split("::")[1]
    in_place = full.endswith("_") and not full.endswith("__")
    name = full.rstrip("_") if in_place else full
    if name in ("__and__", "__or__", "__xor__", "__iand__", "__ior__"):
        name = "bitwise"
    known = op._schema.arguments
    return Operation(
        full,
        name,
        in_place,
        name == "bitwise" or torch.Tag.pointwise in op.tags,
        [a.name for a in known],
        {a.name: a.default_value for a in known if a.has_default_value()},
    )


def bind(op: Operation, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by the names of an operation's schema, defaults filled in."""
    out = dict(zip(op.arguments, args))
    for name in op.arguments[len(args) :]:
        if name in kwargs:
            out[name] = kwargs[name]
        elif name in op.defaults:
            out[name] = op.defaults[name]
    return out
