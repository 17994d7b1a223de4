"""A comparison as the few lines that advice is ordered by.

`python -m secateur.comparison.shipped cnn=out/digits llm=out/aidreams` puts folders that `secateur compare` wrote among those that
come with the library; before each stands the kind of model it is about. One of the same task, cost and steps takes the place of
the old one, and the others stay, so no folder need be kept. `--drop TASK` takes a task out.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from secateur.comparison.rows import DENSE, read_about, read_rows
from secateur.comparison.run import chosen_methods
from secateur.comparison.setup import Setup
from secateur.comparison.summary import Line, as_json, metric_of, percent, summary
from secateur.comparison.work import by_chance
from secateur.comparison.works import kind_of
from secateur.errors import SecateurError, choose, require
from secateur.method import method_class
from secateur.taxonomy.axes import AXES, parse_members
from secateur.taxonomy.measured import FILE
from secateur.utils.about import __version__
from secateur.utils.files import atomic_write_text
from secateur.utils.schema import read_object


def condensed(folder: str | Path, models: str = "") -> dict[str, Any]:
    """What advice reads of a comparison: task, cost, quality of the dense model, and a line a method and target.

    >>> secateur.recommend(model="cnn", measured=[condensed("out/digits")])  # doctest: +SKIP

    models: the kinds of model it is about, as members of the taxonomy's axis; none: whatever is asked about. Raises
    `SecateurError` where the folder holds no comparison, or one in which nothing has ended.
    """
    folder = Path(folder).expanduser()
    setup, rows = Setup.read(read_about(folder)["setup"], str(folder)), read_rows(folder)
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
        "seeds": max(len(line.seeds) for line in lines),
        "test": setup.test or kind_of(setup.task).usual,
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
    """What makes the comparison again; it names the methods where they aren't all that fit."""
    targets = dict.fromkeys(line.target for line in lines if line.method != DENSE)
    methods = {line.method for line in lines if line.method != DENSE}
    seeds = max(len(line.seeds) for line in lines)
    words = ["secateur", "compare", setup.task, "--cost", setup.cost]
    if set(chosen_methods(setup, "all")) - methods:
        words += ["--methods", ",".join(sorted(m for m in methods if not by_chance(method_class(m))))]
    words += ["--targets", ",".join(targets), "--seeds", str(seeds)]
    words += [*(["--steps", str(setup.steps)] if setup.steps else []), "--samples", str(setup.samples)]
    for name in ("train", "test", "minutes"):
        if (value := getattr(setup, name)) is not None:
            words += [f"--{name}", f"{value:g}"]
    return shlex.join([*words, "--out", "DIR"])


def merged(
    old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]], drop: Sequence[str] = ()
) -> list[Mapping[str, Any]]:
    """The old comparisons, each replaced by a new one of the same task, cost and steps, and the other new ones behind them.

    >>> one = {"task": "digits", "cost": "macs", "steps": 0}
    >>> [c["task"] for c in merged([one, one | {"task": "text"}], [one | {"task": "sst2"}], drop=["text"])]
    ['digits', 'sst2']

    drop: tasks of which the old ones go. Raises `SecateurError` where nothing is of a task to drop, or two of the new ones
    are of one task, cost and steps.
    """
    fresh = {_about(one): one for one in new}
    require(
        len(fresh) == len(new), "two are of one task, cost and steps", where="shipped", fix="give one of them"
    )
    for task in drop:
        choose(task, [one["task"] for one in old], error=f"nothing is of {task!r}", where="--drop")
    kept = [fresh.pop(_about(one), one) for one in old if one["task"] not in drop]
    return [*kept, *fresh.values()]


def _about(comparison: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(comparison[name] for name in ("task", "cost", "steps"))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m secateur.comparison.shipped", description="Put comparisons among the shipped ones."
    )
    parser.add_argument("folders", nargs="*", help="KIND=DIR, such as cnn=out/digits")
    parser.add_argument(
        "--drop", nargs="*", default=[], metavar="TASK", help="tasks of which the old ones go"
    )
    parser.add_argument("--out", default=FILE, type=Path, help="default: the library's own file")
    given = parser.parse_args(argv)
    try:
        old = read_object(given.out, fix="restore it")["comparisons"] if given.out.exists() else []
        found = merged(
            old, [condensed(folder, kind) for kind, folder in map(_pair, given.folders)], given.drop
        )
    except SecateurError as error:
        print(f"secateur: {error}", file=sys.stderr)
        return 2
    lines = ",\n".join(_indented(one) for one in found)
    atomic_write_text(given.out, f'{{"version": {json.dumps(__version__)}, "comparisons": [\n{lines}\n]}}\n')
    return 0


def _pair(text: str) -> tuple[str, str]:
    kind, between, folder = text.partition("=")
    require(
        bool(between and folder),
        "it names no kind of model",
        where=text,
        fix="KIND=DIR, such as cnn=out/digits",
    )
    return kind, folder


def _indented(comparison: Mapping[str, Any]) -> str:
    """A comparison as JSON with a line of text for each line."""
    head = json.dumps({key: value for key, value in comparison.items() if key != "lines"})[:-1]
    return head + ', "lines": [\n' + ",\n".join(json.dumps(line) for line in comparison["lines"]) + "\n]}"


if __name__ == "__main__":
    sys.exit(main())
