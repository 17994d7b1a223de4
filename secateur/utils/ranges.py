"""Ranges of dataclass fields, declared where the field is: choices, min, max, above, below."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from secateur.errors import SecateurError, choose

BOUNDS = {
    "min": (lambda value, bound: value >= bound, "at least {}"),
    "above": (lambda value, bound: value > bound, "above {}"),
    "max": (lambda value, bound: value <= bound, "at most {}"),
    "below": (lambda value, bound: value < bound, "below {}"),
}
"""Keys of a field's metadata: (what holds, how it is said)."""


def check_fields(instance: Any, where: str | None = None) -> None:
    """Refuse values outside the ranges that a dataclass' fields declare; None and "" always pass, unless they have a choice.

    >>> @dataclasses.dataclass
    ... class Trial:
    ...     share: float = dataclasses.field(default=0.5, metadata={"min": 0, "below": 1})
    >>> check_fields(Trial(share=1.5))
    Traceback (most recent call last):
    ...
    secateur.errors.SecateurError: share: 1.5 is out of range; give at least 0 and below 1

    Every entry of a tuple is held to the range. where: the field's name, or `where.name`.

    Raises `SecateurError` with the field, its value and what it may be.
    """
    for item in dataclasses.fields(instance):
        value, place = getattr(instance, item.name), f"{where}.{item.name}" if where else item.name
        values = value if isinstance(value, tuple) else (value,)
        if choices := item.metadata.get("choices"):
            fix = " or ".join(map(str, choices)) if len(choices) == 2 else None
            for entry in values:
                choose(entry, choices, what=item.name, where=place, fix=fix)
        bounds = {key: item.metadata[key] for key in BOUNDS if key in item.metadata}
        for entry in values if bounds else ():
            if entry is None:
                continue
            if math.isnan(entry) or not all(BOUNDS[key][0](entry, bound) for key, bound in bounds.items()):
                said = " and ".join(BOUNDS[key][1].format(bound) for key, bound in bounds.items())
                what = "out of range"
                if bounds.keys() == {"min", "max"}:
                    what = f"outside {bounds['min']}..{bounds['max']}"
                raise SecateurError(f"{entry} is {what}", where=place, fix=f"give {said}")
