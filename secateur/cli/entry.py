"""Where the process starts: Ctrl-C is one line from the first moment, also while libraries are imported."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from types import FrameType

from secateur.cli.interrupt import INTERRUPTED, interrupted
from secateur.errors import SecateurWarning

AGAIN = 2.0
"""Seconds after which an interrupt that somebody swallowed is raised again."""
_format = warnings.formatwarning
_seen: list[int] = []


def _on_signal(number: int, frame: FrameType | None) -> None:
    _seen.append(number)
    if len(_seen) > 2:  # somebody swallows the exception; nothing of ours is half written
        os.write(2, f"secateur: {interrupted(sys.argv[1:])}\n".encode())
        os._exit(INTERRUPTED)
    _ring(AGAIN)  # an exception that is raised inside a destructor or a callback of C is lost
    raise KeyboardInterrupt


def _ring(seconds: float) -> None:
    """Call the handler again after this many seconds; 0: not any more."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, seconds)


def _line(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """A warning of ours is one line, as an error is."""
    if issubclass(category, SecateurWarning):
        return f"secateur: {message}\n"
    return _format(message, category, filename, lineno, line)


def main() -> int:
    """Run the command line of this process; gives its exit code."""
    warnings.formatwarning = _line
    # a shell starts background jobs with the signal ignored: leave it so
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, _on_signal)
        if hasattr(signal, "SIGALRM"):
            signal.signal(signal.SIGALRM, _on_signal)
    try:
        from secateur.cli.main import main as run

        code = run()
    except BaseException:
        # an import that was interrupted may fail with an error of its own
        if not _seen:
            raise
        _ring(0)
        print(f"secateur: {interrupted(sys.argv[1:])}", file=sys.stderr)
        code = INTERRUPTED
    if _seen:
        _ring(0)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # no traceback while the interpreter closes
    return code
