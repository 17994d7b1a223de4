"""What the rows of a comparison say: means and errors, ranks, the Pareto front, and tests against chance and a baseline."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from scipy import stats

from secateur.comparison.rows import DENSE, Row
from secateur.comparison.setup import Setup
from secateur.comparison.work import baseline_of, by_chance, removes_units
from secateur.errors import SecateurError
from secateur.method import method_class


@dataclass
class Line:
    """A method at a target, over its seeds. Shares of the dense model's cost, seconds, and the quality's own unit."""

    method: str
    target: str
    seeds: list[int] = field(default_factory=list)
    quality: float = math.nan
    error: float = math.nan
    """Standard error of the mean over the seeds; NaN for one."""
    cost: float = math.nan
    shares: dict[str, float] = field(default_factory=dict)
    seconds: float = math.nan
    speed: float = math.nan
    memory: float = math.nan
    rank: int | None = None
    front: bool = False
    over: bool = False
    """More is left than was asked for."""
    against: dict[str, tuple[float, float]] = field(default_factory=dict)
    """"chance" (of the same kind: weights or units) or the baseline -> (how much better this one is, mean over the seeds that both
    have; p of a paired t-test, NaN without one)."""
    why: str | None = None
    """Why there are no figures."""


def summary(setup: Setup, rows: Sequence[Row], baseline: str | None = None) -> list[Line]:
    """A line a method and target: best first within each target; the dense model first, what was refused last.

    >>> lines = summary(found.setup, found.rows)  # doctest: +SKIP
    >>> [(line.method, line.quality, line.against["random"]) for line in lines]  # doctest: +SKIP

    Raises `SecateurError` for a baseline without rows.
    """
    sign = metric_of(rows)[1]
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["method"], row["target"]), []).append(row)
    names = list(dict.fromkeys(row["method"] for row in rows))
    if baseline is not None and baseline not in names:
        raise SecateurError(f"{baseline!r} has no rows", where="baseline", fix=f"one of {', '.join(names)}")
    controls = [name for name in names if name != DENSE and by_chance(method_class(name))]
    own = baseline or baseline_of(setup)
    lines = []
    for (method, target), mine in groups.items():
        line = _line(setup, method, target, mine)
        beside = {"chance": chance_for(method, controls), own: own} if method != DENSE else {}
        for what, other in beside.items():
            if other is not None and other != method and (other, target) in groups:
                gap = paired(mine, groups[other, target], sign)
                line.against |= {what: gap} if math.isfinite(gap[0]) else {}
        lines.append(line)
    for target in {line.target for line in lines} - {"100%"}:
        ranked = sorted(
            (line for line in lines if line.target == target and line.why is None),
            key=lambda line: -sign * line.quality,
        )
        for number, line in enumerate(ranked, 1):
            line.rank = number
    for line in front([line for line in lines if line.why is None], sign):
        line.front = True
    order = {
        target: n for n, target in enumerate(sorted({r["target"] for r in rows}, key=_share, reverse=True))
    }
    return sorted(lines, key=lambda line: (order[line.target], line.rank or len(lines) + 1, line.method))


def chance_for(method: str, controls: Sequence[str]) -> str | None:
    """The random control that removes what the method removes: weights or units."""
    units = removes_units(method_class(method))
    alike = [name for name in controls if removes_units(method_class(name)) == units]
    return next(iter(alike), None)


def metric_of(rows: Sequence[Row]) -> tuple[str, int]:
    """(what quality is, -1 where less is better, else 1)."""
    return next(((row["metric"], row["sign"]) for row in rows if row["state"] == "done"), ("quality", 1))


def percent(metric: str) -> bool:
    """Whether a quality of 0..1 is shown as a percentage."""
    return metric not in ("perplexity", "psnr", "PSNR", "dB")


def _share(target: str) -> float:
    return float(target.rstrip("%"))


def _line(setup: Setup, method: str, target: str, rows: Sequence[Row]) -> Line:
    done = [row for row in rows if row["state"] == "done"]
    line = Line(method, target, sorted(row["seed"] for row in done))
    if not done:
        line.why = f"{rows[0]['state']}: {rows[0].get('why', '')}"
        return line
    values = [row["quality"] for row in done]
    line.quality = statistics.mean(values)
    line.error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else math.nan
    line.shares = {name: _mean(done, name) for name in ("params", "macs", "tokens") if name in done[0]}
    line.cost = line.shares.get(setup.cost, math.nan)
    line.over = method != DENSE and line.cost > _share(target) / 100 + 0.005
    line.seconds, line.memory = _mean(done, "seconds"), _mean(done, "peak_memory_bytes")
    speeds = [row["speed"]["ratio"] for row in done if row.get("speed")]
    line.speed = statistics.mean(speeds) if speeds else math.nan
    return line


def _mean(rows: Sequence[Row], name: str) -> float:
    found = [row[name] for row in rows if row.get(name) is not None]
    return statistics.mean(found) if found else math.nan


def paired(rows: Sequence[Row], others: Sequence[Row], sign: int = 1) -> tuple[float, float]:
    """(how much better the first are, in the mean over the seeds of both; p of a two-sided paired t-test).

    >>> a = [{"seed": s, "state": "done", "quality": q} for s, q in enumerate([0.9, 0.8, 0.7])]
    >>> b = [{"seed": s, "state": "done", "quality": q} for s, q in enumerate([0.8, 0.75, 0.6])]
    >>> [round(x, 4) for x in paired(a, b)]
    [0.0833, 0.0377]

    p is NaN for fewer than two pairs, and for differences that are all the same.
    """
    theirs = {row["seed"]: row["quality"] for row in others if row["state"] == "done"}
    gaps = [
        sign * (row["quality"] - theirs[row["seed"]])
        for row in rows
        if row["state"] == "done" and row["seed"] in theirs
    ]
    if not gaps:
        return math.nan, math.nan
    mean = statistics.mean(gaps)
    if len(gaps) < 2 or max(gaps) - min(gaps) < 1e-12:
        return mean, math.nan
    return mean, float(stats.ttest_1samp(gaps, 0.0).pvalue)


def front(lines: Sequence[Line], sign: int = 1) -> list[Line]:
    """Those that no other beats: none is as good at less cost, or better at the same."""

    def beaten(line: Line) -> bool:
        good = sign * line.quality
        return any(
            other.cost <= line.cost
            and sign * other.quality >= good
            and (other.cost < line.cost or sign * other.quality > good)
            for other in lines
        )

    return [line for line in lines if not math.isnan(line.cost) and not beaten(line)]


def mean_ranks(lines: Sequence[Line]) -> list[tuple[str, float, int]]:
    """(method, mean of its ranks, over how many targets), best first."""
    found: dict[str, list[int]] = {}
    for line in lines:
        if line.rank is not None:
            found.setdefault(line.method, []).append(line.rank)
    rows = [(method, statistics.mean(ranks), len(ranks)) for method, ranks in found.items()]
    return sorted(rows, key=lambda row: row[1])


def as_json(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """The lines as JSON can hold them: None where there is no number."""

    def plain(value: Any) -> Any:
        if isinstance(value, float):
            return value if math.isfinite(value) else None
        if isinstance(value, Mapping):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, list | tuple) else value

    return [{key: plain(value) for key, value in vars(line).items()} for line in lines]
