"""What a report says, before it is drawn: figures with units, ratios, rows of the before/after table, honest notes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SPARSE_NOTE = "same size and speed without sparse kernels: the zeros are stored in dense tensors"

FIGURES: dict[str, str] = {
    "params": "parameters",
    "params_nonzero": "non-zero parameters",
    "macs": "multiply-adds",
    "size_bytes": "size",
    "forward_seconds": "time of one forward",
    "decode_seconds_per_token": "time per new token",
    "peak_memory_bytes": "peak memory",
}
"""Figures of a measurement that are single numbers, in the order in which they are shown."""
METRICS = {"acc": "", "acc_norm": " (length-normalised)", "miou": " (mIoU)"}


def single(figures: Mapping[str, Any]) -> dict[str, float | None]:
    """The single numbers of a measurement, those of its latency among them."""
    every = {**figures, **(figures.get("latency") or {})}
    return {key: every.get(key) for key in FIGURES}


def by_task(figures: Mapping[str, Any]) -> dict[tuple[str, str], float | None]:
    """(perplexity, psnr or accuracy, task) -> value, None where it was not finite."""
    found: dict[tuple[str, str], float | None] = {}
    for key in ("perplexity", "psnr"):
        for task, value in (figures.get(key) or {}).items():
            found[key, task] = value
    for task, value in (figures.get("accuracy") or {}).items():
        metrics = value if isinstance(value, Mapping) else {"acc": value}
        for metric, number_ in metrics.items():
            if metric in METRICS:
                found["accuracy", task + METRICS[metric]] = number_
    return found


def number(value: float | None) -> str:
    """A count for reading.

    >>> number(134515008), number(576)
    ('134.5 M', '576')
    """
    if value is None or not math.isfinite(value):
        return "–"
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == 'k' else size):.4g} {letter}"
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.4g}"


def in_bytes(value: float | None) -> str:
    """Bytes for reading, in powers of 1000.

    >>> in_bytes(538090408)
    '538.1 MB'
    """
    if value is None or not math.isfinite(value):
        return "–"
    for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(value) >= size:
            return f"{value / size:.4g} {unit}"
    return f"{value:.0f} B"


def in_seconds(value: float | None) -> str:
    """Seconds for reading.

    >>> in_seconds(0.0123), in_seconds(75)
    ('12.3 ms', '1 min 15 s')
    """
    if value is None or not math.isfinite(value):
        return "–"
    if value >= 3600:
        return f"{int(value // 3600)} h {int(value % 3600 // 60)} min"
    if value >= 60:
        return f"{int(value // 60)} min {int(value % 60)} s"
    if value >= 1:
        return f"{value:.3g} s"
    return f"{value * 1e3:.3g} ms" if value >= 1e-3 else f"{value * 1e6:.3g} µs"


def figure(key: str, value: float | None) -> str:
    """A figure as its key is read: bytes, seconds, a share, a perplexity or a count."""
    if value is None or not math.isfinite(value):
        return "–"
    if key.endswith("bytes"):
        return in_bytes(value)
    if "seconds" in key:
        return in_seconds(value)
    if key == "accuracy":
        return f"{value:.1%}".replace("%", " %")
    if key == "psnr":
        return f"{value:.2f} dB"
    if key == "perplexity":
        return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
    return number(value)


@dataclass(frozen=True)
class Row:
    """One line of the before/after table. `ratio` is after / before; `change` is what to print of it.

    `reason`: why a side is missing.
    """

    key: str
    label: str
    before: float | None
    after: float | None
    reason: str | None = None

    @property
    def ratio(self) -> float | None:
        if not self.before or self.after is None or not math.isfinite(self.before + self.after):
            return None
        return self.after / self.before

    @property
    def change(self) -> str:
        if self.key == "accuracy" and self.before is not None and self.after is not None:
            return f"{(self.after - self.before) * 100:+.1f} points"
        if self.key == "psnr" and self.before is not None and self.after is not None:
            return f"{self.after - self.before:+.2f} dB"
        if self.ratio is None:
            return "" if self.reason is None else "not measured"
        if self.ratio == 1:
            return "same"
        if self.key == "perplexity":
            return f"× {self.ratio:.3g}"
        return f"{self.ratio:.1%}".replace("%", " %")

    @property
    def texts(self) -> tuple[str, str, str, str]:
        return self.label, figure(self.key, self.before), figure(self.key, self.after), self.change


def rows(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Row]:
    """The before/after table: every single figure that either side has or says why not, then quality by task."""
    left, right = single(before), single(after)
    why = {**(before.get("not_measured") or {}), **(after.get("not_measured") or {})}
    labels = {**FIGURES, "macs": FIGURES["macs"] + _tokens(before)}
    found = [Row(key, label, left[key], right[key], why.get(key)) for key, label in labels.items()]
    first, last = by_task(before), by_task(after)
    found = [row for row in found if row.before is not None or row.after is not None or row.reason]
    for kind, task in dict.fromkeys([*first, *last]):
        label = f"{kind}, {task}"
        found.append(Row(kind, label, first.get((kind, task)), last.get((kind, task)), why.get(label)))
    return found


def left(report: Mapping[str, Any]) -> str:
    """What share of the model is left, in one line; "" where nothing was counted.

    >>> left({"before": {"params": 200, "macs": 50}, "after": {"params": 150, "macs": 20}})
    'left: 75.0 % of the parameters, 40.0 % of the multiply-adds'

    Equal targets don't mean equal sizes: what a bare share counts depends on the method. Where only zeros were set, the
    parameters that are not zero are counted.
    """
    before, after = single(report.get("before") or {}), single(report.get("after") or {})
    same = before["params"] == after["params"] and before["params_nonzero"] != after["params_nonzero"]
    shares = []
    for key in ("params_nonzero" if same else "params", "macs"):
        row = Row(key, FIGURES[key], before[key], after[key])
        if row.ratio is not None:
            shares.append(f"{row.ratio:.1%} of the {row.label}".replace("%", " %"))
    return f"left: {', '.join(shares)}" if shares else ""


def _tokens(figures: Mapping[str, Any]) -> str:
    """What a language model's multiply-adds were counted on."""
    inputs = figures.get("inputs")
    ids = inputs.get("input_ids") if isinstance(inputs, Mapping) else None
    return f", {math.prod(ids['tensor'])} tokens" if isinstance(ids, Mapping) and "tensor" in ids else ""


def notes(report: Mapping[str, Any]) -> list[str]:
    """What a reader must know: the report's own notes, and those that follow from its figures."""
    before, after = report.get("before") or {}, report.get("after") or {}
    found = [str(note) for note in report.get("notes") or []]
    zeros = any(entry["kept"] < entry["size"] for entry in report.get("weights") or [])
    said = any("sparse kernels" in note for note in found)
    if zeros and not said and after.get("params") == before.get("params"):
        found.insert(0, SPARSE_NOTE)
    times = single(before)["forward_seconds"], single(after)["forward_seconds"]
    if times[0] and times[1] and times[1] > 0.98 * times[0] and SPARSE_NOTE not in found:
        found.append(
            "it is not faster: the time was measured, and a smaller count of multiply-adds did not shorten it"
        )
    for row in rows(before, after):
        if row.key == "perplexity" and row.before and row.after is None:
            found.append(f"{row.label} is no longer finite: what is left does not work")
        elif row.reason:
            found.append(f"{row.label} was not measured: {row.reason}")
        if row.key == "perplexity" and row.ratio and row.ratio > 10:
            found.append(f"{row.label} is {row.ratio:,.0f} times what it was: what is left hardly works")
    if trained := report.get("recovery"):
        between = by_task(report.get("cut") or {})
        was = [f"{kind}, {task} was {figure(kind, value)}" for (kind, task), value in between.items()]
        text = f"after the cut it was trained ({trained['recover']}, {trained['steps']} steps)"
        text += f"; before that {'; '.join(was)}" if was else ""
        found.append(text + "; applying the plan again gives the untrained model")
    if report.get("met") is False:
        found.append("the target was not met")
    return list(dict.fromkeys(found))


def lost(unreached: Sequence[str]) -> str:
    """What to say of parameters that no traced run read, though what was cut is as wide as they are.

    >>> lost(["aux.weight", "aux.bias"])
    'never reached by the trace: aux.weight and 1 more; a branch that reads them may not run any more'
    """
    more = f" and {len(unreached) - 1} more" if len(unreached) > 1 else ""
    return f"never reached by the trace: {unreached[0]}{more}; a branch that reads them may not run any more"


def parted(reason: str) -> tuple[str, str]:
    """A reason without the place it was found at, and the place: the last pair of brackets, where it ends in one.

    >>> parted("rows (of a table) are looked up by index (model.embed at lookup.py:12)")
    ('rows (of a table) are looked up by index', 'model.embed at lookup.py:12')
    >>> parted("a norm mixes them")
    ('a norm mixes them', '')
    """
    depth = 0
    for place in range(len(reason) - 1, 0, -1) if reason.endswith(")") else ():
        depth += {")": 1, "(": -1}.get(reason[place], 0)
        if depth == 0:
            return (
                (reason[:place].rstrip(), reason[place + 1 : -1])
                if reason[place - 1] == " "
                else (reason, "")
            )
    return reason, ""


def command_line(report: Mapping[str, Any]) -> str:
    """The command that gives this result again; `report["command"]` where the command line wrote it."""
    import shlex

    if report.get("command"):
        return str(report["command"])
    words = ["secateur", "prune", str(report.get("model", "MODEL")), "--method", str(report.get("method"))]
    words += ["--target", str(report.get("target")), "--seed", str(report.get("seed", 0))]
    for name, value in (report.get("hyperparameters") or {}).items():
        if isinstance(value, bool):
            words.append(f"--{'' if value else 'no-'}{name.replace('_', '-')}")
        elif value is not None and isinstance(value, str | int | float):
            words += [f"--{name.replace('_', '-')}", str(value)]
    return shlex.join(words)
