"""When is what is left broken? One rule for every kind of quality."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

LOST = 0.25
"""An accuracy has collapsed where more than this share of what stood above chance is gone."""
TIMES = 2.0
"""A perplexity has collapsed where it is more than so many times what it was."""
DECIBELS = 3.0
"""A PSNR has collapsed where it fell by more than this, which is twice the squared error."""


@dataclass(frozen=True)
class Collapse:
    """One figure that broke: its kind (perplexity, psnr or accuracy), its task and metric, both values, and by which rule.

    `after` is None where it is no longer finite.
    """

    kind: str
    task: str
    metric: str
    before: float
    after: float | None
    why: str


def collapses(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Collapse]:
    """What broke between two measurements of `measure`, in the order of the figures; empty where nothing did.

    >>> before = {"accuracy": {"digits": {"acc": 0.95}}, "chance": {"digits": 0.1}}
    >>> [found] = collapses(before, {"accuracy": {"digits": {"acc": 0.225}}})
    >>> found.why
    '85 % of what stood above chance (10.0 %) is gone'

    Perplexity: more than twice what it was, or no longer finite. PSNR: more than 3 dB lower. Accuracy and mIoU: more than a
    quarter of what stood above chance is gone, and where the number of questions is known also more than two standard
    errors of the difference. Where chance isn't known it counts as 0.
    """
    found = []
    for kind, broke in (("perplexity", _worse), ("psnr", _quieter)):
        for task, was in (before.get(kind) or {}).items():
            now = (after.get(kind) or {}).get(task, was)
            if _finite(was) and (why := broke(was, now) if _finite(now) else "it is no longer finite"):
                found.append(Collapse(kind, task, "", was, now if _finite(now) else None, why))
    for task, metrics in (before.get("accuracy") or {}).items():
        later = (after.get("accuracy") or {}).get(task) or {}
        for metric, was in metrics.items():
            now = later.get(metric, was)
            chance = 0.0 if metric == "miou" else (before.get("chance") or {}).get(task, 0.0)
            if not _finite(was) or was <= chance:
                continue
            if not _finite(now):
                found.append(Collapse("accuracy", task, metric, was, None, "it is no longer finite"))
            elif was - now > max(
                LOST * (was - chance), 2 * _error(was, now, (before.get("questions") or {}).get(task))
            ):
                gone = min(1.0, (was - now) / (was - chance))
                what = f"what stood above chance ({100 * chance:.1f} %)" if chance else "it"
                found.append(
                    Collapse("accuracy", task, metric, was, now, f"{100 * gone:.0f} % of {what} is gone")
                )
    return found


def _worse(was: float, now: float) -> str:
    return f"{now / was:,.3g} times what it was" if now > TIMES * was else ""


def _quieter(was: float, now: float) -> str:
    return f"{was - now:.1f} dB lower" if was - now > DECIBELS else ""


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _error(first: float, second: float, count: int | None) -> float:
    """The standard error of the difference of two shares of `count` questions; 0 where the count isn't known."""
    return math.sqrt((first * (1 - first) + second * (1 - second)) / count) if count else 0.0
