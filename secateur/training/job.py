"""What a training-time method sees: the network, its task, the phases of training, and how its plan comes out."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.gates import Gate, Gated, place
from secateur.graph import Graph, Group
from secateur.graph.blocks import find_matrices
from secateur.graph.smaller import left
from secateur.method import Method
from secateur.pruning.context import Context
from secateur.pruning.options import Options
from secateur.pruning.plan import DENSE_NOTE, Plan
from secateur.pruning.request import removes_units
from secateur.pruning.target import Target
from secateur.solvers.batchnorm import reestimate_batchnorm
from secateur.surgery import Shrinking, cut_units, prove
from secateur.training.batches import Draw, length, step_seed
from secateur.training.checkpoint import Moments, copy_moments
from secateur.training.cuts import Cuts, Decide
from secateur.training.fit import fit
from secateur.training.journal import Journal
from secateur.training.losses import checked_loss
from secateur.training.masks import Masked
from secateur.training.recipe import Recipe
from secateur.training.state import Hook, State
from secateur.training.task import Task
from secateur.utils.batches import inputs_of, sequences_in
from secateur.utils.inputs import Inputs, map_tensors
from secateur.utils.random import seed_of, seeded
from secateur.utils.running import device_of, evaluating
from secateur.utils.screen import Screen
from secateur.utils.types import Objective


@dataclass(repr=False)
class Job(Screen):
    """One run of a `TrainMethod`. `model` is trained in place; `steps` is the length of the whole budget."""

    model: nn.Module
    task: Task
    method: Method
    target: Target
    steps: int
    recipe: Recipe
    options: Options = field(default_factory=Options)
    inputs: Inputs | None = None
    seed: int = 0
    trained: bool = False
    """Whether the model came trained; a method that `starts` "trained" otherwise trains it first."""
    directory: Path | None = None
    every: int = 100
    phases: list[dict[str, Any]] = field(default_factory=list)
    moments: Moments = field(default_factory=dict)
    """The optimiser's state at the end of the last phase."""
    frozen: dict[str, str] = field(default_factory=dict)
    _ungated: dict[str, str] = field(default_factory=dict)
    _names: list[str] = field(default_factory=list)
    _cut: dict[str, Tensor] = field(default_factory=dict)
    _competed: frozenset[str] = frozenset()
    _graph: Graph | None = None
    _contexts: list[Context] = field(default_factory=list)
    _dense: dict[str, Tensor] = field(default_factory=dict)
    _shrinking: Shrinking | None = None

    @property
    def share(self) -> float:
        """The share kept; raises `SecateurError` where the target is another."""
        return self.target.share(self.method.name)

    @property
    def weights(self) -> dict[str, nn.Parameter]:
        """The weights of every linear and convolution layer, by parameter name, in order."""
        return {name: self.model.get_parameter(name) for name in find_matrices(self.model)}

    @property
    def epoch(self) -> float:
        """Steps in an epoch."""
        return length(self.task.train) / (1 if isinstance(self.task.train, list) else self.recipe.batch)

    def step_of(self, text: str | int) -> int:
        """A place in the training: `500it` or `500` (steps), `1.4ep` (epochs), `1.7%` of it.

        Raises `SecateurError` where it can't be read, or leaves no step to train.
        """
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(it|ep|%|)\s*", str(text))
        if not match:
            raise SecateurError(f"{text!r} isn't a step", where="rewind", fix="such as 500it, 1.4ep or 1.7%")
        number, unit = float(match[1]), match[2]
        step = round(number * {"ep": self.epoch, "%": self.steps / 100}.get(unit, 1))
        if step >= self.steps:
            raise SecateurError(
                f"{text} is step {step} of {self.steps}, which leaves nothing to train",
                where="rewind",
                fix="give an earlier step, or train for longer",
            )
        return step

    def generator(self, *parts: object) -> torch.Generator:
        return seeded(self.seed, self.method.name, *parts)

    @contextmanager
    def seeded(self, *parts: object) -> Iterator[None]:
        """Torch's global random state is that of the seed and this place, for what draws from it, such as new layers."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(self.seed, self.method.name, *parts))
            yield

    def train(
        self,
        phase: str,
        *,
        steps: int | None = None,
        start: int = 0,
        until: int | None = None,
        loss_terms: Sequence[Objective] = (),
        after_backward: Sequence[Hook] = (),
        after_step: Sequence[Hook] = (),
        moments: Moments | None = None,
        seed: int | None = None,
        model: nn.Module | None = None,
        parameters: Iterable[Any] | None = None,
        loss: Objective | None = None,
        data: Any = None,
        augment: bool = True,
        **recipe: Any,
    ) -> list[float]:
        """Train the model in a phase of its own name, with `fit`; gives the loss of each step.

        >>> job.train("dense", lr=0.05)  # doctest: +SKIP
        >>> job.train("gates", model=gated, parameters=[{"params": [*gated.laws.parameters()], "lr": 0.1}])  # doctest: +SKIP

        steps: None is the whole budget. model: what runs, where it is more than the job's model, such as one behind
        gates. parameters, loss, data: in place of the task's, as `fit` takes them. augment: False where the data are of another
        kind than the task's. recipe: fields that differ from the
        run's. Where the run is resumed, a finished phase is read, and one that was stopped goes on from its last
        checkpoint; a hook with `state_dict()` is kept there too.
        """
        if phase in self._names:
            raise SecateurError(
                f"two phases are named {phase!r}", where=self.method.name, fix="give each its own name"
            )
        seen: list[State] = []
        count = len(self._names)
        self._names.append(phase)
        file = self.directory / f"{count:02d}-{phase}.safetensors" if self.directory else None
        losses = fit(
            model or self.model,
            self.task.train if data is None else data,
            steps=steps or self.steps,
            start=start,
            until=until,
            loss=loss or self.task.loss,
            loss_terms=loss_terms,
            after_backward=after_backward,
            after_step=after_step,
            parameters=parameters,
            augment=self.task.augment if augment else None,
            seed=self.seed if seed is None else seed,
            moments=moments,
            recipe=self.recipe.replace(**recipe),
            checkpoint=file,
            every=self.every,
            about={"method": self.method.name, **self.method.hyperparameters, "phase": phase},
            description=f"{self.method.name}: {phase}",
            at_end=seen.append,
        )
        self.moments = copy_moments(seen[0].optimizer)
        if self._shrinking is not None:
            self._cut = dict(self._shrinking.keep)
        self.note(phase=phase, first_step=start, last_step=seen[0].step, loss=losses[-1] if losses else None)
        return losses

    @property
    def graph(self) -> Graph | None:
        """The groups of the dense network; None where the method removes no units."""
        return self._graph

    @property
    def removed_units(self) -> bool:
        return bool(self._cut)

    def snapshot(self) -> dict[str, Tensor]:
        """Copies of all parameters and buffers."""
        return {name: tensor.detach().clone() for name, tensor in _tensors(self.model).items()}

    @torch.no_grad()
    def restore(self, snapshot: Mapping[str, Tensor]) -> None:
        """Put back what `snapshot` gave. Raises `SecateurError` where the network was cut meanwhile."""
        tensors = _tensors(self.model)
        for name, tensor in tensors.items():
            if tensor.shape != snapshot[name].shape:
                raise SecateurError("the snapshot is from before a cut", where=name, fix="take one after it")
        for name, tensor in tensors.items():
            tensor.copy_(snapshot[name])

    def masked(self, masks: Mapping[str, Tensor]) -> Masked:
        """A hook that keeps zero what the masks removed, from now on."""
        return Masked(self.model, masks)

    def batches(self, count: int, augmented: bool = False) -> Iterator[Any]:
        """Inputs of the first `count` training batches, without labels; `round(epoch)` of them are the whole data.

        augmented: as training sees them.
        """
        draw, device = Draw(self.task.train, self.recipe.batch, self.seed), device_of(self.model)
        for step in range(count):
            batch = map_tensors(draw(step), lambda t: t.to(device))
            if augmented and self.task.augment is not None:
                batch = self.task.augment(batch, torch.Generator().manual_seed(step_seed(self.seed, step)))
            yield inputs_of(self.model, batch)

    def journal(self, name: str) -> Journal:
        """What is measured one after the other under this name; a resumed run reads what is there."""
        return Journal(self.directory / f"{name}.json" if self.directory else None)

    def losses(self, samples: int, single: bool = False) -> Callable[[], dict[str, float]]:
        """A function that gives the task's losses by name for the model as it is, over so many training samples.

        single: where the task has no `losses`, its only one. Raises `SecateurError` where it has none, and not `single`.
        """
        own, alone = self.task.losses, self.task.loss or checked_loss(self.task.train)
        if own is None and not single:
            raise SecateurError(
                "it has one loss, and the worst of several is guarded",
                where=f"{self.method.name}, task {self.task.name}",
                fix="a task with losses=, a function of (model, batch) that gives them by name, or single",
            )
        device = device_of(self.model)
        draw = Draw(self.task.train, min(self.recipe.batch, samples), self.seed)
        count = min(-(-samples // draw.batch), -(-draw.count // draw.batch))
        batches = [map_tensors(draw(step), lambda t: t.to(device)) for step in range(count)]

        @torch.no_grad()
        def measured() -> dict[str, float]:
            total: dict[str, float] = {}
            with evaluating(self.model):
                for batch in batches:
                    found = own(self.model, batch) if own else {"loss": alone(self.model, batch)}
                    for name, value in found.items():
                        total[name] = total.get(name, 0.0) + float(value) * sequences_in(batch)
            return total

        return measured

    def reestimate(self, count: int) -> None:
        """Take BatchNorm statistics anew on so many training batches, as after a cut; 0: leave them.

        The batches are augmented: what the network was trained on. On pictures as they are ResNet-20 loses 3.7 points.
        """
        if count:
            reestimate_batchnorm(self.model, self.batches(count, augmented=True))

    def quality(self) -> float | None:
        """The task's number for the model as it is now; None where the task has none."""
        return None if self.task.quality is None else float(self.task.quality(self.model))

    def note(self, **numbers: Any) -> None:
        """A row of the report's `phases`; numbers of the phase of the last row join it."""
        if self.phases and numbers.get("phase", self.phases[-1].get("phase")) == self.phases[-1].get("phase"):
            self.phases[-1] |= numbers
        else:
            self.phases.append(numbers)

    def context(self) -> Context:
        """Groups, matrices and the division of the budget, of the model as it is now."""
        context = Context(
            self.model, self.method, self.target, self.inputs, seed=self.seed, options=self.options
        )
        if self._graph is not None and not self._cut:
            context.graph = self._graph
        if self._graph is None and removes_units(self.method):
            self._graph = context.graph
        self._contexts.append(context)
        return context

    def gated(
        self,
        context: Context,
        law: Callable[[Group], Gate],
        groups: Sequence[Group] | None = None,
        *,
        model: nn.Module | None = None,
        **how: Any,
    ) -> Gated:
        """The network behind gates, as `gates.place` puts them; the plan's notes say which groups have none, and why.

        >>> gated = job.gated(context, lambda group: HardConcrete(group.size), train_model=False)  # doctest: +SKIP

        groups: None: those of the context. model: in place of the job's own. Raises `SecateurError` where no group gets a gate.
        """
        groups = context.groups if groups is None else groups
        gated = place(self.model if model is None else model, context.graph, law, groups=groups, **how)
        self._ungated |= gated.frozen
        return gated

    @property
    def limit(self) -> float | None:
        """Seconds that a latency target came to, once the budget was divided."""
        return next((c.limit for c in reversed(self._contexts) if c.limit is not None), None)

    def keeps_share(self, plan: Plan) -> bool:
        """Whether a plan of units keeps no more than the share that was asked for; True for targets of other kinds."""
        if self.target.kind not in ("share", "parts") or not self._contexts:
            return True
        return self.removed_units and self._contexts[-1].keeps_share(plan.keep, self._competed)

    def cut(self, keep: Mapping[str, Tensor]) -> None:
        """Cut the model to the kept units now, so that what follows trains the small one.

        Groups whose cut isn't provably right stay whole; the report says why.
        """
        self._check_whole()
        context = self.context()
        graph = context.graph
        self._competed = frozenset(keep)
        smaller = {name: units.cpu() for name, units in keep.items() if len(units) < graph[name].size}
        if self.options.prove and smaller:
            self.frozen = prove(self.model, graph, smaller, context.example)
            smaller = {name: units for name, units in smaller.items() if name not in self.frozen}
        self._dense, self._cut, self._graph = self.snapshot(), smaller, graph
        if smaller:
            cut_units(self.model, graph, smaller)

    def cuts(self, decide: Decide) -> Cuts:
        """A hook for `after_step` of a phase in which units leave on the way; `decide` says after each step what stays.

        >>> job.train("pruning", after_step=[job.cuts(lambda state, now: kept(state.step))])  # doctest: +SKIP

        The plan speaks of the dense network's units. Groups that can't be cut to half provably stay whole: they get their
        reason before the phase begins. Raises `SecateurError` where the network was cut before.
        """
        self._check_whole()
        context = self.context()
        graph = context.graph
        if self.options.prove:
            whole = {group.name: torch.zeros(group.size) for group in context.groups}
            half = {g.name: g.down_to(g.size // 2) for g in context.competitors(whole, keep_scores=False)}
            self.frozen = prove(self.model, graph, half, context.example)
            for name, why in self.frozen.items():
                graph[name].reason = f"the cut isn't provably right: {why}"
        self._dense, self._graph = self.snapshot(), graph
        self._shrinking = Shrinking(self.model, graph)
        return Cuts(self._shrinking, decide)

    def _check_whole(self) -> None:
        if self._cut or self._shrinking is not None:
            raise SecateurError(
                "the network was cut before", where=self.method.name, fix="cut it once, or all in one phase"
            )

    def plan(
        self,
        masks: Mapping[str, Tensor] | None = None,
        keep: Mapping[str, Tensor] | None = None,
        notes: Mapping[str, str] | None = None,
    ) -> Plan:
        """What is kept, with all trained tensors at their dense shape; `keep` is what was cut, where `cut` was called."""
        if keep is not None and not self._cut:
            self.cut(keep)
        if self._shrinking is not None:
            self._shrinking.settle()
        values = {name: tensor.detach().cpu().clone() for name, tensor in _tensors(self.model).items()}
        context, graph = self.context(), self._graph
        if self._cut:
            assert graph is not None
            context.graph = graph  # that of the dense model
            values = at_dense_shape(values, self._dense, graph, self._cut)
        return context.make_plan(
            keep=self._cut,
            masks=masks,
            values=values,
            notes={
                **({"weights": DENSE_NOTE} if masks else {}),
                **{f"no gate: {name}": why for name, why in self._ungated.items()},
                **(notes or {}),
            },
            options={"steps": self.steps, "recipe": dataclasses.asdict(self.recipe)},
        )


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def at_dense_shape(
    small: Mapping[str, Tensor], dense: Mapping[str, Tensor], graph: Graph, keep: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The cut model's tensors at their places in the dense ones, which are as they were before the cut elsewhere."""
    stays = left(graph, keep)
    full: dict[str, Tensor] = {}
    for name, value in dense.items():
        full[name] = value.cpu().clone()
        if name in small:
            places = [
                stays.get((name, dim), torch.ones(size, dtype=torch.bool)).nonzero().flatten()
                for dim, size in enumerate(value.shape)
            ]
            full[name][torch.meshgrid(*places, indexing="ij") if places else ...] = small[name].cpu()
    return full
