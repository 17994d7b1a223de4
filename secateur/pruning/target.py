"""Targets and schedules as text: `50%`, `params<=100e6`, `2:4`, `vocabulary=16000`, `iterative:3`."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from secateur.errors import SecateurError

FORMS = "50%, params<=100e6, macs<=50%, size<=200MB, latency<=8ms, 2:4, vocabulary=16000, tokens=64 or part=50%,other=65%"
_UNITS = {
    "size": {"": 1, "b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2**10, "mib": 2**20, "gib": 2**30},
    "latency": {"": 1e-3, "us": 1e-6, "ms": 1e-3, "s": 1.0},
    "params": {"": 1, "k": 1e3, "m": 1e6, "b": 1e9},
    "macs": {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12},
}
_NUMBER = r"\d+(?:\.\d*)?(?:e[+-]?\d+)?|\.\d+(?:e[+-]?\d+)?"


@dataclass(frozen=True)
class Target:
    """A parsed target. `value` is a share in 0..1 where `relative`, else parameters, multiply-adds, bytes, seconds or tokens."""

    kind: str
    value: float
    relative: bool
    text: str
    n_m: tuple[int, int] | None = None
    parts: tuple[tuple[str, Target], ...] = ()
    """Of kind "parts": the share of each part that is named; what lies in none stays whole."""

    def limit(self, dense: float) -> float:
        """The absolute limit, given the dense model's figure."""
        return self.value * dense if self.relative else self.value

    @property
    def meaning(self) -> str | None:
        """What a share without a percent sign was taken for, since other libraries read it as the share removed.

        >>> parse_target("0.3").meaning, parse_target("30%").meaning
        ('the target 0.3 was read as the share kept: 30 % stays', None)
        """
        if self.kind != "share" or self.value == 1 or "%" in self.text:
            return None
        return f"the target {self.text} was read as the share kept: {self.value * 100:g} % stays"

    def share(self, who: str) -> float:
        """The share kept, which `who` needs; raises `SecateurError` where the target is of another kind."""
        if self.kind != "share":
            raise SecateurError(f"{who} needs a share", where=f"target {self}", fix="such as 20%")
        return self.value

    def weights(self, total: int, others: int, who: str) -> int:
        """How many of `total` prunable weights stay, where `others` parameters lie outside them.

        >>> parse_target("params<=60").weights(80, 20, "wanda"), parse_target("30%").weights(80, 20, "wanda")
        (40, 24)

        Raises `SecateurError` where the others alone are over the limit, or the target says neither.
        """
        if self.kind != "params":
            return int(self.share(who) * total + 1e-9)
        keep = int(self.limit(total + others)) - others
        if keep < 1:
            raise SecateurError(
                f"{others:,} parameters lie outside linear and convolution weights, which alone is over the limit",
                where=f"target {self}",
                fix=f"ask for more than params<={others}",
            )
        return min(keep, total)

    def __str__(self) -> str:
        return self.text


def parse_target(text: str | float | Target) -> Target:
    """Text (or a share as a number) to a `Target`.

    >>> parse_target("75%").value, parse_target("params<=100e6").value, parse_target("2:4").n_m
    (0.75, 100000000.0, (2, 4))

    Raises `SecateurError` when it can't be read or lies outside what can be meant.
    """
    if isinstance(text, Target):
        return text
    raw = f"{text:g}" if isinstance(text, int | float) else str(text)
    clean = raw.strip().lower().replace(" ", "").replace("≤", "<=")
    if match := re.fullmatch(rf"({_NUMBER}|-\d+(?:\.\d+)?)(%?)", clean):
        share = float(match[1]) / (100 if match[2] else 1)
        if not 0 < share <= 1:
            raise SecateurError(
                f"{raw!r} keeps {share:g} of the units, which is outside 0..1",
                where="target",
                fix="a target is the share kept, such as 50%",
            )
        return Target("share", share, True, raw)
    if match := re.fullmatch(r"(\d+):(\d+)", clean):
        n, m = int(match[1]), int(match[2])
        if not 0 < n <= m or m < 2:
            raise SecateurError(
                f"{raw!r} isn't a pattern", where="target", fix="N:M keeps N of every M weights, such as 2:4"
            )
        return Target("n_m", n / m, True, raw, (n, m))
    if match := re.fullmatch(r"tokens=(\d+)", clean):
        return Target("tokens", float(match[1]), False, raw)
    if match := re.fullmatch(r"vocabulary=(\d+|used)", clean):
        return Target("vocabulary", math.inf if match[1] == "used" else float(match[1]), False, raw)
    if re.fullmatch(r"[^<>=,]+=[^<>=,]+(,[^<>=,]+=[^<>=,]+)*", raw):
        return _of_parts(raw)
    if match := re.fullmatch(rf"(params|macs|size|latency)<=({_NUMBER})([a-z%]*)", clean):
        kind, number, unit = match[1], float(match[2]), match[3]
        if unit == "%":
            if not 0 < number <= 100:
                raise SecateurError(f"{raw!r} is outside 0..100 %", where="target", fix="such as macs<=50%")
            return Target(kind, number / 100, True, raw)
        if unit in _UNITS[kind] and number > 0:
            return Target(kind, number * _UNITS[kind][unit], False, raw)
    raise SecateurError(f"{raw!r} can't be read", where="target", fix=f"write one of {FORMS}")


def _of_parts(raw: str) -> Target:
    """`text_encoder=52.5%,unet=65%`: a share for each part."""
    parts: dict[str, Target] = {}
    for item in raw.split(","):
        name, _, share = (word.strip() for word in item.partition("="))
        goal = parse_target(share)
        if goal.kind != "share":
            raise SecateurError(
                f"{share!r} is no share",
                where=f"target {raw}",
                fix=f"give shares of parts, such as {name}=50%",
            )
        if name in parts:
            raise SecateurError(f"{name} is named twice", where=f"target {raw}", fix="name each part once")
        parts[name] = goal
    return Target("parts", min(goal.value for goal in parts.values()), True, raw, parts=tuple(parts.items()))


def parse_schedule(text: str) -> int:
    """The number of rounds: `once` is 1, `iterative:K` is K."""
    if text == "once":
        return 1
    if (match := re.fullmatch(r"iterative:(\d+)", text.strip())) and int(match[1]) > 0:
        return int(match[1])
    raise SecateurError(
        f"{text!r} isn't a schedule", where="schedule", fix="write once or iterative:K, K >= 1"
    )


def rounds(share: float, count: int) -> list[float]:
    """Shares kept after each of `count` rounds, falling linearly to `share`."""
    return [1 - (1 - share) * (i + 1) / count for i in range(count)]
