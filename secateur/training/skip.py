"""The kind of method that trains a network to leave out work while it runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from secateur.skipping.attached import Skipping
from secateur.training.method import TrainMethod
from secateur.training.task import Task


@dataclasses.dataclass
class SkipMethod(TrainMethod):
    """No weight leaves: tokens or windows do, picture by picture, while the network runs.

    >>> pruned = secateur.train_prune(load_task("salient-patches"), method="dtop")  # doctest: +SKIP
    >>> with secateur.attach(pruned.model, "dtop", p0=0.95) as attached:  # doctest: +SKIP
    ...     logits = pruned.model(pictures)

    Write `attach`; `prune`, which trains with `attach(model, masked=True)`; and `example`. There is no target but 100 %.
    """

    removes: ClassVar[str] = "work"
    starts: ClassVar[str] = "trained"
    everything: ClassVar[Mapping[str, Any]] = {}
    """Hyperparameters with which nothing is skipped: the network then gives what it gives without the method, bit for bit."""
    shown_on: ClassVar[str] = "digits"
    """The task of the examples on its page."""

    @classmethod
    def usual(cls) -> dict[str, Any]:
        own = {"objects": "T", "granularity": "token", "speedup": "univ", "when": "RT"}
        return {**super().usual(), **own, "data": "data", "decision": "dyn", "budget_unit": "tokens"}

    @classmethod
    def example(cls) -> Task:
        """A tiny task that the method can be trained on, for the common checks: `build` gives its network."""
        raise NotImplementedError(f"{cls.__name__} has no example")

    def attach(self, model: nn.Module, masked: bool = False) -> Skipping:
        """The network skips until `detach`, on what it is given.

        masked: all is computed and what would be skipped is masked, for training; else it is really left out. Both give the
        same numbers. Raises `SecateurError` for a network that it can't be put on.
        """
        raise self.lacks("attach")
