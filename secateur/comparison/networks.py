"""Networks of tasks: cut, and trained on for as long as methods that train may."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import Tensor, nn

from secateur.comparison.details import gradient_map
from secateur.comparison.rows import Run
from secateur.comparison.setup import Setup
from secateur.comparison.work import SEQLEN, Figures, Work, by_chance, check_fit, cost, removes_units, told
from secateur.errors import SecateurError
from secateur.graph import trace
from secateur.method import Method, method_class
from secateur.pruning.prune import Pruned, prune
from secateur.tasks import load_task
from secateur.training import fit
from secateur.training.batches import length, take
from secateur.training.masks import Masked
from secateur.training.train_prune import train_prune

BATCH = 32
"""Samples of a calibration batch."""


class TaskWork(Work):
    """A trained network of a task: cut, and trained on for as long as methods that train may."""

    verbs = ("prune", "train_prune")
    costs = ("params", "macs")

    def __init__(self, setup: Setup):
        super().__init__(setup)
        self.task = load_task(setup.task, train=setup.train, test=setup.test)
        self.metric, self.sign = self.task.metric, self.task.sign
        if self.task.pretrained is None or self.task.quality is None:
            raise SecateurError(
                "it has no trained network to compare on", where=f"task {setup.task}", fix="take another task"
            )

    @functools.cached_property
    def network(self) -> nn.Module:
        assert self.task.pretrained is not None
        return self.task.pretrained().eval()

    @functools.cached_property
    def kinds(self) -> tuple[str, ...] | None:
        """Kinds of unit for chance to draw from: its own, or channels where the network has none of these."""
        own = method_class("random-structured").kinds  # type: ignore[attr-defined]
        graph = trace(self.network, self.task.inputs)
        return None if any(graph.prunable(kind) for kind in own) else ("channels",)

    def dense(self, seed: int) -> Figures:
        return self._figures(self.network) | {"map": gradient_map(self.network, self.task.train)}

    def run(self, run: Run) -> Figures:
        kind = method_class(run.method)
        check_fit(self, kind, run.method, self.setup)
        target = self.setup.budget(run.target)
        if kind.verb == "train_prune":
            done = train_prune(
                self.task, method=run.method, target=target, steps=self.setup.steps, seed=run.seed
            )
        else:
            done = prune(
                copy.deepcopy(self.network),
                self.task.inputs,
                method=run.method,
                target=target,
                data=calibration(self.task.train, self.network, self.setup.samples, run.seed),
                loss=self.task.loss,
                seed=run.seed,
                inplace=True,
                rollback=False,
                **self._options(kind),
            )
            if self.setup.steps:
                self._tune(done, run.seed)
        found = self._figures(done.model, done) | told(done)
        return found | {"map": gradient_map(done.model, self.task.train)}

    def _options(self, kind: type[Method]) -> dict[str, Any]:
        """Options of `prune` that follow from the data, and the kinds of unit that chance draws from."""
        text = {"seqlen": SEQLEN} if isinstance(self.task.train, Tensor) else {}
        return text | ({"kinds": self.kinds} if by_chance(kind) and removes_units(kind) else {})

    def _tune(self, done: Pruned, seed: int) -> None:
        masks = {name: mask for name, mask in done.plan.masks.items()}
        fit(
            done.model,
            self.task.train,
            steps=self.setup.steps,
            seed=seed,
            loss=self.task.loss,
            augment=self.task.augment,
            recipe=self.task.recipe,
            after_step=[Masked(done.model, masks)] if masks else [],
        )
        done.model.eval()

    def _figures(self, model: nn.Module, done: Pruned | None = None) -> Figures:
        assert self.task.quality is not None
        return {"quality": float(self.task.quality(model))} | cost(
            model, self.network, self.task.inputs, self.setup, done
        )


def calibration(train: Any, network: nn.Module, samples: int, seed: int) -> Any:
    """`samples` of a task's training data as what `prune` calibrates on: batches, rows of token ids, or what the network draws."""
    if hasattr(network, "calibration_inputs"):
        return None
    count = length(train)
    generator = torch.Generator().manual_seed(seed)
    if isinstance(train, list):
        return take(train, torch.randperm(count, generator=generator)[: max(1, samples // BATCH)])
    rows = torch.randperm(count, generator=generator)[:samples]
    return (
        take(train, rows) if isinstance(train, Tensor) else [take(train, part) for part in rows.split(BATCH)]
    )
