"""The kind of method that prunes while it trains."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

from secateur.method import Method

if TYPE_CHECKING:
    from secateur.pruning.plan import Plan
    from secateur.training.job import Job


@dataclasses.dataclass
class TrainMethod(Method):
    """Prunes while the network is trained, on a task's data: `secateur.train_prune`.

    Write `prune`: phases of training (`job.train`), what is removed between or during them, and the plan at the end.
    """

    verb: ClassVar[str] = "train_prune"
    starts: ClassVar[str] = "init"
    """What the first phase begins with: "init", untrained weights, or "trained" ones."""
    draws: ClassVar[bool] = False
    """Whether it needs a task whose model draws in steps (`Task.sampler`)."""
    removes: ClassVar[str] = "weights"
    """Single "weights" (zeros) or whole "units" (smaller tensors)."""
    kinds: ClassVar[tuple[str, ...] | None] = None
    """The kinds of unit it cuts, where it removes units; None: every kind the graph has."""
    share_of: ClassVar[str] = "units"
    """What a bare percentage counts, where it removes units: as for `UnitMethod`."""

    @classmethod
    def usual(cls) -> dict[str, Any]:
        units = cls.removes == "units"
        own = {"objects": "N F C H" if units else "W", "granularity": "struct" if units else "unstr"}
        own |= {"speedup": "univ" if units else "spec", "when": "PAT", "data": "data", "recovery": "train"}
        own |= {"start": "init" if cls.starts == "init" else "pre", "supervision": "supervised"}
        return {**super().usual(), **own}

    def prune(self, job: Job) -> Plan:
        """Trains `job.model` in phases and gives the plan. It is run again from its top when a run is resumed: finished
        phases are then read, so what lies between them must be a function of the model, the job and the seed."""
        raise self.lacks("prune")
