"""Run a model once and follow every prunable index of every parameter through it.

`trace` runs the model's own forward on the given inputs and watches each operation: high-level ones (linear, matmul,
einsum, attention, recurrent layers) where Python calls them, all others where PyTorch dispatches them. No graph is
exported, so data-dependent code, caches and nested outputs need nothing special.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import nn

from secateur.graph.build import build_graph
from secateur.graph.groups import Graph
from secateur.graph.run import run_model
from secateur.graph.tracer import Tracer


def trace(model: nn.Module, inputs: Any, *, inner: bool = False) -> Graph:
    """The groups of coupled parameter slices of a model.

    >>> graph = trace(model, {"input_ids": torch.zeros(2, 8, dtype=torch.long)})
    >>> print(graph.explain())
    >>> graph["model.layers.0.mlp:neurons"].size
    24

    The model is run once, in evaluation mode and without gradients, and is left as it was. Spec: spa (arXiv
    2403.18955), algorithm A.

    Args:
        model: any module; nothing of it need be exportable.
        inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments of `model.forward`. Use a batch
            of two or more: an axis of size one is never taken for a prunable one, but its merges with other axes are
            ambiguous.
        inner: the units of attention are entries of its heads' width (kind `head_dim`: the same entry of every head, of
            queries and keys with the partner it is rotated with) instead of whole heads. A tensor can be cut along one
            of them.

    Returns:
        The graph; groups that can't be cut are in it with the reason.

    Raises:
        SecateurError: the model cannot be run on the inputs.
    """
    tracer, graph = _traced(model, inputs, frozenset(), inner)
    stuck = collapsed(tracer, graph)
    if stuck:  # grouped convolutions that cannot lose the same channel of every group: let whole groups leave
        _, graph = _traced(model, inputs, stuck, inner)
    return graph


def _traced(model: nn.Module, inputs: Any, whole_groups: frozenset[str], inner: bool) -> tuple[Tracer, Graph]:
    tracer = Tracer(model, whole_groups, inner)
    return tracer, build_graph(tracer, run_model(tracer, inputs))


def collapsed(tracer: Tracer, graph: Graph) -> frozenset[str]:
    """Grouped convolutions whose channels have all become one unit."""
    single = np.zeros(len(graph._open), bool)
    for group in graph.groups:
        if group.reason == "a single unit":
            single[group._classes] = True
    return frozenset(path for path, ids in tracer.notes.grouped.items() if single[graph._class[ids]].any())
