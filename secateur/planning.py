"""Planning: from a method, a target and a model to a plan, in rounds, with rollback and resumable blocks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from secateur.budget import Target, divide, owl_shares, parse_schedule, rounds
from secateur.checkpoint import Checkpoint
from secateur.context import Context
from secateur.errors import SecateurError
from secateur.graph import Graph
from secateur.inputs import Inputs
from secateur.method import Method, Objective, UnitMethod, WeightMethod, make_method
from secateur.options import Options
from secateur.plan import Plan
from secateur.select import Pattern, top_k
from secateur.stats.layer import LayerStats
from secateur.stats.memory import estimate
from secateur.surgery import mask_units, prove, unmask_units

DENSE_NOTE = "same size and speed without sparse kernels: the zeros are stored in dense tensors"


class Undo:
    """Original tensors of what a run changes in place, so that a failure puts them back."""

    def __init__(self, model: nn.Module, active: bool = True):
        self.model, self.active = model, active
        self.originals: dict[str, Tensor] = {}

    def remember(self, name: str) -> None:
        if self.active and name not in self.originals:
            self.originals[name] = _tensor(self.model, name).detach().clone()

    def restore(self) -> None:
        unmask_units(self.model)
        with torch.no_grad():
            for name, original in self.originals.items():
                _tensor(self.model, name).copy_(original)

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
    lean: bool = False
    """The plan shares the model's tensors instead of holding copies."""
    announce: Callable[[str], None] | None = None
    refused: dict[str, str] = field(default_factory=dict)
    scores: dict[str, Tensor] = field(default_factory=dict)
    limit: float | None = None
    met: bool = True
    """Whether the plan keeps the share that was asked for."""
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
        scratch = Undo(self.model)
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
                try:
                    plan = self.method.plan(context)
                except SecateurError as error:
                    raise _with_frozen(error, graph) from error
                self.scores, self.limit = context.scores, context.limit
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
                    if _has_tensor(self.model, name):
                        scratch.remember(name)
                grown = any(not _has_tensor(self.model, name) for name in plan.values)
                set_values(self.model, plan.values)
                mask_units(self.model, graph, plan.keep)
                graph = None if grown else graph  # a repair added a bias: the groups are traced with it
        assert merged is not None and graph is not None
        scratch.restore()
        merged.target = str(self.target)
        if not merged.keep:
            merged.values = {}
        if self.target.kind == "share":
            self.met = context.keeps_share(merged.keep)
        return merged, graph

    def _prove(self, graph: Graph, plan: Plan) -> dict[str, str]:
        assert self.inputs is not None
        return prove(self.model, graph, plan.keep, self.inputs, export=self.options.prove_export)


def plan_weights(method: WeightMethod, context: Context, run: Run) -> Plan:
    """Masks (and changed weights) for every prunable matrix, block by block; the model is left pruned.

    Blocks that an earlier, killed run finished are taken from its checkpoint.
    """
    matrices = context.matrices
    patterns = _patterns(method, context, run)
    if run.announce and method.needs:
        needed = estimate(context.model, context.require_data(), method.needs, matrices)
        run.announce(f"calibration needs about {needed / 1e6:,.0f} MB above the model, one block at a time")
    plan = context.make_plan(notes={"weights": DENSE_NOTE})
    order = sorted({matrix.block for matrix in matrices.values()})
    done = 0
    for index in order:
        found = run.checkpoint.load(f"round-{context.round}-block-{index}")
        if found is None:
            break
        _install(run, found, plan)
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
            _install(run, result, plan)
    return plan


def _install(run: Run, result: Mapping[str, Tensor], plan: Plan) -> None:
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
                plan.values[name] = parameter.detach() if run.lean else parameter.detach().clone().cpu()


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
        name: method.scores(matrix.weight(), stats.get(name) or LayerStats(name=name))
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
    owl = method if hasattr(method, "outliers") else make_method("owl")
    stats = context.stats(owl.needs)
    ratios: dict[int, float] = {}
    for block in sorted({matrix.block for matrix in context.matrices.values()}):
        scores = [
            owl.scores(matrix.weight(), stats[name])  # type: ignore[attr-defined]
            for name, matrix in context.matrices.items()
            if matrix.block == block
        ]
        ratios[block] = owl.outliers(scores)  # type: ignore[attr-defined]
    shares = owl_shares(list(ratios.values()), share, owl.lam)  # type: ignore[attr-defined]
    return dict(zip(ratios, shares))


def set_values(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Write repaired tensors, in the model's dtype and place; one the model lacks (a new bias) becomes a parameter."""
    for name, value in values.items():
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        present = getattr(module, attribute, None)
        if present is None:
            like = next(module.parameters())
            module.register_parameter(attribute, nn.Parameter(value.to(like.device, like.dtype)))
            continue
        with torch.no_grad():
            present.copy_(value)


def _tensor(model: nn.Module, name: str) -> Tensor:
    """A parameter or buffer."""
    path, _, attribute = name.rpartition(".")
    return getattr(model.get_submodule(path), attribute)


def _has_tensor(model: nn.Module, name: str) -> bool:
    try:
        return isinstance(_tensor(model, name), Tensor)
    except AttributeError:
        return False


def _with_frozen(error: SecateurError, graph: Graph) -> SecateurError:
    """A target out of reach, told with what can't be cut and why."""
    frozen = {group.name: group.reason for group in graph.groups if group.reason}
    if error.where != "target" or not frozen:
        return error
    told = "; ".join(f"{name}: {reason}" for name, reason in list(frozen.items())[:8])
    more = f"; and {len(frozen) - 8} more" if len(frozen) > 8 else ""
    return SecateurError(f"{error.what} (not cut: {told}{more})", where=error.where, fix=error.fix)


def _complement(units: Tensor, size: int) -> Tensor:
    gone = torch.ones(size, dtype=torch.bool)
    gone[units] = False
    return gone
