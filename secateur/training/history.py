"""Quality while a network trains: when it is best, and what it was at every measured step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from secateur.errors import SecateurError
from secateur.training.state import State


class History:
    """A hook after each step that measures quality every `every` steps and after the last; kept in checkpoints.

    >>> history = History(model_quality, every=100)  # doctest: +SKIP
    >>> fit(model, data, steps=1000, after_step=[history])  # doctest: +SKIP
    >>> history.best  # doctest: +SKIP
    (600, 0.913)
    """

    def __init__(self, quality: Callable[[nn.Module], float], every: int, sign: int = 1):
        if every < 1:
            raise SecateurError(f"{every} is less than 1", where="History", fix="give a whole number from 1")
        self.quality, self.every, self.sign = quality, every, sign
        self.steps: list[int] = []
        self.values: list[float] = []

    def __call__(self, state: State) -> None:
        done = state.step + 1
        if done % self.every == 0 or done == state.steps:
            self.steps.append(done)
            self.values.append(float(self.quality(state.model)))

    @property
    def best(self) -> tuple[int, float]:
        """(the first step after which it was best, how good): the highest, or with sign -1 the lowest."""
        value = max(self.values, key=lambda value: self.sign * value)
        return self.steps[self.values.index(value)], value

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "values": self.values}

    def load_state_dict(self, kept: dict[str, Any]) -> None:
        self.steps, self.values = list(kept["steps"]), list(kept["values"])
