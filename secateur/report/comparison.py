"""A comparison as tables in a terminal, and as one HTML file without network."""

from __future__ import annotations

import base64
import io
import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from secateur.comparison.details import shown_picture
from secateur.comparison.rows import DENSE, Row
from secateur.comparison.setup import Setup
from secateur.comparison.summary import Line, as_json, mean_ranks, metric_of, percent, summary
from secateur.comparison.works import kind_of
from secateur.method import method_class
from secateur.report.geometry import geometry_data
from secateur.report.html import plotly_script, render
from secateur.report.terminal import table
from secateur.taxonomy.axes import AXES, MEANING
from secateur.utils.files import atomic_write_text
from secateur.utils.screen import counted

COST = {
    "params": "parameters that aren't zero",
    "macs": "multiply-adds",
    "tokens": "visual tokens times layers",
}
AXIS = ("granularity", "when", "criteria")
"""The axes of the taxonomy by which the page filters."""
SURE = 0.05


def print_comparison(
    setup: Setup, rows: Sequence[Row], console: Console, baseline: str | None = None
) -> None:
    """A table for each target, best first; then what was refused or failed, with the reasons."""
    lines = summary(setup, rows, baseline)
    metric = metric_of(rows)[0]
    beside = list(dict.fromkeys(name for line in lines for name in line.against))
    console.print(
        Text(f"{setup.task}: {metric}, at equal {COST[setup.cost]}; {sizes(setup, lines)}", style="bold")
    )
    titles = [f"vs {name}" for name in beside]
    wide = console.width >= 110
    timed = any(not math.isnan(line.speed) for line in lines)
    right = ["rank", metric, "left", *(["speed"] if timed else []), *(["seconds"] if wide else [])]
    right += titles[: None if wide else 1]
    for target in dict.fromkeys(line.target for line in lines):
        mine = [line for line in lines if line.target == target and line.why is None]
        if not mine:
            continue
        made = table("rank", "method", *right[1:], right=right)
        made.columns[1].no_wrap = True
        made.title = None if target == "100%" else f"{target} of the {setup.cost}"
        for line in mine:
            made.add_row(
                str(line.rank or ""),
                line.method + (" *" if line.front else ""),
                quality(line, metric),
                f"{line.cost:.1%}" + (" (over)" if line.over else ""),
                *([number(line.speed, "{:.2f}x")] if timed else []),
                *([number(line.seconds, "{:.1f}")] if wide else []),
                *(gap(line, name, metric) for name in beside[: None if wide else 1]),
            )
        console.print(made)
    if any(line.why is None for line in lines):
        told = "* no other is as good for less. vs: how much better"
        seeds = max(len(line.seeds) for line in lines)
        console.print(
            Text(told + (", with p of a paired t-test over the seeds" if seeds > 1 else ""), style="dim")
        )
    if ranks := mean_ranks(lines):
        best = ", ".join(f"{name} {rank:.1f}" for name, rank, _ in ranks[:5])
        console.print(Text(f"mean rank: {best}"))
    for methods, targets, why in refusals(lines):
        console.print(Text(f"{methods} {targets}: {why}", style="yellow"))


def sizes(setup: Setup, lines: Sequence[Line]) -> str:
    """`3 seeds, judged on 64 at most, ± is two standard errors`"""
    seeds, judged = max(len(line.seeds) for line in lines), setup.test or kind_of(setup.task).usual
    parts = [
        counted(seeds, "seed") if seeds else "no run has figures",
        *([f"judged on {judged} at most"] if judged else []),
    ]
    return ", ".join([*parts, *(["± is two standard errors"] if seeds > 1 else [])])


def refusals(lines: Sequence[Line]) -> list[tuple[str, str, str]]:
    """(methods, targets, why) of what has no figures, once for each reason."""
    found: dict[tuple[str, str], list[str]] = {}
    for line in lines:
        if line.why is not None:
            found.setdefault((line.method, line.why), []).append(line.target)
    alike: dict[tuple[str, str], list[str]] = {}
    for (method, why), targets in found.items():
        alike.setdefault((", ".join(targets), why), []).append(method)
    return [(", ".join(methods), targets, why) for (targets, why), methods in alike.items()]


def quality(line: Line, metric: str) -> str:
    scale, unit = (100, " %") if percent(metric) else (1, "")
    digits = 1 if percent(metric) else 2
    error = "" if math.isnan(line.error) else f" ± {2 * scale * line.error:.{digits}f}"
    return f"{scale * line.quality:.{digits}f}{error}{unit}"


def number(value: float, form: str) -> str:
    return "" if math.isnan(value) else form.format(value)


def gap(line: Line, name: str, metric: str) -> str:
    """How much better than another, and p."""
    if name not in line.against:
        return ""
    mean, p = line.against[name]
    scale = 100 if percent(metric) else 1
    about = "" if math.isnan(p) else " (<0.001)" if p < 0.001 else f" ({p:.2g})"
    return f"{scale * mean:+.1f}{about}"


def write_comparison(
    path: str | Path,
    setup: Setup,
    rows: Sequence[Row],
    baseline: str | None = None,
    out: str = "DIR",
    folder: str | Path | None = None,
) -> None:
    """Write `comparison_html` to a file, whole or not at all.

    >>> write_comparison("out/page.html", found.setup, found.rows)  # doctest: +SKIP
    """
    atomic_write_text(path, comparison_html(setup, rows, baseline, out, folder))


def comparison_html(
    setup: Setup,
    rows: Sequence[Row],
    baseline: str | None = None,
    out: str = "DIR",
    folder: str | Path | None = None,
) -> str:
    """The page of a comparison: a leaderboard that sorts and filters, the Pareto plot, a page for each run, and the six linked views
    where the geometry was gathered.

    baseline: what others are tested against beside chance. out: the folder that the commands name. folder: where the files of
    the geometry lie; None: no views.
    """
    lines = summary(setup, rows, baseline)
    metric, sign = metric_of(rows)
    names: dict[str, int] = {}
    versions: list[dict[str, str]] = []
    runs = [_run(row, names, versions) for row in rows]
    axes = {line.method: _axes(line.method) for line in lines}
    geometry = None if folder is None else geometry_data(folder, rows, lines)
    data = {
        "metric": metric,
        "sign": sign,
        "percent": percent(metric),
        "cost": setup.cost,
        "lines": as_json(lines),
        "runs": runs,
        "names": list(names),
        "versions": versions,
        "axes": axes,
        "commands": {line.method: _command(setup, line.method, rows, out) for line in lines},
        "beside": list(dict.fromkeys(name for line in lines for name in line.against)),
        "geometry": geometry,
        "picture": _picture() if any(row.get("kept") for row in rows) else None,
    }
    states = [row["state"] for row in rows]
    facts = [
        ("task", setup.task, ""),
        ("quality", metric + (" (less is better)" if sign < 0 else ""), ""),
        ("equal", COST[setup.cost], ""),
        ("methods", str(len({line.method for line in lines} - {DENSE})), ""),
        ("seeds", str(max(len(line.seeds) for line in lines)), ""),
        ("runs", str(len(rows)), ""),
        ("refused or failed", str(len(rows) - states.count("done")), ""),
    ]
    filters = [
        (
            axis,
            [
                (m, MEANING.get(m, m))
                for m in AXES[axis]
                if any(m in own.get(axis, ()) for own in axes.values())
            ],
        )
        for axis in AXIS
    ]
    return render(
        "comparison.html",
        title=f"{setup.task}: methods compared",
        setup=setup,
        facts_lines=facts,
        filters=filters,
        targets=list(dict.fromkeys(line.target for line in lines)),
        ranks=[(name, f"{rank:.2f}", str(count)) for name, rank, count in mean_ranks(lines)],
        refused=refusals(lines),
        settings=[(name, str(value)) for name, value in setup.as_json().items()],
        data=data,
        geometry=geometry,
        plotly=plotly_script(),
    )


def _axes(method: str) -> dict[str, list[str]]:
    if method == DENSE:
        return {}
    info = method_class(method).info
    return {axis: sorted(info.members(axis)) for axis in AXIS}


def _run(row: Row, names: dict[str, int], versions: list[dict[str, str]]) -> dict[str, Any]:
    """A row as the page needs it: layers' names and versions are numbers of lists that all runs share."""
    own = {key: row[key] for key in ("method", "target", "seed", "state", "why", "quality", "seconds", "notes", "parts", "kept", "map", "scores", "speed", "forward_seconds", "quartiles", "peak_memory_bytes", "params", "macs", "tokens", "target_given", "cpu_seconds", "not_measured") if row.get(key) is not None}  # fmt: skip
    own["layers"] = [[names.setdefault(n, len(names)), kept, size] for n, kept, size in row.get("layers", ())]
    if found := row.get("versions"):
        if found not in versions:
            versions.append(found)
        own["versions"] = versions.index(found)
    return own


def _command(setup: Setup, method: str, rows: Sequence[Row], out: str) -> str:
    """What repeats the rows of a method."""
    targets = list(dict.fromkeys(row["target"] for row in rows if row["target"] != "100%"))
    seeds = 1 + max(row["seed"] for row in rows)
    words = ["secateur", "compare", setup.task, "--methods", "random" if method == DENSE else method]
    words += ["--targets", ",".join(targets), "--seeds", str(seeds)]
    for name, field in Setup.__dataclass_fields__.items():
        value = getattr(setup, name)
        if name in ("task", "latency") or value == field.default:
            continue
        flag = "--" + name.replace("_", "-")
        words += [flag] if value is True else [flag, str(value)]
    words += [] if setup.latency else ["--no-latency"]
    return shlex.join([*words, "--out", f"{out}-again"])


def _picture() -> str:
    """The shown picture as a PNG in base64."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(shown_picture().permute(1, 2, 0).numpy()).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()
