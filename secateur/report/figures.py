"""The plots of a report, as data that plotly draws; a colour "$name" is one of page.css."""

from __future__ import annotations

import html
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from secateur.pruning.document import to_ranges
from secateur.pruning.plan import Plan
from secateur.report.summary import METRICS, figure, in_seconds, rows, seconds_within, single, speed_words
from secateur.utils.collapse import collapses
from secateur.utils.spread import Speed

Figure = dict[str, Any]
KIND_NAMES = {"kv_groups": "key/value groups", "head_dim": "head dimensions", "hidden": "hidden dimensions"}


def kind_name(kind: str) -> str:
    """A kind of unit in words.

    >>> kind_name("kv_groups"), kind_name("neurons")
    ('key/value groups', 'neurons')
    """
    return KIND_NAMES.get(kind, kind.replace("_", " "))


PERCENT = {"tickvals": [0, 25, 50, 75, 100], "ticktext": ["0", "25 %", "50 %", "75 %", "100 %"]}


def _layout(height: int, **more: Any) -> dict[str, Any]:
    return {
        "height": height,
        "margin": {"l": 10, "r": 16, "t": 8, "b": 8, "pad": 4},
        "showlegend": False,
        "bargap": 0.3,
        **more,
    }


def _named(text: str) -> dict[str, Any]:
    return {"title": {"text": text, "standoff": 6, "font": {"size": 12, "color": "$soft"}}}


def cost_figure(report: Mapping[str, Any]) -> Figure | None:
    """Bars of after / before, in percent, of everything that costs."""
    found = [
        row
        for row in rows(report.get("before") or {}, report.get("after") or {}, report.get("speed"))
        if row.ratio is not None and row.key not in ("perplexity", "psnr", "accuracy")
    ][::-1]
    if not found:
        return None
    # of what was timed: the inverse of how many times as fast it is
    shares = [100 / row.speed.ratio if row.speed else 100 * (row.ratio or 0) for row in found]
    same = [not r.speed.differs if r.speed else share >= 99.5 for r, share in zip(found, shares, strict=True)]
    bar = {
        "type": "bar",
        "orientation": "h",
        "y": [row.label for row in found],
        "x": shares,
        "text": [
            f" {speed_words(row.speed).partition(' (')[0]}" if row.speed else f" {share:.1f} %"
            for row, share in zip(found, shares, strict=True)
        ],
        "textposition": "outside",
        "cliponaxis": False,
        "marker": {"color": ["$before" if alike else "$kept" for alike in same]},
        "hovertemplate": "%{customdata}<extra></extra>",
        "customdata": [f"{row.texts[1]} → {row.texts[2]}" for row in found],
    }
    line = {
        "type": "line",
        "x0": 100,
        "x1": 100,
        "y0": 0,
        "y1": 1,
        "yref": "paper",
        "line": {"color": "$soft", "width": 1, "dash": "dot"},
    }
    top = max(100.0, *shares)
    xaxis = {"range": [0, top * 1.12], **(PERCENT if top < 150 else {"ticksuffix": " %"})}
    return {
        "data": [bar],
        "layout": _layout(50 + 34 * len(found), xaxis=xaxis, yaxis={"showgrid": False}, shapes=[line]),
    }


def quality_figures(report: Mapping[str, Any]) -> list[Figure]:
    """Bars before and after: accuracies in one plot, perplexities in one."""
    before, after = report.get("before") or {}, report.get("after") or {}
    made = []
    for key, title in (("perplexity", "Perplexity"), ("psnr", "PSNR in dB"), ("accuracy", "Accuracy")):
        found = [row for row in rows(before, after) if row.key == key]
        if not found:
            continue
        scale = 100 if key == "accuracy" else 1
        broken = {f"{c.task}{METRICS.get(c.metric, '')}" for c in collapses(before, after) if c.kind == key}
        tasks = [row.label.partition(", ")[2] for row in found][::-1]
        data: list[dict[str, Any]] = []
        for name, color in (("after", "$after"), ("before", "$before")):
            values = [getattr(row, name) for row in found][::-1]
            data.append(
                {
                    "type": "bar",
                    "orientation": "h",
                    "name": name,
                    "y": tasks,
                    "x": [None if value is None else value * scale for value in values],
                    "text": [f" {name} {figure(key, value)}" for value in values],
                    "textposition": "outside",
                    "cliponaxis": False,
                    "marker": {
                        "color": ["$bad" if name == "after" and task in broken else color for task in tasks]
                    },
                    "hovertemplate": "%{y}, " + name + ": %{text}<extra></extra>",
                }
            )
        values = [value for trace in data for value in trace["x"] if value is not None]
        wide = max(values) > 20 * min(values) > 0 and key == "perplexity"
        axis: dict[str, Any] = {"rangemode": "tozero", "ticksuffix": " %" if key == "accuracy" else ""}
        axis["range"] = [0, max(values) * 1.25] if max(values) > 0 else [0, 1]
        if wide:
            from math import log10

            axis = {
                "type": "log",
                "range": [log10(max(min(values) / 3, 1e-9)), log10(max(values)) * 1.25],
                "dtick": 1,
            }
        layout = _layout(60 + 58 * len(tasks), barmode="group", xaxis=axis, yaxis={"showgrid": False})
        made.append(
            {"title": title + (" (logarithmic scale)" if wide else ""), "data": data, "layout": layout}
        )
    return made


def speed_figure(report: Mapping[str, Any]) -> Figure | None:
    """The latency that the multiply-adds promise beside the one measured."""
    before, after = single(report.get("before") or {}), single(report.get("after") or {})
    first, last = before["forward_seconds"], after["forward_seconds"]
    if not (first and last and before["macs"] and after["macs"]):
        return None
    promised = first * after["macs"] / before["macs"]
    spans = [(report.get(key) or {}).get("latency", {}).get("quartiles", {}) for key in ("before", "after")]
    within = [span.get("forward_seconds") or (value, value) for span, value in zip(spans, (first, last))]
    promised_within = [seconds * promised / first for seconds in within[0]]
    bars = [
        ("after, measured", last, within[1], "$after"),
        ("after, if time<br>followed multiply-adds", promised, promised_within, "$mid"),
        ("before, measured", first, within[0], "$before"),
    ]
    data = {
        "type": "bar",
        "orientation": "h",
        "y": [name for name, *_ in bars],
        "x": [value * 1e3 for _, value, *_ in bars],
        "text": [
            f" {seconds_within(value, *span)}" if span[0] < span[1] else f" {in_seconds(value)}"
            for _, value, span, _ in bars
        ],
        "textposition": "outside",
        "cliponaxis": False,
        "marker": {"color": [color for *_, color in bars]},
        "hovertemplate": "%{y}: %{text}<extra></extra>",
    }
    top = max(value for _, value, *_ in bars) * 1e3
    xaxis = {"range": [0, top * 1.15], "ticksuffix": " ms"}
    return {"data": [data], "layout": _layout(160, xaxis=xaxis, yaxis={"showgrid": False})}


def speed_text(report: Mapping[str, Any]) -> str:
    held = (report.get("speed") or {}).get("forward_seconds")
    if held is None:
        return "One forward on the example inputs."
    speed = Speed.read(held)
    return (
        f"One forward on the example inputs, before and after in turn: {speed_words(speed)}, the median and the middle half of"
        f" {speed.pairs} pairs."
    )


def layer_label(names: Sequence[str]) -> list[str]:
    """What tells names apart: the block's number when only that differs, else the name without what all share.

    >>> layer_label(["model.layers.0.mlp:neurons", "model.layers.1.mlp:neurons"])
    ['0', '1']
    >>> layer_label(["stage1.0.conv1:channels", "stage2.0.conv1:channels"])
    ['stage1.0.conv1', 'stage2.0.conv1']
    """
    plain = [name.rpartition(":")[0] or name for name in names]
    parts = [re.split(r"(\d+)", name) for name in plain]
    if len(parts) > 1 and len({len(part) for part in parts}) == 1:
        differing = [i for i, column in enumerate(zip(*parts, strict=True)) if len(set(column)) > 1]
        if len(differing) == 1 and all(part[differing[0]].isdigit() for part in parts):
            before = parts[0][differing[0] - 1]
            if before.endswith(".") or not before:
                return [part[differing[0]] for part in parts]
    words = [name.split(".") for name in plain]
    shared = 0
    while (
        all(len(word) > shared + 1 for word in words)
        and len({word[shared] for word in words}) == 1
        and len(words) > 1
    ):
        shared += 1
    return [".".join(word[shared:]) for word in words]


def panels(names: Sequence[str]) -> list[tuple[list[int], list[str]]]:
    """Names parted into what is drawn together: (places, labels). Numbered layers of one family make a panel.

    >>> panels(["layers.0.mlp:neurons", "layers.1.mlp:neurons", "embed:neurons"])
    [([0, 1], ['0', '1']), ([2], ['embed'])]
    """
    families: dict[str, list[int]] = {}
    for place, name in enumerate(names):
        families.setdefault(re.sub(r"\d+", "#", name), []).append(place)
    made: list[tuple[list[int], list[str]]] = []
    rest: list[int] = []
    for places in families.values():
        labels = layer_label([names[place] for place in places])
        if len(places) > 1 and all(label.isdigit() for label in labels):
            made.append((places, labels))
        else:
            rest += places
    if rest:
        rest.sort()
        made.append((rest, _unique(layer_label([names[place] for place in rest]))))
    return made


def _panel_title(kind: str, name: str, count: int) -> str:
    """The kind, and where it is when the kind has several panels."""
    title = kind_name(kind).capitalize()
    part = split_block(name.rpartition(":")[0])
    return f"{title}, {part[0]} {part[2]}" if count > 1 and part else title


def kept_figures(report: Mapping[str, Any]) -> list[Figure]:
    """Share kept per layer: panels of bars a kind; for single weights a map of layers and matrices."""
    made = []
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for group in report.get("groups") or []:
        if group.get("kept") is not None:
            kinds.setdefault(group["kind"], []).append(group)
    for kind, groups in kinds.items():
        found = panels([group["name"] for group in groups])
        drawn = [
            ([groups[place] for place in places], labels)
            for places, labels in found
            if any(groups[place]["kept"] < groups[place]["size"] for place in places)
        ]
        for members, labels in drawn:
            figure_ = _kept_panel(members, labels)
            figure_["title"] = _panel_title(kind, members[0]["name"], len(drawn)) + " kept"
            made.append(figure_)
    weights = [w for w in report.get("weights") or [] if w["size"]]
    if weights:
        made.append(_weights_map(weights))
    return made


def _kept_panel(groups: Sequence[Mapping[str, Any]], labels: Sequence[str]) -> Figure:
    shares = [100 * group["kept"] / group["size"] for group in groups]
    colors = ["$frozen" if group.get("reason") else "$kept" for group in groups]
    hover = [
        f"{g['name']}: {g['kept']:,} of {g['size']:,}"
        + (f"<br>{_short(g['reason'])}" if g.get("reason") else "")
        for g in groups
    ]
    common: dict[str, Any] = {"type": "bar", "hovertemplate": "%{customdata}<extra></extra>"}
    if len(labels) > 1 and all(label.isdigit() for label in labels):
        bar = {**common, "x": list(labels), "y": shares, "customdata": hover, "marker": {"color": colors}}
        xaxis = {**_named("layer"), "type": "category", "showgrid": False, "nticks": 24}
        return {
            "data": [bar],
            "layout": _layout(210, xaxis=xaxis, yaxis={"range": [0, 105], **PERCENT}, bargap=0.25),
        }
    bar = {
        **common,
        "orientation": "h",
        "x": shares[::-1],
        "y": labels[::-1],
        "customdata": hover[::-1],
        "marker": {"color": colors[::-1]},
        "text": [f" {g['kept']:,}/{g['size']:,}" for g in groups][::-1],
        "textposition": "outside",
        "cliponaxis": False,
    }
    yaxis = {"type": "category", "showgrid": False, "dtick": 1, "tickfont": {"size": 11}}
    layout = _layout(50 + 20 * len(groups), xaxis={"range": [0, 115], **PERCENT}, yaxis=yaxis)
    return {"data": [bar], "layout": layout}


def _short(reason: str) -> str:
    return html.escape(reason if len(reason) < 90 else reason[:87] + "...")


def _unique(labels: Sequence[str]) -> list[str]:
    seen: dict[str, int] = {}
    out = []
    for label in labels:
        seen[label] = seen.get(label, 0) + 1
        out.append(label if seen[label] == 1 else f"{label} ({seen[label]})")
    return out


def split_block(name: str) -> tuple[str, int, str] | None:
    """(path of the blocks, index, the rest) of a tensor in a repeated block; None outside.

    >>> split_block("model.layers.3.mlp.up_proj.weight")
    ('model.layers', 3, 'mlp.up_proj')
    """
    match = re.fullmatch(r"(.*?)\.(\d+)\.(.+)", name.removesuffix(".weight"))
    return (match[1], int(match[2]), match[3]) if match else None


def _weights_map(weights: Sequence[Mapping[str, Any]]) -> Figure:
    split = [split_block(w["name"]) for w in weights]
    shares = [100 * w["kept"] / w["size"] for w in weights]
    texts = [
        f"{w['name']}: {w['kept']:,} of {w['size']:,}, {s:.2f} %"
        for w, s in zip(weights, shares, strict=True)
    ]
    found = [part for part in split if part]
    if (
        len(found) == len(weights)
        and len({part[0] for part in found}) == 1
        and len({part[1] for part in found}) > 1
    ):
        columns = sorted({part[1] for part in found})
        lines = list(dict.fromkeys(part[2] for part in found))
        z: list[list[float | None]] = [[None] * len(columns) for _ in lines]
        hover = [[""] * len(columns) for _ in lines]
        for part, share, text in zip(found, shares, texts, strict=True):
            z[lines.index(part[2])][columns.index(part[1])] = share
            hover[lines.index(part[2])][columns.index(part[1])] = text
        low, high = min(shares), max(shares)
        if high - low < 1:
            low, high = max(0.0, low - 10), min(100.0, high + 10)
        data: dict[str, Any] = {
            "type": "heatmap",
            "z": z[::-1],
            "x": [str(c) for c in columns],
            "y": lines[::-1],
            "customdata": hover[::-1],
            "hovertemplate": "%{customdata}<extra></extra>",
            "colorscale": [[0, "$low"], [0.5, "$mid"], [1, "$kept"]],
            "zmin": low,
            "zmax": high,
            "xgap": 1,
            "ygap": 1,
            "colorbar": {"ticksuffix": " %", "thickness": 12, "outlinewidth": 0, "len": 1},
        }
        axis = {**_named("layer"), "type": "category", "showgrid": False, "nticks": 24}
        layout = _layout(90 + 26 * len(lines), xaxis=axis, yaxis={"showgrid": False, "type": "category"})
        return {"title": "Weights kept, layer by matrix", "data": [data], "layout": layout}
    labels = _unique(layer_label([w["name"].removesuffix(".weight") for w in weights]))
    bar = {
        "type": "bar",
        "orientation": "h",
        "x": shares[::-1],
        "y": labels[::-1],
        "text": [f" {share:.1f} %" for share in shares][::-1],
        "textposition": "outside",
        "cliponaxis": False,
        "marker": {"color": "$kept"},
        "customdata": texts[::-1],
        "hovertemplate": "%{customdata}<extra></extra>",
    }
    xaxis = {"range": [0, 115], **PERCENT}
    yaxis = {"type": "category", "showgrid": False, "dtick": 1, "tickfont": {"size": 11}}
    layout = _layout(50 + 20 * len(weights), xaxis=xaxis, yaxis=yaxis)
    return {"title": "Weights kept", "data": [bar], "layout": layout}


def strip_figures(plan: Plan) -> list[Figure]:
    """Rows of units, a heat map a kind: kept ones in colour; for single weights the share kept of every input."""
    kinds: dict[str, list[str]] = {}
    for name in plan.keep:
        kinds.setdefault(plan.kinds.get(name, ""), []).append(name)
    made = []
    scale = [[0, "$cut"], [1, "$kept"]]
    for kind, every in kinds.items():
        found = panels(every)
        for places, labels in found:
            names = [every[place] for place in places]
            lines: list[dict[str, Any]] = [
                {"size": plan.sizes[name], "keep": to_ranges(plan.keep[name].tolist())} for name in names
            ]
            widest = max(line["size"] for line in lines)
            data = {
                "type": "heatmap",
                "rows": lines,
                "y": labels,
                "colorscale": scale,
                "zmin": 0,
                "zmax": 1,
                "showscale": False,
                "hovertemplate": "layer %{y}, unit %{x}: kept %{z:.0%}<extra></extra>",
                "ygap": 1,
                "xgap": 1 if widest <= 64 else 0,
            }
            made.append(_strip(_panel_title(kind, names[0], len(found)), data, len(names), "unit", widest))
    families: dict[str, list[str]] = {}
    for name in plan.masks:
        part = split_block(name)
        families.setdefault(part[2] if part else "other layers", []).append(name)
    for family, names in families.items():
        z = [_density(plan.masks[name]) for name in names]
        width = max(map(len, z))
        longest = max(plan.masks[name][0].numel() for name in names)
        data = {
            "type": "heatmap",
            "z": [[*row, *[None] * (width - len(row))] for row in z],
            "x": [i * longest // width for i in range(width)],
            "y": _unique(layer_label([name.removesuffix(".weight") for name in names])),
            "colorscale": [[0, "$cut"], [0.5, "$mid"], [1, "$kept"]],
            "zmin": 0,
            "zmax": 1,
            "colorbar": {"tickformat": ".0%", "thickness": 12, "outlinewidth": 0},
            "hovertemplate": "layer %{y}: %{z:.0%} kept<extra></extra>",
        }
        made.append(_strip(family, data, len(names), "input", longest))
    return made


def _strip(title: str, data: dict[str, Any], lines: int, axis: str, units: int) -> Figure:
    each = 14 if lines > 16 else 20
    xaxis: dict[str, Any] = {**_named(axis), "showgrid": False}
    yaxis = {"type": "category", "showgrid": False, "autorange": "reversed", "tickfont": {"size": 11}}
    if lines <= 48:
        yaxis["dtick"] = 1 if lines <= 16 else 2
    layout = _layout(70 + each * lines, xaxis=xaxis, yaxis=yaxis)
    if units <= 32:
        xaxis["dtick"] = 1
        layout["width"] = 140 + 28 * units
    return {"title": title, "data": [data], "layout": layout}


def _density(mask: Any, bins: int = 128) -> list[float]:
    """Share kept of every input of a mask [out, in, ...], averaged into at most `bins` neighbours."""
    shares = mask.float().flatten(1).mean(0) if mask.dim() > 1 else mask.float()
    parts = shares.tensor_split(min(bins, shares.numel()))
    return [round(float(part.mean()), 3) for part in parts]


def score_figures(report: Mapping[str, Any], plan: Plan | None) -> list[Figure]:
    """Histograms of the scores of `report["scores"]`, {group name: [score of each unit]}, kept against cut."""
    scores = report.get("scores") or {}
    if not scores or plan is None:
        return []
    kinds: dict[str, tuple[list[float], list[float]]] = {}
    for name, values in scores.items():
        if name not in plan.keep:
            continue
        kept = set(plan.keep[name].tolist())
        stay, leave = kinds.setdefault(plan.kinds.get(name, ""), ([], []))
        for unit, value in enumerate(values):
            (stay if unit in kept else leave).append(value)
    made = []
    for kind, (stay, leave) in kinds.items():
        ranked = sorted([*stay, *leave])
        low, high = ranked[0], ranked[int(0.995 * (len(ranked) - 1))]  # the last bar holds the far tail
        if not low < high:
            continue
        edges = [low + (high - low) * i / 60 for i in range(61)]
        middles = [(a + b) / 2 for a, b in itertools.pairwise(edges)]
        data = []
        for values, name, color in ((leave, "cut", "$before"), (stay, "kept", "$kept")):
            counts = [0] * 60
            for value in values:
                counts[min(59, int((min(value, high) - low) / (high - low) * 60))] += 1
            hover = f"%{{y}} {name}<extra></extra>"
            data.append({"type": "bar", "x": middles, "y": counts, "name": name, "marker": {"color": color}})
            data[-1]["hovertemplate"] = hover
        legend = {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0}
        layout = _layout(240, barmode="stack", bargap=0.02, showlegend=True, legend=legend)
        layout |= {"xaxis": _named("score"), "yaxis": _named("units")}
        layout["margin"] = {**layout["margin"], "t": 30}
        made.append({"title": kind_name(kind).capitalize(), "data": data, "layout": layout})
    return made
