"""What was measured one after the other, on disk, so that a run that was stopped measures none of it again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from secateur.utils.files import atomic_write_json
from secateur.utils.schema import read_object


class Journal:
    """The results of a fixed order of measurements, each plain JSON.

    >>> journal = Journal(None)
    >>> journal(lambda: {"loss": 2.0})
    {'loss': 2.0}

    A run that is resumed comes by the same measurements again and reads those that are there. file: None keeps nothing.

    Raises `SecateurError` where the file isn't JSON.
    """

    def __init__(self, file: Path | None):
        self.file = file
        known = read_object(file, "remove its folder to start again") if file and file.exists() else {}
        self.results: list[Any] = list(known.get("results", []))
        self.seen = 0

    def __call__(self, measure: Callable[[], Any]) -> Any:
        if self.seen == len(self.results):
            self.results.append(measure())
            if self.file:
                atomic_write_json(self.file, {"results": self.results})
        self.seen += 1
        return self.results[self.seen - 1]
