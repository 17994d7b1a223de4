"""How a metanetwork is made: data models, the loss of the weights that it writes, and the epoch that is taken.

Liu, Wang, Zhang 2025, https://arxiv.org/abs/2506.12041. Spec: metapruning.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.graph import Graph, Group, trace
from secateur.graph.network import Network, network
from secateur.pruning.context import Context
from secateur.pruning.method import UnitMethod
from secateur.pruning.prune import Pruned, prune_with
from secateur.pruning.target import parse_target
from secateur.training.batches import Draw, step_seed
from secateur.training.job import Job
from secateur.training.losses import checked_loss
from secateur.training.metanetwork import MetaNetwork, tensors_of
from secateur.training.method import TrainMethod
from secateur.training.recipe import Recipe
from secateur.training.state import State
from secateur.training.task import Task
from secateur.training.train_prune import claim, steps_of
from secateur.utils.batches import sequences_in
from secateur.utils.inputs import map_tensors
from secateur.utils.running import device_of, evaluating
from secateur.utils.screen import Screen

KINDS = ("channels", "neurons", "heads", "kv_groups", "hidden")


@dataclass
class Making(TrainMethod):
    """How a metanetwork is made, and networks are made ready for it."""

    name: ClassVar[str] = "metanetwork"

    models: int = field(
        default=3, metadata={"help": "data models; of two or more the last chooses the epoch", "min": 1}
    )
    meta_epochs: int = field(default=8, metadata={"help": "epochs over the data models", "min": 1})
    judged: int = field(
        default=6, metadata={"help": "epochs to choose among, evenly spread up to the last", "min": 1}
    )
    hidden: int = field(default=32, metadata={"help": "features of a node or edge inside", "min": 2})
    layers: int = field(default=4, metadata={"help": "rounds of messages", "min": 1})
    ratio: float = field(
        default=0.05, metadata={"help": "how much of its answer joins the weights", "min": 0}
    )
    meta_lr: float = field(default=1e-3, metadata={"help": "learning rate of the metanetwork", "above": 0})
    reg: float = field(default=0.1, metadata={"help": "weight of the group penalty", "min": 0})
    alpha: float = field(
        default=16.0, metadata={"help": "penalty of the smallest unit, in that of the largest", "min": 1}
    )
    speedup: float = field(
        default=2.3,
        metadata={"help": "fewer multiply-adds by this factor where an epoch is chosen", "above": 1},
    )
    first: float = field(
        default=1.32, metadata={"help": "fewer multiply-adds by this factor before the metanetwork", "min": 1}
    )
    ready: float = field(
        default=0.4, metadata={"help": "training after that first cut, of one training", "min": 0}
    )
    tune: float = field(
        default=0.5, metadata={"help": "training after the metanetwork, of one training", "min": 0}
    )
    tune_lr: float = field(
        default=0.1, metadata={"help": "learning rate of all but the first training, of its", "above": 0}
    )

    def fine(self, job: Job, phase: str, length: float, model: nn.Module, **more: Any) -> None:
        """A phase at the low rate."""
        if steps := round(length * job.steps):
            job.train(phase, steps=steps, model=model, lr=self.tune_lr * job.recipe.lr, **more)


def importance(group: Group, tensors: Mapping[str, Tensor]) -> Tensor:
    """The mean over coupled slices of the sum of squares, the largest of the group 1: [units].

    Slices are rows, columns and scales of norms; biases and statistics have none.
    """
    rows = []
    for s in counted(group, tensors):
        value = tensors[s.name].detach().double()
        sums = value.square().movedim(s.dim, 0).flatten(1).sum(1) if value.dim() > 1 else value.square()
        rows.append(sums[s.index.to(value.device)].sum(1))
    total = torch.stack(rows).mean(0)
    return total / total.max().clamp_min(1e-300)


def counted(group: Group, tensors: Mapping[str, Tensor]) -> list[Any]:
    """The slices of a group that have a norm: weights, and scales of norms."""
    return [
        s
        for s in group.slices
        if s.name in tensors
        and (s.role != "vector" or (s.name.endswith("weight") and tensors[s.name].dim() == 1))
    ]


def strengths(score: Tensor, alpha: float) -> Tensor | None:
    """How strongly each unit shrinks: alpha ** ((max - i) / (max - min)), i the root of its importance, [units].

    >>> strengths(torch.tensor([4.0, 9, 1, 16]) / 16, alpha=16).round(decimals=4)
    tensor([ 6.3496,  2.5198, 16.0000,  1.0000])

    None where all are equal, and so none is smaller.
    """
    root = score.sqrt()
    low, high = root.min(), root.max()
    return alpha ** ((high - root) / (high - low)) if high > low else None


def shrinkage(
    groups: Sequence[Group], tensors: Mapping[str, Tensor], alpha: float, reg: float
) -> dict[str, Tensor]:
    """The gradient of reg / 2 * sum of strength * w^2 over the slices of each unit, strengths held constant, by name."""
    found: dict[str, Tensor] = {}
    for group in groups:
        strength = strengths(importance(group, tensors), alpha)
        if strength is None:
            continue
        for s in counted(group, tensors):
            value = tensors[s.name].detach()
            factor = value.new_zeros(value.shape[s.dim])
            index = s.index.to(value.device)
            factor[index] = strength.to(value)[:, None].expand_as(index)
            shape = [-1 if k == s.dim else 1 for k in range(value.dim())]
            found[s.name] = found.get(s.name, 0) + reg * factor.reshape(shape) * value
    return found


@dataclass
class GroupNorm(UnitMethod):
    """The norm of everything that leaves with a unit, scales of norms too, in that of its group's largest."""

    kinds: ClassVar[tuple[str, ...] | None] = KINDS
    share_of: ClassVar[str] = "units"
    allocation: ClassVar[str] = "global"

    def score(self, group: Group, context: Context) -> Tensor:
        return importance(group, tensors_of(context.model)).sqrt().float()


def cut_by(model: nn.Module, inputs: Any, factor: float, **options: Any) -> Pruned | None:
    """A smaller copy, with fewer multiply-adds by this factor; None where that is 1."""
    if factor == 1:
        return None
    return prune_with(model, inputs, method=GroupNorm(), target=f"macs<={100 / factor}%", **options)


def smaller(model: nn.Module, inputs: Any, factor: float) -> nn.Module:
    """The model of `cut_by`, or a copy."""
    found = cut_by(model, inputs, factor)
    return copy.deepcopy(model) if found is None else found.model


@dataclass(repr=False)
class DataModel(Screen):
    """A trained network as the metanetwork sees it. `tensors` are its own, which stay."""

    model: nn.Module
    graph: Network
    groups: Sequence[Group]
    tensors: dict[str, Tensor]


def data_model(model: nn.Module, inputs: Any) -> DataModel:
    """A data model of a network.

    Raises `SecateurError` where the network can't be said as a graph of channels and kernels.
    """
    cut: Graph = trace(model, inputs)
    own = {name: tensor.detach().clone() for name, tensor in tensors_of(model).items()}
    return DataModel(model, network(model, inputs), cut.prunable(KINDS), own)


class MetaLoss:
    """An objective of `fit`: the task's loss of the weights that the metanetwork makes of a data model, and their penalty.

    >>> fit(meta, [torch.tensor([n]) for n in range(len(models))], loss=MetaLoss(job, models, 16, 0.1), steps=24)  # doctest: +SKIP

    A batch is the number of a data model. The gradient of the mean loss over the training data, at the weights made, and that
    of the penalty are sent back through these weights together; the models are in eval mode.

    Raises `SecateurError` where the data models are of several architectures.
    """

    def __init__(self, job: Job, models: Sequence[DataModel], alpha: float, reg: float):
        self.job, self.models, self.alpha, self.reg = job, models, alpha, reg
        self.loss = job.task.loss or checked_loss(job.task.train)
        for number, made in enumerate(models):
            if made.graph.form != models[0].graph.form:
                raise SecateurError(
                    f"data model {number} is of another architecture than the first",
                    where="metanetwork",
                    fix="give networks that differ in weights and widths only",
                )

    def __call__(self, meta: nn.Module, batch: Tensor) -> Tensor:
        assert isinstance(meta, MetaNetwork)
        data = self.models[int(batch)]
        made = meta.generate(data.graph, data.tensors)
        value, gradients = self.gradients(data, made)
        sent = torch.stack([(made[name] * gradients[name]).sum() for name in made]).sum()
        return value + sent - sent.detach()

    def gradients(self, data: DataModel, made: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """(the mean loss of the model with these weights, what is sent back to each of them)."""
        own = tensors_of(data.model)
        with torch.no_grad():
            for name, value in made.items():
                own[name].copy_(value)
        data.model.zero_grad()
        with evaluating(data.model), torch.enable_grad():
            total = mean_loss(self.job, data.model, self.loss, backward=True)
        penalty = shrinkage(data.groups, own, self.alpha, self.reg)
        found = {}
        for name in made:
            gradient = own[name].grad
            found[name] = (torch.zeros_like(own[name]) if gradient is None else gradient) + penalty.get(
                name, 0
            )
        data.model.zero_grad()
        with torch.no_grad():
            for name in made:
                own[name].copy_(data.tensors[name])
        return total, found


def mean_loss(job: Job, model: nn.Module, loss: Any, backward: bool = False) -> Tensor:
    """The mean loss over the training data, batch by batch; backward: gradients too."""
    draw, device = Draw(job.task.train, job.recipe.batch, job.seed), device_of(model)
    batches = [map_tensors(draw(step), lambda t: t.to(device)) for step in range(max(1, round(job.epoch)))]
    sizes = [sequences_in(batch) for batch in batches]
    total = torch.zeros((), device=device)
    for step, (batch, size) in enumerate(zip(batches, sizes, strict=True)):
        if backward and job.task.augment is not None:
            batch = job.task.augment(batch, torch.Generator().manual_seed(step_seed(job.seed, step)))
        part = loss(model, batch) * (size / sum(sizes))
        if backward:
            part.backward()
        total += part.detach()
    return total


class Epochs:
    """A hook that keeps the metanetwork as it is after these steps, by step."""

    def __init__(self, steps: Sequence[int]):
        self.steps = steps
        self.kept: dict[int, dict[str, Tensor]] = {}

    def __call__(self, state: State) -> None:
        if (step := state.step + 1) in self.steps:
            own = state.model.state_dict().items()
            self.kept[step] = {name: t.detach().cpu().clone() for name, t in own}

    def state_dict(self) -> dict[str, Any]:
        return {f"{step}/{name}": t for step, kept in self.kept.items() for name, t in kept.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.kept = {}
        for key, value in state.items():
            step, _, name = key.partition("/")
            self.kept.setdefault(int(step), {})[name] = value


def train_metanetwork(
    task: Task,
    making: Making | None = None,
    *,
    epochs: float | None = None,
    steps: int | None = None,
    seed: int = 0,
    device: str | None = None,
    recipe: Recipe | None = None,
    directory: Path | None = None,
    every: int = 100,
) -> tuple[MetaNetwork, dict[str, Any]]:
    """(a metanetwork for the networks of a task, how it was made).

    >>> meta, about = train_metanetwork(load_task("digits"), Making(models=5), epochs=20)  # doctest: +SKIP
    >>> save_metanetwork(meta, "meta", about)  # doctest: +SKIP

    epochs, steps: the length of one training of a data model; None: the task's. directory: what a stopped run needs to go on.

    Raises `SecateurError`: a network that can't be said as a graph of channels and kernels, a directory of another run.
    """
    making, recipe = making or Making(), recipe or task.recipe
    total = steps_of(task, recipe, epochs, steps)
    model = task.build().to(device or "cpu")
    inputs = None if task.inputs is None else map_tensors(task.inputs, lambda t: t.to(device_of(model)))
    identity = {"task": task.name, "steps": total, "seed": seed, **making.hyperparameters}
    claim(directory, identity | dataclasses.asdict(recipe))
    goal = parse_target(f"macs<={100 / making.speedup}%")
    job = Job(
        model, task, making, goal, total, recipe, inputs=inputs, seed=seed, directory=directory, every=every
    )
    meta = make_metanetwork(job, making)
    return meta, {**identity, "phases": job.phases}


def make_metanetwork(job: Job, making: Making) -> MetaNetwork:
    """A metanetwork for the job's task: data models are trained, it is trained on them, and its best epoch is taken.

    Each data model has a seed of its own, is cut by `first` and trained on. The last of several is held out: each epoch's
    metanetwork changes it, it is trained on, cut by `speedup`, and judged by the loss on the training data. A resumed job goes
    on where it was.
    """
    if job.inputs is None:
        raise SecateurError(
            "it has no example inputs", where=f"task {job.task.name}", fix="give the task inputs"
        )
    models = []
    for number in range(making.models):
        seed = 1009 * (job.seed + 1) + number  # the order of the data, apart from the job's
        with job.seeded("data model", number):
            dense = job.task.build().to(device_of(job.model))
        job.train(f"data-{number}", model=dense, seed=seed)
        model = smaller(dense, job.inputs, making.first)
        making.fine(job, f"data-{number}-ready", making.ready, model, seed=seed)
        models.append(data_model(model.eval(), job.inputs))
    learning = models[:-1] or models
    with job.seeded("metanetwork"):
        meta = MetaNetwork(models[0].graph.form, making.hidden, making.layers, making.ratio)
    meta.to(device_of(job.model))
    loss = MetaLoss(job, models, making.alpha, making.reg)
    last, apart = making.meta_epochs, -(-making.meta_epochs // making.judged)
    epochs = Epochs([len(learning) * epoch for epoch in range(last, 0, -apart)])
    job.train(
        "metanetwork",
        steps=last * len(learning),
        model=meta,
        data=[torch.tensor([number]) for number in range(len(learning))],
        augment=False,
        loss=loss,
        after_step=[epochs],
        **META_RECIPE,
        lr=making.meta_lr,
    )
    if len(models) > 1:
        meta.load_state_dict(epochs.kept[best_epoch(job, making, meta, epochs, models)])
    return meta.requires_grad_(False).eval()


META_RECIPE: dict[str, Any] = {
    "optimizer": "adamw",
    "betas": (0.9, 0.999),
    "weight_decay": 5e-4,
    "decay": "all",
    "lr_schedule": "milestones",
    "milestones": (0.75,),
    "gamma": 0.1,
    "warmup": 0.0,
    "clip": 0.0,
    "precision": "float32",
}
"""How a metanetwork is trained."""


def best_epoch(
    job: Job, making: Making, meta: MetaNetwork, epochs: Epochs, models: Sequence[DataModel]
) -> int:
    """The step after which the last data model, from which nothing was learnt, loses least by a cut."""
    loss, journal, held_out = job.task.loss or checked_loss(job.task.train), job.journal("epochs"), models[-1]
    factor = max(making.speedup / making.first, 1.0)
    found = {}
    for step, kept in epochs.kept.items():
        epoch = step // (len(models) - 1)
        meta.load_state_dict(kept)
        model = copy.deepcopy(held_out.model)
        meta.transform(model, held_out.graph)
        making.fine(job, f"epoch-{epoch}", making.tune, model)

        def measured(model: nn.Module = model) -> float:
            small = smaller(model, job.inputs, factor)
            with evaluating(small), torch.no_grad():
                return float(mean_loss(job, small, loss))

        found[step] = journal(measured)
        job.note(phase=f"epoch {epoch}", loss_after_the_cut=found[step])
    return min(found, key=lambda step: found[step])
