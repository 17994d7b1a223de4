"""A run that takes too long is stopped, so that one method doesn't hold up the others."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from secateur.errors import SecateurError


class OutOfTime(BaseException):
    """Raised inside of a run whose time is up. No `Exception`, so that no search takes it for a candidate that doesn't fit."""


@contextlib.contextmanager
def stopped_after(minutes: float | None) -> Iterator[None]:
    """Raises `OutOfTime` in what runs inside once this process has computed for so many minutes; None: never.

    Processor time counts, so a busy machine stops no run that an idle one wouldn't. Raises `SecateurError` where nothing can be
    stopped: outside of the main thread, and on systems without these timers.
    """
    if minutes is None:
        yield
        return
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        raise SecateurError("runs can't be stopped here", where="minutes", fix="leave it out")

    def stop(number: int, frame: FrameType | None) -> None:
        raise OutOfTime(f"stopped after {minutes:g} processor minutes")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, 60 * minutes)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
