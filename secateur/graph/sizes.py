"""Integers that remember how they were computed, so that a hard-coded width is found where it is stored.

While a model is traced, its integer attributes and the sizes of labelled tensors are `Size`s. A `view(b, n,
self.heads, c // self.heads)` then shows which attributes must change when heads or channels leave.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from secateur.graph.labels import Axes


@dataclass(frozen=True)
class Attribute:
    """Where an integer is stored: module path, attribute (dots reach into a config), place in a tuple."""

    module: str
    name: str
    place: int | None = None


@dataclass(frozen=True, eq=False)
class Extent:
    """The size of one axis of a traced tensor."""

    axes: Axes
    axis: int


class Size(int):
    """An int with its expression: an Attribute, an Extent or (operator, left, right).

    `compared` is called with the expressions of two Sizes that a model's code found equal.
    """

    expr: Any
    compared: ClassVar[Callable[[Any, Any], None] | None] = None

    def __new__(cls, value: int, expr: Any) -> Self:
        self = int.__new__(cls, value)
        self.expr = expr
        return self

    def __eq__(self, other: object) -> bool:
        same = int.__eq__(self, other)
        if same is True and Size.compared is not None and isinstance(other, Size):
            Size.compared(self.expr, other.expr)
        return same

    def __ne__(self, other: object) -> bool:
        same = self.__eq__(other)
        return same if same is NotImplemented else not same

    __hash__ = int.__hash__

    def __neg__(self) -> Size:
        return Size(-int(self), (operator.sub, 0, self.expr))

    def __reduce__(self) -> tuple[type[int], tuple[int]]:
        return int, (int(self),)

    def __deepcopy__(self, memo: dict) -> int:
        return int(self)

    def __copy__(self) -> int:
        return int(self)


def _method(name: str, op: Callable[[Any, Any], Any], swap: bool) -> None:
    plain = getattr(int, name)

    def method(self: Size, other: Any) -> Any:
        value = plain(self, other)
        if not isinstance(value, int) or isinstance(value, bool):
            return value
        left, right = (other, self) if swap else (self, other)
        return Size(value, (op, expression(left), expression(right)))

    setattr(Size, name, method)


for _name, _op in {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "floordiv": operator.floordiv,
    "mod": operator.mod,
    "pow": operator.pow,
}.items():
    _method(f"__{_name}__", _op, False)
    _method(f"__r{_name}__", _op, True)


def expression(value: Any) -> Any:
    return value.expr if isinstance(value, Size) else value


def leaves(expr: Any) -> Iterator[Attribute | Extent]:
    """The attributes and extents an expression is made of."""
    if isinstance(expr, (Attribute, Extent)):
        yield expr
    elif isinstance(expr, tuple):
        yield from leaves(expr[1])
        yield from leaves(expr[2])


def evaluate(expr: Any, value: Callable[[Attribute | Extent], int]) -> int:
    """The expression with its leaves replaced."""
    if isinstance(expr, (Attribute, Extent)):
        return value(expr)
    if isinstance(expr, tuple):
        return expr[0](evaluate(expr[1], value), evaluate(expr[2], value))
    return expr
