"""A weight that comes in over the first steps of a training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from secateur.training.state import State


@dataclass
class Ramp:
    """A hook for `after_step` that knows how far the training is: `weight` rises from 0 to 1 over the first `share` of it.

    >>> ramp = Ramp(0.2)
    >>> ramp.weight, Ramp(0.0).weight
    (0.0, 1.0)

    Kept in checkpoints, so that a resumed run has the weight of its step.
    """

    share: float
    step: int = 0
    steps: int = 1

    def __call__(self, state: State) -> None:
        self.step, self.steps = state.step + 1, state.steps

    @property
    def weight(self) -> float:
        return min(1.0, self.step / self.steps / self.share) if self.share else 1.0

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.step, self.steps = state["step"], state["steps"]
