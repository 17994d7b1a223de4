"""The line of the model's code that is running: what reasons and recorded sizes point to."""

from __future__ import annotations

import functools
import linecache
import sys

SKIP = ("/torch/", "/secateur/graph/", "/contextlib.py")


@functools.cache
def passed_over(name: str) -> bool:
    """Is this file no part of the model's code?"""
    return any(part in name for part in SKIP)


def source_place() -> tuple[str, int]:
    """File and line of the model's code that is running."""
    frame = last = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if not passed_over(name):
            return name, frame.f_lineno
        last, frame = frame, frame.f_back  # type: ignore[assignment]
    return last.f_code.co_filename, last.f_lineno


def source_line() -> str:
    """The line of the model's code that is running: `file.py:12: code`."""
    return line(*source_place())


def line(name: str, number: int) -> str:
    """`file.py:12: code`."""
    if passed_over(name):
        return f"{name}:{number}"
    return f"{name.rsplit('/', 1)[-1]}:{number}: {linecache.getline(name, number).strip()[:100]}"
