"""Plans of methods that remove single weights, block by block."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from secateur.errors import SecateurError
from secateur.graph.parts import inside, parts_of
from secateur.method import Method, make_method
from secateur.pruning.allocate import MEASURED, arithmetic_shares, arithmetic_steps, divide
from secateur.pruning.context import Context
from secateur.pruning.fitted import Fitted, repair_bytes
from secateur.pruning.method import WeightMethod
from secateur.pruning.plan import DENSE_NOTE, Plan
from secateur.pruning.select import Pattern, top_k
from secateur.pruning.share import ALONE
from secateur.pruning.undo import Undo
from secateur.stats.collect import default_loss
from secateur.stats.layer import LayerStats
from secateur.stats.memory import estimate
from secateur.surgery.changes import set_values
from secateur.utils.batches import as_batches
from secateur.utils.inputs import map_tensors
from secateur.utils.running import device_of, evaluating

Allocation = Callable[[WeightMethod, Context, int], dict[str, Pattern]]
ALLOCATIONS: dict[str, Allocation] = {}
"""Allocations of a budget over matrices, by name: (method, context, weights kept in all) -> a pattern for each."""


READ_DATA: set[str] = set()
"""Allocations that read the calibration data, whatever the method reads."""

TAKE_A_NUMBER: set[str] = set()
"""Allocations that take a number behind their name, `name:0.01`, and then read no data."""


def allocation(
    name: str, reads_data: bool = False, takes_number: bool = False
) -> Callable[[Allocation], Allocation]:
    """Decorator: an allocation for single weights under this name, for `allocation=`.

    >>> @allocation("mine")  # doctest: +SKIP
    ... def mine(method, context, keep):
    ...     return by_shares(method, context, keep, {name: 0.5 for name in context.matrices})
    """

    def add(function: Allocation) -> Allocation:
        ALLOCATIONS[name] = function
        if reads_data:
            READ_DATA.add(name)
        if takes_number:
            TAKE_A_NUMBER.add(name)
        return function

    return add


def reads_data(method: Method, asked: str | None) -> bool:
    """Whether a run reads calibration data: for its method's statistics, or to divide its budget."""
    if method.statistics() or not isinstance(method, WeightMethod):
        return bool(method.statistics()) or asked == MEASURED
    name, _, number = (asked or method.allocation).partition(":")
    return name in READ_DATA and not number


def plan_weights(method: WeightMethod, context: Context) -> Plan:
    """Masks (and changed weights) for every prunable matrix, block by block; the model is left pruned.

    Blocks that an earlier, killed run finished are taken from its checkpoint.
    """
    needs, patterns = method.statistics(), _patterns(method, context)
    matrices = {name: matrix for name, matrix in context.every_matrix.items() if name in patterns}
    if context.announce and (needs or context.options.fits):
        needed = estimate(context.model, context.require_data(), needs, matrices)
        more = f", and the repair {repair_bytes(context) / 1e6:,.0f} MB more" if context.options.fits else ""
        context.announce(
            f"calibration needs about {needed / 1e6:,.0f} MB above the model, one block at a time{more}"
        )
    plan = context.make_plan(notes={"weights": DENSE_NOTE})

    # finished blocks stand at the front of the order, since a run writes them one after the other
    finished: dict[int, dict[str, Tensor]] = {}
    for index in sorted({matrix.block for matrix in matrices.values()}):
        loaded = context.checkpoint.load(f"round-{context.round}-block-{index}")
        if loaded is None:
            break
        finished[index] = loaded
    done = max(finished, default=-1) + 1
    fitted = Fitted(context, method.propagate) if context.options.fits else None
    for index, loaded in finished.items():
        if fitted is None:
            _install(context, loaded, plan)
    flow = fitted.resume(finished, partial(_install, context, plan=plan)) if fitted else None

    with torch.no_grad():
        for block in context.stream(
            needs,
            propagate=method.propagate,
            skip=done,
            names=patterns,
            flow=flow if method.propagate else None,
        ):
            cut = {
                name: patterns[name] for name in block.matrices if patterns[name].keep < matrices[name].numel
            }
            result: dict[str, Tensor] = {}
            for name, (weight, mask) in method.solve_block(block, cut).items():
                matrix = matrices[name]
                if not torch.isfinite(weight).all():
                    raise SecateurError(
                        "the repaired weights are not finite",
                        where=f"{method.name}, {name}",
                        fix="raise the damping, or give more calibration data",
                    )
                changed = not torch.equal(weight, matrix.weight() * mask)
                result[f"mask/{name}"] = matrix.unfold(mask).to(torch.bool)
                if changed and context.options.repair in (None, "reconstruct"):
                    result[f"value/{name}"] = matrix.unfold(weight)
            if fitted:
                result |= fitted.block(block, result, partial(_install, context, result, plan))
            _install(context, result, plan)
            context.checkpoint.save(f"round-{context.round}-block-{block.index}", result)
    if fitted:
        plan.notes |= fitted.notes()
    return plan


def _install(context: Context, result: Mapping[str, Tensor], plan: Plan) -> None:
    """One block's masks and weights, into the model and the plan."""
    with torch.no_grad():
        for key, tensor in result.items():
            what, _, name = key.partition("/")
            if context.undo and what in ("mask", "value"):
                context.undo.remember(name)
            if what == "mask":
                if context.recorded:
                    plan.masks[name] = tensor
                parameter = context.model.get_parameter(name)
                parameter.masked_fill_(~tensor.to(parameter.device), 0)
        # values last: a repaired weight is written over the masked one
        for key, tensor in result.items():
            what, _, name = key.partition("/")
            if what == "value":
                set_values(context.model, {name: tensor})
                if not context.recorded:
                    continue
                parameter = context.model.get_parameter(name)
                plan.values[name] = parameter.detach() if context.lean else parameter.detach().clone().cpu()


def _patterns(method: WeightMethod, context: Context) -> dict[str, Pattern]:
    """How many weights each matrix keeps, and where they compete."""
    if context.target.parts:
        found = [_patterns(method, part) for part in context.each_part()]
        return {name: pattern for patterns in found for name, pattern in patterns.items()}
    matrices, target = context.matrices, context.target
    if not matrices:
        raise SecateurError(
            "every weight is protected"
            if context.every_matrix
            else "it has no linear or convolution weights",
            where=type(context.model).__name__,
            fix="protect less" if context.every_matrix else "nothing can be pruned",
        )
    if target.n_m:
        if context.options.share:
            raise SecateurError(
                "N:M is the same share everywhere", where=f"target {target}", fix="leave share out"
            )
        return _n_m_patterns(method, context, *target.n_m)
    total = sum(matrix.numel for matrix in context.every_matrix.values())
    others = sum(p.numel() for p in context.model.parameters()) - total
    whole = total - sum(matrix.numel for matrix in matrices.values())
    keep = (
        target.weights(total, others, method.name) - whole
    )  # what is protected counts, and the rest makes up for it
    if keep < 1:
        raise SecateurError(
            f"{whole:,} of {total:,} weights are protected, which alone is over the target",
            where=f"target {target}",
            fix=f"ask for more than {whole / total:.1%}, or protect less",
        )
    fixed = context.fixed_weights
    own = {"global": "global", "part": "per-part"}.get(method.scope)
    name = own or context.allocation or method.allocation
    context.notes.pop("share", None)
    divided = ALLOCATIONS[name.partition(":")[0]]
    if not fixed:
        return divided(method, context, keep)
    rest = dataclasses.replace(context)
    rest.matrices = {name: matrix for name, matrix in matrices.items() if name not in fixed}
    given, left = sum(fixed.values()), sum(matrix.numel for matrix in rest.matrices.values())
    if keep - given < (left > 0):
        raise SecateurError(
            f"{given + whole:,} of {total:,} weights stay by share, keep and only, which alone is over the target",
            where=f"target {target}",
            fix=f"ask for more than {(given + whole) / total:.1%}, or give smaller shares",
        )
    patterns = {name: Pattern(count, scope=method.scope) for name, count in fixed.items()}
    if keep - given >= left:
        context.notes["share"] = ALONE
        return patterns
    return patterns | divided(method, rest, keep - given)


def _n_m_patterns(method: WeightMethod, context: Context, n: int, m: int) -> dict[str, Pattern]:
    """N of every M inputs, in each matrix where M divides them; the others are skipped with a reason."""
    patterns: dict[str, Pattern] = {}
    for name, matrix in context.matrices.items():
        if matrix.shape[1] % m:
            context.skipped[name] = f"{matrix.shape[1]} inputs can't be parted into groups of {m}"
        else:
            patterns[name] = Pattern(matrix.numel // m * n, scope=method.scope, n_m=(n, m))
    if not patterns:
        raise SecateurError(
            f"no layer's inputs can be parted into groups of {m}",
            where=f"target {context.target}",
            fix="give a share",
        )
    return patterns


def by_shares(
    method: WeightMethod, context: Context, keep: int, shares: Mapping[str, float]
) -> dict[str, Pattern]:
    """Patterns of matrices that keep these shares, moved as little as it takes to keep `keep` weights exactly."""
    sizes = {name: matrix.numel for name, matrix in context.matrices.items()}
    floored = [max(shares[name], context.options.floor) for name in sizes]
    counts = divide(list(sizes.values()), floored, keep)
    return {name: Pattern(count, scope=method.scope) for name, count in zip(sizes, counts)}


def _share(context: Context, keep: int) -> float:
    return keep / sum(matrix.numel for matrix in context.matrices.values())


@allocation("uniform")
def uniform(method: WeightMethod, context: Context, keep: int) -> dict[str, Pattern]:
    """The same share of every matrix."""
    return by_shares(method, context, keep, dict.fromkeys(context.matrices, _share(context, keep)))


@allocation("global")
def all_compete(method: WeightMethod, context: Context, keep: int) -> dict[str, Pattern]:
    """Matrices compete with their dense scores."""
    return _ranked(method, context, [list(context.matrices)], [keep])


@allocation("per-kind")
def kinds_compete(method: WeightMethod, context: Context, keep: int) -> dict[str, Pattern]:
    """Matrices of one role compete (all down projections, ...); each role keeps the same share."""
    roles: dict[str, list[str]] = {}
    for name, matrix in context.matrices.items():
        roles.setdefault(matrix.role, []).append(name)
    totals = [sum(context.matrices[name].numel for name in names) for names in roles.values()]
    counts = divide(totals, [_share(context, keep)] * len(totals), keep)
    return _ranked(method, context, list(roles.values()), counts)


@allocation("per-part")
def within_parts(method: WeightMethod, context: Context, keep: int) -> dict[str, Pattern]:
    """Matrices of one part of the model compete (a text encoder, a denoiser); each part keeps the same share."""
    paths = parts_of(context.model).values()
    pools: dict[str, list[str]] = {}
    for name in context.matrices:
        pools.setdefault(next((path for path in paths if inside(name, path)), ""), []).append(name)
    totals = [sum(context.matrices[name].numel for name in names) for names in pools.values()]
    counts = divide(totals, [_share(context, keep)] * len(totals), keep)
    return _ranked(method, context, list(pools.values()), counts)


@allocation("owl", reads_data=True)
def by_outliers(method: WeightMethod, context: Context, keep: int) -> dict[str, Pattern]:
    """The shares of OWL: blocks with more outliers keep more."""
    owl = method if method.allocation == "owl" else make_method("owl")
    assert isinstance(owl, WeightMethod)
    return by_shares(method, context, keep, owl.shares(context, _share(context, keep)))


@allocation("coarse-to-fine", reads_data=True)
def by_the_loss(method: WeightMethod, context: Context, keep: int) -> dict[str, Pattern]:
    """The shares of ECoFLaP: blocks that the loss hangs on more keep more."""
    ecoflap = method if method.name == "ecoflap" else make_method("ecoflap")
    assert isinstance(ecoflap, WeightMethod)
    return by_shares(method, context, keep, ecoflap.shares(context, _share(context, keep)))


@allocation("arithmetic", reads_data=True, takes_number=True)
def falling(method: WeightMethod, context: Context, keep: int) -> dict[str, Pattern]:
    """Shares that fall by the same step from block to block; the step is `arithmetic:0.01`'s number or, without one, that of
    the least loss on the calibration data, masked once."""
    blocks = list(dict.fromkeys((m.block_path, m.block) for m in context.matrices.values()))
    share = _share(context, keep)

    def at(step: float) -> dict[str, Pattern]:
        each = arithmetic_shares(len(blocks), share, step)
        if not (-1e-9 < min(each) and max(each) < 1 + 1e-9):
            raise SecateurError(
                f"steps of {step:g} over {len(blocks)} blocks lead from {each[0]:.4g} to {each[-1]:.4g}, outside 0..1",
                where="allocation",
                fix=f"at most {2 * min(share, 1 - share) / max(1, len(blocks) - 1):.4g}",
            )
        of_block = dict(zip(blocks, each))
        shares = {name: of_block[m.block_path, m.block] for name, m in context.matrices.items()}
        return by_shares(method, context, keep, shares)

    number = (context.allocation or "").partition(":")[2]
    if number:
        return at(float(number))
    steps = arithmetic_steps(len(blocks), share)
    losses = context.remember("arithmetic", lambda: {"losses": _losses(method, context, map(at, steps))})
    best = int(losses["losses"].argmin())
    context.notes["arithmetic"] = f"the share falls by {steps[best]:.4g} from block to block: " + ", ".join(
        f"{step:.4g} gave a loss of {loss:.4g}" for step, loss in zip(steps, losses["losses"].tolist())
    )
    return at(steps[best])


@torch.no_grad()
def _losses(method: WeightMethod, context: Context, trials: Iterable[Mapping[str, Pattern]]) -> Tensor:
    """The mean loss on the calibration data with what each of the patterns removes set to zero, [trials]."""
    scores = _dense_scores(method, context)
    device = device_of(context.model)
    batches = [map_tensors(batch, lambda t: t.to(device)) for batch in as_batches(context.require_data())]
    loss = context.loss or default_loss(context.model, batches[0])
    found = []
    for patterns in trials:
        undo = Undo(context.model)
        try:
            for name, pattern in patterns.items():
                matrix = context.matrices[name]
                undo.remember(name)
                kept = pattern.select(scores[name], matrix.parts, method.later_stays)
                matrix.set(matrix.weight().masked_fill(~kept, 0))
            with evaluating(context.model):
                found.append(sum(float(loss(context.model, batch)) for batch in batches) / len(batches))
        finally:
            undo.restore()
    return torch.tensor(found, dtype=torch.float64)


@allocation("own")
def of_the_method(method: WeightMethod, context: Context, keep: int) -> dict[str, Pattern]:
    """The shares that the method itself gives its matrices: `WeightMethod.shares`."""
    return by_shares(method, context, keep, method.shares(context, _share(context, keep)))


def _dense_scores(method: WeightMethod, context: Context) -> dict[str, Tensor]:
    stats = context.stats(method.statistics()) if method.statistics() else {}
    return {
        name: method.scores(matrix.weight(), stats.get(name) or LayerStats(name=name, seed=context.seed))
        for name, matrix in context.matrices.items()
    }


def _ranked(
    method: WeightMethod, context: Context, pools: Sequence[list[str]], keeps: Sequence[int]
) -> dict[str, Pattern]:
    """Matrices of a pool compete with their dense scores; within a matrix the method then chooses that many."""
    scores = _dense_scores(method, context)
    patterns: dict[str, Pattern] = {}
    for names, keep in zip(pools, keeps):
        floors = {name: max(1, int(context.options.floor * scores[name].numel())) for name in names}
        device = scores[names[0]].device  # blocks may lie on several
        joined = torch.cat([scores[name].flatten().float().to(device) for name in names])
        chosen = top_k(joined.flip(0), keep).flip(0) if method.later_stays else top_k(joined, keep)
        masks = chosen.split([scores[name].numel() for name in names])
        counts = [max(int(mask.sum()), floors[name]) for name, mask in zip(names, masks)]
        # what the floors added is taken back where most is left above one
        while (over := sum(counts) - keep) > 0:
            largest = max(range(len(names)), key=lambda i: counts[i] - floors[names[i]])
            room = counts[largest] - floors[names[largest]]
            if room <= 0:
                raise SecateurError(
                    "the floors alone are over the target", where="floor", fix="lower the floor"
                )
            counts[largest] -= min(over, room)
        patterns |= {name: Pattern(count, scope="global") for name, count in zip(names, counts)}
    return patterns
