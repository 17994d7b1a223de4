"""A cut that is only tried: masked, measured and undone, without a copy of the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from secateur.graph.groups import Graph
from secateur.surgery.changes import Keep, _tensor
from secateur.surgery.mask import mask_units, unmask_units, zeros


@contextmanager
def trial(model: nn.Module, graph: Graph, keep: Keep) -> Iterator[None]:
    """Inside, the units that `keep` leaves out are masked; afterwards the model is as it was, to the bit.

    >>> with trial(model, graph, {"fc1:neurons": torch.tensor([0, 2])}):  # doctest: +SKIP
    ...     without = loss(model)

    Only the tensors that lose something are kept meanwhile. Not for a model that is masked by other means of
    `mask_units` than zeros (blocks, experts): these would come back too.
    """
    before = {name: _tensor(model, name).detach().clone() for name in zeros(graph, keep)}
    try:
        mask_units(model, graph, keep)
        yield
    finally:
        unmask_units(model)
        with torch.no_grad():
            for name, tensor in before.items():
                _tensor(model, name).copy_(tensor)
