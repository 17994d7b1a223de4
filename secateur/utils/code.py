"""Code that isn't this library's: files that a user names, packages that announce themselves, and where a class came from."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import re
import sys
import traceback
from importlib import metadata
from pathlib import Path
from types import ModuleType

from secateur.errors import SecateurError, nearest

_RUN: dict[str, tuple[str, ModuleType]] = {}
"""Files that were run: path -> (what it held, the module)."""


def read_spec(text: str) -> tuple[Path, str | None] | None:
    """(file, class or None) of `file.py:Class` or `file.py`; None for any other text.

    >>> read_spec("mine.py:Peak"), read_spec("mine.py"), read_spec("wanda")
    ((PosixPath('mine.py'), 'Peak'), (PosixPath('mine.py'), None), None)
    """
    found = re.fullmatch(r"(.+\.py)(?::(\w*))?", text.strip())
    return (Path(found[1]).expanduser(), found[2] or None) if found else None


def run_file(path: Path) -> ModuleType:
    """The module that a Python file is, run once as long as it holds the same text.

    Raises:
        SecateurError: there is no such file, or it fails; the error names the line.
    """
    where = str(path)
    if not path.is_file():
        near = nearest(path.name, (p.name for p in path.parent.glob("*.py")))
        fix = f"did you mean {path.with_name(near[0])}?" if near else "give the path of a Python file"
        raise SecateurError("there is no such file", where=where, fix=fix)
    text, key = path.read_bytes().decode("utf-8", "replace"), str(path.resolve())
    if key in _RUN and _RUN[key][0] == text:
        return _RUN[key][1]
    name = f"{path.stem}_{hashlib.sha256(key.encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise SecateurError(
            f"it can't be run ({_told(error, path)})", where=where, fix="mend the file"
        ) from error
    _RUN[key] = (text, module)
    return module


def _told(error: BaseException, path: Path) -> str:
    """An error of a user's file in one line, with the line of the file it arose in."""
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if Path(f.filename) == path]
    line = error.lineno if isinstance(error, SyntaxError) else (lines or [None])[-1]
    told = error.msg if isinstance(error, SyntaxError) else str(error)
    return f"{type(error).__name__}: {told}" + (f", line {line}" if line else "")


def announced(group: str) -> list[metadata.EntryPoint]:
    """What installed packages announce in a group of entry points."""
    return sorted(metadata.entry_points(group=group), key=lambda point: point.name)


def package_of(point: metadata.EntryPoint) -> str:
    """The name and version of the package that an entry point belongs to."""
    return f"{point.dist.name} {point.dist.version}" if point.dist else point.value


def origin(cls: type) -> str:
    """Where a class came from, and a digest of its text; empty for this library's own.

    >>> origin(SecateurError)
    ''
    """
    module = sys.modules.get(cls.__module__)
    if cls.__module__.partition(".")[0] == __name__.partition(".")[0]:
        return ""
    file = getattr(module, "__file__", None)
    try:
        text = Path(file).read_text(encoding="utf-8") if file else inspect.getsource(cls)
    except (OSError, TypeError):
        text = None
    place = next((k for k, (_, ran) in _RUN.items() if ran is module), None)
    name = f"{Path(place).name if place else cls.__module__}:{cls.__qualname__}"
    return f"{name} sha256:{hashlib.sha256(text.encode()).hexdigest()[:12]}" if text is not None else name
