"""A plan's files without its tensors: what `plan.json` says, checked, and its rows. Needs no torch."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from safetensors import SafetensorError, safe_open

from secateur.errors import SecateurError, require
from secateur.utils.files import check_path
from secateur.utils.schema import Count, Entry, Size, parse, read_object

FORMAT = "secateur-plan"
WHOLE = ("layers", "attentions", "novices")
"""Kinds of unit of which a list may lose all: `graph.groups.WHOLE`, which can't be read without torch."""
LARGEST_INPUT = 2**28
DTYPES = Literal[
    "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"
]


class GroupEntry(Entry):
    kind: str
    size: Size
    keep: str
    beside: str = ""


class MaskEntry(Entry):
    shape: Annotated[list[Size], Field(min_length=1, max_length=8)]
    kept: Count


class TensorEntry(Entry):
    tensor: Annotated[list[Count], Field(max_length=8)]
    dtype: DTYPES


class Document(Entry):
    """`plan.json`."""

    format: Literal["secateur-plan"]
    version: Annotated[int, Field(ge=1, le=1)] = 1
    method: str
    target: str
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)]
    hyperparameters: dict[str, Any]
    options: dict[str, Any]
    inputs: Any
    groups: dict[str, GroupEntry]
    masks: dict[str, MaskEntry]
    notes: dict[str, str]
    source: str = ""


def read_document(path: str | Path) -> tuple[Path, dict[str, Any]]:
    """(the file, what it says) of the plan in a directory, or of a `plan.json`.

    Raises:
        SecateurError: it is missing, isn't JSON, or isn't a plan.
    """
    path = Path(path)
    path = path / "plan.json" if path.is_dir() else path
    if not path.exists():
        fix = "give a directory that holds plan.json"
        fix = fix if path.parent.is_dir() and path.name == "plan.json" else check_path(path, fix)
        raise SecateurError("there is no plan", where=str(path), fix=fix)
    document = read_object(path, fix="write the plan again")
    if document.get("format") != FORMAT:
        raise SecateurError("it isn't a plan", where=str(path), fix="give a plan.json that secateur wrote")
    parse(Document, document, str(path), fix="write the plan again")
    _check_inputs(document["inputs"], str(path))
    return path, document


def _check_inputs(spec: Any, where: str) -> None:
    """Refuse a description of inputs that no tensors can be made from."""
    if isinstance(spec, dict) and "tensor" in spec:
        entry = parse(TensorEntry, spec, f"{where}, inputs", fix="write the plan again")
        count = math.prod(entry.tensor)
        require(
            count <= LARGEST_INPUT,
            f"an input of {count} numbers is too large",
            where=where,
            fix="write the plan again",
        )
    elif isinstance(spec, dict | list):
        for item in spec.values() if isinstance(spec, dict) else spec:
            _check_inputs(item, where)


@contextlib.contextmanager
def undamaged(path: Path) -> Iterator[None]:
    """What fails inside says that the plan is damaged."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, OSError, SafetensorError) as error:
        raise SecateurError(
            f"it is damaged ({type(error).__name__}: {error})", where=str(path), fix="write the plan again"
        ) from error


def kept_units(document: Mapping[str, Any], path: Path) -> dict[str, list[int]]:
    """The kept units of every group, checked: an edit may have made them impossible."""
    units: dict[str, list[int]] = {}
    for name, group in document["groups"].items():
        where = f"{path}, group {name}"
        units[name] = from_ranges(group["keep"], where=where, size=group["size"])
        if not units[name] and group["kind"] not in WHOLE:
            raise SecateurError(
                f"it keeps units {group['keep']!r} of {group['size']}",
                where=where,
                fix="keep at least one, all below the size",
            )
    return units


def check_mask(name: str, bits: Any, size: int) -> None:
    """Raises ValueError where the bits aren't those of a mask of this size."""
    if str(bits.dtype).removeprefix("torch.") != "uint8" or tuple(bits.shape) != ((size + 7) // 8,):
        raise ValueError(f"the mask of {name} has {tuple(bits.shape)} {bits.dtype} for {size} weights")


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
                size = math.prod(entry["shape"])
                bits = tensors.get_tensor(f"mask/{name}")
                check_mask(name, bits, size)
                kept = int(np.unpackbits(bits, count=size).sum())
                if kept != entry["kept"]:
                    raise ValueError(f"the mask of {name} keeps {kept}, not {entry['kept']}")
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


def from_ranges(text: str, where: str = "ranges", size: int | None = None) -> list[int]:
    """Ranges back to sorted indices; with a size, all are below it.

    >>> from_ranges("0-2,5")
    [0, 1, 2, 5]
    """
    units: set[int] = set()
    fix = "write ranges such as 0-2,5"
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        found = re.fullmatch(r"([0-9]{1,12})(?:-([0-9]{1,12}))?", part)
        if found is None:
            raise SecateurError(f"{part!r} isn't a range", where=where, fix=fix)
        low, high = int(found[1]), int(found[2] or found[1])
        if high < low:
            raise SecateurError(f"{part!r} runs backwards", where=where, fix=fix)
        if size is not None and high >= size:
            raise SecateurError(
                f"it keeps units {text[:200]!r} of {size}",
                where=where,
                fix="keep at least one, all below the size",
            )
        units.update(range(low, high + 1))
    return sorted(units)
