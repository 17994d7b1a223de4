"""What a model's loss is without something: whole modules left out, one choice after the other."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.graph.groups import Graph
from secateur.surgery import mask_units, unmask_units
from secateur.utils.inputs import Inputs, map_tensors
from secateur.utils.running import device_of, evaluating
from secateur.utils.types import Objective


@torch.no_grad()
def losses_without(
    model: nn.Module,
    graph: Graph,
    choices: Sequence[Mapping[str, Tensor]],
    batches: Sequence[Inputs],
    loss: Objective,
    progress: Callable[..., Iterable] | None = None,
) -> list[float]:
    """The mean loss over `batches` with only these modules kept, for each choice; infinity where it isn't finite.

    >>> without_each = [{group.name: others(unit)} for unit in range(group.size)]  # doctest: +SKIP
    >>> losses_without(model, graph, without_each, [ids], loss)  # doctest: +SKIP
    [3.21, 2.87, 2.91]

    choices: kept units of groups whose units leave whole (blocks, attentions). The model is left as it was.
    """
    for name in {name for choice in choices for name in choice}:
        assert graph[name].whole, name
    device = device_of(model)
    moved = [map_tensors(batch, lambda tensor: tensor.to(device)) for batch in batches]
    found: list[float] = []
    every: Any = progress(choices, "ablations", len(choices)) if progress else choices
    with evaluating(model):
        for keep in every:
            try:
                mask_units(model, graph, keep)
                value = sum(float(loss(model, batch)) for batch in moved) / len(moved)
            finally:
                unmask_units(model)
            found.append(value if math.isfinite(value) else math.inf)
    return found


def least_missed(
    model: nn.Module,
    graph: Graph,
    left: Mapping[str, Sequence[int]],
    count: int,
    batches: Sequence[Inputs],
    loss: Objective,
    progress: Callable[..., Iterable] | None = None,
) -> dict[str, Tensor]:
    """Kept units of each group once `count` have left, one after the other, each time that without which the loss is lowest.

    >>> least_missed(model, graph, {"model.layers:attentions": range(30)}, 5, [ids], loss)  # doctest: +SKIP

    left: the units that are still there. Of equals the first leaves. Raises `SecateurError` where the loss is finite without none.
    """
    here = [(name, unit) for name, units in left.items() for unit in units]
    rounds: Any = progress(range(count), "least missed", count) if progress else range(count)
    for _ in rounds:
        choices = [_kept(left, [one for one in here if one != tried]) for tried in here]
        found = losses_without(model, graph, choices, batches, loss)
        if min(found) == math.inf:
            raise SecateurError(
                f"the loss isn't finite without any one of the {len(here)} that are left",
                where=", ".join(left),
                fix="give a higher target",
            )
        del here[found.index(min(found))]
    return _kept(left, here)


def _kept(groups: Iterable[str], units: Sequence[tuple[str, int]]) -> dict[str, Tensor]:
    return {g: torch.tensor([unit for name, unit in units if name == g], dtype=torch.int64) for g in groups}
