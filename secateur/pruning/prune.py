"""`prune`: one call from a model and a target to a smaller model, the plan that made it, and a report."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.data import calibration_batches
from secateur.errors import SecateurError
from secateur.graph import Graph, trace
from secateur.io.artefact import save_model
from secateur.measure import latency, measure
from secateur.method import Method, make_method
from secateur.pruning.checks import Buffers, check_forward
from secateur.pruning.method import UnitMethod, WeightMethod
from secateur.pruning.options import Options
from secateur.pruning.plan import DENSE_NOTE, Plan
from secateur.pruning.resume import Checkpoint, fingerprint
from secateur.pruning.run import Run, Undo
from secateur.pruning.target import Target, parse_target
from secateur.surgery import cut_units
from secateur.surgery.changes import set_values
from secateur.training.method import TrainMethod
from secateur.utils.files import cache_dir
from secateur.utils.inputs import Inputs, default_inputs, from_description
from secateur.utils.running import device_of
from secateur.utils.types import Objective

TRACED = 128
"""Tokens of the example input that a language model is traced, proved and counted on."""


@dataclass
class Pruned:
    """What `prune` gives: the model, the plan that made it, the graph it was cut along, and a JSON-able report.

    `scores` are those that a structured method's budget was divided by, [units] per group.
    """

    model: nn.Module
    plan: Plan
    report: dict[str, Any]
    tokenizer: Any = None
    dense_config: Any = None
    scores: dict[str, Tensor] = field(default_factory=dict)
    _graph: Graph | Callable[[], Graph] | None = None

    @property
    def graph(self) -> Graph:
        """The groups of the dense model; traced on first use when the method needed none."""
        if callable(self._graph):
            self._graph = self._graph()
        if self._graph is None:
            raise SecateurError(
                "the model was pruned without example inputs", where="graph", fix="pass inputs="
            )
        return self._graph

    def save(self, directory: str | Path) -> None:
        """Weights, config, tokenizer, `plan.json` and `report.json` into a new directory, all or nothing.

        Raises `SecateurError` when the directory isn't empty or the disk is full.
        """
        save_model(
            self.model,
            directory,
            tokenizer=self.tokenizer,
            plan=self.plan,
            report=self.report,
            dense_config=self.dense_config,
        )


def prune(
    model: nn.Module,
    inputs: Inputs | None = None,
    *,
    method: str | Method,
    target: str | float | Target,
    data: Any = None,
    seed: int = 0,
    tokenizer: Any = None,
    loss: Objective | None = None,
    inplace: bool = False,
    rollback: bool = True,
    resume: bool | str | Path = False,
    tasks: Iterable[str] = (),
    limit: int | None = None,
    progress: Callable[..., Iterable] | None = None,
    announce: Callable[[str], None] | None = None,
    **settings: Any,
) -> Pruned:
    """Cut `model` down to `target` with `method`.

    >>> pruned = secateur.prune(model, method="wanda", target="50%", data=token_ids)  # doctest: +SKIP
    >>> pruned.report["after"]["params_nonzero"]  # doctest: +SKIP

    Parameters
    ----------
    inputs: example inputs of `model.forward`: a tensor, a tuple or a dict. Language models need none.
    target: `50%` (share kept), `params<=100e6`, `macs<=50%`, `size<=200MB`, `latency<=8ms`, `2:4`.
    data: calibration data: token ids [samples, length], a list of model inputs, a text file, the name of a text, or
        None for English that every machine has. Vision models need a list of inputs where the method needs data.
    loss: `loss(model, batch) -> scalar` for methods that need gradients of models that don't return their own loss.
    inplace: cut the model itself instead of a copy. A failed run leaves it as it was either way, unless `rollback` is
        False, which saves a copy of every changed tensor (for a model that is thrown away on failure).
    resume: keep finished steps on disk, so that a killed run goes on where it was: True for the cache, or a directory.
    tasks, limit: what to measure before and after (`wikitext2`, `piqa`, ...), with at most `limit` items each.
    progress, announce: `secateur.utils.progress.track` for bars; what is called with a line to tell, such as the memory that
        calibration will need.
    settings: fields of `Options` (samples, seqlen, schedule, allocation, floor, round_to, kinds, uniform, prove) and
        hyperparameters of the method.

    Raises `SecateurError`: unknown method or setting, a target that can't be met, no data, NaN weights, nothing to cut.
    """
    started = time.perf_counter()
    names = {f.name for f in dataclasses.fields(Options)}
    options = Options(**{key: value for key, value in settings.items() if key in names})
    options.check()
    chosen = make_method(method, **{key: value for key, value in settings.items() if key not in names})
    if getattr(chosen, "seed", seed) is None:
        chosen = dataclasses.replace(chosen, seed=seed)  # type: ignore[call-arg]
    goal = parse_target(target)
    check_model(model)
    _check_pair(chosen, goal, options)
    if inputs is None and (
        isinstance(chosen, UnitMethod) or hasattr(getattr(model, "config", None), "vocab_size")
    ):
        inputs = default_inputs(model, min(options.seqlen, TRACED))
    batches = None
    if chosen.needs:
        batches = calibration_batches(data, tokenizer, model, options.samples, options.seqlen, seed)

    tasks = tuple(tasks)
    measured: dict[str, Any] = {
        "inputs": inputs,
        "tokenizer": tokenizer,
        "tasks": tasks,
        "limit": limit,
        "seqlen": options.seqlen,
    }
    dense_config = copy.deepcopy(getattr(model, "config", None))
    working = model if inplace else copy.deepcopy(model)
    modes = [(module, module.training) for module in working.modules()]
    buffers = Buffers(working)
    working.eval()
    undo: Undo | None = None
    try:
        if inputs is not None:
            check_forward(working, inputs, steady=isinstance(chosen, UnitMethod) and options.prove)
        before = measure(working, **measured)
        undo = Undo(working, rollback and inplace)
        key = (chosen.name, chosen.hyperparameters, str(goal), dataclasses.asdict(options), seed)
        checkpoint = _checkpoint(resume, model, *key, batches)
        run = Run(working, chosen, goal, options, inputs, batches, seed, loss, progress, checkpoint, undo)
        run.lean = inplace and not rollback
        run.announce = announce
        plan, graph = run.plan()
        buffers.restore()
        if plan.structured:
            undo.release()
            apply_plan(working, plan, graph=graph)
        buffers = Buffers(working)
        after = measure(working, **measured)
    except BaseException:
        if undo is not None:
            undo.restore()
        raise
    finally:
        buffers.restore()
        for module, mode in modes:
            module.training = mode
    checkpoint.remove()
    report = _report(chosen, goal, options, seed, before, after, plan, graph, run)
    if run.limit is not None and inputs is not None:
        seconds = latency(working, inputs)
        report["latency"] = {"limit_seconds": run.limit, "after_seconds": seconds}
        report["met"] = seconds <= run.limit
    report["seconds"] = time.perf_counter() - started
    return Pruned(
        model=working,
        plan=plan,
        report=report,
        tokenizer=tokenizer,
        dense_config=dense_config,
        scores=run.scores,
        _graph=graph or (lambda: trace(model, inputs)) if inputs is not None else graph,
    )


def apply_plan(
    model: nn.Module, plan: Plan, inputs: Inputs | None = None, graph: Graph | None = None
) -> None:
    """Do what a plan says, in place: repaired tensors, zeros, and cut units.

    >>> secateur.apply_plan(fresh_model, secateur.Plan.load("pruned/"))  # doctest: +SKIP

    Raises `SecateurError` when the plan is another model's; the model is then untouched.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, mask in plan.masks.items():
        if name not in parameters or parameters[name].shape != mask.shape:
            found = tuple(parameters[name].shape) if name in parameters else "no such tensor"
            raise SecateurError(
                f"the plan masks {name} {tuple(mask.shape)}, the model has {found}",
                where="plan",
                fix="apply it to the model it was made for",
            )
    for name, value in plan.values.items():
        if name in parameters and parameters[name].shape != value.shape:
            raise SecateurError(
                f"the plan sets {name} {tuple(value.shape)}, the model has {tuple(parameters[name].shape)}",
                where="plan",
                fix="apply it to the model it was made for",
            )
    if plan.keep:
        if graph is None:
            if inputs is None:
                inputs = _on_device(from_description(plan.inputs), model)
            graph = trace(model, inputs)
            if "head_dim" in plan.kinds.values() and plan.keep.keys() - {g.name for g in graph.groups}:
                graph = trace(model, inputs, inner=True)
        for name in plan.keep:
            group = next((g for g in graph.groups if g.name == name), None)
            if group is None or group.size != plan.sizes[name]:
                size = "no such group" if group is None else f"{group.size} units"
                raise SecateurError(
                    f"the plan cuts {name} of {plan.sizes[name]} units, the model has {size}",
                    where="plan",
                    fix="apply it to the model it was made for",
                )
            if group.reason:
                raise SecateurError(f"{name} can't be cut: {group.reason}", where="plan")
    set_values(model, plan.values)
    with torch.no_grad():
        for name, mask in plan.masks.items():
            parameters[name].masked_fill_(~mask.to(parameters[name].device), 0)
    if plan.keep:
        assert graph is not None
        cut_units(model, graph, plan.keep)


def _on_device(inputs: Inputs, model: nn.Module) -> Inputs:
    from secateur.utils.inputs import map_tensors

    device = device_of(model)
    return map_tensors(inputs, lambda tensor: tensor.to(device))


def check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise SecateurError(
            f"got a {type(model).__name__}",
            where="model",
            fix="pass a torch.nn.Module (the command line takes names)",
        )
    count = 0
    for name, parameter in model.named_parameters():
        count += parameter.numel()
        if parameter.is_floating_point() and not torch.isfinite(parameter).all():
            raise SecateurError(
                "its weights hold NaN or infinite values", where=name, fix="load or train the model again"
            )
    if not count:
        raise SecateurError(
            "it has no parameters", where=type(model).__name__, fix="pass a model with weights"
        )


def _check_pair(method: Method, target: Target, options: Options) -> None:
    if isinstance(method, TrainMethod):
        raise SecateurError(
            f"{method.name} prunes while the network is trained",
            where="prune",
            fix="use secateur.train_prune, or `secateur train-prune`",
        )
    if target.kind == "tokens":
        raise SecateurError(
            f"{method.name} cuts weights, not tokens", where=f"target {target}", fix="give a share"
        )
    if isinstance(method, WeightMethod) and target.kind in ("macs", "size", "latency"):
        raise SecateurError(
            f"{method.name} sets single weights to zero, which changes no {target.kind}",
            where=f"target {target}",
            fix="use a structured method, or a share, params<= or N:M target",
        )
    if isinstance(method, UnitMethod) and target.n_m:
        raise SecateurError(
            f"{method.name} removes whole units",
            where=f"target {target}",
            fix="N:M needs an unstructured method",
        )
    if options.schedule != "once" and target.kind != "share":
        raise SecateurError(
            "an iterative schedule needs a share",
            where=f"target {target}",
            fix="give a share, or schedule=once",
        )


def _checkpoint(resume: bool | str | Path, model: nn.Module, *parts: Any) -> Checkpoint:
    if not resume:
        return Checkpoint(None)
    if resume is True:
        return Checkpoint(cache_dir() / "runs" / fingerprint(model, *parts))
    return Checkpoint(Path(resume) / fingerprint(model, *parts))


def _report(
    method: Method,
    target: Target,
    options: Options,
    seed: int,
    before: dict[str, Any],
    after: dict[str, Any],
    plan: Plan,
    graph: Graph | None,
    run: Run,
) -> dict[str, Any]:
    """Everything the run did, JSON-able."""
    groups = []
    if graph is not None:
        kinds = options.kinds or (method.kinds if isinstance(method, UnitMethod) else None)
        for group in graph.groups:
            kept = len(plan.keep[group.name]) if group.name in plan.keep else group.size
            reason = group.reason
            if reason is None and kept == group.size:
                untouched = kinds is not None and group.kind not in kinds
                reason = (
                    f"{method.name} doesn't cut {group.kind}" if untouched else "kept whole by the budget"
                )
            groups.append(
                {"name": group.name, "kind": group.kind, "size": group.size, "kept": kept, "reason": reason}
            )
    weights = [
        {"name": name, "size": mask.numel(), "kept": int(mask.sum())} for name, mask in plan.masks.items()
    ]
    weights += [
        {"name": name, "size": 0, "kept": 0, "reason": reason} for name, reason in run.skipped.items()
    ]
    notes = [DENSE_NOTE] if plan.masks else []
    notes += list(plan.notes.values()) if not plan.masks else []
    notes += [f"{name}: {reason}" for name, reason in {**run.refused, **run.skipped}.items()]
    return {
        "method": method.name,
        "hyperparameters": method.hyperparameters,
        "target": str(target),
        "met": _met(target, before, after, plan, run),
        "seed": seed,
        "out": None,
        "options": dataclasses.asdict(options),
        "before": before,
        "after": after,
        "groups": groups,
        "weights": weights,
        "notes": notes,
    }


def _met(target: Target, before: dict, after: dict, plan: Plan, run: Run) -> bool:
    if target.kind in ("share", "n_m"):
        if run.skipped or not plan.masks:
            return run.met and not run.skipped
        kept = sum(int(mask.sum()) for mask in plan.masks.values())
        return kept <= target.value * sum(mask.numel() for mask in plan.masks.values()) + 1e-6
    if target.kind == "params":
        key = "params_nonzero" if plan.masks else "params"
        return after[key] <= target.limit(before["params"]) + 1e-6
    if target.kind == "latency":
        return run.limit is None  # measured again by the caller
    key = {"macs": "macs", "size": "size_bytes"}[target.kind]
    return after[key] <= target.limit(before[key]) + 1e-6
