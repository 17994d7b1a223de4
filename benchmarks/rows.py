"""What benches share: rows that are printed and kept as they come, and means with their errors."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def keep(rows: list[dict[str, Any]], row: dict[str, Any], file: Path | None) -> None:
    """Adds a row, prints it, and writes all of them to `file`, so that a stopped bench leaves what it has."""
    rows.append(row)
    print(json.dumps(row), flush=True)
    if file:
        file.write_text(json.dumps(rows, indent=1))


def spread(values: Sequence[float]) -> tuple[float, float]:
    """(the mean, two standard errors of it; not a number for a single value)."""
    error = 2 * statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return statistics.mean(values), error
