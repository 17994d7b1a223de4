"""What a run did, as a JSON-able report: the same rows for pruning and for training."""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from secateur.graph import Graph
from secateur.method import Method
from secateur.pruning.options import Options
from secateur.pruning.plan import Plan
from secateur.pruning.target import Target
from secateur.utils.screen import brief, change, counted, fit


class Report(dict[str, Any]):
    """A dictionary that JSON can hold, as `report.json` is; its repr is what matters of it."""

    def __repr__(self) -> str:
        return fit(
            [f"Report: {self.said()}", *(f"  {line}" for line in self.lines()), f"  keys: {', '.join(self)}"]
        )

    def said(self) -> str:
        """Method, target, and whether it is met."""
        met = {True: ", met", False: ", NOT met"}.get(self.get("met"), "")  # type: ignore[arg-type]
        return f"{self.get('method')}, target {self.get('target')}{met}"

    def lines(self) -> list[str]:
        """What is left, what was cut, and the notes."""
        before, after = self.get("before") or {}, self.get("after") or {}
        keys = ["params", "params_nonzero", "macs", "size_bytes"]
        if after.get("params") == after.get("params_nonzero"):
            keys.remove("params_nonzero")
        moved = [key for key in keys if before.get(key) != after.get(key)]
        lines = [change(key, before.get(key), after.get(key)) for key in moved]
        for key in ("perplexity", "accuracy", "psnr"):
            lines += [
                f"{key}, {n}: {brief(v)} -> {brief(after[key].get(n))}"
                for n, v in (before.get(key) or {}).items()
            ]
        cut = [row for row in self.get("groups") or () if row["kept"] < row["size"]]
        if cut:
            lines.append(f"{counted(len(cut), 'group')} cut of {len(self['groups'])}")
        return [*filter(None, lines), *self.get("notes", ())]


def build_report(
    method: Method,
    target: Target,
    plan: Plan,
    graph: Graph | None,
    before: dict[str, Any],
    after: dict[str, Any],
    *,
    options: dict[str, Any],
    kinds: tuple[str, ...] | None,
    kept_share: bool,
    refused: Mapping[str, str],
    skipped: Mapping[str, str] | None = None,
    latency: tuple[float | None, float | None] = (None, None),
    parts: Sequence[Mapping[str, Any]] = (),
) -> Report:
    """Method, target, figures before and after, a row for each group and masked tensor, and notes.

    options: as the report shows them. kinds: the kinds of unit that were to be cut; None: all. kept_share: whether a
    share target is met where the plan has no masks. refused, skipped: reasons by group and by matrix. latency: (the
    limit in seconds, seconds of one forward of the result), where the target is one. parts: weights kept of each part.
    """
    skipped = skipped or {}
    weights: list[dict[str, Any]] = [
        {"name": name, "size": mask.numel(), "kept": int(mask.sum())} for name, mask in plan.masks.items()
    ]
    weights += [{"name": name, "size": 0, "kept": 0, "reason": reason} for name, reason in skipped.items()]
    limit, seconds = latency
    report = Report(
        {
            "method": method.name,
            **({"source": method.source} if method.source else {}),
            "hyperparameters": method.hyperparameters,
            "target": str(target),
            "met": seconds <= limit if limit is not None and seconds is not None else False,
            "seed": plan.seed,
            "out": None,
            "options": options,
            "before": before,
            "after": after,
            "groups": group_rows(method, graph, plan, kinds, refused),
            "weights": weights,
            **({"parts": list(parts)} if parts else {}),
            "notes": [
                *filter(None, [target.meaning]),
                *plan.notes.values(),
                *(f"{name}: {why}" for name, why in {**refused, **skipped}.items()),
            ],
        }
    )
    if graph is not None and plan.keep and (more := other_numbers(graph, plan, before, after)):
        report["notes"].append(more)
    if target.kind == "latency":
        report["latency"] = {"limit_seconds": limit, "after_seconds": seconds}
    elif target.parts and plan.masks:
        shares = {name: goal.value for name, goal in target.parts}
        report["met"] = all(row["kept"] <= shares[row["name"]] * row["size"] + 1e-6 for row in parts)
    else:
        report["met"] = target_met(target, before, after, plan, kept_share and not skipped)
    return report


def other_numbers(
    graph: Graph, plan: Plan, before: Mapping[str, Any], after: Mapping[str, Any]
) -> str | None:
    """What to say where the cut model does its work another number of times than the dense one, on the same inputs."""
    whole, planned = graph.macs({}), graph.macs(plan.keep)
    if not before.get("macs") or not after.get("macs") or abs(whole / before["macs"] - 1) > 1e-3:
        return None  # not a model whose work the graph can tell
    if abs(after["macs"] - planned) < 0.01 * planned:
        return None
    share, fair = after["macs"] / before["macs"], planned / whole
    return (
        f"multiply-adds: sizes follow from values (how many boxes are found, say), and the cut model comes to other ones"
        f" than the dense model: {share:.1%} of its multiply-adds as counted, {fair:.1%} at the dense model's sizes"
    )


def group_rows(
    method: Method,
    graph: Graph | None,
    plan: Plan,
    kinds: tuple[str, ...] | None,
    refused: Mapping[str, str],
) -> list[dict[str, Any]]:
    """One row a group: name, kind, size, units kept, and why it is whole."""
    rows = []
    for group in graph.groups if graph is not None else ():
        kept = len(plan.keep[group.name]) if group.name in plan.keep else group.size
        reason = group.reason or refused.get(group.name)
        if reason is None and kept == group.size:
            untouched = kinds is not None and group.kind not in kinds
            reason = f"{method.name} doesn't cut {group.kind}" if untouched else "kept whole by the budget"
        rows.append(
            {"name": group.name, "kind": group.kind, "size": group.size, "kept": kept, "reason": reason}
        )
    return rows


def target_met(
    target: Target, before: Mapping[str, Any], after: Mapping[str, Any], plan: Plan, kept_share: bool
) -> bool:
    """Whether the result keeps no more than the target allows; for all targets but a latency."""
    if target.kind in ("share", "n_m", "parts"):
        if not plan.masks or not kept_share:
            return kept_share
        sizes = [(int(mask.sum()), mask.numel()) for mask in plan.masks.values()]
        return sum(kept for kept, _ in sizes) <= target.value * sum(size for _, size in sizes) + 1e-6
    if target.kind == "vocabulary":
        kept = [len(units) for name, units in plan.keep.items() if plan.kinds[name] == "vocabulary"]
        return all(number <= target.value for number in kept)
    key = {"params": "params", "macs": "macs", "size": "size_bytes"}[target.kind]
    figure = "params_nonzero" if key == "params" and plan.masks else key
    return after[figure] <= target.limit(before[key]) + 1e-6


def command_line(report: Mapping[str, Any]) -> str:
    """The command that gives this result again; `report["command"]` where the command line wrote it; "" of a run without a method.

    >>> command_line({"method": "wanda", "target": "50%", "options": {"keep": ["lm_head"], "samples": 32}})
    'secateur prune MODEL --method wanda --target 50% --seed 0 --keep lm_head'
    """
    if report.get("command"):
        return str(report["command"])
    if report.get("method") is None:
        return ""
    file = re.match(r"(.+\.py:\w+) sha256:", report.get("source") or "")
    method = file[1] if file else str(report.get("method"))
    words = ["secateur", "prune", str(report.get("model", "MODEL")), "--method", method]
    words += ["--target", str(report.get("target")), "--seed", str(report.get("seed", 0))]
    usual = dataclasses.asdict(Options())
    options = {k: v for k, v in (report.get("options") or {}).items() if k in usual and v != usual[k]}
    for name, value in {**(report.get("hyperparameters") or {}), **options}.items():
        if isinstance(value, bool):
            words.append(f"--{'' if value else 'no-'}{name.replace('_', '-')}")
        elif isinstance(value, str | int | float):
            words += [f"--{name.replace('_', '-')}", str(value)]
        elif isinstance(value, list | tuple):
            words += [f"--{name.replace('_', '-')}", ",".join(map(str, value))]
    return shlex.join(words)
