"""What is compared, as data: what every run of a comparison shares."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from secateur.errors import SecateurError, require
from secateur.pruning.target import parse_target
from secateur.utils.ranges import check_fields

COSTS = ("params", "macs", "tokens")
"""What equal budgets are counted in: parameters that aren't zero, multiply-adds, visual tokens times layers."""


@dataclass(frozen=True)
class Setup:
    """What the runs of a comparison share. Raises `SecateurError` for what is out of range.

    >>> Setup("digits", cost="macs", steps=100).budget("60%")
    'macs<=60%'
    """

    task: str
    cost: str = field(
        default="params",
        metadata={"help": "what budgets are counted in: params, macs, tokens", "choices": COSTS},
    )
    steps: int = field(
        default=0,
        metadata={
            "help": "training steps: of methods that train, and after the cut of those that don't; 0: none, and no methods that train",
            "min": 0,
        },
    )
    samples: int = field(
        default=128, metadata={"help": "calibration samples, the same for all methods", "min": 1}
    )
    train: int | None = field(default=None, metadata={"help": "train on at most so many samples", "min": 1})
    test: int | None = field(
        default=None, metadata={"help": "judge on at most so many samples or windows", "min": 1}
    )
    latency: bool = field(default=True, metadata={"help": "time each result beside the dense model"})
    threads: int = field(default=1, metadata={"help": "of each run", "min": 1})
    minutes: float | None = field(
        default=None,
        metadata={"help": "processor minutes after which a run is stopped; its row says so", "above": 0},
    )
    geometry: bool = field(
        default=False,
        metadata={
            "help": "of classifiers of pictures: angle, norm and margin of the last features, clean and under corruptions"
        },
    )
    geometry_pictures: int = field(
        default=200, metadata={"help": "pictures of which the geometry is gathered", "min": 1}
    )
    geometry_corruptions: str = field(
        default="common",
        metadata={
            "help": "common (fifteen), all (nineteen), or names with commas, such as fog,gaussian_noise"
        },
    )

    def __post_init__(self) -> None:
        check_fields(self)

    def budget(self, share: str) -> str:
        """The target of a method that is given this share of the cost."""
        return f"{self.cost}<={share}"

    def as_json(self) -> dict[str, Any]:
        """The fields; those of the geometry only where it is gathered, as in folders from before it was."""
        found = dataclasses.asdict(self)
        return found if self.geometry else {n: v for n, v in found.items() if not n.startswith("geometry")}

    @classmethod
    def read(cls, found: Mapping[str, Any], where: str) -> Setup:
        """The way back from `as_json`. Raises `SecateurError` for what this version doesn't know."""
        try:
            return cls(**found)
        except TypeError as error:
            raise SecateurError(
                f"its settings can't be read ({error})",
                where=where,
                fix="read it with the version that wrote it, or compare again in a new folder",
            ) from error


def shares(targets: tuple[str, ...] | list[str]) -> list[str]:
    """The targets as percentages, checked: equal budgets need a plain share each.

    >>> shares(["80%", "0.6"])
    ['80%', '60%']

    Raises `SecateurError` for none, for anything but a share below 1, and for one that is given twice.
    """
    require(bool(targets), "there is none", where="targets", fix="such as 80%,60%,40%")
    found = []
    for target in targets:
        read = parse_target(target)
        if read.kind != "share" or not 0 < read.value < 1:
            raise SecateurError(
                f"{target!r} isn't a share below 100 %",
                where="targets",
                fix="give shares, 80%,60%,40%; what they are shares of is the cost",
            )
        found.append(f"{read.value * 100:g}%")
    if len(set(found)) < len(found):
        raise SecateurError("one is given twice", where=f"targets {', '.join(found)}", fix="give each once")
    return found
