"""What the shipped comparisons say, as tables: docs/leaderboard.md, written from `secateur/taxonomy/measured.json`.

python benchmarks/leaderboard.py             # writes docs/leaderboard.md
python benchmarks/leaderboard.py --check     # only says whether it is as it would be written
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from secateur.taxonomy.measured import COST, shipped
from secateur.utils.files import atomic_write_text

PAGE = Path(__file__).parents[1] / "docs" / "leaderboard.md"
FIRST = """
# Leaderboards

<!-- written by `python benchmarks/leaderboard.py` from secateur/taxonomy/measured.json -->

The comparisons that come with the library and order what `secateur recommend` says. Within a target all methods have the same
budget; the command above each table makes its rows. ± is two standard errors over the seeds, which says nothing of how few
samples are judged. What is left stands behind a figure where it is more than was asked for, or less by five points: methods that
remove blocks have few to choose from. What surprised stands in [compare.md](compare.md#what-surprised).
""".strip()
FEW = 0.05
"""Budget that is left over and goes without saying."""
Comparison = Mapping[str, Any]


def page(comparisons: list[dict[str, Any]]) -> str:
    return "\n\n".join([FIRST, *(section(one) for one in comparisons)]) + "\n"


def section(one: Comparison) -> str:
    """A heading, the command, what is judged, and a table: best mean rank first, then what has no figures and why."""
    targets = list(dict.fromkeys(line["target"] for line in one["lines"]))
    found: dict[str, dict[str, Mapping[str, Any]]] = {}
    for line in one["lines"]:
        found.setdefault(line["method"], {})[line["target"]] = line
    ranked = {
        method: [line["rank"] for line in lines.values() if line["rank"]] for method, lines in found.items()
    }
    order = sorted(
        (method for method in found if ranked[method]), key=lambda method: statistics.mean(ranked[method])
    )
    trained = f", trained on for {one['steps']} steps" if one["steps"] else ""
    head = [
        f"## {one['task']}, equal {COST[one['cost']]}{trained}",
        f"```sh\n{one['command']}\n```",
        f"{one['metric'].capitalize()}{' (less is better)' if one['sign'] < 0 else ''}, {sizes(one)}; dense {number(one, one['dense'])}.",
    ]
    rows = [["method", "mean rank", *targets], ["---", "---:", *["---:"] * len(targets)]]
    for method in order:
        cells = [cell(one, found[method].get(target)) for target in targets]
        rows.append([f"`{method}`", f"{statistics.mean(ranked[method]):.1f}", *cells])
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return "\n\n".join([*head, table, *without(found)])


def without(found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[str]:
    """A line for each reason why there are no figures, with the methods that have it."""
    reasons: dict[str, dict[str, list[str]]] = {}
    for method, lines in found.items():
        for target, line in lines.items():
            if line["why"] is not None:
                reasons.setdefault(line["why"], {}).setdefault(method, []).append(target)
    said = []
    for why, methods in reasons.items():
        names = ", ".join(
            f"`{method}`" + ("" if len(targets) == len(found[method]) else f" at {', '.join(targets)}")
            for method, targets in methods.items()
        )
        said.append(f"- {names}: {why}")
    return ["Without figures:\n\n" + "\n".join(said)] if said else []


def cell(one: Comparison, line: Mapping[str, Any] | None) -> str:
    if line is None or line["rank"] is None:
        return ""
    error = None if line["error"] is None else 2 * line["error"]
    spare = float(line["target"].rstrip("%")) / 100 - line["cost"]
    left = f" ({line['cost']:.1%} left)" if line["over"] or spare > FEW else ""
    return number(one, line["quality"], error) + left


def sizes(one: Comparison) -> str:
    judged = f"judged on {one['test']}" if one["test"] else "judged on all test data"
    return f"{one['seeds']} seed{'s' * (one['seeds'] > 1)}, {judged}"


def number(one: Comparison, value: float, error: float | None = None) -> str:
    scale, digits = (100, 1) if one["percent"] else (1, 2 if value < 1000 else 0)
    about = "" if error is None else f" ± {scale * error:.{digits}f}"
    return f"{scale * value:,.{digits}f}{about}{' %' if one['percent'] else ''}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    given = parser.parse_args(argv)
    text = page(shipped())
    if given.check:
        return int(PAGE.read_text(encoding="utf-8") != text)
    atomic_write_text(PAGE, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
