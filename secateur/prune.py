"""`prune`: one call from a model and a target to a smaller model, the plan that made it, and a report."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.artefact import save_model
from secateur.budget import ALLOCATIONS, Target, divide, owl_shares, parse_schedule, parse_target, rounds
from secateur.checkpoint import Checkpoint, fingerprint
from secateur.context import Context
from secateur.data import calibration_batches
from secateur.errors import SecateurError
from secateur.files import cache_dir
from secateur.graph import Graph, trace
from secateur.inputs import Inputs, default_inputs, from_description
from secateur.measure import measure
from secateur.method import Method, Objective, UnitMethod, WeightMethod, make_method
from secateur.plan import Plan
from secateur.select import Pattern, top_k
from secateur.stats.layer import LayerStats
from secateur.surgery import cut_units, mask_units, prove, set_tensor

DENSE_NOTE = "same size and speed without sparse kernels: the zeros are stored in dense tensors"


@dataclass(frozen=True)
class Options:
    """What every method understands. The command line's flags and their help are these fields."""

    samples: int = field(default=32, metadata={"help": "calibration sequences"})
    seqlen: int = field(default=512, metadata={"help": "tokens per calibration and evaluation window"})
    schedule: str = field(
        default="once",
        metadata={"help": "once, or iterative:K to reach the target in K rounds, scoring anew in each"},
    )
    allocation: str | None = field(
        default=None,
        metadata={"help": f"how the budget is divided: {', '.join(ALLOCATIONS)}; default: the method's"},
    )
    floor: float = field(default=0.0, metadata={"help": "least share kept of any layer or group, 0..1"})
    round_to: int = field(default=1, metadata={"help": "keep multiples of this many channels or neurons"})
    kinds: tuple[str, ...] | None = field(
        default=None, metadata={"help": "kinds of unit to cut, e.g. neurons kv_groups; default: the method's"}
    )
    uniform: bool = field(
        default=False,
        metadata={"help": "cut every layer alike, so that plain from_pretrained loads the result"},
    )
    prove: bool = field(
        default=True,
        metadata={"help": "check that the sliced model equals the masked one; failing groups are frozen"},
    )

    def check(self) -> None:
        if self.samples < 1 or self.seqlen < 2:
            raise SecateurError(
                f"{self.samples} samples of {self.seqlen} tokens is no calibration data",
                where="samples, seqlen",
                fix="at least 1 sample of 2 tokens",
            )
        if not 0 <= self.floor <= 1:
            raise SecateurError(
                f"{self.floor} is outside 0..1", where="floor", fix="give a share such as 0.1"
            )
        if self.round_to < 1:
            raise SecateurError(
                f"{self.round_to} isn't a multiple", where="round_to", fix="give 1, 8, 16, 64, ..."
            )
        if self.allocation is not None and self.allocation not in ALLOCATIONS:
            raise SecateurError(
                f"there is no allocation {self.allocation!r}",
                where="allocation",
                fix=f"one of {', '.join(ALLOCATIONS)}",
            )
        parse_schedule(self.schedule)


@dataclass
class Pruned:
    """What `prune` gives: the model, the plan that made it, the graph it was cut along, and a JSON-able report.

    `changes` holds the module attributes that the cut set, by module path: what a loader must set again.
    """

    model: nn.Module
    plan: Plan
    report: dict[str, Any]
    tokenizer: Any = None
    changes: dict[str, dict[str, Any]] = field(default_factory=dict)
    dense_config: Any = None
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
            changes=self.changes,
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
    resume: bool | str | Path = False,
    tasks: Iterable[str] = (),
    limit: int | None = None,
    progress: Callable[..., Iterable] | None = None,
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
    inplace: cut the model itself instead of a copy. A failed run leaves it as it was either way.
    resume: keep finished steps on disk, so that a killed run goes on where it was: True for the cache, or a directory.
    tasks, limit: what to measure before and after (`wikitext2`, `piqa`, ...), with at most `limit` items each.
    settings: fields of `Options` (samples, seqlen, schedule, allocation, floor, round_to, kinds, uniform, prove) and
        hyperparameters of the method.

    Raises `SecateurError`: unknown method or setting, a target that can't be met, no data, NaN weights, nothing to cut.
    """
    started = time.perf_counter()
    names = {f.name for f in dataclasses.fields(Options)}
    options = Options(**{key: value for key, value in settings.items() if key in names})
    options.check()
    chosen = make_method(method, **{key: value for key, value in settings.items() if key not in names})
    goal = parse_target(target)
    _check_model(model)
    _check_pair(chosen, goal, options)
    if inputs is None and (
        isinstance(chosen, UnitMethod) or hasattr(getattr(model, "config", None), "vocab_size")
    ):
        inputs = default_inputs(model)
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
    training = model.training
    model.eval()
    undo: Undo | None = None
    try:
        before = measure(model, **measured)
        dense_config = copy.deepcopy(getattr(model, "config", None))
        working = model if inplace else copy.deepcopy(model)
        undo = Undo(working)
        key = (chosen.name, chosen.hyperparameters, str(goal), dataclasses.asdict(options), seed)
        checkpoint = _checkpoint(resume, model, *key, batches)
        run = Run(working, chosen, goal, options, inputs, batches, seed, loss, progress, checkpoint, undo)
        plan, graph = run.plan()
        changes: dict[str, dict[str, Any]] = {}
        if plan.structured:
            undo.release()
            changes = apply_plan(working, plan, graph=graph)
        undo.release()
        after = measure(working, **measured)
    except BaseException:
        if undo is not None:
            undo.restore()
        raise
    finally:
        model.train(training)
    working.train(training)
    checkpoint.remove()
    report = _report(chosen, goal, options, seed, before, after, plan, graph, run)
    report["seconds"] = time.perf_counter() - started
    return Pruned(
        model=working,
        plan=plan,
        report=report,
        tokenizer=tokenizer,
        changes=changes,
        dense_config=dense_config,
        _graph=graph or (lambda: trace(model, inputs)) if inputs is not None else graph,
    )


class Undo:
    """Original tensors of what a run changes in place, so that a failure puts them back."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.originals: dict[str, Tensor] = {}

    def remember(self, name: str) -> None:
        if name not in self.originals:
            self.originals[name] = self.model.get_parameter(name).detach().clone()

    def restore(self) -> None:
        with torch.no_grad():
            for name, original in self.originals.items():
                self.model.get_parameter(name).copy_(original)

    def release(self) -> None:
        self.originals.clear()


@dataclass
class Run:
    """One planning run: rounds of the schedule, each scored on what the last one left."""

    model: nn.Module
    method: Method
    target: Target
    options: Options
    inputs: Inputs | None
    batches: Any
    seed: int
    loss: Objective | None
    progress: Callable[..., Iterable] | None
    checkpoint: Checkpoint
    undo: Undo
    refused: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def context(self, target: Target, round_: int = 0) -> Context:
        options = self.options
        return Context(
            model=self.model,
            method=self.method,
            target=target,
            inputs=self.inputs,
            data=self.batches,
            seed=self.seed,
            allocation="uniform" if options.uniform else options.allocation,
            floor=options.floor,
            round_to=options.round_to,
            kinds=options.kinds,
            uniform=options.uniform,
            loss=self.loss,
            options={k: v for k, v in dataclasses.asdict(options).items() if v != getattr(Options(), k)},
            progress=self.progress,
            checkpoint=self.checkpoint,
            round=round_,
        )

    def plan(self) -> tuple[Plan, Graph | None]:
        count = parse_schedule(self.options.schedule)
        targets = [self.target]
        if count > 1:
            targets = [
                dataclasses.replace(self.target, value=share) for share in rounds(self.target.value, count)
            ]
        if isinstance(self.method, WeightMethod):
            if self.target.kind == "share" and self.target.value == 1:
                return self.context(self.target).make_plan(), None
            for index, target in enumerate(targets):
                plan = plan_weights(self.method, self.context(target, index), self)
            plan.target = str(self.target)
            return plan, None
        if not isinstance(self.method, UnitMethod):
            raise SecateurError(f"{self.method.name} doesn't cut weights or units", where="method")
        return self._plan_units(targets)

    def _plan_units(self, targets: list[Target]) -> tuple[Plan, Graph]:
        assert isinstance(self.method, UnitMethod)
        graph: Graph | None = None
        merged: Plan | None = None
        for index, target in enumerate(targets):
            while True:
                context = self.context(target, index)
                if graph is not None:
                    context.graph = graph
                graph = context.graph
                if merged is not None:
                    context.gone = {
                        name: _complement(units, graph[name].size) for name, units in merged.keep.items()
                    }
                plan = self.method.plan(context)
                failures = self._prove(graph, plan) if self.options.prove else {}
                if not failures:
                    break
                for name, reason in failures.items():
                    graph[name].reason = self.refused[name] = f"the cut isn't provably right: {reason}"
            if merged is not None:
                plan.values = {**merged.values, **plan.values}
            merged = plan
            if index + 1 < len(targets):
                for name in {name for key in plan.keep for name in (s.name for s in graph[key].slices)} | set(
                    plan.values
                ):
                    if _has_parameter(self.model, name):
                        self.undo.remember(name)
                _set_values(self.model, plan.values)
                mask_units(self.model, graph, plan.keep)
        assert merged is not None and graph is not None
        self.undo.restore()
        merged.target = str(self.target)
        if not merged.keep:
            merged.values = {}
        return merged, graph

    def _prove(self, graph: Graph, plan: Plan) -> dict[str, str]:
        assert self.inputs is not None
        return prove(self.model, graph, plan.keep, self.inputs)


def plan_weights(method: WeightMethod, context: Context, run: Run) -> Plan:
    """Masks (and changed weights) for every prunable matrix, block by block; the model is left pruned.

    Blocks that an earlier, killed run finished are taken from its checkpoint.
    """
    matrices = context.matrices
    patterns = _patterns(method, context, run)
    masks: dict[str, Tensor] = {}
    plan = context.make_plan(notes={"weights": DENSE_NOTE})
    order = sorted({matrix.block for matrix in matrices.values()})
    done = 0
    for block in order:
        found = run.checkpoint.load(f"round-{context.round}-block-{block}")
        if found is None:
            break
        _install(run, matrices, found, masks, plan)
        done += 1
    with torch.no_grad():
        for block in context.stream(method.needs, propagate=method.propagate, skip=done):
            wanted = {
                n: patterns[n]
                for n in block.matrices
                if n in patterns and patterns[n].keep < matrices[n].numel
            }
            solved = method.solve_block(block, wanted)
            result: dict[str, Tensor] = {}
            for name, (weight, mask) in solved.items():
                matrix = matrices[name]
                if not torch.isfinite(weight).all():
                    raise SecateurError(
                        "the repaired weights are not finite",
                        where=f"{method.name}, {name}",
                        fix="raise the damping, or give more calibration data",
                    )
                changed = not torch.equal(weight, matrix.weight() * mask)
                result[f"mask/{name}"] = matrix.unfold(mask).to(torch.bool)
                if changed:
                    result[f"value/{name}"] = matrix.unfold(weight)
            run.checkpoint.save(f"round-{context.round}-block-{block.index}", result)
            _install(run, matrices, result, masks, plan)
    return plan


def _install(
    run: Run, matrices: Mapping[str, Any], result: Mapping[str, Tensor], masks: dict, plan: Plan
) -> None:
    """One block's masks and weights, into the model and the plan."""
    with torch.no_grad():
        for key, tensor in result.items():
            what, _, name = key.partition("/")
            parameter = run.model.get_parameter(name)
            run.undo.remember(name)
            if what == "mask":
                plan.masks[name] = tensor
                parameter.masked_fill_(~tensor.to(parameter.device), 0)
        for key, tensor in result.items():
            what, _, name = key.partition("/")
            if what == "value":
                parameter = run.model.get_parameter(name)
                parameter.copy_(tensor)
                plan.values[name] = parameter.detach().clone().cpu()


def _patterns(method: WeightMethod, context: Context, run: Run) -> dict[str, Pattern]:
    """How many weights each matrix keeps, and where they compete."""
    matrices = dict(context.matrices)
    target, scope = context.target, method.scope
    if not matrices:
        raise SecateurError(
            "it has no linear or convolution weights",
            where=type(context.model).__name__,
            fix="nothing can be pruned",
        )
    if target.n_m:
        n, m = target.n_m
        for name, matrix in list(matrices.items()):
            if matrix.shape[1] % m:
                run.skipped[name] = f"{matrix.shape[1]} inputs can't be parted into groups of {m}"
                del matrices[name]
        if not matrices:
            raise SecateurError(
                f"no layer's inputs can be parted into groups of {m}",
                where=f"target {target}",
                fix="give a share",
            )
        return {
            name: Pattern(matrix.numel // m * n, scope=scope, n_m=target.n_m)
            for name, matrix in matrices.items()
        }
    sizes = {name: matrix.numel for name, matrix in matrices.items()}
    total = sum(sizes.values())
    if target.kind == "params":
        others = sum(p.numel() for p in context.model.parameters()) - total
        keep = int(target.limit(total + others)) - others
        if keep < 1:
            raise SecateurError(
                f"{others:,} parameters lie outside the prunable matrices, which alone is over the limit",
                where=f"target {target}",
                fix=f"ask for more than params<={others}",
            )
        keep = min(keep, total)
    else:
        keep = int(target.value * total + 1e-9)
    share = keep / total
    allocation = context.allocation or method.allocation
    if allocation == "global" or scope == "global":
        return _ranked(method, context, [list(sizes)], [keep])
    if allocation == "per-kind":
        kinds: dict[str, list[str]] = {}
        for name in sizes:
            kinds.setdefault(matrices[name].role, []).append(name)
        totals = [sum(sizes[name] for name in names) for names in kinds.values()]
        return _ranked(method, context, list(kinds.values()), divide(totals, [share] * len(totals), keep))
    shares = dict.fromkeys(sizes, share)
    if allocation == "owl":
        blocks = outlier_shares(method, context, share)
        shares = {name: blocks[matrix.block] for name, matrix in matrices.items()}
    if context.floor:
        shares = {name: max(value, context.floor) for name, value in shares.items()}
    counts = divide(list(sizes.values()), list(shares.values()), keep)
    return {name: Pattern(count, scope=scope) for name, count in zip(sizes, counts)}


def _dense_scores(method: WeightMethod, context: Context) -> dict[str, Tensor]:
    stats = context.stats(method.needs) if method.needs else {}
    return {
        name: method.score(matrix.weight().detach(), stats.get(name) or LayerStats())
        for name, matrix in context.matrices.items()
    }


def _ranked(
    method: WeightMethod, context: Context, pools: list[list[str]], keeps: list[int]
) -> dict[str, Pattern]:
    """Matrices of a pool compete with their dense scores; within a matrix the method then chooses as many."""
    scores = _dense_scores(method, context)
    patterns: dict[str, Pattern] = {}
    for names, keep in zip(pools, keeps):
        floors = {name: max(1, int(context.floor * scores[name].numel())) for name in names}
        joined = torch.cat([scores[name].flatten().float() for name in names])
        chosen = top_k(joined, keep).split([scores[name].numel() for name in names])
        counts = [max(int(mask.sum()), floors[name]) for name, mask in zip(names, chosen)]
        while (over := sum(counts) - keep) > 0:
            largest = max(range(len(names)), key=lambda i: counts[i] - floors[names[i]])
            room = counts[largest] - floors[names[largest]]
            if room <= 0:
                raise SecateurError(
                    "the floors alone are over the target", where="floor", fix="lower the floor"
                )
            counts[largest] -= min(over, room)
        patterns |= {name: Pattern(count, scope="layer") for name, count in zip(names, counts)}
    return patterns


def outlier_shares(method: WeightMethod, context: Context, share: float) -> dict[int, float]:
    """OWL: blocks whose Wanda scores have more outliers keep more (weight-baselines, 15)."""
    from secateur.method import make_method as make

    owl = method if hasattr(method, "outliers") else make("owl")
    stats = context.stats(owl.needs)
    ratios: dict[int, float] = {}
    for block in sorted({matrix.block for matrix in context.matrices.values()}):
        scores = [
            owl.score(matrix.weight().detach(), stats[name])  # type: ignore[attr-defined]
            for name, matrix in context.matrices.items()
            if matrix.block == block
        ]
        ratios[block] = owl.outliers(scores)  # type: ignore[attr-defined]
    shares = owl_shares(list(ratios.values()), share, owl.lam)  # type: ignore[attr-defined]
    return dict(zip(ratios, shares))


def apply_plan(
    model: nn.Module, plan: Plan, inputs: Inputs | None = None, graph: Graph | None = None
) -> dict[str, dict[str, Any]]:
    """Do what a plan says, in place: repaired tensors, zeros, and cut units. Gives the attributes it changed.

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
    _set_values(model, plan.values)
    with torch.no_grad():
        for name, mask in plan.masks.items():
            parameters[name].masked_fill_(~mask.to(parameters[name].device), 0)
    if plan.keep:
        assert graph is not None
        return cut_units(model, graph, plan.keep)
    return {}


def _set_values(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        set_tensor(model, name, value)


def _on_device(inputs: Inputs, model: nn.Module) -> Inputs:
    from secateur.inputs import map_tensors

    device = next(model.parameters()).device
    return map_tensors(inputs, lambda tensor: tensor.to(device))


def _has_parameter(model: nn.Module, name: str) -> bool:
    try:
        model.get_parameter(name)
    except AttributeError:
        return False
    return True


def _complement(units: Tensor, size: int) -> Tensor:
    gone = torch.ones(size, dtype=torch.bool)
    gone[units] = False
    return gone


def _check_model(model: nn.Module) -> None:
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
        "met": _met(target, before, after, plan, graph),
        "seed": seed,
        "out": None,
        "options": dataclasses.asdict(options),
        "before": before,
        "after": after,
        "groups": groups,
        "weights": weights,
        "notes": notes,
    }


def _met(target: Target, before: dict, after: dict, plan: Plan, graph: Graph | None) -> bool:
    if target.kind == "share":
        if plan.masks:
            kept = sum(int(mask.sum()) for mask in plan.masks.values())
            return kept <= target.value * sum(mask.numel() for mask in plan.masks.values()) + 1e-6
        return True
    if target.kind == "n_m":
        return True
    if target.kind == "params":
        key = "params_nonzero" if plan.masks else "params"
        return after[key] <= target.limit(before["params"]) + 1e-6
    if target.kind == "latency":
        return True
    key = {"macs": "macs", "size": "size_bytes"}[target.kind]
    return after[key] <= target.limit(before[key]) + 1e-6
