"""A plan's files without its tensors: what `plan.json` says, checked, and its rows. Needs no torch."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from secateur.errors import SecateurError

FORMAT = "secateur-plan"


def read_document(path: str | Path) -> tuple[Path, dict[str, Any]]:
    """(the file, what it says) of the plan in a directory, or of a `plan.json`.

    Raises:
        SecateurError: it is missing, isn't JSON, or isn't a plan.
    """
    path = Path(path)
    path = path / "plan.json" if path.is_dir() else path
    try:
        document = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise SecateurError(
            "there is no plan", where=str(path), fix="give a directory that holds plan.json"
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise SecateurError(f"it isn't JSON ({error})", where=str(path)) from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise SecateurError("it isn't a plan", where=str(path), fix="give a plan.json that secateur wrote")
    return path, document


@contextlib.contextmanager
def undamaged(path: Path) -> Iterator[None]:
    """What fails inside says that the plan is damaged."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, SafetensorError) as error:
        raise SecateurError(
            f"it is damaged ({type(error).__name__}: {error})", where=str(path), fix="write the plan again"
        ) from error


def kept_units(document: Mapping[str, Any], path: Path) -> dict[str, list[int]]:
    """The kept units of every group, checked: an edit may have made them impossible."""
    units: dict[str, list[int]] = {}
    for name, group in document["groups"].items():
        where = f"{path}, group {name}"
        units[name] = from_ranges(group["keep"], where=where)
        if not units[name] or units[name][-1] >= group["size"]:
            raise SecateurError(
                f"it keeps units {group['keep']!r} of {group['size']}",
                where=where,
                fix="keep at least one, all below the size",
            )
    return units


def summarise(path: Path, document: Mapping[str, Any]) -> dict[str, Any]:
    """`rows`, as `Plan.summary` gives them, and the names of the tensors that a repair replaced, `values`."""
    groups, rows, values = document["groups"], [], []
    for name, units in kept_units(document, path).items():
        rows.append(
            {"name": name, "kind": groups[name]["kind"], "size": groups[name]["size"], "kept": len(units)}
        )
    if (beside := path.with_name("plan.safetensors")).exists():
        import numpy as np

        with safe_open(beside, framework="numpy") as tensors:
            values = [name for name in tensors.keys() if name.startswith("value/")]  # noqa: SIM118
            for name, entry in document["masks"].items():
                size = int(np.prod(entry["shape"]))
                kept = int(np.unpackbits(tensors.get_tensor(f"mask/{name}"), count=size).sum())
                rows.append({"name": name, "kind": "weights", "size": size, "kept": kept})
    elif document["masks"]:
        raise KeyError(f"mask/{next(iter(document['masks']))}")
    return {"rows": rows, "values": sorted(name.removeprefix("value/") for name in values)}


def to_ranges(units: Sequence[int]) -> str:
    """Sorted indices as ranges.

    >>> to_ranges([0, 1, 2, 5, 7, 8])
    '0-2,5,7-8'
    """
    parts: list[str] = []
    start = previous = None
    for unit in [*units, None]:
        if previous is not None and unit == previous + 1:
            previous = unit
            continue
        if start is not None:
            parts.append(f"{start}" if start == previous else f"{start}-{previous}")
        start = previous = unit
    return ",".join(parts)


def from_ranges(text: str, where: str = "ranges") -> list[int]:
    """Ranges back to sorted indices.

    >>> from_ranges("0-2,5")
    [0, 1, 2, 5]
    """
    units: set[int] = set()
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        first, dash, last = part.partition("-")
        try:
            low, high = int(first), int(last) if dash else int(first)
        except ValueError:
            raise SecateurError(
                f"{part!r} isn't a range", where=where, fix="write ranges such as 0-2,5"
            ) from None
        if high < low:
            raise SecateurError(f"{part!r} runs backwards", where=where, fix="write ranges such as 0-2,5")
        units.update(range(low, high + 1))
    return sorted(units)
