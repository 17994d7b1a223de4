"""What a model's loss is without something: whole modules left out, one choice after the other."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from secateur.graph.groups import Graph
from secateur.surgery import mask_units, unmask_units
from secateur.utils.inputs import Inputs
from secateur.utils.running import evaluating
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
    found: list[float] = []
    every: Any = progress(choices, "ablations", len(choices)) if progress else choices
    with evaluating(model):
        for keep in every:
            try:
                mask_units(model, graph, keep)
                value = sum(float(loss(model, batch)) for batch in batches) / len(batches)
            finally:
                unmask_units(model)
            found.append(value if math.isfinite(value) else math.inf)
    return found
