"""What a report says, before it is drawn: figures with units, ratios, rows of the before/after table, honest notes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from secateur.utils.collapse import collapses
from secateur.utils.spread import Speed, decimals

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
SKIPPED = "of the multiply-adds of the parts that skip"
TIMES = ("forward_seconds", "decode_seconds_per_token")
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
            found["accuracy", task + METRICS.get(metric, f" ({metric})")] = number_
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


def seconds_within(value: float, low: float, high: float) -> str:
    """Seconds in the digits that their spread supports.

    >>> seconds_within(0.447, 0.431, 0.470), seconds_within(0.00512, 0.00511, 0.00513), seconds_within(1.28, 1.1, 1.6)
    ('450 ms', '5.12 ms', '1.3 s')
    >>> seconds_within(0.00043, 0.0001, 0.002)  # one digit at least
    '400 µs'
    """
    unit = 1.0 if value >= 1 else 1e-3 if value >= 1e-3 else 1e-6
    first = -math.floor(math.log10(value / unit))
    places = max(first, decimals(low / unit, high / unit, most=first + 2))
    return in_seconds(round(value / unit, places) * unit)


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

    `reason`: why a side is missing. `spans`: quartiles of what was timed, before and after. `speed`: of both run in turn.
    """

    key: str
    label: str
    before: float | None
    after: float | None
    reason: str | None = None
    spans: tuple[Sequence[float] | None, Sequence[float] | None] = (None, None)
    speed: Speed | None = None

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
        if self.speed is not None:
            return speed_words(self.speed)
        if self.key in TIMES:
            return f"{self.ratio:.0%}, not in turn".replace("%", " %")
        if self.ratio == 1:
            return "same"
        if self.key == "perplexity":
            return f"× {self.ratio:.3g}"
        return f"{self.ratio:.1%}".replace("%", " %")

    @property
    def texts(self) -> tuple[str, str, str, str]:
        sides = zip((self.before, self.after), self.spans, strict=True)
        first, last = (
            seconds_within(value, *span) if value and span else figure(self.key, value)
            for value, span in sides
        )
        return self.label, first, last, self.change


def speed_words(speed: Speed) -> str:
    """How fast what is left is, with the spread.

    >>> speed_words(Speed.of([1.70, 1.64, 1.75, 1.68, 1.66, 1.72], [1.0] * 6))
    '1.69 × as fast (1.66 to 1.71)'
    >>> speed_words(Speed.of([1.01, 0.98, 1.03, 0.99, 1.02, 0.97], [1.0] * 6))
    'unclear (0.98 to 1.02)'
    """
    if speed.differs:
        return f"{speed}".replace("x (", " × as fast (")
    return f"unclear ({speed.span})" if speed.pairs > 1 else "unclear, one run"


def rows(
    before: Mapping[str, Any], after: Mapping[str, Any], speed: Mapping[str, Any] | None = None
) -> list[Row]:
    """The before/after table: every single figure that either side has or says why not, then quality by task.

    speed: `timing.latencies`' of both, by key.
    """
    left, right = single(before), single(after)
    spans = [(side.get("latency") or {}).get("quartiles") or {} for side in (before, after)]
    speeds = {key: Speed.read(held) for key, held in (speed or {}).items()}
    why = {**(before.get("not_measured") or {}), **(after.get("not_measured") or {})}
    labels = {**FIGURES, "macs": FIGURES["macs"] + _tokens(before)}
    found = [
        Row(
            key,
            label,
            left[key],
            right[key],
            why.get(key),
            (spans[0].get(key), spans[1].get(key)),
            speeds.get(key),
        )
        for key, label in labels.items()
    ]
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
    parameters that are not zero are counted. Where work is skipped while the network runs, the share that is done is said.
    """
    before, after = single(report.get("before") or {}), single(report.get("after") or {})
    same = before["params"] == after["params"] and before["params_nonzero"] != after["params_nonzero"]
    shares = []
    for key in ("params_nonzero" if same else "params", "macs"):
        row = Row(key, FIGURES[key], before[key], after[key])
        if key == "macs" and (phases := skipping(report)):
            shares.append(f"{phases[-1]['work']:.1%} {SKIPPED}".replace("%", " %"))
        elif row.ratio is not None:
            shares.append(f"{row.ratio:.1%} of the {row.label}".replace("%", " %"))
    for part in report.get("parts") or ():
        if part["size"]:
            shares.append(
                f"{part['kept'] / part['size']:.1%} of the weights of {part['name']}".replace("%", " %")
            )
    return f"left: {', '.join(shares)}" if shares else ""


def skipping(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The phases in which a network that skips work while it runs was measured doing so."""
    return [phase for phase in report.get("phases") or () if phase.get("work") is not None]


def skipped(report: Mapping[str, Any]) -> list[str]:
    """What a network that skips work reaches while it skips.

    >>> phases = [{"phase": "pruned", "quality": 0.75, "work": 0.5}]
    >>> skipped({"task": {"metric": "accuracy"}, "phases": phases})[0].partition(";")[0]
    'where work is skipped: accuracy 75.0 %, 50.0 % of the multiply-adds of the parts that skip'
    """
    metric = (report.get("task") or {}).get("metric") or "quality"
    found = []
    for phase in skipping(report):
        work = f"{phase['work']:.1%} {SKIPPED}".replace("%", " %")
        reached = f"{metric} {figure(metric, phase.get('quality'))}"
        found.append(
            f"where work is skipped: {reached}, {work}; the table has the network that skips nothing"
        )
    return found


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
    for row in rows(before, after, report.get("speed")):
        if row.reason and not (row.key == "perplexity" and row.before):  # else it is an alarm
            found.append(f"{row.label} was not measured: {row.reason}")
        if row.key == "forward_seconds" and row.speed and SPARSE_NOTE not in found:
            if row.speed.differs and row.speed.ratio < 1:
                found.append("it is slower: a smaller count of multiply-adds did not shorten the time")
            elif not row.speed.differs:
                found.append("it is not measurably faster: the difference is within the noise of the timing")
    found += filter(None, [busy(before, after)])
    found += skipped(report)
    if trained := report.get("recovery"):
        between = by_task(report.get("cut") or {})
        was = [f"{kind}, {task} was {figure(kind, value)}" for (kind, task), value in between.items()]
        text = f"after the cut it was trained ({trained['recover']}, {trained['steps']} steps)"
        text += f"; before that {'; '.join(was)}" if was else ""
        found.append(text + "; applying the plan again gives the untrained model")
    if report.get("met") is False:
        found.append("the target was not met")
    return list(dict.fromkeys(found))


def busy(*sides: Mapping[str, Any]) -> str:
    """What to say of times that were taken beside other work; "" where there was little.

    >>> busy({"latency": {"crowded": True, "others": 1.4, "processors": 2}})
    'the machine was busy while times were taken (other programs used 1.4 of 2 processors): time again when it is idle'
    """
    for side in sides:
        times = side.get("latency") or {}
        if times.get("crowded"):
            used = f"other programs used {times['others']:.1f} of {times['processors']} processors"
            return f"the machine was busy while times were taken ({used}): time again when it is idle"
    return ""


def alarms(report: Mapping[str, Any]) -> list[str]:
    """What broke, and, last, what to do about it; empty where nothing did. The rule is that of `utils.collapse`.

    >>> before, after = {"perplexity": {"ptb": 20.0}}, {"perplexity": {"ptb": 50.0}}
    >>> alarms({"before": before, "after": after, "target": "50%"})[0]
    'collapsed: perplexity, ptb went from 20 to 50: 2.5 times what it was'
    """
    found = []
    for broken in collapses(_whole(report), report.get("after") or {}):
        values = [figure(broken.kind, value) for value in (broken.before, broken.after)]
        task = broken.task + METRICS.get(broken.metric, "")
        found.append(f"collapsed: {broken.kind}, {task} went from {values[0]} to {values[1]}: {broken.why}")
    return [*found, _what_next(report)] if found else []


def _whole(report: Mapping[str, Any]) -> Mapping[str, Any]:
    """The figures of the whole network: where it was trained before anything left, those of its best phase."""
    before, task = report.get("before") or {}, report.get("task") or {}
    metric, name = task.get("metric"), task.get("name")
    reached = [
        row["quality"] for row in report.get("phases") or [] if row.get("density") == 1 and row.get("quality")
    ]
    if not reached or metric not in ("accuracy", "miou", "psnr"):
        return before
    if metric == "psnr":
        return {**before, "psnr": {name: max(reached)}}
    return {**before, "accuracy": {name: {"acc" if metric == "accuracy" else metric: max(reached)}}}


def _what_next(report: Mapping[str, Any]) -> str:
    target = report.get("target")
    ways = [f"a milder target than {target}" if target else "a milder target"]
    if report.get("task"):
        ways.insert(0, "longer training (--epochs)")
    elif report.get("recovery"):
        ways.insert(0, "more --steps of recovery")
    elif (report.get("before") or {}).get("perplexity"):
        ways.insert(0, "training after the cut (--recover lora)")
    else:
        ways.insert(0, "training after the cut")
    return f"what to try: {', '.join(ways)}, or another method (`secateur recommend` names some)"


def lost(unreached: Sequence[str]) -> str:
    """What to say of parameters that no traced run read, though what was cut is as wide as they are.

    >>> lost(["aux.weight", "aux.bias"])
    'never reached by the trace: aux.weight and 1 more; a branch that reads them may not run any more: trace it too, with --also (also=)'
    """
    more = f" and {len(unreached) - 1} more" if len(unreached) > 1 else ""
    name = f"never reached by the trace: {unreached[0]}{more}"
    return f"{name}; a branch that reads them may not run any more: trace it too, with --also (also=)"


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
