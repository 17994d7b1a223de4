"""Hessians of many layers' inputs with a bound on memory: few layers at a time, the data once for each few."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from secateur.graph import Graph
from secateur.graph.blocks import Matrix, every_matrix
from secateur.stats.layer import LayerStats
from secateur.stats.record import NotShared, Recorder
from secateur.utils.batches import as_batches
from secateur.utils.inputs import map_tensors
from secateur.utils.running import device_of, evaluating, run

__all__ = ["every_matrix", "hessians", "readers"]


def hessians(
    model: nn.Module,
    batches: Any,
    matrices: Mapping[str, Matrix],
    *,
    memory: float = 1e9,
    progress: Callable[..., Iterable] | None = None,
) -> Iterator[tuple[Matrix, LayerStats]]:
    """(matrix, its statistics with `hessian`) for each of `matrices`, in their order.

    >>> for matrix, stats in hessians(model, images, every_matrix(model)):  # doctest: +SKIP
    ...     stats.hessian

    memory: bytes of Hessians held at once (a single larger one is held all the same); the model runs over the data once
    for every set of layers that fits. A layer that doesn't run has the identity.
    Raises `SecateurError` where inputs are NaN or infinite, or there is no data.
    """
    sets: list[dict[str, Matrix]] = [{}]
    held = 0.0
    for name, matrix in matrices.items():
        cost = 4.0 * matrix.parts * matrix.shape[1] ** 2
        if sets[-1] and held + cost > memory:
            sets.append({})
            held = 0.0
        sets[-1][name] = matrix
        held += cost
    for some in sets if matrices else []:
        recorder = _record(model, as_batches(batches), some, progress)
        for name, matrix in some.items():
            yield matrix, recorder.stats[name]


def _record(
    model: nn.Module, batches: list, matrices: Mapping[str, Matrix], progress: Callable[..., Iterable] | None
) -> Recorder:
    device = device_of(model)
    for share in (True, False):
        recorder = Recorder(model, matrices, frozenset({"hessian"}), share)
        try:
            with torch.no_grad(), evaluating(model), recorder:
                for item in progress(batches, "Hessians", len(batches)) if progress else batches:
                    batch = map_tensors(item, lambda tensor: tensor.to(device))
                    recorder.begin(batch)
                    run(model, batch)
        except NotShared:
            continue
        break
    recorder.check()
    return recorder


def readers(graph: Graph, keep: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters that read units which leave -> bool of their shape, True on what those units fed."""
    gone: dict[str, Tensor] = {}
    for name, units in keep.items():
        group = graph[name]
        leaving = torch.ones(group.size, dtype=torch.bool)
        leaving[units.cpu()] = False
        if not leaving.any():
            continue
        for s in group.slices:
            if s.role == "in":
                mask = gone.setdefault(s.name, torch.zeros(graph.shapes[s.name], dtype=torch.bool))
                mask.index_fill_(s.dim, s.index[leaving].reshape(-1), True)
    return gone
