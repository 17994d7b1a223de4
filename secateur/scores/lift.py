"""A criterion's scores of single weights, for each group the tensors and roles that count: what is then lifted to units.

>>> for group, values, roles in of_elements(context, "snip", lambda: batches):  # doctest: +SKIP
...     units = group.reduce(values, "sum", roles)

Weights count, biases and normalisations don't; `fpgm` counts the filters that make a unit, `bn-scale` the normalisation
behind it. Spec: spa, algorithm B.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.graph import Group
from secateur.pruning.context import Context
from secateur.scores.criteria import OF_INPUTS, OF_LOSS, fpgm, inverse_diagonal, l2, obd, obs, score
from secateur.stats.hessians import every_matrix, hessians
from secateur.utils.batches import as_batches

Elements = list[tuple[Group, Mapping[str, Tensor], tuple[str, ...]]]
WEIGHTS = ("out", "in")


def of_elements(
    context: Context, criterion: str, batches: Callable[[], Any], damping: float = 0.01
) -> Elements:
    """(group, scores of its tensors' elements, the roles that count) of the groups the criterion knows something about.

    criterion: one of `criteria.CRITERIA`. batches: gives what Hessians of inputs are gathered on. damping: for `obs`.

    Raises `SecateurError` where no group has what the criterion looks at.
    """
    parameters = dict(context.model.named_parameters(remove_duplicate=False))
    if criterion == "bn-scale":
        scales = {
            f"{path}.weight".lstrip("."): module.weight
            for path, module in context.model.named_modules()
            if "norm" in type(module).__name__.lower() and isinstance(getattr(module, "weight", None), Tensor)
        }
        values = {name: scale.detach().float().abs() for name, scale in scales.items()}
        having = _having(context, criterion, values, ("vector",), "normalisation follows its units")
        return [(group, values, ("vector",)) for group in having]
    names = list(
        dict.fromkeys(
            s.name
            for group in context.groups
            for s in group.slices
            if s.role in WEIGHTS and s.name in parameters
        )
    )
    modules = tuple(f"{path}." for group in context.groups for path in group.modules)
    names += [n for n, p in parameters.items() if n.startswith(modules) and p.dim() > 1 and n not in names]
    if criterion == "fpgm":
        return [
            (
                group,
                {s.name: fpgm(parameters[s.name], s.dim) for s in group.slices if s.name in names},
                ("out",),
            )
            for group in _having(context, criterion, set(names), ("out",), "layer makes its units")
        ]
    if criterion in OF_INPUTS:
        values = of_inputs(context, criterion, names, batches(), damping)
        plain = {name: l2(parameters[name]) for name in names if name not in values}
        return [
            (group, values if any(s.name in values for s in group.slices) else plain, WEIGHTS)
            for group in context.groups
        ]
    values = score(
        criterion,
        context.model,
        names,
        as_batches(context.require_data()) if criterion in OF_LOSS else None,
        context.loss,
        inputs=context.inputs,
        generator=context.generator("probes"),
    )
    having = _having(context, criterion, values, WEIGHTS, "weight leaves with its units")
    return [(group, values, WEIGHTS) for group in having]


def of_inputs(
    context: Context, criterion: str, names: list[str], batches: Any, damping: float
) -> dict[str, Tensor]:
    """`obd` or `obs` by the Hessian of each layer's inputs; tensors that aren't layers have no score."""
    known = every_matrix(context.model)
    matrices = {name: known[name] for name in names if name in known}
    scores: dict[str, Tensor] = {}
    for matrix, stats in hessians(context.model, batches, matrices, progress=context.progress):
        parts = [
            obd(rows, own.hessian)
            if criterion == "obd"
            else obs(rows, inverse_diagonal(own.hessian, damping))
            for rows, own in stats.split(matrix.weight())
        ]
        scores[matrix.name] = matrix.unfold(torch.cat(parts))
    return scores


def _having(context: Context, criterion: str, names: Any, roles: tuple[str, ...], what: str) -> list[Group]:
    groups = [
        group for group in context.groups if any(s.name in names and s.role in roles for s in group.slices)
    ]
    if not groups:
        raise SecateurError(
            f"{criterion} says nothing about {type(context.model).__name__}: no {what}",
            where=context.method.name,
            fix="use another criterion",
        )
    return groups


AGGREGATIONS = ("sum", "mean", "max", "prod", "first")


def slice_scores(scores: Tensor, dim: int, index: Tensor) -> Tensor:
    """[units]: the scores of what one tensor gives each unit, summed. index [units, k] along `dim`.

    >>> slice_scores(torch.ones(4, 3), 0, torch.tensor([[0, 1], [2, 3]]))
    tensor([6., 6.])

    scores: of every weight, or [lines] of every index along `dim`.
    """
    lines = scores if scores.dim() == 1 else scores.sum([d for d in range(scores.dim()) if d != dim])
    return lines[index.to(lines.device)].sum(1)


def aggregate(members: Tensor, how: str) -> Tensor:
    """[members, units] -> [units]: scores of a group's units from those of the tensors in it.

    >>> aggregate(torch.tensor([[1.0, 2.0], [3.0, 5.0]]), "prod")
    tensor([ 3., 10.])
    """
    if how == "max":
        return members.amax(0)
    return members[0] if how == "first" else getattr(members, how)(0)


def smallest_first(model: nn.Module, group: Group) -> Tensor:
    """The numbers of a group's units, smallest first: the mean size of their weights, over inputs that are left, summed
    over the layers that make them. PAGCP, arXiv 2303.11923."""
    total = torch.zeros(group.size, dtype=torch.float64)
    for s in group.slices:
        if s.role == "out":
            size = model.get_parameter(s.name).detach().transpose(0, s.dim).flatten(1).abs().double().cpu()
            alive = (size != 0).any(0).sum().clamp_min(1)
            total += (size.sum(1) / alive)[s.index].mean(1)
    return total.argsort(stable=True)
