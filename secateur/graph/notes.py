"""What is noted while a model runs, for `build_graph` to resolve when it has finished."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from secateur.graph.labels import Axes
from secateur.graph.source import line


class Part:
    """The number of entries kept between two places of an axis; negative when counted from the end."""

    __slots__ = ("axes", "axis", "sign", "start", "stop")

    def __init__(self, axes: Axes, axis: int, start: int, stop: int, sign: int = 1):
        self.axes, self.axis = axes, axis % len(axes.shape)
        self.start, self.stop, self.sign = start, stop, sign


class Event:
    """A size that was passed to an operation, and what it has to be."""

    __slots__ = ("expr", "module", "part", "place")

    def __init__(self, expr: Any, part: Part, place: tuple[str, int], module: str):
        self.expr, self.part, self.place, self.module = expr, part, place, module

    @property
    def where(self) -> str:
        return line(*self.place)


class RuleError(NamedTuple):
    """A rule that failed otherwise than by NoRule: a defect of this package, not of the model."""

    op: str
    module: str
    error: str


class Layer(NamedTuple):
    """What ran with parameters of its own: a weight that channels meet, or what scales and shifts them.

    tensors: names by part: "weight", "bias" of a weight; "scale", "shift", "mean", "var" of channels; "" where a value isn't
    a parameter as it is. dims: (out, in) of the weight. reads: labels of the channels that it reads, None: unknown.
    """

    module: str
    tensors: dict[str, str]
    dims: tuple[int, int] = (0, 1)
    reads: np.ndarray | None = None
    groups: int = 1
    transposed: bool = False


class Run(NamedTuple):
    """A run on inputs of a form: what it did, as one number; of its outputs the shapes, whether they are finite, some values.

    finite: None where values were spared.
    """

    inputs: str
    ops: int
    shapes: list[tuple[int, ...]]
    finite: list[bool] | None
    some: list[Tensor]


def some_of(outputs: Sequence[Tensor]) -> list[Tensor]:
    """A few thousand values of each, evenly spread."""
    return [v.detach().reshape(-1)[:: max(1, v.numel() // 4096)].clone() for v in outputs]


@dataclass
class Notes:
    """What follows from the operations of one run, besides which labels were tied.

    splits: grids of labels that came from one split axis; all but one of their axes must agree.
    rigids: (labels, axis, why) where entries of an axis differ in meaning, so that it can't shrink.
    floors: (labels, k) where the model picks k of these units.
    grains: (labels, k) where a kernel reads rows of a multiple of k.
    rescaled: (head width, query labels, why) of attention scaled by the root of that width.
    choices: (module, operation, labels) where units compete.
    numbered: (labels, number or None for all, why) where code treats a unit by its number.
    experts: labels of a router, by the path of the list whose modules they number.
    grouped: channels of a grouped convolution, by its path.
    extras: labels that belong to no unit, such as one class more than there are experts.
    normalised: parameters that only a weight norm reads.
    events: sizes passed to operations; costs: (module, axes whose sizes multiply to its multiply-adds).
    roles: "out" or "in" of each parameter's axis; uses: parameters in the order of their first use.
    layers: what ran with parameters, in order.
    calls: (input, output) of each call of a module of a list, by path.
    unknown: why, by the name of the operation that has no rule; rule_errors: rules that failed.
    runs: what was run; ops: the operations of the present run so far, in order, as one number.
    """

    splits: list[np.ndarray] = field(default_factory=list)
    rigids: list[tuple[np.ndarray, int, str]] = field(default_factory=list)
    floors: list[tuple[np.ndarray, int]] = field(default_factory=list)
    grains: list[tuple[np.ndarray, int]] = field(default_factory=list)
    rescaled: list[tuple[np.ndarray, list[np.ndarray], str]] = field(default_factory=list)
    choices: list[tuple[str, str, np.ndarray]] = field(default_factory=list)
    numbered: list[tuple[np.ndarray, int | None, str]] = field(default_factory=list)
    experts: dict[str, np.ndarray] = field(default_factory=dict)
    grouped: dict[str, np.ndarray] = field(default_factory=dict)
    extras: set[int] = field(default_factory=set)
    normalised: set[str] = field(default_factory=set)
    events: list[Event] = field(default_factory=list)
    costs: list[tuple[str, list[Any]]] = field(default_factory=list)
    roles: dict[tuple[str, int], str] = field(default_factory=dict)
    uses: dict[str, int] = field(default_factory=dict)
    layers: list[Layer] = field(default_factory=list)
    calls: dict[str, list[tuple[Axes | None, Axes | None]]] = field(default_factory=dict)
    unknown: dict[str, str] = field(default_factory=dict)
    rule_errors: list[RuleError] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    ops: int = 0
