"""A progress bar with an ETA on stderr; silent where stderr is not a terminal, or when switched off."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

T = TypeVar("T")
_enabled = True
_shown: Progress | None = None


def enable(on: bool = True) -> None:
    """Switches all bars on or off, e.g. for `--quiet` or when JSON goes to a terminal."""
    global _enabled
    _enabled = on


def visible() -> bool:
    """Whether bars are drawn now: enabled, stderr is a terminal, and SECATEUR_PROGRESS is not 0."""
    return _enabled and sys.stderr.isatty() and os.environ.get("SECATEUR_PROGRESS") != "0"


@contextlib.contextmanager
def bar(description: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """A bar as a context; call what it gives with the number of steps done.

    >>> with bar("perplexity", total=8) as advance:
    ...     for _ in range(4):
    ...         advance(2)

    Bars may be nested; they share one display.
    """
    global _shown
    if not visible():
        yield lambda steps: None
        return
    outer = _shown
    progress = outer or Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    with contextlib.nullcontext() if outer else progress:
        _shown = progress
        task = progress.add_task(description, total=total)
        try:
            yield lambda steps: progress.update(task, advance=steps)
        finally:
            progress.remove_task(task)
            _shown = outer


def track(iterable: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """The items of `iterable`, with a bar. `total` is taken from len() where there is one.

    >>> sum(track([1, 2, 3], "adding"))
    6
    """
    if total is None:
        total = len(iterable) if hasattr(iterable, "__len__") else None  # type: ignore[arg-type]
    with bar(description, total) as advance:
        for item in iterable:
            yield item
            advance(1)
