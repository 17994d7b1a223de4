"""The rows of a comparison on disk: one JSON object a line, written whole as soon as a run ends, never twice."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from secateur.errors import SecateurError, SecateurWarning
from secateur.utils.files import atomic_write_json, atomic_write_text
from secateur.utils.schema import read_object
from secateur.utils.screen import counted

FORMAT, VERSION = "secateur-comparison", 1
ROWS, ABOUT, DAMAGED, LOCK = "rows.jsonl", "comparison.json", "damaged.jsonl", "lock"
DENSE = "dense"
STATES = ("done", "refused", "failed")
"""done: it has figures. refused: the method or the target doesn't fit, with the reason. failed: an error nobody foresaw."""
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of a comparison: a method (or `dense`) at a target with a seed."""

    method: str
    target: str
    seed: int

    @property
    def key(self) -> tuple[str, str, int]:
        return (self.method, self.target, self.seed)


def key_of(row: Mapping[str, Any]) -> tuple[str, str, int]:
    return (row["method"], row["target"], row["seed"])


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """The folder for one process at a time; the system gives it back when that ends, however it does.

    Raises `SecateurError` where another comparison writes there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / LOCK, timeout=0):
            yield
    except Timeout as error:
        raise SecateurError(
            "another comparison writes there now",
            where=str(folder),
            fix="wait for it, or take another folder",
        ) from error


def begin(folder: Path, setup: Mapping[str, Any]) -> None:
    """Writes what is compared, or checks that what is there was compared alike. Where no run has ended yet it is written anew.

    Raises `SecateurError` for a folder of another version, of other settings, or with something else in it.
    """
    about = folder / ABOUT
    known = read_about(folder)["setup"] if about.exists() else None
    if known is not None and (folder / ROWS).exists():
        for name in sorted(known.keys() | setup.keys()):
            if known.get(name) != setup.get(name):
                raise SecateurError(
                    f"its rows were made with {name}={known.get(name)!r}, not {setup.get(name)!r}",
                    where=str(folder),
                    fix="give the same settings, or another folder",
                )
        return
    if strange := sorted(p.name for p in folder.iterdir() if p.name not in (LOCK, ABOUT)):
        raise SecateurError(
            f"there is something else in it: {', '.join(strange[:4])}",
            where=str(folder),
            fix="give a new folder",
        )
    atomic_write_json(about, {"format": FORMAT, "version": VERSION, "setup": dict(setup)})


def read_about(folder: Path) -> dict[str, Any]:
    """What was compared. Raises `SecateurError` where the folder is no comparison, or of another version."""
    if not (folder / ABOUT).is_file():
        raise SecateurError(
            "no comparison is there", where=str(folder), fix="secateur compare TASK ... --out DIR makes one"
        )
    about = read_object(folder / ABOUT, fix="compare again, in a new folder")
    if about.get("format") != FORMAT or not isinstance(about.get("setup"), dict):
        raise SecateurError("it isn't a comparison", where=str(folder / ABOUT), fix="give a new folder")
    if about.get("version") != VERSION:
        raise SecateurError(
            f"it was written by another version ({about.get('version')!r}, this one writes {VERSION})",
            where=str(folder / ABOUT),
            fix="read it with that version, or compare again in a new folder",
        )
    return about


def read_rows(folder: str | Path) -> list[Row]:
    """The rows of a comparison, in the order in which they were finished.

    >>> rows = secateur.comparison.read_rows("out/comparison")  # doctest: +SKIP

    The last line may still be unfinished and is left out. Others that can't be read are left out with a `SecateurWarning`.
    Raises `SecateurError` where the folder is no comparison.
    """
    read_about(Path(folder))
    good, damaged, _ = _parse(Path(folder) / ROWS)
    if damaged:
        warnings.warn(
            f"{Path(folder) / ROWS}: {counted(len(damaged), 'row')} can't be read, and left out",
            SecateurWarning,
            2,
        )
    return good


def mend(folder: Path) -> tuple[list[Row], int]:
    """(the rows, how many were damaged): what can't be read is moved to `damaged.jsonl`, so that it is run again."""
    file = folder / ROWS
    good, damaged, unfinished = _parse(file)
    if damaged or unfinished:
        if damaged:
            with open(folder / DAMAGED, "a", encoding="utf-8") as out:
                out.writelines(line + "\n" for line in damaged)
        atomic_write_text(file, "".join(json.dumps(row) + "\n" for row in good))
    return good, len(damaged)


def append(folder: Path, row: Row) -> None:
    """Adds a row in one write, and waits until it is on the disk."""
    line = (json.dumps(row, allow_nan=False) + "\n").encode()
    handle = os.open(folder / ROWS, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        if os.write(handle, line) != len(line):
            raise SecateurError(
                "the row wasn't written whole", where=str(folder / ROWS), fix="make room on the disk"
            )
        os.fsync(handle)
    except OSError as error:
        raise SecateurError(
            f"the row wasn't written ({error})", where=str(folder / ROWS), fix="make room on the disk"
        ) from error
    finally:
        os.close(handle)


def _parse(file: Path) -> tuple[list[Row], list[str], bool]:
    """(good rows, lines that aren't one, whether the last line is unfinished). Of rows of one run the first counts."""
    if not file.exists():
        return [], [], False
    *lines, last = file.read_text(encoding="utf-8", errors="replace").split("\n")
    good: dict[tuple[str, str, int], Row] = {}
    damaged: list[str] = []
    for line in lines:
        row = _row(line)
        if row is None:
            damaged.append(line)
        else:
            good.setdefault(key_of(row), row)
    return list(good.values()), damaged, bool(last) or len(good) + len(damaged) < len(lines)


def _row(line: str) -> Row | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    whole = (
        isinstance(row, dict)
        and isinstance(row.get("method"), str)
        and isinstance(row.get("target"), str)
        and type(row.get("seed")) is int
        and row.get("state") in STATES
        and (row["state"] != "done" or type(row.get("quality")) in (int, float))
    )
    return row if whole else None
