"""How results show themselves: a few lines, what matters first, never more than a screen of 80 columns."""

from __future__ import annotations

import dataclasses
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

WIDTH, HEIGHT = 79, 16
PART = 60


def fit(lines: Iterable[str]) -> str:
    """Lines cut to the width, and to the height with a line that says how many more there are.

    >>> fit(["a" * 100])[-3:]
    'aa…'
    """
    shown = [line if len(line) <= WIDTH else f"{line[: WIDTH - 1]}…" for line in lines]
    if len(shown) > HEIGHT:
        shown = [*shown[: HEIGHT - 1], f"… {len(shown) - HEIGHT + 1} lines more"]
    return "\n".join(shown)


def brief(value: Any) -> str:
    """One value in a few words: tensors by dtype and shape, modules and functions by name, collections by their size.

    >>> brief([0.5] * 100), brief({"a": 1}), brief("x" * 100)[:4]
    ('100 of float', "{'a': 1}", "'xxx")
    """
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if hasattr(value, "named_parameters") or isinstance(value, Screen):
        return type(value).__name__
    if callable(value) and hasattr(value, "__qualname__"):
        return str(value.__qualname__)
    if isinstance(value, Mapping | Sequence | AbstractSet) and not isinstance(value, str | bytes):
        inside = [*value, *(value.values() if isinstance(value, Mapping) else ())]
        plain = all(isinstance(each, str | int | float | None) for each in inside)
        if plain and len(text := repr(value)) <= PART:
            return text
        kinds = Counter(
            type(each).__name__ for each in inside[len(value) if isinstance(value, Mapping) else 0 :]
        )
        return f"{len(value)} of {' and '.join(kinds)}" if value else repr(value)
    text = " ".join(repr(value).split())
    return text if len(text) <= PART else f"{text[: PART - 1]}…"


class Screen:
    """A dataclass (with `repr=False`) whose repr is its fields in a few words; those that are empty are left out."""

    def __repr__(self) -> str:
        parts = []
        for item in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, item.name, None)
            empty = value is None or (isinstance(value, str | Mapping | Sequence) and not len(value))
            if item.repr and not item.name.startswith("_") and not empty:
                parts.append(f"{item.name}={brief(value)}")
        text = f"{type(self).__name__}({', '.join(parts)})"
        return fit(textwrap.wrap(text, WIDTH, subsequent_indent="    ", break_on_hyphens=False))


def counted(count: int, noun: str) -> str:
    """`1 group`, `2 groups`."""
    return f"{count:,} {noun if count == 1 else f'{noun}s'}"


def change(label: str, before: float | None, after: float | None) -> str | None:
    """`params 100 -> 50 (50.0 %)`; nothing where a side is missing."""
    if not before or after is None:
        return None
    return f"{label} {before:,.0f} -> {after:,.0f} ({100 * after / before:.1f} %)"
