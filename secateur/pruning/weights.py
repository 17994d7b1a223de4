"""Plans of methods that remove single weights, block by block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from secateur.errors import SecateurError
from secateur.method import make_method
from secateur.pruning.allocate import divide, owl_shares
from secateur.pruning.context import Context
from secateur.pruning.method import WeightMethod
from secateur.pruning.plan import DENSE_NOTE, Plan
from secateur.pruning.select import Pattern, top_k
from secateur.stats.layer import LayerStats
from secateur.stats.memory import estimate

if TYPE_CHECKING:
    from secateur.pruning.run import Run


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
