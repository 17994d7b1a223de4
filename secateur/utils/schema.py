"""What a JSON file of ours may hold, said once and checked when it is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from secateur.errors import SecateurError

LARGEST = 10**9


class Entry(BaseModel):
    """A JSON object: no other keys than its fields, and no value of another type made to fit."""

    # older pydantic warns of a field such as `model_args` where the namespace is protected
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


def _public(name: str) -> str:
    if any(part.startswith("__") for part in name.split(".")):
        raise ValueError("is no name of a module or field")
    return name


Count = Annotated[int, Field(ge=0, le=LARGEST)]
Size = Annotated[int, Field(ge=1, le=LARGEST)]
Path_ = Annotated[str, AfterValidator(_public)]
"""The dotted name of a module, tensor or field."""
T = TypeVar("T", bound=Entry)


def read_object(path: Path, fix: str = "write it again") -> dict[str, Any]:
    """The JSON object in a file.

    >>> read_object(Path("run.json"))  # doctest: +SKIP
    {'seed': 0}

    Raises `SecateurError` where it can't be read, isn't JSON, or is something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SecateurError(f"it can't be read ({error.strerror})", where=str(path), fix=fix) from error
    except (ValueError, RecursionError) as error:
        raise SecateurError(f"it isn't JSON ({error})", where=str(path), fix=fix) from error
    if not isinstance(value, dict):
        raise SecateurError("it isn't a JSON object", where=str(path), fix=fix)
    return value


def parse(kind: type[T], value: Any, where: str, fix: str = "write it again") -> T:
    """`value` as an entry of this kind.

    >>> class Group(Entry):
    ...     size: Count
    >>> parse(Group, {"size": 3}, "plan.json").size
    3
    >>> parse(Group, {"size": True}, "plan.json")
    Traceback (most recent call last):
    ...
    secateur.errors.SecateurError: plan.json: size is True: Input should be a valid integer; write it again

    Raises `SecateurError` with the place of the first value that doesn't belong there.
    """
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"]) or "it"
        found = "" if first["type"] == "missing" else f" is {str(first['input'])[:60]}"
        raise SecateurError(f"{place}{found}: {first['msg']}", where=where, fix=fix) from error
