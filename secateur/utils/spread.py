"""What several timings say: a ratio with its spread, in digits that the spread supports."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

AGREE = 7 / 8
"""A difference is taken for real where this share of the pairs shows it,"""
ENOUGH = 5
"""of at least so many."""


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """(lower quartile, median, upper quartile).

    >>> quartiles([1.0, 2.0, 3.0, 4.0, 5.0])
    (2.0, 3.0, 4.0)
    """
    low, middle, high = statistics.quantiles([*values] * (1 + (len(values) == 1)), n=4, method="inclusive")
    return low, middle, high


def decimals(low: float, high: float, most: int = 2) -> int:
    """How many decimals a number between these two supports: the first in which they differ; at most `most`.

    >>> decimals(1.61, 1.79), decimals(1.68, 1.71), decimals(431, 470)
    (1, 2, -1)
    """
    return most if high <= low else min(most, -math.floor(math.log10(high - low)))


@dataclass(frozen=True)
class Speed:
    """How many times as fast the second of two is: the median of the ratios of pairs that ran in turn, and their quartiles.

    >>> str(Speed.of([1.70, 1.64, 1.75, 1.68, 1.66, 1.72], [1.0] * 6))
    '1.69x (1.66 to 1.71)'
    >>> str(Speed.of([1.01, 0.98, 1.03, 0.99, 1.02, 0.97], [1.0] * 6))
    'not distinguishable from 1 (0.98 to 1.02)'
    """

    ratio: float
    low: float
    high: float
    pairs: int
    agree: float
    """The share of the pairs in which the same side is ahead."""

    @classmethod
    def of(cls, first: Sequence[float], second: Sequence[float]) -> Speed:
        """From the seconds of both, taken in turn."""
        ratios = [a / b for a, b in zip(first, second, strict=True)]
        low, ratio, high = quartiles(ratios)
        faster, slower = (sum(sign * r > sign for r in ratios) / len(ratios) for sign in (1, -1))
        return cls(ratio, low, high, len(ratios), max(faster, slower))

    @property
    def differs(self) -> bool:
        """Whether one is faster beyond the noise: seven of eight pairs say so, at least five, and by half a percent."""
        clear = not self.low <= 1 <= self.high and round(self.ratio, 2) != 1
        return clear and self.pairs >= ENOUGH and self.agree >= AGREE

    @property
    def span(self) -> str:
        """The quartiles: half of the pairs lie between them."""
        places = max(1, decimals(self.low, self.high))
        return f"{self.low:.{places}f} to {self.high:.{places}f}"

    def __str__(self) -> str:
        if self.differs:
            return f"{self.ratio:.{max(1, decimals(self.low, self.high))}f}x ({self.span})"
        return f"not distinguishable from 1 ({self.span})" if self.pairs > 1 else "not known from one pair"

    def as_dict(self) -> dict[str, Any]:
        """As JSON holds it; `read` is the way back."""
        return {**dataclasses.asdict(self), "differs": self.differs}

    @classmethod
    def read(cls, held: Mapping[str, Any]) -> Speed:
        return cls(**{item.name: held[item.name] for item in dataclasses.fields(cls)})
