"""What is said after Ctrl-C, and its exit code. Imports nothing: it must be there from the first moment."""

from __future__ import annotations

from collections.abc import Sequence

INTERRUPTED = 130
RESUMED = ("prune", "train-prune", "recover", "train")
"""Verbs and folders of verbs whose runs go on where they were."""


def interrupted(argv: Sequence[str]) -> str:
    """What is true after Ctrl-C, and how to go on."""
    again = "run it again to start from the beginning"
    if argv[:1] and argv[0] in RESUMED and "--no-resume" not in argv:
        again = "run the same command again to continue"
    return f"interrupted; nothing is half written; {again}"
