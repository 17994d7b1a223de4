"""What is said after Ctrl-C, and its exit code. Imports nothing: it must be there from the first moment."""

from __future__ import annotations

from collections.abc import Sequence

INTERRUPTED = 130


def interrupted(argv: Sequence[str]) -> str:
    """What is true after Ctrl-C, and how to go on."""
    again = "run it again to start from the beginning"
    if argv[:1] in (["prune"], ["train-prune"]) and "--no-resume" not in argv:
        again = "run the same command again to continue"
    return f"interrupted; nothing is half written; {again}"
