"""Networks of tasks: cut, and trained on for as long as methods that train may."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import Tensor, nn

from secateur.comparison.details import gradient_map
from secateur.comparison.geometry import Lens, chosen, lens, measured
from secateur.comparison.rows import Run
from secateur.comparison.setup import Setup
from secateur.comparison.work import SEQLEN, Figures, Work, by_chance, check_fit, cost, removes_units, told
from secateur.errors import SecateurError
from secateur.graph import trace
from secateur.method import Method, method_class
from secateur.pruning.prune import Pruned, prune_with
from secateur.tasks import load_task
from secateur.training import fit
from secateur.training.batches import length, take
from secateur.training.masks import Masked
from secateur.training.sampling import visited
from secateur.training.task import Task
from secateur.training.train_prune import train_prune
from secateur.utils.inputs import Inputs, map_tensors
from secateur.utils.running import device_of
from secateur.utils.types import Objective

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

    @classmethod
    def check_geometry(cls, setup: Setup) -> None:
        shown = load_task(setup.task, train=1, test=1).pictures
        if shown is None:
            super().check_geometry(setup)
        else:
            chosen(setup.geometry_corruptions, shown(1).pixels.shape[1])

    @functools.cached_property
    def lens(self) -> Lens:
        assert self.task.pictures is not None
        return lens(self.setup, self.task.pictures(self.setup.geometry_pictures), self.network)

    def _geometry(self, model: nn.Module, pictures: bool = False) -> Figures:
        return {"geometry": measured(self.lens, model, pictures)} if self.setup.geometry else {}

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
        found = self._figures(self.network) | self._geometry(self.network, pictures=seed == 0)
        return found | {"map": gradient_map(self.network, self.task.train, self.task.inputs)}

    def run(self, run: Run) -> Figures:
        kind = method_class(run.method)
        check_fit(self, kind, run.method, self.setup)
        target = self.setup.budget(run.target)
        if kind.verb == "train_prune":
            done = train_prune(
                self.task, method=run.method, target=target, steps=self.setup.steps, seed=run.seed
            )
        else:
            done = prune_with(
                copy.deepcopy(self.network),
                self.task.inputs,
                method=run.method,
                target=target,
                data=calibration(self.task, self.network, self.setup.samples, run.seed),
                loss=self._loss(run.seed),
                seed=run.seed,
                inplace=True,
                rollback=False,
                **self._options(kind),
            )
            if self.setup.steps:
                self._tune(done, run.seed)
        found = self._figures(done.model, done) | told(done) | self._geometry(done.model)
        return found | {"map": gradient_map(done.model, self.task.train, self.task.inputs)}

    def _options(self, kind: type[Method]) -> dict[str, Any]:
        """Options of `prune` that follow from the data, and the kinds of unit that chance draws from."""
        text = {"seqlen": SEQLEN} if isinstance(self.task.train, Tensor) else {}
        return text | ({"kinds": self.kinds} if by_chance(kind) and removes_units(kind) else {})

    def _loss(self, seed: int) -> Objective | None:
        """The task's loss. A network that draws is calibrated on what it meets, which has no loss: that of as many samples to
        train on, with the same noise at each call, stands in."""
        loss = self.task.loss
        if self.task.sampler is None or loss is None:
            return loss
        shown = take(self.task.train, drawn(self.task.train, self.setup.samples, seed))

        def fixed(model: nn.Module, batch: Inputs) -> Tensor:
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                return loss(model, map_tensors(shown, lambda tensor: tensor.to(device_of(model))))

        return fixed

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


def calibration(task: Task, network: nn.Module, samples: int, seed: int) -> Any:
    """`samples` of a task's training data as what `prune` calibrates on: batches, or rows of token ids; of a network that draws,
    what it meets in so many drawings."""
    if hasattr(network, "calibration_inputs"):
        return None  # `prune` asks the network
    if task.sampler is not None:
        return visited(network, task.sampler, samples, seed)
    if isinstance(task.train, list):
        return take(task.train, drawn(task.train, max(1, samples // BATCH), seed))
    rows = drawn(task.train, samples, seed)
    if isinstance(task.train, Tensor):
        return take(task.train, rows)
    return [take(task.train, part) for part in rows.split(BATCH)]


def drawn(train: Any, count: int, seed: int) -> Tensor:
    """int64 [count]: so many of the training data, by the seed."""
    return torch.randperm(length(train), generator=torch.Generator().manual_seed(seed))[:count]
