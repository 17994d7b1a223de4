"""Reports and lists as tables in a terminal."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from secateur.pruning.document import to_ranges
from secateur.report.summary import alarms, in_seconds, left, lost, notes, number, parted, rows
from secateur.taxonomy import MethodInfo
from secateur.taxonomy.axes import AXES, MEANING, notation


def table(*headings: str, right: Iterable[str] = (), title: str | None = None) -> Table:
    """An open table; the headings in `right` are aligned right."""
    made = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="bold", pad_edge=False)
    for heading in headings:
        made.add_column(
            heading,
            justify="right" if heading in right else "left",
            overflow="fold",
            no_wrap=heading in right,
        )
    return made


def named_source(found: Mapping[str, Any]) -> str:
    """Where a report's or plan's method came from, behind its name; nothing for this library's."""
    return f" ({found['source']})" if found.get("source") else ""


def report_tables(report: Mapping[str, Any]) -> list[Any]:
    """What `print_report` prints, as rich renderables."""
    met = report.get("met")
    head = Text.assemble(
        (str(report.get("model") or "model"), "bold"),
        f"  {report.get('method')}{named_source(report)}  target {report.get('target')}  ",
        ("met" if met else "not met", "green" if met else "bold red") if met is not None else "",
    )
    parts: list[Any] = [*(Text(line, style="bold red") for line in alarms(report)), head]
    if report.get("unreached"):
        parts.append(Text(lost(report["unreached"]), style="bold red"))
    parts += filter(None, [left(report)])
    figures = before_after(report)
    if figures.row_count:
        parts.append(figures)
    if kept := kept_by_kind(report):
        counts = table("cut", "groups", "units", "kept", "share", right=("groups", "units", "kept", "share"))
        for kind, groups, size, stay in kept:
            share = f"{stay / size:.1%}".replace("%", " %") if size else ""
            counts.add_row(kind.replace("_", " "), str(groups), f"{size:,}", f"{stay:,}", share)
        parts.append(counts)
    if lines := frozen(report.get("groups") or []):
        parts.append(
            Text(f"not cut: {len(lines)} " + ("group" if len(lines) == 1 else "groups"), style="bold")
        )
        lines = [(name, parted(reason)[0]) for name, reason in lines]
        shown = list(dict.fromkeys(reason for _, reason in lines))
        for reason in shown[:6]:
            names = [name for name, why in lines if why == reason]
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            parts.append(Text(f"  {names[0]}{more}: {reason}"))
        if len(shown) > 6:
            parts.append(Text(f"  and {len(shown) - 6} more: `secateur inspect` shows all"))
    for note in notes(report):
        parts.append(Text(f"note: {note}", style="yellow"))
    last = []
    if report.get("seconds") is not None:
        last.append(f"took {in_seconds(report['seconds'])}")
    if report.get("out"):
        last.append(f"written to {report['out']}")
    if last:
        parts.append(Text(", ".join(last)))
    return parts


def before_after(report: Mapping[str, Any], first: str = "before", last: str = "after") -> Table:
    """The figures of both sides and how they differ."""
    change = f"{last}/{first}"
    made = table("", first, last, change, right=(first, last, change))
    for row in rows(report.get("before") or {}, report.get("after") or {}, report.get("speed")):
        made.add_row(*row.texts)
    return made


def kept_by_kind(report: Mapping[str, Any]) -> list[tuple[str, int, int, int]]:
    """(kind, number of groups, units, kept units) of what was cut, single weights last."""
    totals: dict[str, list[int]] = {}
    cut = [g for g in report.get("groups") or [] if g.get("kept") is not None and not g.get("reason")]
    weights = [{**entry, "kind": "weights"} for entry in report.get("weights") or [] if entry["size"]]
    for group in [*cut, *weights]:
        entry = totals.setdefault(group["kind"], [0, 0, 0])
        entry[0] += 1
        entry[1] += group["size"]
        entry[2] += group["kept"]
    return [
        (kind, groups, size, kept)
        for kind, (groups, size, kept) in totals.items()
        if kind == "weights" or kept < size
    ]


def frozen(groups: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """(name, reason) of the groups that could not be cut."""
    return [(group["name"], group["reason"]) for group in groups if group.get("reason")]


def print_report(report: Mapping[str, Any], console: Console | None = None) -> None:
    """Before and after, what was cut, what could not be, and what a reader must know.

    >>> print_report(pruned.report)  # doctest: +SKIP
    """
    console = console or Console()
    for part in report_tables(report):
        console.print(part)


def print_measurement(figures: Mapping[str, Any], console: Console | None = None, title: str = "") -> None:
    """One model's figures."""
    console = console or Console()
    made = table(title, "value", "", right=("value",))
    for row in rows(figures, {}):
        made.add_row(row.label, row.texts[1], row.change if row.before is None else "")
    console.print(made)
    for note in notes({"before": figures}):
        console.print(Text(f"note: {note}", style="yellow"))


def print_comparison(found: Mapping[str, Any], console: Console) -> None:
    """Two measured models side by side: `before` is the one that is compared with."""
    for line in alarms(found):
        console.print(Text(line, style="bold red"))
    console.print(Text.assemble((str(found["model"]), "bold"), f"  against {found['against']}"))
    if shares := left(found):
        console.print(shares)
    console.print(before_after(found, "against", "model"))
    for note in notes(found):
        console.print(Text(f"note: {note}", style="yellow"))


def print_graph(found: Mapping[str, Any], console: Console, full: bool = False) -> None:
    """What `describe_groups` found, as `secateur inspect` shows it: like groups in one row unless `full`."""
    console.print(
        f"{number(found['params'])} parameters, {number(found['macs'])} multiply-adds on the example inputs"
    )
    if unreached := found.get("unreached"):
        names = ", ".join(unreached[:3]) + (f" and {len(unreached) - 3} more" if len(unreached) > 3 else "")
        console.print(
            Text(f"never reached by the trace, so what they tie is unknown: {names}", style="yellow")
        )
    made = table("group", "kind", "units", "params", "macs", right=("units", "params", "macs"))
    groups = found["groups"] if full else merge_alike(found["groups"])
    for row in groups:
        cells = [f"{row[key] * 100:.1f} %" if row.get(key) is not None else "–" for key in ("params", "macs")]
        count = row.get("count", 1)
        units = f"{count} × {row['size']:,}" if count > 1 else f"{row['size']:,}"
        cells = [row["name"], row["kind"].replace("_", " "), units, *cells]
        made.add_row(*cells, style="dim" if row["reason"] else None)
    console.print(made)
    if stuck := frozen(groups):
        console.print("cannot be cut:", style="bold")
        for name, reason in stuck:
            console.print(Text(f"  {name}: {reason}"))
    for name, why in found["unknown"].items():
        console.print(Text(f"operation without a rule: {name}: {why}", style="yellow"))
    console.print(
        "Shares are of the whole model; groups overlap, so they don't add up to 100 %.", style="dim"
    )


def print_methods(records: Sequence[MethodInfo], console: Console, unknown: Sequence[str] = ()) -> None:
    """A row a method; unknown: words of a search that no method holds."""
    if not records:
        console.print("no method is like that; drop a filter, or see all with `secateur methods`")
        return
    made = table("method", "title", "cuts", "when", "speed-up", "data", "what it does")
    for info in records:
        axes = [notation(info, axis) for axis in ("objects", "when", "speedup", "data")]
        made.add_row(Text(info.name, style="bold"), info.title, *axes, info.description)
    console.print(made)
    if unknown:
        console.print(f"no method is described with: {', '.join(unknown)}", style="yellow")
    console.print("`secateur methods NAME` shows one with its hyperparameters.", style="dim")


def print_published(
    records: Sequence[MethodInfo],
    here: Sequence[Sequence[str]],
    counts: Mapping[str, Any],
    console: Console,
) -> None:
    """The published systems: what each does, what stands here of it, its paper and code; then how many are what."""
    for place, (info, names) in enumerate(zip(records, here, strict=True), 1):
        axes = " | ".join(notation(info, axis) for axis in ("objects", "when", "criteria"))
        stands = f"here: {', '.join(names)}" if names else "not here"
        head = Text.assemble(f"{place}. ", (info.title, "bold"), f"  {info.year}  {axes}  ")
        console.print(head + Text(stands, style="green" if names else "dim"))
        console.print(Text(f"   {info.description}"))
        console.print(Text(f"   {'  '.join(info.links)}", style="dim"))
    plain = [f"{count} {what}" for what, count in counts.items() if isinstance(count, int)]
    console.print(Text(", ".join(plain)))
    for axis in ("granularity", "when"):
        console.print(
            Text(f"{axis}: " + ", ".join(f"{name} {count}" for name, count in counts[axis].items()))
        )
    console.print(Text(f"{sum(map(bool, here))} of {len(records)} stand here"))


def print_method(found: Mapping[str, Any], info: MethodInfo, console: Console) -> None:
    """One method: what it does, its hyperparameters, its place in the taxonomy."""
    console.print(Text.assemble((found["name"], "bold"), f"  {info.title}"))
    console.print(Text(re.sub(r"(^|\n)>>> .*(\n\.\.\. .*)*\n*", "\n", found["doc"]).strip()))
    made = table("hyperparameter", "default", "")
    for item in found["hyperparameters"]:
        made.add_row(f"--{item['name'].replace('_', '-')}", str(item["default"]), Text(item["help"]))
    console.print(made if made.row_count else "It has no hyperparameters.")
    made = table("axis", "value", "")
    for axis, members in AXES.items():
        held = [member for member in members if member in info.members(axis)]
        named = ", ".join(MEANING[member] for member in held if member in MEANING)
        made.add_row(axis, notation(info, axis), named if len(held) < 8 else "")
    console.print(made)
    for link in info.links:
        console.print(Text(link))


def print_advice(
    advice: Sequence[tuple[MethodInfo, str]], later: Sequence[str], console: Console, own: bool = False
) -> None:
    """Methods with the reasons for them, best first, and what to add later. own: by a comparison of the user's."""
    if not advice:
        console.print("no method fits; allow training (--train), give data, or ask about other hardware")
        return
    for place, (info, why) in enumerate(advice, 1):
        console.print(Text.assemble(f"{place}. ", (info.name or info.spec, "bold"), f"  {info.title}"))
        console.print(Text(f"   {why}"))
    if later:
        console.print(Text(f"\nNeed more? {'; '.join(later)}."))
    if not own:
        text = "Ranks are of small models. `secateur compare` on yours, then `--comparison DIR`, says more."
        console.print(text, style="dim")


def print_plan(plan: Mapping[str, Any], console: Console, full: bool = False) -> None:
    """A plan's rows: kept of size."""
    head = f"{named_source(plan)}  target {plan['target']}  seed {plan['seed']}"
    console.print(Text.assemble((plan["method"], "bold"), head))
    made = table("name", "kind", "size", "kept", "share", right=("size", "kept", "share"))
    rows = plan["rows"]
    if not full:
        alike = merge_alike([{**row, "reason": None} for row in rows], add=("kept",))
        rows = [{**row, "size": row["size"] * row["count"]} for row in alike]
    for row in rows:
        share = f"{100 * row['kept'] / row['size']:.1f} %" if row["size"] else ""
        made.add_row(
            row["name"], row["kind"].replace("_", " "), f"{row['size']:,}", f"{row['kept']:,}", share
        )
    console.print(made if made.row_count else "it cuts nothing")
    if plan["values"]:
        console.print(f"{len(plan['values'])} tensors are replaced by repaired ones")


def print_diff(found: Mapping[str, Any], console: Console) -> None:
    """Where two plans differ."""
    rows = found["rows"]
    if not rows:
        console.print("the two plans keep the same")
        return
    made = table(
        "name",
        "kept by first",
        "by second",
        "both of either",
        right=("kept by first", "by second", "both of either"),
    )
    for row in rows:
        kept = ["whole" if row[key] is None else f"{row[key]:,}" for key in ("first", "second")]
        alone = row["first"] is None or row["second"] is None
        made.add_row(row["name"], *kept, "" if alone else f"{100 * row['agree']:.1f} %")
    console.print(made)


def merge_alike(
    groups: Sequence[Mapping[str, Any]], add: Sequence[str] = ("params", "macs")
) -> list[dict[str, Any]]:
    """Groups whose names differ only in numbers, of one kind, size and reason, as one row with `count`.

    What `add` names is added up.

    >>> alike = merge_alike([dict(name=f"layers.{i}.mlp", kind="neurons", size=8, reason=None, params=0.1, macs=0.1)
    ...                      for i in range(3)])
    >>> alike[0]["name"], alike[0]["count"], round(alike[0]["params"], 2)
    ('layers.0-2.mlp', 3, 0.3)
    """
    merged: dict[tuple, list[Mapping[str, Any]]] = {}
    for group in groups:
        like = (
            _without_numbers(group["name"]),
            group["kind"],
            group["size"],
            _without_numbers(group["reason"] or ""),
        )
        merged.setdefault(like, []).append(group)
    made = []
    for alike in merged.values():
        row = dict(alike[0]) | {"count": len(alike)}
        for key in add:
            values = [group[key] for group in alike if group.get(key) is not None]
            row[key] = sum(values) if values else None
        row["name"] = common_name([group["name"] for group in alike])
        made.append(row)
    return made


def common_name(names: Sequence[str]) -> str:
    """One name for names that differ in numbers only; runs of numbers become `first-last`.

    >>> common_name(["a.0.b", "a.1.b", "a.2.b"]), common_name(["a.0.b", "a.4.b"])
    ('a.0-2.b', 'a.{0,4}.b')
    """
    parts = [re.split(r"(\d+)", name) for name in names]
    out: list[str] = []
    for column in zip(*parts, strict=True):
        values: list[str] = list(dict.fromkeys(column))
        if len(values) == 1:
            out.append(values[0])
        else:
            text = to_ranges(sorted(int(value) for value in values))
            out.append("{" + text + "}" if "," in text else text)
    return "".join(out)


def _without_numbers(text: str) -> str:
    return re.sub(r"\d+", "#", text)
