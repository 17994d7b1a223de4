"""A model's groups: as data, and as a picture in one HTML file (layers in order, coupled parts in one colour)."""

from __future__ import annotations

import html
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from secateur.graph import Graph, Group
from secateur.report.html import HERE, _fill, _json, _kind, reason_html
from secateur.report.summary import number
from secateur.report.terminal import merge_alike
from secateur.utils.files import atomic_write_text

Tensors = dict[str, tuple[int, ...]]
CROWD = 9
"""More modules than this are drawn in several rows where their path has another number."""


def describe_groups(graph: Graph) -> dict[str, Any]:
    """Size and cost of the model, and a row a group: name, kind, size, shares of params and macs, reason, exact.

    The shares are those of what would leave if all units of the group could: groups overlap, they don't add up to 1.
    `macs` is None where the group can't be cut, or has a single unit.
    """
    params, macs = graph.params(), graph.macs()
    made = []
    for group in graph.groups:
        share = None
        if group.reason is None and group.size > 1 and macs:
            one = graph.macs({group.name: torch.tensor([0])})
            share = (macs - one) / macs * group.size / (group.size - 1)
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
    return {"params": params, "macs": macs, "groups": made, "unknown": dict(graph.unknown)}


def write_graph(path: str | Path, graph: Graph, title: str) -> None:
    """Write `graph_html` to a file.

    >>> write_graph("groups.html", secateur.trace(model, inputs), "my model")  # doctest: +SKIP
    """
    atomic_write_text(path, graph_html(graph, title))


def graph_html(graph: Graph, title: str) -> str:
    """Every module with its tensors' sides in the colours of their groups; hatched grey: cannot be cut."""
    found = describe_groups(graph)
    colors, sides, tensors = _colors(graph.groups), _sides(graph), _modules(graph.shapes)
    body = [_head(found, title), _legend(found["groups"], colors), "<h2>Layers, in order</h2>", KEY]
    for label, tag, modules in _rows(graph):
        cells = "".join(_module(graph, path, short, tensors[path], sides, colors) for path, short in modules)
        mark = ""
        if tag is not None:
            mark = f'<span class="tag" data-g="{tag}" style="background:{colors[tag]}"></span>'
        body.append(
            f'<div class="row"><div class="label">{mark}{html.escape(label)}</div><div class="flow">{cells}</div></div>'
        )
    info = [_about(graph, group, row) for group, row in zip(graph.groups, found["groups"], strict=True)]
    values = {
        "title": html.escape(f"{title}: what can be cut"),
        "css": (HERE / "page.css").read_text(encoding="utf-8"),
        "body": "\n".join(body),
        "groups": _json(info),
    }
    return _fill((HERE / "inspect.html").read_text(encoding="utf-8"), values)


KEY = """<div class="key">
<span><span class="m"><span class="edge"><span style="--color:#3b82c4"></span></span><span class="text">matrix</span>
<span class="edge"><span style="--color:#c4703b"></span></span></span>left: what it reads, right: what it produces</span>
<span><span class="m vector"><span class="text">norm</span><span class="band"><span style="--color:#3b82c4"></span></span></span>
a vector</span>
<span><span class="m"><span class="edge"><span class="frozen"></span></span><span class="text">hatched: cannot be cut</span></span></span>
<span><span class="m"><span class="edge"><span class="none"></span></span><span class="text">dashed: no units</span></span></span>
</div>"""


def _head(found: dict[str, Any], title: str) -> str:
    groups = found["groups"]
    stuck = sum(1 for group in groups if group["reason"])
    facts = [("parameters", number(found["params"])), ("multiply-adds", number(found["macs"]))]
    facts += [("groups that can be cut", str(len(groups) - stuck)), ("that cannot", str(stuck))]
    cells = [
        f'<div><div class="name">{name}</div><div class="value">{html.escape(value)}</div></div>'
        for name, value in facts
    ]
    notes = "".join(
        f"<li>operation without a rule: {html.escape(name)}: {html.escape(str(why))}</li>"
        for name, why in found["unknown"].items()
    )
    listed = f'<ul class="notes">{notes}</ul>' if notes else ""
    return f'<h1>{html.escape(title)}: what can be cut</h1><div class="facts">{"".join(cells)}</div>{listed}'


def _legend(rows: Sequence[dict[str, Any]], colors: Sequence[str]) -> str:
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
        marks = []
        for row in alike[:96]:
            index = ids[row["name"]]
            look = (
                ' class="swatch frozen"'
                if row["reason"]
                else f' class="swatch" style="--color:{colors[index]}"'
            )
            marks.append(f'<span{look} data-g="{index}"></span>')
        count = f"{len(alike)} × {merged['size']:,}" if len(alike) > 1 else f"{merged['size']:,}"
        shares = [
            f"{merged[key] * 100:.1f} %" if merged[key] is not None else "–" for key in ("params", "macs")
        ]
        why = reason_html(merged["reason"] or "")
        lines.append(
            f'<tr><td class="swatches{" many" * (len(marks) > 6)}">{"".join(marks)}</td><td class="name">{html.escape(merged["name"])}</td>'
            f'<td>{_kind(merged["kind"])}</td><td class="n">{count}</td><td class="n">{shares[0]}</td>'
            f'<td class="n">{shares[1]}</td><td>{why}</td></tr>'
        )
    heads = '<th></th><th>group</th><th>kind</th><th class="n">units</th><th class="n">parameters</th>'
    heads += '<th class="n">multiply-adds</th><th>cannot be cut because</th>'
    text = "Shares are of the whole model. Groups overlap, a matrix has two sides, so they add up to more than 100 %."
    return (
        f'<h2>Groups</h2><p class="soft">{text}</p><div class="wide"><table><thead><tr>{heads}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


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
) -> str:
    matrices = [leaf for leaf, shape in tensors.items() if len(shape) > 1]
    name = html.escape(short.rpartition(".")[2] if len(short) > 22 else short)
    shown = max(matrices or tensors, key=lambda leaf: len(tensors[leaf]))
    size = "×".join(map(str, tensors[shown]))
    text = f'<div class="text"><b title="{html.escape(path)}">{name}</b><i>{size}</i></div>'
    if not matrices:
        ids = list(
            dict.fromkeys(i for leaf in tensors for i, _ in sides.get(f"{path}.{leaf}".lstrip("."), []))
        )
        return f'<div class="m vector">{text}<div class="band">{_segments(graph, ids, colors)}</div></div>'
    if len(matrices) > 1:
        text = text.replace("</i>", f" and {len(matrices) - 1} more</i>")
    read: list[int] = []
    made: list[int] = []
    for leaf in matrices:
        for i, role in sides.get(f"{path}.{leaf}".lstrip("."), []):
            (read if role == "in" else made).append(i)
    left, right = (_segments(graph, list(dict.fromkeys(ids)), colors) for ids in (read, made))
    return f'<div class="m"><div class="edge">{left}</div>{text}<div class="edge">{right}</div></div>'


def _segments(graph: Graph, ids: Sequence[int], colors: Sequence[str]) -> str:
    if not ids:
        return '<span class="none"></span>'
    parts = []
    for i in ids:
        group = graph.groups[i]
        tip = html.escape(f"{group.name}: {group.reason}" if group.reason else group.name, quote=True)
        look = 'class="frozen"' if group.reason else f'style="--color:{colors[i]}"'
        parts.append(f'<span data-g="{i}" {look} title="{tip}"></span>')
    return "".join(parts)


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
    return [group.name, _kind(group.kind), group.size, share, slices, group.reason]
