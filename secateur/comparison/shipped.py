"""A comparison as the few lines that advice is ordered by.

`python -m secateur.comparison.shipped cnn=out/digits llm=out/aidreams` writes those that come with the library, from folders
that `secateur compare` wrote; before each stands the kind of model it is about.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from secateur.comparison.rows import DENSE, read_about, read_rows
from secateur.comparison.setup import Setup
from secateur.comparison.summary import Line, as_json, metric_of, percent, summary
from secateur.errors import SecateurError
from secateur.taxonomy.axes import AXES, parse_members
from secateur.taxonomy.measured import FILE
from secateur.utils.about import __version__
from secateur.utils.files import atomic_write_text


def condensed(folder: str | Path, models: str = "") -> dict[str, Any]:
    """What advice reads of a comparison: task, cost, quality of the dense model, and a line a method and target.

    >>> secateur.recommend(model="cnn", measured=[condensed("out/digits")])  # doctest: +SKIP

    models: the kinds of model it is about, as members of the taxonomy's axis; none: whatever is asked about. Raises
    `SecateurError` where the folder holds no comparison, or one in which nothing has ended.
    """
    folder = Path(folder).expanduser()
    setup, rows = Setup(**read_about(folder)["setup"]), read_rows(folder)
    lines = summary(setup, rows)
    dense = next((line.quality for line in lines if line.method == DENSE and line.why is None), None)
    shown = [_short(line) for line in lines if line.method != DENSE]
    if dense is None or not shown:
        raise SecateurError("nothing is compared yet", where=str(folder), fix="give `secateur compare` time")
    metric, sign = metric_of(rows)
    return {
        "task": setup.task,
        "models": [kind for kind in AXES["models"] if kind in parse_members("models", models)],
        "cost": setup.cost,
        "steps": setup.steps,
        "metric": metric,
        "sign": sign,
        "percent": percent(metric),
        "dense": dense,
        "command": _command(setup, lines),
        "lines": shown,
    }


def _short(line: Line) -> dict[str, Any]:
    whole = as_json([line])[0]
    names = ("method", "target", "quality", "error", "cost", "rank", "over", "why")
    chance = whole["against"].get("chance")
    return {name: _rounded(whole[name]) for name in names} | {
        "chance": chance and [_rounded(x) for x in chance]
    }


def _rounded(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _command(setup: Setup, lines: Sequence[Line]) -> str:
    targets = dict.fromkeys(line.target for line in lines if line.method != DENSE)
    seeds = max(len(line.seeds) for line in lines)
    words = ["secateur", "compare", setup.task, "--cost", setup.cost, "--targets", ",".join(targets)]
    words += ["--seeds", str(seeds), *(["--steps", str(setup.steps)] if setup.steps else [])]
    words += ["--samples", str(setup.samples), *(["--test", str(setup.test)] if setup.test else [])]
    return shlex.join([*words, "--out", "DIR"])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m secateur.comparison.shipped", description="Write the shipped comparisons."
    )
    parser.add_argument("folders", nargs="+", help="KIND=DIR, such as cnn=out/digits")
    parser.add_argument("--out", default=FILE, type=Path, help="default: the library's own file")
    given = parser.parse_args(argv)
    pairs = [text.partition("=")[::2] for text in given.folders]
    found = [condensed(folder, kind) for kind, folder in pairs]
    lines = ",\n".join(_indented(one) for one in found)
    atomic_write_text(given.out, f'{{"version": {json.dumps(__version__)}, "comparisons": [\n{lines}\n]}}\n')
    return 0


def _indented(comparison: dict[str, Any]) -> str:
    """A comparison as JSON with a line of text for each line."""
    head = json.dumps({key: value for key, value in comparison.items() if key != "lines"})[:-1]
    return head + ', "lines": [\n' + ",\n".join(json.dumps(line) for line in comparison["lines"]) + "\n]}"


if __name__ == "__main__":
    sys.exit(main())
