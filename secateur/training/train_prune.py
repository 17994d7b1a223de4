"""`train_prune`: one call from a task, a method that prunes while it trains, and a target to a smaller trained model."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.families.pipelines import Parts, as_module
from secateur.graph import trace
from secateur.measure import latency, measure
from secateur.method import Method
from secateur.pruning.checks import check_model
from secateur.pruning.prune import Pruned
from secateur.pruning.report import build_report
from secateur.pruning.request import read_request
from secateur.pruning.resume import fingerprint, run_directory
from secateur.pruning.target import Target
from secateur.training import parallel
from secateur.training.batches import check_classes, length
from secateur.training.finite import nonfinite_tensor
from secateur.training.job import Job
from secateur.training.method import TrainMethod
from secateur.training.pipelines import pipeline_task
from secateur.training.recipe import Recipe
from secateur.training.task import Task
from secateur.utils.files import atomic_write_json
from secateur.utils.inputs import Inputs, map_tensors
from secateur.utils.random import seeded
from secateur.utils.running import device_of
from secateur.utils.schema import read_object
from secateur.utils.types import Objective

MEANT = ("floor", "round_to", "kinds", "prove", "allocation", "uniform")
"""The fields of `Options` that mean something here."""
RECIPE = tuple(item.name for item in dataclasses.fields(Recipe))


def train_prune(
    task: Task | nn.Module | Any,
    inputs: Inputs | None = None,
    *,
    method: str | Method,
    target: str | float | Target | None = None,
    data: Any = None,
    epochs: float | None = None,
    steps: int | None = None,
    seed: int = 0,
    loss: Objective | None = None,
    quality: Callable[[nn.Module], float] | None = None,
    recipe: Recipe | None = None,
    device: str | torch.device | None = None,
    resume: bool | str | Path = False,
    every: int = 100,
    clean: bool = True,
    prompts: Sequence[Any] | None = None,
    drawing: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Pruned:
    """Train a network and prune it on the way.

    >>> pruned = secateur.train_prune(net, method="lottery-ticket", target="20%", data=(x, y), epochs=10)  # doctest: +SKIP
    >>> pruned = secateur.train_prune(load_task("cifar10"), method="lottery-rewinding", target="20%")  # doctest: +SKIP
    >>> pruned = secateur.train_prune(pipe, method="ecodiff", target="80%", prompts=["a red house"])  # doctest: +SKIP

    task: a `Task` (`secateur.tasks.load_task`), or a network as it is now (a copy is trained) with `data` as for `fit`;
        or a pipeline of diffusers, for methods that learn from what it draws.
    target: `20%` is the share kept, of the weights of linear and convolution layers, or of units for methods that
        remove those; further as in `prune`. Methods that skip work while the network runs remove nothing and take none.
    epochs, steps: the length of one training; None: the task's. A method may train several times.
    seed: of the untrained weights, the order of the data, its augmentation, and all else that is drawn at random.
    quality: what is measured before and after, where the task is a network.
    recipe: optimiser, rate, batch and schedule; None: the task's. device: where to train; None: where the network is.
    resume: keep what is needed to go on after a kill: True for the cache, or a directory of its own. The same call then
        goes on there and ends with the same bits; False keeps nothing and starts from the beginning. What was kept is
        removed at the end, unless `clean=False` (so that the result can be written first). `every`: steps between
        checkpoints.
    prompts, drawing: of a pipeline: what it draws, and further arguments of its call (num_inference_steps, ...).
    settings: hyperparameters of the method, fields of `Recipe`, and of `Options` (floor, round_to, kinds, prove,
        allocation, uniform).

    Raises `SecateurError`: unknown method or setting, a target that can't be met, labels that the network has no output
    for, a class without samples, a loss that isn't finite, a directory of another run. What is there stays.
    """
    started = time.perf_counter()
    request = read_request("train_prune", method, target, settings, options=MEANT, others=RECIPE)
    chosen, options, goal = request.method, request.options, request.target
    assert isinstance(chosen, TrainMethod)
    task = as_module(task, prompts, drawing)
    if isinstance(task, Parts) and data is None:
        check_model(task)
        task = pipeline_task(task, inputs, quality)
    elif isinstance(task, nn.Module):
        check_model(task)
        task = _as_task(task, inputs, data, loss, quality)
    elif data is not None or inputs is not None or loss is not None or quality is not None:
        raise SecateurError(
            "a task brings its own data, inputs, loss and quality",
            where=f"task {task.name}",
            fix="leave them out",
        )
    recipe = (recipe or task.recipe).replace(**request.others)
    if task.classes is not None and isinstance(task.train, tuple) and len(task.train) == 2:
        check_classes(task.train[1], task.classes)
    total = steps_of(task, recipe, epochs, steps)
    model, trained = _network(task, chosen, seed)
    check_model(model)
    if device is not None:
        model.to(parallel.local_device(device))
    place = device_of(model)
    rank, size = parallel.join(place)
    example = map_tensors(task.inputs, lambda t: t.to(place)) if task.inputs is not None else None
    identity = {
        "task": task.name,
        "network": fingerprint(model),
        "method": chosen.name,
        **({"source of the method": chosen.source} if chosen.source else {}),
        "target": str(goal),
        "steps": total,
        "seed": seed,
        **{f"{chosen.name} {key}": value for key, value in chosen.hyperparameters.items()},
        **dataclasses.asdict(recipe),
        **{key: getattr(options, key) for key in MEANT},
    }
    directory = Path(resume) if isinstance(resume, str | Path) else None
    if resume is True:
        directory = run_directory(True, lambda: fingerprint(model, identity))
    if rank == 0:
        claim(directory, identity)
    parallel.barrier(size)
    job = Job(model, task, chosen, goal, total, recipe, options, example, seed, trained, directory, every)
    before = measure(model, inputs=example) | _quality(job)
    training, config = model.training, copy.deepcopy(getattr(model, "config", None))
    plan = chosen.prune(job)
    model.train(training)
    if broken := nonfinite_tensor(model):
        raise SecateurError("it isn't finite at the end of training", where=broken, fix="lower lr")
    after = measure(model, inputs=example) | _quality(job)
    report = build_report(
        chosen,
        goal,
        plan,
        job.graph,
        before,
        after,
        options={key: getattr(options, key) for key in MEANT},
        kinds=options.kinds or chosen.kinds,
        kept_share=bool(plan.masks) or goal.value == 1 or job.keeps_share(plan),
        refused=job.frozen,
        latency=(
            job.limit,
            latency(model, example) if job.limit is not None and example is not None else None,
        ),
    )
    report |= {
        "task": {"name": task.name, "metric": task.metric, "steps": total, **dataclasses.asdict(recipe)},
        "phases": job.phases,
        "processes": size,
        "seconds": time.perf_counter() - started,
    }
    parallel.barrier(size)
    if directory and clean and rank == 0:
        shutil.rmtree(directory, ignore_errors=True)
    graph = job.graph or ((lambda: trace(model, example)) if example is not None else None)
    return Pruned(model=model, plan=plan, report=report, dense_config=config, _graph=graph)


def _as_task(model: nn.Module, inputs: Any, data: Any, loss: Any, quality: Any) -> Task:
    if data is None:
        raise SecateurError(
            "there is no data to train on", where="train_prune", fix="pass data=(x, labels), or a task"
        )
    if inputs is None and isinstance(data, tuple) and len(data) == 2 and isinstance(data[0], Tensor):
        inputs = data[0][:2]
    build = lambda: copy.deepcopy(model)
    return Task(
        type(model).__name__,
        build,
        data,
        quality,
        inputs,
        loss=loss,
        pretrained=build,
        recipe=_plain_recipe(),
    )


def _plain_recipe() -> Recipe:
    return Recipe(optimizer="sgd", lr=0.05, batch=64, clip=0.0)


def _network(task: Task, method: TrainMethod, seed: int) -> tuple[nn.Module, bool]:
    """(the network that the first phase begins with, whether it is trained)."""
    if method.starts == "trained" and task.pretrained is not None:
        return task.pretrained(), True
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**31, (1,), generator=seeded(seed, "network")).item()))
        return task.build(), False


def steps_of(task: Task, recipe: Recipe, epochs: float | None, steps: int | None) -> int:
    if steps is not None and epochs is not None:
        raise SecateurError("both epochs and steps are given", where="train_prune", fix="give one of them")
    count = length(task.train)
    if steps is None:
        epochs = task.epochs if epochs is None else epochs
        steps = round(epochs * count / (1 if isinstance(task.train, list) else recipe.batch))
    if steps < 1:
        raise SecateurError(
            f"{steps} steps is no training",
            where="epochs",
            fix="give more epochs, or samples, or a smaller batch",
        )
    return steps


def claim(directory: Path | None, identity: dict[str, Any]) -> None:
    """Makes the directory this run's, or finds that it is, or refuses it."""
    if directory is None:
        return
    file = directory / "run.json"
    own = json.loads(json.dumps(identity))
    if file.exists():
        other = read_object(file, fix="remove its folder to start again")
        changed = [key for key in {**own, **other} if own.get(key) != other.get(key)]
        if changed:
            raise SecateurError(
                f"the run there was begun with another {', '.join(changed)}",
                where=str(directory),
                fix="use the same settings to go on, --no-resume to start again, or another directory",
            )
        return
    if directory.exists() and any(directory.iterdir()):
        raise SecateurError(
            "it isn't empty and holds no run",
            where=str(directory),
            fix="give a new directory for what is kept",
        )
    atomic_write_json(file, own)


def _quality(job: Job) -> dict[str, Any]:
    """The task's number, also where reports look for it."""
    value, metric, name = job.quality(), job.task.metric, job.task.name
    figures: dict[str, Any] = {"quality": value}
    if value is not None and metric in ("psnr", "perplexity"):
        figures[metric] = {name: value}
    elif value is not None and metric in ("accuracy", "miou"):
        figures["accuracy"] = {name: {"acc" if metric == "accuracy" else metric: value}}
        figures["chance"] = {name: 1 / job.task.classes} if job.task.classes else {}
    return figures
