"""What methods reached on the same work at the same cost: it orders advice, and its figures are the reason.

`measured.json` holds the lines of the comparisons that come with the library; `python -m secateur.comparison.shipped` writes it.
"""

from __future__ import annotations

import functools
import json
import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

FILE = Path(__file__).with_suffix(".json")
COST = {"params": "parameters", "macs": "multiply-adds", "tokens": "visual tokens times layers"}
HALF = 50
"""At a high ratio only targets up to this percentage count."""
LARGE = 1000
"""From here on digits behind the point say nothing."""
Comparison = Mapping[str, Any]


class Standing(NamedTuple):
    """A method's place among what was compared, above 0 and up to 1 for the last (NaN: not measured), and the figures as text."""

    place: float
    text: str


@functools.cache
def shipped() -> list[dict[str, Any]]:
    """The comparisons that come with the library, each as `secateur.comparison.shipped.condensed` gives it.

    >>> sorted(shipped()[0])[:4]
    ['command', 'cost', 'dense', 'lines']
    """
    return json.loads(FILE.read_text(encoding="utf-8"))["comparisons"]


def fitting(
    comparisons: Sequence[Comparison], models: Collection[str], dense: bool, train: bool
) -> list[Comparison]:
    """Those on the kinds of model that are asked for; of several on one kind those that are most like the situation.

    dense: only what leaves smaller dense matrices counts, so multiply-adds say more than parameters that are zero. train: there
    is training after the cut. A comparison that says nothing of its kind of model is a user's own, and fits.
    """
    by_kind: dict[tuple[str, ...], list[Comparison]] = {}
    for comparison in comparisons:
        kinds = tuple(comparison["models"])
        if not kinds or not models or set(kinds) & set(models):
            by_kind.setdefault(kinds, []).append(comparison)

    def like(comparison: Comparison) -> tuple[bool, bool]:
        return (comparison["steps"] > 0) == train, (comparison["cost"] != "params") == dense

    return [one for alike in by_kind.values() for one in alike if like(one) == max(map(like, alike))]


def standings(comparisons: Sequence[Comparison], high_ratio: bool = False) -> dict[str, Standing]:
    """Where each method stands in these comparisons: its mean rank over the number of methods, in the mean over comparisons.

    high_ratio: only targets of half the cost or less count, where a comparison has any.
    """
    found: dict[str, list[Standing]] = {}
    for comparison in comparisons:
        for method, standing in _standings(comparison, high_ratio).items():
            found.setdefault(method, []).append(standing)
    together = {}
    for method, some in found.items():
        with_figures = [one for one in some if not math.isnan(one.place)]
        place = statistics.mean(one.place for one in with_figures) if with_figures else math.nan
        together[method] = Standing(place, "; ".join(one.text for one in with_figures or some))
    return together


def _standings(comparison: Comparison, high_ratio: bool) -> dict[str, Standing]:
    targets = list(dict.fromkeys(line["target"] for line in comparison["lines"]))
    hard = [target for target in targets if float(target.rstrip("%")) <= HALF]
    counted = hard if high_ratio and hard else targets
    by_method: dict[str, list[Mapping[str, Any]]] = {}
    for line in comparison["lines"]:
        if line["target"] in counted:
            by_method.setdefault(line["method"], []).append(line)
    most = max((line["rank"] for lines in by_method.values() for line in lines if line["rank"]), default=1)
    found = {}
    for method, lines in by_method.items():
        ranked = [line for line in lines if line["rank"] is not None]
        if not ranked:
            found[method] = Standing(
                math.nan, f"no figures: on {comparison['task']} it was {lines[0]['why']}"
            )
            continue
        rank = statistics.mean(line["rank"] for line in ranked)
        without = [line["target"] for line in lines if line["rank"] is None]
        text = f"mean rank {rank:.1f} of {most} on {comparison['task']}{_sizes(comparison)} at equal"
        text += f" {COST[comparison['cost']]}"
        text += f", trained on for {comparison['steps']} steps" if comparison["steps"] else ""
        text += f": {comparison['metric']} {', '.join(_figures(comparison, line) for line in ranked)}; dense"
        text += f" {_number(comparison, comparison['dense'])}"
        text += f"; no figures at {', '.join(without)}" if without else ""
        found[method] = Standing(rank / most, text)
    return found


def _sizes(comparison: Comparison) -> str:
    """` (3 seeds, judged on 64)`, of what is known"""
    seeds, test = comparison.get("seeds"), comparison.get("test")
    parts = [f"{seeds} seed{'s' * (seeds > 1)}"] if seeds else []
    parts += [f"judged on {test}"] if test else []
    return f" ({', '.join(parts)})" if parts else ""


def _figures(comparison: Comparison, line: Mapping[str, Any]) -> str:
    """`98.6 ± 0.1 % at 60% (58.8% left, +71.1 against chance)`; ± is two standard errors."""
    error = None if line["error"] is None else 2 * line["error"]
    beside = [f"{line['cost']:.1%} left{', more than asked' if line['over'] else ''}"]
    if line["chance"] is not None:
        beside.append(f"{_scaled(comparison, line['chance'][0], '+')} against chance")
    return f"{_number(comparison, line['quality'], error)} at {line['target']} ({', '.join(beside)})"


def _number(comparison: Comparison, value: float, error: float | None = None) -> str:
    about = "" if error is None else f" ± {_scaled(comparison, error)}"
    return f"{_scaled(comparison, value)}{about}" + (" %" if comparison["percent"] else "")


def _scaled(comparison: Comparison, value: float, sign: str = "") -> str:
    if comparison["percent"]:
        return f"{100 * value:{sign}.1f}"
    return f"{value:{sign}.2f}" if abs(value) < LARGE else f"{value:{sign}.0f}"
