"""The tokens of a language model as units: rows of the table that reads them, and of the head that writes them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from secateur.graph.groups import Group

LOOKED_UP = "rows are looked up by index (vocabulary)"
RETURNED = "it is an output of the model"


def join_tokens(model: nn.Module, groups: Sequence[Group]) -> list[Group]:
    """The groups with those of the token table and the head as one, of kind `vocabulary`, that can be cut.

    They were frozen because the ids of the inputs and the columns of the outputs mean their rows; who cuts them puts the
    ids right. Where a row is frozen for any other reason, the group keeps it. A model without a token table has none.
    """
    table = _rows(model, "get_input_embeddings")
    owners = [g for g in groups if any(s.name in table and s.dim == 0 for s in g.slices)]
    if not table or not owners:
        return list(groups)
    size = owners[0].size
    head = _rows(model, "get_output_embeddings")
    owners += [
        g
        for g in groups
        if g not in owners and any(s.name in head and s.dim == 0 for s in g.slices) and g.size == size
    ]
    reasons = [g.reason for g in owners if not (g.reason or "").startswith((LOOKED_UP, RETURNED))]
    slices = tuple(s for g in owners for s in g.slices)
    numbered = all(torch.equal(s.index[:, 0], torch.arange(size)) for s in slices)
    if not numbered or len({g.size for g in owners}) > 1:
        reasons.append("its rows aren't the tokens in their order")
    path = next(s.name for g in owners for s in g.slices if s.name in table).rpartition(".")[0]
    joined = Group(
        name=f"{path}:vocabulary",
        kind="vocabulary",
        size=size,
        slices=slices,
        reason=reasons[0] if reasons else None,
        _classes=np.stack([g._classes for g in owners], axis=1),
    )
    return [joined, *(g for g in groups if g not in owners)]


def _rows(model: nn.Module, getter: str) -> set[str]:
    """All names of the matrix that the model's table or head has a row of for each token."""
    try:
        module = getattr(model, getter)()
    except (AttributeError, NotImplementedError):
        return set()
    weight = getattr(module, "weight", None)
    return {name for name, p in model.named_parameters(remove_duplicate=False) if p is weight}
