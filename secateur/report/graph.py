"""A model's groups: as data, and as a picture in one HTML file (layers in order, coupled parts in one colour)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from secateur.graph import Graph, Group
from secateur.report.figures import kind_name
from secateur.report.html import render
from secateur.report.summary import number
from secateur.report.terminal import merge_alike
from secateur.utils.files import atomic_write_text

Tensors = dict[str, tuple[int, ...]]
CROWD = 9
"""More modules than this are drawn in several rows where their path has another number."""


def describe_groups(graph: Graph) -> dict[str, Any]:
    """Size and cost of the model, and a row a group: name, kind, size, shares of params and macs, reason, exact.

    The shares are those of what would leave if all units of the group could: groups overlap, they don't add up to 1.
    `macs` is None where the group can't be cut, or has no unit to spare.
    """
    params, macs = graph.params(), graph.macs()
    made = []
    for group in graph.groups:
        share, least = None, max(1, group.least)
        if group.reason is None and group.size > least and macs:
            few = graph.macs({group.name: torch.arange(least)})
            share = (macs - few) / macs * group.size / (group.size - least)
        made.append(
            {
                "name": group.name,
                "kind": group.kind,
                "size": group.size,
                "params": graph._touched(group) / max(1, params),
                "macs": share,
                "reason": group.reason,
                "exact": group.exact,
                "tensors": len({s.name for s in group.slices}),
            }
        )
    return {
        "params": params,
        "macs": macs,
        "groups": made,
        "unknown": dict(graph.unknown),
        "unreached": list(graph.unreached),
    }


def write_graph(path: str | Path, graph: Graph, title: str) -> None:
    """Write `graph_html` to a file.

    >>> write_graph("groups.html", secateur.trace(model, inputs), "my model")  # doctest: +SKIP
    """
    atomic_write_text(path, graph_html(graph, title))


def graph_html(graph: Graph, title: str) -> str:
    """Every module with its tensors' sides in the colours of their groups; hatched grey: cannot be cut."""
    found = describe_groups(graph)
    colors, sides, tensors = _colors(graph.groups), _sides(graph), _modules(graph.shapes)
    layers = [
        {
            "label": label,
            "tag": tag,
            "color": None if tag is None else colors[tag],
            "modules": [_module(graph, path, short, tensors[path], sides, colors) for path, short in modules],
        }
        for label, tag, modules in _rows(graph)
    ]
    return render(
        "graph.html",
        title=f"{title}: what can be cut",
        head=_head(found),
        unknown=[f"operation without a rule: {name}: {why}" for name, why in found["unknown"].items()],
        legend=_legend(found["groups"], colors),
        rows=layers,
        groups=[_about(graph, group, row) for group, row in zip(graph.groups, found["groups"], strict=True)],
    )


def _head(found: dict[str, Any]) -> list[tuple[str, str, str]]:
    stuck = sum(1 for group in found["groups"] if group["reason"])
    facts = [("parameters", number(found["params"])), ("multiply-adds", number(found["macs"]))]
    facts += [("groups that can be cut", str(len(found["groups"]) - stuck)), ("that cannot", str(stuck))]
    return [(name, value, "") for name, value in facts]


def _legend(rows: Sequence[dict[str, Any]], colors: Sequence[str]) -> list[dict[str, Any]]:
    """A row of the table for groups that differ in numbers only, with a mark each."""
    ids = {row["name"]: i for i, row in enumerate(rows)}
    families: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        key = (
            re.sub(r"\d+", "#", row["name"]),
            row["kind"],
            row["size"],
            re.sub(r"\d+", "#", row["reason"] or ""),
        )
        families.setdefault(key, []).append(row)
    lines = []
    for alike in families.values():
        merged = merge_alike(alike)[0]
        shares = {
            key: f"{merged[key] * 100:.1f} %" if merged[key] is not None else "–"
            for key in ("params", "macs")
        }
        marks = [_mark(ids[row["name"]], row["reason"], colors) for row in alike[:96]]
        count = f"{len(alike)} × {merged['size']:,}" if len(alike) > 1 else f"{merged['size']:,}"
        line = {"name": merged["name"], "kind": kind_name(merged["kind"]), "reason": merged["reason"] or ""}
        lines.append({**line, **shares, "marks": marks, "count": count})
    return lines


def _mark(group: int, reason: str | None, colors: Sequence[str]) -> dict[str, Any]:
    return {"group": group, "frozen": bool(reason), "color": colors[group]}


def _colors(groups: Sequence[Group]) -> list[str]:
    """A colour a group; groups that differ in numbers only are shades of one hue."""
    families = list(dict.fromkeys(re.sub(r"\d+", "#", group.name) for group in groups))
    seen: dict[str, int] = {}
    made = []
    for group in groups:
        family = re.sub(r"\d+", "#", group.name)
        step = seen[family] = seen.get(family, -1) + 1
        hue = (210 + 137.5 * families.index(family)) % 360
        made.append(f"hsl({hue + (step % 3 - 1) * 9:.0f} {62 - 8 * (step % 2)}% {46 + 7 * (step % 3 - 1)}%)")
    return made


def _sides(graph: Graph) -> dict[str, list[tuple[int, str]]]:
    """Tensor name -> [(index of a group, role of its slice)], rows and columns only."""
    found: dict[str, list[tuple[int, str]]] = {}
    for i, group in enumerate(graph.groups):
        for s in group.slices:
            if s.dim < 2:
                found.setdefault(s.name, []).append((i, s.role))
    for alias, name in graph.aliases.items():  # a tied tensor is read by its other user the other way round
        turned = [(i, {"in": "out", "out": "in"}.get(role, role)) for i, role in found.get(name, [])]
        found.setdefault(alias, turned)
    return found


def _modules(shapes: Tensors) -> dict[str, Tensors]:
    """Module path -> its own tensors, in the model's order."""
    found: dict[str, Tensors] = {}
    for name, shape in shapes.items():
        path, _, leaf = name.rpartition(".")
        if shape and (len(shape) > 1 or shape[0] > 1):
            found.setdefault(path, {})[leaf] = shape
    return found


def _rows(graph: Graph) -> list[tuple[str, int | None, list[tuple[str, str]]]]:
    """(label, index of the group of layers it is a unit of, [(module path, short name)]), blocks apart from the rest."""
    wholes = {path: i for i, group in enumerate(graph.groups) for path in group.modules}
    paths = list(_modules(graph.shapes))
    labels: dict[str, str] = {}
    for path in paths:
        whole = next((block for block in wholes if path == block or path.startswith(block + ".")), None)
        numbered = re.match(r"(.*?\.)?\d+(?=\.)", path)
        labels[path] = whole or (numbered[0] if numbered else path.rpartition(".")[0])
    crowded = {label for label, count in Counter(labels.values()).items() if count > CROWD} - wholes.keys()
    rows: list[tuple[str, int | None, list[tuple[str, str]]]] = []
    for path, label in labels.items():
        deeper = re.match(re.escape(label) + r"\..*?\d+(?=\.)", path)
        if label in crowded and deeper:
            label = deeper[0]
        short = path[len(label) + 1 :] if label and path != label else path
        if not rows or rows[-1][0] != (label or "model"):
            rows.append((label or "model", wholes.get(label), []))
        rows[-1][2].append((path, short or path))
    return rows


def _module(
    graph: Graph,
    path: str,
    short: str,
    tensors: Tensors,
    sides: dict[str, list[tuple[int, str]]],
    colors: Sequence[str],
) -> dict[str, Any]:
    """One module as the template draws it: what it reads on the left, what it produces on the right."""
    matrices = [leaf for leaf, shape in tensors.items() if len(shape) > 1]
    shown = max(matrices or tensors, key=lambda leaf: len(tensors[leaf]))
    by_role: dict[str, list[int]] = {"read": [], "made": []}
    for leaf in matrices or tensors:
        for group, role in sides.get(f"{path}.{leaf}".lstrip("."), []):
            by_role["read" if role == "in" and matrices else "made"].append(group)
    parts = {name: _segments(graph, list(dict.fromkeys(ids)), colors) for name, ids in by_role.items()}
    return {
        "path": path,
        "name": short.rpartition(".")[2] if len(short) > 22 else short,
        "size": "×".join(map(str, tensors[shown])),
        "more": max(0, len(matrices) - 1),
        "vector": not matrices,
        "band": parts["made"],
        **parts,
    }


def _segments(graph: Graph, ids: Sequence[int], colors: Sequence[str]) -> list[dict[str, Any]]:
    found = []
    for i in ids:
        group = graph.groups[i]
        tip = f"{group.name}: {group.reason}" if group.reason else group.name
        found.append({**_mark(i, group.reason, colors), "tip": tip})
    return found


def _about(graph: Graph, group: Group, row: dict[str, Any]) -> list[Any]:
    share = f", {row['params'] * 100:.1f} % of the parameters"
    if row["macs"] is not None:
        share += f", {row['macs'] * 100:.1f} % of the multiply-adds"
    if group.modules:
        slices = f"blocks {group.modules[0]} to {group.modules[-1]}"
    else:
        slices = f"{len(group.slices)} coupled slices of {row['tensors']} tensors"
    if not group.exact and group.reason is None:
        slices += "; a norm or softmax mixes its units"
    return [group.name, kind_name(group.kind), group.size, share, slices, group.reason]
