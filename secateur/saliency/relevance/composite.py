"""Which relevance rule each layer gets."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from secateur.errors import choose

ATTENTION = ("values", "softmax")
RULES = ("z+", "epsilon", "alpha-beta", "flat", "box")


@dataclass(frozen=True)
class Composite:
    """Which rule each layer gets.

    >>> Composite(linear="epsilon", first="box", low=-2.1, high=2.6)  # doctest: +SKIP

    `first`: of layers on the pixels themselves; `last`: of the layer that gives the logits; None: as the others.
    """

    conv: str = "z+"
    linear: str = "z+"
    first: str | None = None
    last: str | None = None
    epsilon: float = 1e-6
    """Of the epsilon rule, of sums, means and attention; has the sign of what it is added to."""
    stabiliser: float = 1e-9
    """Of the other rules."""
    biases: bool = False
    """Whether positive (for alpha-beta also negative) biases take their share in z+ and alpha-beta."""
    alpha: float = 2.0
    beta: float = 1.0
    attention: str = "values"
    """Attention's weights are constants and the values get all (`values`), or half goes on to queries and keys through the softmax
    (`softmax`: Achtibat et al. 2024, arXiv 2402.05602), which keeps what the softmax's own offset takes."""
    low: float | None = None
    """Least and greatest value of a pixel, for `box`; None: those of the batch."""
    high: float | None = None

    def __post_init__(self) -> None:
        choose(self.attention, ATTENTION, what="rule of attention", where="lrp")
        for name in ("conv", "linear", "first", "last"):
            rule = getattr(self, name)
            if rule is not None or name not in ("first", "last"):
                choose(rule, RULES, what="rule", where=f"lrp, {name}")


COMPOSITES = {
    "z+": Composite(),
    "epsilon": Composite(conv="epsilon", linear="epsilon"),
    "alpha2-beta1": Composite(conv="alpha-beta", linear="epsilon"),
    "epsilon-plus": Composite(linear="epsilon"),
    "epsilon-plus-flat": Composite(linear="epsilon", first="flat"),
    "epsilon-plus-box": Composite(linear="epsilon", first="box"),
    "attn-lrp": Composite(conv="epsilon", linear="epsilon", attention="softmax"),
    "z-conv": Composite(conv="epsilon", linear="z+", epsilon=1e-9),
}
"""Common choices; `z-conv` is that of salient-relevance."""


def as_composite(composite: str | Composite, **changes: Any) -> Composite:
    """A composite by name, with some fields changed.

    Raises `SecateurError` for another name.
    """
    if isinstance(composite, str):
        composite = COMPOSITES[choose(composite, COMPOSITES, what="composite", where="lrp")]
    return dataclasses.replace(composite, **changes)
