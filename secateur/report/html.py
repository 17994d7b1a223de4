"""One self-contained HTML file: a run's report. No network, no other files."""

from __future__ import annotations

import base64
import functools
import gzip
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from secateur.pruning.plan import Plan
from secateur.pruning.report import command_line
from secateur.report.figures import (
    Figure,
    cost_figure,
    kept_figures,
    kind_name,
    quality_figures,
    score_figures,
    speed_figure,
    speed_text,
    strip_figures,
)
from secateur.report.summary import alarms, in_seconds, left, lost, notes, parted, rows
from secateur.report.terminal import kept_by_kind, merge_alike
from secateur.utils.about import library_versions
from secateur.utils.files import atomic_write_text


def write_report(path: str | Path, report: Mapping[str, Any], plan: Plan | None = None) -> None:
    """Write `report_html` to a file, whole or not at all.

    >>> write_report("report.html", pruned.report, pruned.plan)  # doctest: +SKIP
    """
    atomic_write_text(path, report_html(report, plan))


def report_html(report: Mapping[str, Any], plan: Plan | None = None) -> str:
    """The report of one run. `plan` adds the picture of which units or weights left."""
    figures: list[Figure] = []
    model = str(report.get("model") or "model")
    versions = report.get("versions") or library_versions()
    settings = {**(report.get("hyperparameters") or {})}
    settings |= {name: value for name, value in (report.get("options") or {}).items() if value is not None}
    return render(
        "report.html",
        title=f"{model}: {report.get('method')} {report.get('target')}",
        model=model,
        head=_head(report),
        alarms=alarms(report),
        remarks=notes(report),
        figures_lines=[
            row.texts
            for row in rows(report.get("before") or {}, report.get("after") or {}, report.get("speed"))
        ],
        kept_lines=_kept_lines(report),
        sections=[section for section in _sections(report, plan, figures) if section["plots"]],
        frozen_lines=_frozen_lines(report),
        command=command_line(report),
        settings=[(name, json.dumps(value)) for name, value in settings.items()],
        versions=[(name, str(value)) for name, value in versions.items()],
        figures=figures,
        plotly=plotly_script(),
    )


@functools.cache
def _environment() -> Environment:
    made = Environment(
        loader=PackageLoader("secateur.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    made.filters |= {"parted": parted, "as_json": as_json, "breakable": breakable}
    return made


def render(template: str, **values: Any) -> str:
    """A page from a template of `report/templates`; every value is escaped."""
    return _environment().get_template(template).render(**values)


def breakable(name: str) -> Markup:
    """A dotted name that may go on in the next line behind a dot, a colon or an underscore."""
    return Markup(re.sub(r"([.:_])(?=\w)", r"\1<wbr>", str(escape(name))))


def as_json(value: Any) -> Markup:
    """JSON that can stand inside a script element: no `<` can end it."""
    return Markup(json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"))


@functools.cache
def plotly_script() -> str:
    from plotly.offline import get_plotlyjs

    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), mtime=0)).decode()


def _sections(report: Mapping[str, Any], plan: Plan | None, figures: list[Figure]) -> list[dict[str, Any]]:
    """The sections that hold plots; the plots join `figures`."""
    made = [
        _section("After, as a share of before", [cost_figure(report)], figures),
        _section(
            "Quality",
            quality_figures(report),
            figures,
            "Lower perplexity is better, higher accuracy and PSNR are better.",
        ),
        _section("Speed: predicted and measured", [speed_figure(report)], figures, speed_text(report)),
        _section("What each layer keeps", kept_figures(report), figures),
    ]
    if plan is not None:
        text = "One row a layer, one column a unit, in the model's own order: the coloured ones stay."
        if plan.masks:
            text = (
                "One row a layer, columns are the inputs of the matrix: how many of an input's weights stay."
            )
        strips = strip_figures(plan)
        made.append(_section("Which were cut", strips, figures, text, bool(plan.masks) and len(strips) > 2))
    return [*made, _section("Scores", score_figures(report, plan), figures, "Higher scores stay.")]


def _section(
    title: str, drawn: Sequence[Figure | None], figures: list[Figure], text: str = "", choose: bool = False
) -> dict[str, Any]:
    """choose: a menu shows one plot at a time."""
    plots = []
    for item in filter(None, drawn):
        item["id"] = f"plot{len(figures)}"
        figures.append(item)
        plots.append(
            {"id": item["id"], "title": item.pop("title", None) or "", "height": item["layout"]["height"]}
        )
    return {"title": title, "text": text, "choose": choose, "plots": plots}


def _head(report: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(name, value, look) of the facts on top."""
    facts = [("method", report.get("method"), ""), ("target", report.get("target"), "")]
    if report.get("source"):
        facts.insert(1, ("method from", report["source"], ""))
    if report.get("met") is not None:
        facts.append(("target met", *(("yes", " good") if report["met"] else ("no", " bad"))))
    if report.get("unreached"):
        facts.append(("warning", lost(report["unreached"]), " bad"))
    if shares := left(report):
        facts.append(("left", shares.removeprefix("left: "), ""))
    facts.append(("seed", report.get("seed"), ""))
    if report.get("seconds") is not None:
        facts.append(("time", in_seconds(report["seconds"]), ""))
    return [(name, str(value), look) for name, value, look in facts]


def _kept_lines(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    return [
        (
            kind_name(kind),
            f"{groups}",
            f"{size:,}",
            f"{stay:,}",
            f"{stay / size * 100:.1f} %" if size else "–",
        )
        for kind, groups, size, stay in kept_by_kind(report)
    ]


def _frozen_lines(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """(group, kind, units, reason) of what was not cut, groups that differ in numbers only in one line."""
    groups = [{**group, "params": None, "macs": None} for group in report.get("groups") or []]
    lines = []
    for row in merge_alike([group for group in groups if group.get("reason")]):
        units = f"{row['count']} × {row['size']:,}" if row["count"] > 1 else f"{row['size']:,}"
        lines.append((row["name"], kind_name(row["kind"]), units.replace(" ", "\u00a0"), row["reason"]))
    weights = report.get("weights") or []
    return [*lines, *((w["name"], "weights", "", w["reason"]) for w in weights if w.get("reason"))]
